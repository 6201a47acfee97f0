"""What is published under results/ lies there as small as it can be read again."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from hsa_ultralong.files.strict_json import as_lines

ROOT = Path(__file__).resolve().parents[1]


def tracked(pattern):
    listed = subprocess.run(["git", "ls-files", pattern], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def test_published_lines_are_packed():
    assert not tracked("results/*.jsonl"), "pack them (docs/results.md): xz -9e FILE"
    assert tracked("results/*.jsonl.xz")


def test_published_json_has_no_indentation_within_records():
    names = [name for folder in ("results", "benchmarks/results") for name in tracked(f"{folder}/*.json")]
    # of a disk's blocks a file takes one at least
    texts = {name: text for name in names if len(text := (ROOT / name).read_text(encoding="utf-8")) > 4096}
    broken = [name for name, text in texts.items() if len(text) > 1.05 * len(as_lines(json.loads(text)))]
    assert texts and not broken, f"write them by eval/metadata.py's write_json: {broken}"
