"""Several runs of a suite side by side: what differs in how they were made, and by how much they differ.

Called by `hsa compare` (cli/compare.py); tests/eval/test_suite_compare.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hsa_ultralong.eval.intervals import (
    Difference,
    draws,
    independent_difference,
    middle,
    paired_difference,
)
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.stored_runs import StoredRun
from hsa_ultralong.eval.suite_summary import Records, auroc, scores_of
from hsa_ultralong.eval.tasks import SUITES, score
from hsa_ultralong.eval.tasks.scoring import METRICS

MEAN = "mean of the tasks"
# draws of areas, each of which compares all pairs of samples
_AREAS = 500
# settings that change the samples; all others but the model's own change how it answers them
_OF_SAMPLES = ("seed", "samples", "haystack", "haystack_tokens", "files")


@dataclass(frozen=True)
class Cell:
    """One run on one task and length: the score with its 95% interval, and how far it is from the first run's.

    difference: None for the first run itself, and where there is none, for which `reason` says why.
    """

    value: float
    low: float
    high: float
    samples: int
    difference: Difference | None = None
    reason: str = ""


# (task, metric) -> run -> cell
Table = Mapping[tuple[str, str], Mapping[str, Cell]]


@dataclass(frozen=True)
class Comparison:
    """Runs beside the first of them.

    Attributes:
        notes: every difference in samples, scoring and settings, in sentences. tables: (suite, length) -> its tasks.
    """

    runs: Sequence[StoredRun]
    notes: Sequence[str]
    tables: Mapping[tuple[str, int], Table]

    def records(self) -> list[dict[str, Any]]:
        """Flat records, as compare.json has them."""
        found = []
        for (suite, length), table in self.tables.items():
            for (task, metric), row in table.items():
                for run, cell in row.items():
                    found.append(
                        {"suite": suite, "task": task, "metric": metric, "length": length, "run": run,
                         "samples": cell.samples, "value": cell.value, "ci_low": cell.low, "ci_high": cell.high,
                         "difference": cell.difference._asdict() if cell.difference else None,
                         "not_compared": cell.reason or None}
                    )  # fmt: skip
        return found


def compare_runs(runs: Sequence[StoredRun]) -> Comparison:
    """Every run beside the first, task by task and length by length.

    Raises:
        ValueError: for fewer than two runs, or runs without a score that is a share.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two runs, got {', '.join(run.name for run in runs) or 'none'}")
    named = _with_samples(runs)
    tables: dict[tuple[str, int], dict[tuple[str, str], dict[str, Cell]]] = {}
    for (task, metric), length in _rows(named):
        row = {run.name: cell for run in named if (cell := _cell(named[0], run, task, metric, length)) is not None}
        tables.setdefault((suite_of(task), length), {})[task, metric] = row
    order = {name: number for number, name in enumerate(SUITES)}
    found = dict(sorted(tables.items(), key=lambda item: (order.get(item[0][0], len(order)), item[0][1])))
    if not found:
        raise ValueError(
            f"{', '.join(run.name for run in runs)} have no score that is a share, and so none to compare; "
            "perplexities stand in summary.md of each run"
        )
    for table in found.values():
        if mean := _mean_row(table, [run.name for run in runs]):
            table[MEAN, f"{mean[1]} tasks"] = mean[0]
    return Comparison(runs, _notes(named), found)


def _with_samples(runs: Sequence[StoredRun]) -> list[StoredRun]:
    """Runs whose likelihoods name their samples, which have no checksum.

    An item is the same where all that chooses items is: files by their checksums, seed and number.
    """

    def sample(record: Mapping[str, Any]) -> Mapping[str, Any]:
        is_unnamed = record["setting"] == "likelihood" and "sample" not in record
        return {**record, "sample": f"item at {record.get('start')}"} if is_unnamed else record

    def is_alike(run: StoredRun) -> bool:
        return all(run.settings.get(name) == runs[0].settings.get(name) for name in _OF_SAMPLES)

    return [replace(run, records=[sample(r) for r in run.records]) if is_alike(run) else run for run in runs]


def suite_of(task: str) -> str:
    """The first suite that has the task."""
    return next((name for name, tasks in SUITES.items() if any(one.name == task for one in tasks)), "other tasks")


def _rows(runs: Sequence[StoredRun]) -> list[tuple[tuple[str, str], int]]:
    """All (task, metric) and lengths that any run has, in the order of the runs."""
    return list(dict.fromkeys((key, n) for run in runs for key, row in run.wholes.items() for n in row))


def _records(run: StoredRun, task: str, length: int) -> Records:
    return run.cells.get((task, length), [])


def _cell(first: StoredRun, run: StoredRun, task: str, metric: str, length: int) -> Cell | None:
    whole = run.wholes.get((task, metric), {}).get(length)
    if whole is None:
        return None
    difference, reason = None, ""
    if run is not first:
        theirs = first.wholes
        if (task, metric) in theirs and length in theirs[task, metric]:
            difference = _difference(_records(first, task, length), _records(run, task, length), metric)
        else:
            own = (m for (t, m), row in theirs.items() if t == task and length in row)
            other = next((m for m in own if m != metric and "auroc" not in (m, metric)), None)
            reason = f"{first.name} scores it {other}" if other else f"{first.name} was not asked"
    return Cell(whole["value"], whole["ci_low"], whole["ci_high"], whole["samples"], difference, reason)


