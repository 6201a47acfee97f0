"""Every test: one thread, no network, fixed seeds."""

from __future__ import annotations

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

import typer.testing
from hypothesis import settings

# Every call of CliRunner makes all commands anew, which takes longer than most commands that are refused.
typer.testing._get_command = functools.cache(typer.testing._get_command)

settings.register_profile("tests", deadline=None, derandomize=True, database=None, max_examples=15)
settings.load_profile("tests")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(0)


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
