"""Why answers are missed: the right chunk was not retrieved, got too little weight, or was read wrongly; by length.

Called by suite_plots.py and html_report/; tests/eval/test_suite_diagnosis.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from hsa_ultralong.eval.suite_summary import Records, cells

RIGHT, READING, FUSION, RETRIEVAL, UNKNOWN = "right", "reading", "fusion", "retrieval", "not known"
# in the order in which plots stack them
CAUSES = {
    RIGHT: "answered rightly",
    READING: "missed in reading: a chunk of the evidence had the greatest weight",
    FUSION: "missed in fusion: retrieved, but another chunk had more weight in every head",
    RETRIEVAL: "missed in retrieval: no chunk of the evidence was among the K of any head",
    UNKNOWN: "missed, and what was retrieved is not known",
}


def cause(record: Mapping[str, Any]) -> str:
    """To what the answer of a record is put down; of a task with several facts, by the one that stands best."""
    if record["score"] >= 1:
        return RIGHT
    if record["found"] is None:
        return UNKNOWN
    if not record["found"]:
        return RETRIEVAL
    return READING if record["rank"] == 1 else FUSION


class Spread(NamedTuple):
    """Quartiles of what was measured."""

    low: float
    middle: float
    high: float


class Diagnosis(NamedTuple):
    """One task at one length.

    Attributes:
        samples: with a right answer. causes: how many of each. recall: K -> the share of samples whose evidence stands
            among the first K of the head where it stands best; empty where retrieval is not known.
        rank, weight, margin: of the evidence, where it was retrieved.
    """

    samples: int
    causes: Mapping[str, int]
    recall: Mapping[int, float]
    rank: Spread | None
    weight: Spread | None
    margin: Spread | None

    def recall_at(self, k: int) -> float:
        """Recall at K; beyond the greatest K known nothing more is found."""
        return self.recall[max(known for known in self.recall if known <= k)]


def diagnose(records: Records) -> Diagnosis:
    """Of the samples that have a right answer; all of one task and length."""
    scored = [record for record in records if record["score"] is not None]
    known = [record for record in scored if record["found"] is not None]
    ranks = [record["rank"] for record in known if record["rank"] is not None]
    recall = {k: sum(rank <= k for rank in ranks) / len(known) for k in _ladder(ranks)} if known else {}
    return Diagnosis(
        len(scored), Counter(cause(record) for record in scored), recall,
        *(_spread(record[name] for record in known) for name in ("rank", "weight", "margin")),
    )  # fmt: skip


def _ladder(ranks: Sequence[int]) -> list[int]:
    """1, 2, 4 ... up to the first that covers all ranks."""
    most, found = max(ranks, default=1), [1]
    while found[-1] < most:
        found.append(2 * found[-1])
    return found


def _spread(values: Iterable[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(*np.quantile(known, [0.25, 0.5, 0.75]).tolist()) if known else None


def diagnoses(records: Records) -> dict[str, dict[int, Diagnosis]]:
    """Task -> length -> diagnosis, of all that have right answers; tasks in the order of the records."""
    found: dict[str, dict[int, Diagnosis]] = {}
    for (task, length), here in cells(records).items():
        if any(record["score"] is not None for record in here):
            found.setdefault(task, {})[length] = diagnose(here)
    return {task: dict(sorted(of_length.items())) for task, of_length in found.items()}
