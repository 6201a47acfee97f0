"""What is published under results/ lies there as small as it can be read again."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def tracked(pattern):
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_published_lines_are_packed():
    assert not tracked("results/*.jsonl"), "pack them (docs/results.md): xz -9e FILE"
    assert tracked("results/*.jsonl.xz")
