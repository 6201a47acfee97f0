"""A miss is put down to retrieval, fusion or reading, and the right chunk is followed by length."""

from __future__ import annotations

import pytest

from hsa_ultralong.eval.suite_diagnosis import CAUSES, cause, diagnose, diagnoses


@pytest.mark.parametrize("kind", ["reading", "fusion", "retrieval", "not known"])
def test_a_miss_is_put_down_to_the_first_step_that_failed(runs, kind):
    assert cause(runs.record(**runs.missing(kind))) == kind
    assert cause({**runs.record(**runs.missing(kind)), "score": 1.0}) == "right"
    assert kind in CAUSES


def test_recall_at_k_counts_samples_that_retrieved_nothing_right(runs):
    ranks = [1, 1, 2, 5]
    records = [runs.record(index=i, rank=rank) for i, rank in enumerate(ranks)]
    records.append(runs.record(index=4, **runs.missing("retrieval")))
    found = diagnose(records)
    assert found.recall == {1: 0.4, 2: 0.6, 4: 0.6, 8: 0.8}
    assert found.rank == (1.0, 1.5, 2.75)
    assert found.causes == {"right": 4, "retrieval": 1}


def test_every_task_and_length_is_diagnosed_but_absent_facts(runs):
    records = [
        runs.record("a", 4096), runs.record("a", 2048, **runs.missing("fusion")),
        runs.record("b", 2048, **runs.missing("not known")), runs.record("c", score=None),
    ]  # fmt: skip
    found = diagnoses(records)
    assert {task: list(lengths) for task, lengths in found.items()} == {"a": [2048, 4096], "b": [2048]}
    assert found["b"][2048].recall == {} and found["b"][2048].weight is None