def _pairs(first: Records, second: Records) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Records of the same sample, told by its checksum."""
    known = {(r["sample"], r["index"]): r for r in first if "sample" in r}
    return [(known[key], r) for r in second if (key := (r.get("sample"), r["index"])) in known]


def _difference(first: Records, second: Records, metric: str) -> Difference | None:
    if metric == "auroc":
        return _auroc_difference(first, second)
    one, two = ([r for r in records if metric in scores_of(r)] for records in (first, second))
    if pairs := _pairs(one, two):
        return paired_difference([scores_of(a)[metric] for a, _ in pairs], [scores_of(b)[metric] for _, b in pairs])
    return independent_difference([scores_of(r)[metric] for r in one], [scores_of(r)[metric] for r in two])


def _auroc_difference(first: Records, second: Records) -> Difference | None:
    """Of areas; by drawing pairs again where the samples are the same, else both on their own."""
    pairs = _pairs(first, second)
    one, two = ([a for a, _ in pairs], [b for _, b in pairs]) if pairs else (first, second)
    areas = auroc(one), auroc(two)
    if areas[0] is None or areas[1] is None:
        return None

    rng = np.random.default_rng(0)
    mine = draws(len(one), rng, _AREAS)
    theirs = mine if pairs else draws(len(two), rng, _AREAS)
    drawn = [(auroc([one[i] for i in x]), auroc([two[i] for i in y])) for x, y in zip(mine, theirs, strict=True)]
    low, high = middle(b - a for a, b in drawn if a is not None and b is not None)
    method = f"{'pairs' if pairs else 'independent'}, bootstrap"
    return Difference(areas[1] - areas[0], low, high, len(pairs) or None, None, None, None, method)


def _mean_row(table: Table, names: Sequence[str]) -> tuple[dict[str, Cell], int] | None:
    """The mean over the tasks that all runs were asked, each by its own score and counting the same, and their number.

    Intervals follow from those of the tasks (the squares of their distances add: Zou and Donner's method of variance
    estimates recovery), since samples of different tasks are independent.
    """
    own: dict[str, Mapping[str, Cell]] = {}
    for (task, metric), row in table.items():
        has_all = all(name in row and (name == names[0] or row[name].difference is not None) for name in names)
        if metric != "auroc" and has_all:
            own.setdefault(task, row)
    rows = list(own.values())
    if len(rows) < 2:
        return None
    found = {}
    for name in names:
        value, low, high = _mean([(row[name].value, row[name].low, row[name].high) for row in rows])
        differences = [d for row in rows if (d := row[name].difference) is not None]
        difference = None
        if differences:
            mean = _mean([(d.value, d.low, d.high) for d in differences])
            counts = [d.pairs for d in differences]
            pairs = None if None in counts else sum(filter(None, counts))
            difference = Difference(*mean, pairs, None, None, None, "of the tasks' intervals")
        found[name] = Cell(value, max(0.0, low), min(1.0, high), sum(row[name].samples for row in rows), difference)
    return found, len(rows)


def _mean(parts: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean and interval of independent values with intervals."""
    value, low, high = np.array(parts, dtype=float).T
    below, above = (float(np.sqrt((gap**2).sum())) / len(parts) for gap in (value - low, high - value))
    return float(value.mean()), float(value.mean()) - below, float(value.mean()) + above


def _notes(runs: Sequence[StoredRun]) -> list[str]:
    """What is not the same, each in one sentence."""
    first, notes = runs[0], []
    for run in runs[1:]:
        others = [n for n in {**first.settings, **run.settings} if n not in (*_OF_SAMPLES, "weights")]
        for what, names in (("its samples are others", _OF_SAMPLES), ("it answers in another way", others)):
            found = [f"{n} {first.settings.get(n)!r} / {run.settings.get(n)!r}" for n in names
                     if first.settings.get(n) != run.settings.get(n)]  # fmt: skip
            if found:
                notes.append(f"{run.name} beside {first.name}: {what}: {', '.join(found)}.")
        if run.settings.get("weights") == first.settings.get("weights"):
            notes.append(f"{run.name} has the same weights as {first.name}.")
        notes += _sample_notes(first, run)
    for run in runs:
        notes += _score_notes(run)
    return notes


def _sample_notes(first: StoredRun, run: StoredRun) -> list[str]:
    apart: list[str] = []
    partly: list[str] = []
    scored: list[str] = []
    alone: list[str] = []
    for (task, metric), length in _rows([first, run]):
        one, two = _records(first, task, length), _records(run, task, length)
        name = f"{task} at {human_tokens(length)}"
        if not one or not two:
            alone.append(f"{name} ({(first if one else run).name})")
        elif not (shared := _metrics(one) & _metrics(two)):
            scored.append(f"{name} ({one[0]['metric']} / {two[0]['metric']})")
        elif metric in shared and (count := len(_pairs(one, two))) < max(len(one), len(two)):
            (partly if count else apart).append(f"{name} ({count} of {len(one)} and {len(two)})" if count else name)
    sentences = (
        ("no sample is the same, so they are compared as independent ones", apart),
        ("only some samples are the same, and the difference is that of these", partly),
        ("the scoring differs, so they are not compared", scored),
        ("measured by one of the two only", alone),
    )
    who = f"{run.name} beside {first.name}"
    return [f"{who}: {text}: {_listed(dict.fromkeys(found))}." for text, found in sentences if found]


def _metrics(records: Records) -> set[str]:
    return {name for record in records for name in scores_of(record)}


def _score_notes(run: StoredRun) -> list[str]:
    """Scores that this version would not give."""
    other = {
        f"{r['task']} at {human_tokens(r['length'])}"
        for r in run.records
        if r["score"] is not None and r["expected"] and r["metric"] in METRICS
        and abs(score(r["metric"], r["answered"], r["expected"]) - r["score"]) > 1e-9
    }  # fmt: skip
    text = "was scored by another version, which gives other scores for the same answers"
    return [f"{run.name} {text}: {_listed(sorted(other))}."] if other else []


def _listed(names: Any, most: int = 12) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
