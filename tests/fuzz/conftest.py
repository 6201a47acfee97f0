"""The tiny checkpoint of tests/cli, loaded once for all commands."""

import pytest

from hsa_ultralong.cli import common
from tests.cli.conftest import checkpoint  # noqa: F401


@pytest.fixture
def one_model(checkpoint, monkeypatch):  # noqa: F811
    """Commands get one model instead of loading it again: fuzzing is of what they read beside it."""
    loaded = common.load_model(checkpoint, "cpu", "fp32")
    monkeypatch.setattr(common, "load_model", lambda *arguments, **options: loaded)
    return loaded
