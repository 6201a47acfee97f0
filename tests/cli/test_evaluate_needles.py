"""`hsa eval needles` killed at any moment and run again."""

from __future__ import annotations

import json
import multiprocessing
import time

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.testing.processes import HANG_SECONDS


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kills", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_killed_command_loses_no_answer_and_asks_nothing_twice(checkpoint, tmp_path, monkeypatch, kills):
    study = (
        "--lengths",
        "1K",
        "--needles",
        "3" if kills == 1 else "6",
        "--forms",
        "own,int8",
        "--device",
        "cpu",
        "--dtype",
        "fp32",
        "--model",
        str(checkpoint),
    )
    # transformers loads in threads, of which torch knows none in a forked process
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    context = multiprocessing.get_context("fork")
    words = ["eval", "needles", *study, "-o"]
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    for _ in range(kills):
        kept = len(lines(cut))
        child = context.Process(target=lambda: CliRunner().invoke(app, [*words, str(cut)]))
        child.start()
        end = time.monotonic() + HANG_SECONDS
        while len(lines(cut)) < kept + 2 and child.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        child.kill()
        child.join()
        assert len(lines(cut)) >= kept + 2
    before = lines(cut)
    for folder in (cut, whole):
        result = CliRunner().invoke(app, [*words, str(folder)])
        assert result.exit_code == 0, result.output
    assert lines(cut)[: len(before)] == before
    assert [key(line) for line in lines(cut)] == [key(line) for line in lines(whole)]
    summaries = [json.loads((folder / "summary.json").read_text())["records"] for folder in (cut, whole)]
    scores = [[(r["task"], r["length"], r["value"]) for r in summary if "task" in r] for summary in summaries]
    assert scores[0] == scores[1] and len(scores[0]) == 2


def lines(folder):
    """Whole lines so far."""
    place = folder / "records.jsonl"
    return place.read_text().split("\n")[:-1] if place.exists() else []


def key(line):
    record = json.loads(line)
    return tuple(record[name] for name in ("length", "form", "index", "answered", "correct", "found"))
