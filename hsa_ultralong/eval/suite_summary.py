"""The numbers of a suite's run: shares with intervals, AUROC, cells by depth, tables.

Called by suite.py; tests/eval/test_suite.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.files.strict_json import read_json

Records = Sequence[Mapping[str, Any]]
# fields of a record by which a suite's summary is known
_OF_A_SUITE = {"task", "metric", "setting", "length"}


def summary_records(records: Records, shared: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Flat accuracy records: for every task and length the whole, then every tenth of depths that has samples.

    Intervals are Wilson's at 95%; for scores between 0 and 1 they are an upper bound of the width. `recall_absent` is
    an AUROC of the certainty, present facts against absent ones, with a bootstrap interval.

    Args:
        shared: fields that all get: topk, seed ...
    """
    found: list[dict[str, Any]] = []
    for (task, length), here in cells(records).items():
        base = {
            "model": here[0]["model"], "task": task, "length": length, "setting": here[0]["setting"], **shared,
            "distinct_chunks": next((r["distinct_chunks"] for r in here if "distinct_chunks" in r), None),
        }  # fmt: skip
        if task == "recall_absent":
            value = auroc(here)
            if value is not None:
                low, high = auroc_interval(here)
                found.append({**base, "metric": "auroc", "depth": None, "samples": len(here), "value": value,
                              "ci_low": low, "ci_high": high})  # fmt: skip
        scored = [r for r in here if r["score"] is not None]
        for name in dict.fromkeys(name for r in scored for name in scores_of(r)):
            values = [{"score": own[name]} for r in scored if name in (own := scores_of(r))]
            diagnosis = _diagnosis(scored) if name == scored[0]["metric"] else {}
            found.append({**base, "metric": name, "depth": None, **_share(values), **diagnosis})
        if any("nats" in r for r in here):
            found.append({**base, "metric": perplexity_name(here), "depth": None, **_perplexity(here)})
        for tenth in range(10):
            cell = [r for r in scored if r["depth"] is not None and int(min(0.999, r["depth"]) * 10) == tenth]
            if cell:
                found.append({**base, "metric": cell[0]["metric"], "depth": (tenth + 0.5) / 10, **_share(cell)})
    return found


def scores_of(record: Mapping[str, Any]) -> dict[str, float]:
    """Metric -> score of one sample: first the task's own, then those beside it, then the teacher's verdict and whether
    what was generated is right exactly where that is.

    Runs from before a score existed beside the task's own have it from the answers that they kept.
    """
    if record["score"] is None:
        return {}
    metric, beside = record["metric"], dict(record.get("scores") or {})
    if not beside and record["expected"]:
        from hsa_ultralong.eval.tasks.scoring import BESIDE, score  # with torch, which figures do without

        beside = {name: score(name, record["answered"], record["expected"]) for name in BESIDE.get(metric, ())}
    found = {metric: record["score"], **beside}
    generated, verdict = record["score"], record.get("teacher")
    if verdict is not None:
        found["teacher"] = float(verdict)
    elif metric == "teacher" and beside:
        generated, verdict = next(iter(beside.values())), record["score"]
    return found if verdict is None else {**found, "teacher_agrees": float(bool(verdict) == (generated == 1))}


def headlines(summary: Records) -> list[Mapping[str, Any]]:
    """Without the scores that stand beside a task's own; an AUROC stays."""
    own: dict[str, str] = {}
    for record in summary:
        if record["metric"] != "auroc":
            own.setdefault(record["task"], record["metric"])
    return [record for record in summary if record["metric"] in ("auroc", own.get(record["task"]))]


def cells(records: Records) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
    """(task, length) -> its records, in their order."""
    found: dict[tuple[str, int], list[Mapping[str, Any]]] = {}
    for record in records:
        found.setdefault((record["task"], record["length"]), []).append(record)
    return found


def _share(records: Records) -> dict[str, Any]:
    total: float = sum(r["score"] for r in records)
    low, high = wilson_interval(total, len(records))
    return {"samples": len(records), "value": total / len(records), "ci_low": low, "ci_high": high}


def perplexity_name(records: Records) -> str:
    """ "word_perplexity" where words are counted, "perplexity" of tokens otherwise."""
    return "word_perplexity" if records[0]["metric"] == "word_perplexity" else "perplexity"


def _perplexity(records: Records, repeats: int = 1000) -> dict[str, Any]:
    """exp of nats per count, with the 95% interval of drawing records again, with a fixed seed; one has none."""
    nats, count = (np.array([r[name] for r in records], dtype=np.float64) for name in ("nats", "count"))
    if len(records) == 1:
        return {"samples": 1, "value": float(np.exp(nats.sum() / count.sum())), "ci_low": None, "ci_high": None}
    drawn = np.random.default_rng(0).integers(len(nats), size=(repeats, len(nats)))
    values = np.exp(nats[drawn].sum(1) / count[drawn].sum(1))
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return {"samples": len(records), "value": float(np.exp(nats.sum() / count.sum())), "ci_low": low, "ci_high": high}


