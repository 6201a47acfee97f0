"""Every test: one thread, no network, fixed seeds."""

from __future__ import annotations

import gc
import os
import shlex

# before transformers is imported anywhere
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
import torch

# before any kernel is defined: without a GPU the Triton kernels run under the interpreter
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import functools
from unittest.mock import patch

import typer.testing
from hypothesis import settings

# Every call of CliRunner makes all commands anew, which takes longer than most commands that are refused.
typer.testing._get_command = functools.cache(typer.testing._get_command)

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=15)
settings.load_profile("tests")
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    # what has been imported stays: a third of a second for every full collection that looks at it again
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def unpainted():
    """A context in which figures are made and not painted, which takes longer than most of what is tested: where they
    would be lies a pixel."""
    import matplotlib.figure
    from PIL import Image

    def pixel(figure, target, *, format, **_):
        if format == "png":
            Image.new("RGB", (1, 1)).save(target, "png")
        else:
            target.write(b"<svg/>")

    return lambda: patch.object(matplotlib.figure.Figure, "savefig", pixel)


@pytest.fixture
def undrawn(unpainted):
    """No figure of a test is painted."""
    with unpainted():
        yield


@pytest.fixture(scope="session")
def parse_command():
    """A function that refuses a line `hsa ...` whose command, options or values do not exist."""
    import typer

    from hsa_ultralong.cli.main import app

    root = typer.main.get_command(app)

    def parse(line):
        words, command = shlex.split(line), root
        assert words.pop(0) == "hsa", line
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        # `hsa eval` without a command is `hsa eval suite`
        command = getattr(command, "commands", {}).get("suite", command)
        assert not getattr(command, "commands", {}), f"no such command: {line}"
        command.make_context("hsa", words)

    return parse
