"""Figures of a run: written whole in both forms, and left out where there is nothing to show."""

from __future__ import annotations

import pytest

from hsa_ultralong.eval.suite_plots import draw_all
from hsa_ultralong.eval.suite_summary import summary_records


def drawn(folder, records):
    names = draw_all(records, summary_records(records, {}), folder, "nano")
    assert {path.name for path in folder.iterdir()} == {f"{name}.{kind}" for name in names for kind in ("png", "svg")}
    return names


def test_scores_depths_and_diagnosis_are_drawn_in_both_forms(tmp_path, runs):
    kinds = ["reading", "fusion", "retrieval", "not known"]
    records = [
        runs.record(task, length, i, **(runs.missing(kinds[i % 4]) if i % 3 else {}))
        for task in ("a", "b", "c") for length in (2048, 4096) for i in range(8)
    ]  # fmt: skip
    assert drawn(tmp_path, records) == ["scores", "depths", "diagnosis"]
    assert all(path.stat().st_size > 5000 for path in tmp_path.iterdir())
    text = (tmp_path / "diagnosis.svg").read_text(encoding="utf-8")
    assert "right chunk among the first K" in text or "<use" in text


def test_facts_of_no_single_depth_make_no_map(tmp_path, runs):
    assert drawn(tmp_path, [runs.record(depth=None)]) == ["scores", "diagnosis"]


@pytest.mark.parametrize("kind", ["retrieval", "not known"])
def test_tasks_whose_right_chunk_was_never_seen_are_drawn(tmp_path, runs, kind):
    assert "diagnosis" in drawn(tmp_path, [runs.record(index=i, **runs.missing(kind)) for i in range(3)])


def test_absent_facts_alone_have_no_diagnosis(tmp_path, runs):
    records = [runs.record("recall_absent", index=i, score=None if i % 2 else 1.0, certainty=0.5) for i in range(4)]
    only_absent = [r for r in records if r["score"] is None]
    assert "diagnosis" in drawn(tmp_path, records)
    (tmp_path / "absent").mkdir()
    assert drawn(tmp_path / "absent", only_absent) == []
