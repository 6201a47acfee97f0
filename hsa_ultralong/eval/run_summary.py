"""A training run as a results file (docs/results.md): speed, memory, loss and needles of every stage, from its log.

`hsa train` writes it into the run folder as summary.json; tests/eval/test_run_summary.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median
from typing import Any

# of the last log lines of a stage, whose mean is its loss
_LAST = 5
_MEDIANS = ("tokens_per_s", "mfu")


def run_summary(
    log: Sequence[Mapping[str, Any]], config: Mapping[str, Any], meta: dict[str, Any], *, gpus: int = 1
) -> dict[str, Any]:
    """`{"meta", "records"}` of a run.

    Args:
        log: lines of log.jsonl. config: config.json of the run, whose synthetic shares go into the meta.
        meta: of eval.metadata.run_metadata. gpus: number of processes.

    Returns:
        For every stage with steps: tokens_per_s and mfu (medians over log lines), peak_bytes (largest), loss (mean of
        the last five lines), expert_imbalance (last), needle_accuracy of its last probe of every length,
        and family_accuracy of the families that were probed.
    """
    contexts = {stage["name"]: stage["seq_len"] for stage in config["stages"]}
    steps = [line for line in log if "loss" in line]
    probes = [line for line in log if "probe" in line]
    records: list[dict[str, Any]] = []
    for name in dict.fromkeys(line["stage"] for line in steps):
        lines = [line for line in steps if line["stage"] == name]
        shared = {
            "preset": config["preset"],
            "attention": config.get("twin") or "hsa",
            "stage": name,
            "gpus": gpus,
            "step": lines[-1]["step"],
        }
        # the first line holds compilation
        later = lines[1:] or lines
        values = {key: median(line[key] for line in later) for key in _MEDIANS if all(key in line for line in later)}
        if peaks := [line["peak_gib"] for line in lines if "peak_gib" in line]:
            values["peak_bytes"] = max(peaks) * 2**30
        values["loss"] = fmean(line["loss"] for line in lines[-_LAST:])
        if "expert_imbalance" in lines[-1]:
            values["expert_imbalance"] = lines[-1]["expert_imbalance"]
        records += [
            {"metric": key, **shared, "context": contexts.get(name), "value": value} for key, value in values.items()
        ]
        last = {line["probe"]["length"]: line["probe"] for line in probes if line["stage"] == name}
        records += [
            {"metric": "needle_accuracy", **shared, "context": length, "value": probe["needle_accuracy"]}
            for length, probe in sorted(last.items())
        ]
        records += [
            {"metric": "family_accuracy", **shared, "family": key[len("family/") :], "context": length, "value": value}
            for length, probe in sorted(last.items())
            for key, value in probe.items()
            if key.startswith("family/")
        ]
    times = [line["time"] for line in log if "time" in line]
    kept = {key: config[key] for key in ("optimizer", "synthetic_share") if key in config}
    if times:
        kept["logged_seconds"] = round(max(times) - min(times), 1)
    return {"meta": {**meta, **kept}, "records": records}