def is_share(metric: str) -> bool:
    """Whether a metric is a share of samples, shown in percent."""
    return not metric.endswith("perplexity")


def _diagnosis(records: Records) -> dict[str, Any]:
    """Where misses come from: how often a chunk of the evidence was retrieved, and how the best of them stood."""
    known = [r for r in records if r["found"] is not None]
    if not known:
        return {}
    placed = [r for r in known if r["rank"] is not None]
    missed = [r for r in known if r["score"] < 1]
    return {
        "evidence_found": sum(r["found"] for r in known) / len(known),
        "evidence_first": sum(r["rank"] == 1 for r in placed) / len(known),
        "evidence_weight": median(r["weight"] for r in placed) if placed else None,
        "evidence_margin": median(r["margin"] for r in placed) if placed else None,
        "missed_though_found": sum(r["found"] for r in missed) / len(missed) if missed else None,
    }


def auroc(records: Records) -> float | None:
    """Probability that a present fact has a greater certainty than an absent one; None where either is missing."""
    present = np.array([r["certainty"] for r in records if r["score"] is not None and r["certainty"] is not None])
    absent = np.array([r["certainty"] for r in records if r["score"] is None and r["certainty"] is not None])
    if len(present) == 0 or len(absent) == 0:
        return None
    wins = (present[:, None] > absent[None]).mean() + 0.5 * (present[:, None] == absent[None]).mean()
    return float(wins)


def auroc_interval(records: Records, repeats: int = 1000) -> tuple[float, float]:
    """95% interval of `auroc` by drawing samples again, with a fixed seed."""
    rng = np.random.default_rng(0)
    values = []
    for _ in range(repeats):
        value = auroc([records[i] for i in rng.integers(len(records), size=len(records))])
        if value is not None:
            values.append(value)
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def is_suite(summary: Path) -> bool:
    """Whether a summary.json is that of a suite.

    Raises:
        ValueError: it is no JSON object.
    """
    records = read_json(summary).get("records")
    first = records[0] if isinstance(records, list) and records else None
    return isinstance(first, dict) and first.keys() >= _OF_A_SUITE


def wholes(summary: Records) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
    """(task, metric) -> length -> the record over all depths."""
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for record in summary:
        if record["depth"] is None:
            found.setdefault((record["task"], record["metric"]), {})[record["length"]] = record
    return found


def markdown(summary: Records, skipped: Mapping[tuple[str, int], str]) -> str:
    """A table of tasks by length, percent with the 95% interval; what was too short is named below it."""
    lengths = sorted({r["length"] for r in summary} | {length for _, length in skipped})
    lines = ["| task | metric | " + " | ".join(human_tokens(length) for length in lengths) + " |"]
    lines.append("|---|---|" + "---|" * len(lengths))
    for (task, metric), row in wholes(summary).items():
        cells = [_cell(row.get(length)) for length in lengths]
        lines.append(f"| {task} | {metric} | " + " | ".join(cells) + " |")
    notes = [f"- {human_tokens(length)}: {reason}" for (_, length), reason in sorted(skipped.items())]
    text = "\n".join(lines) + "\n\nPercent (perplexities as they are), with 95% intervals.\n"
    return text + ("\nNot measured:\n" + "\n".join(notes) + "\n" if notes else "")


def latex(summary: Records) -> str:
    """The same table as a LaTeX tabular (booktabs)."""
    lengths = sorted({r["length"] for r in summary})
    lines = [r"\begin{tabular}{ll" + "r" * len(lengths) + "}", r"\toprule"]
    lines.append("task & metric & " + " & ".join(human_tokens(length) for length in lengths) + r" \\")
    lines.append(r"\midrule")
    for (task, metric), row in wholes(summary).items():
        factor = 100 if is_share(metric) else 1
        cells = [f"{factor * row[length]['value']:.1f}" if length in row else "--" for length in lengths]
        lines.append(" & ".join([task.replace("_", r"\_"), metric.replace("_", r"\_"), *cells]) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _cell(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    value, low, high = (record[name] for name in ("value", "ci_low", "ci_high"))
    if low is None:
        return f"{value:.2f}"
    if not is_share(record["metric"]):
        return f"{value:.2f} ({low:.2f}-{high:.2f})"
    return f"{100 * value:.0f} ({100 * low:.0f}-{100 * high:.0f})"
