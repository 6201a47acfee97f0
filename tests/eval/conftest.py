"""Runs of a suite, made up: what reports and comparisons read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hsa_ultralong.eval.stored_runs import StoredRun

SETTINGS = {
    "weights": "abc", "dtype": "float32", "topk": 4, "setting": "memory", "chat": False, "samples": 8, "seed": 0,
    "haystack": "h", "haystack_tokens": 9, "files": {},
}  # fmt: skip


def record(task="recall_form_01", length=2048, index=0, *, score=1.0, **more):
    """One line of records.jsonl; the right chunk stands first unless `rank` says otherwise."""
    place = {"document": 0, "start": 64, "stop": 128, "text": "The code is 1234567."}
    made = {
        "model": "m", "task": task, "length": length, "index": index, "depth": (index + 0.5) / 8 % 1,
        "sample": f"{task}-{length}-{index}", "setting": "memory", "metric": "exact", "query": f"What is it, {index}?",
        "expected": ["1234567"], "answered": "1234567" if score == 1 else "7654321", "score": score, "certainty": 0.5,
        "found": True, "rank": 1, "weight": 0.4, "margin": 1.0,
        "retrieved": [{**place, "weight": 0.4, "is_evidence": True}], "evidence": [place],
    }  # fmt: skip
    return {**made, **more}


def missing(kind: str) -> dict:
    """Fields of a miss that is put down to reading, fusion, retrieval or nothing known."""
    return {
        "reading": {"score": 0.0},
        "fusion": {"score": 0.0, "rank": 3, "weight": 0.1, "margin": -0.5},
        "retrieval": {"score": 0.0, "found": False, "rank": None, "weight": None, "margin": None},
        "not known": {"score": 0.0, "found": None, "rank": None, "weight": None, "margin": None, "retrieved": None,
                      "certainty": None},
    }[kind]  # fmt: skip


def write(folder: Path, records: list[dict], settings: dict = SETTINGS, summary: dict | None = None) -> Path:
    """A folder as `hsa eval` leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"version": 1, "settings": settings}), encoding="utf-8")
    lines = "".join(json.dumps(one) + "\n" for one in records)
    (folder / "records.jsonl").write_text(lines, encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


class Runs:
    record, missing, write, settings = staticmethod(record), staticmethod(missing), staticmethod(write), SETTINGS

    @staticmethod
    def stored(records: list[dict], name: str = "nano", **more) -> StoredRun:
        return StoredRun(name, SETTINGS, records, **more)


@pytest.fixture
def runs() -> Runs:
    return Runs()
