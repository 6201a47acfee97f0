"""A NeedleStudy as the files of docs/results.md: report.json (accuracy form) and records.jsonl (one line a sample)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from statistics import median
from typing import Any

from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.metadata import write_json
from hsa_ultralong.eval.needles import LengthResult, NeedleSample, NeedleStudy
from hsa_ultralong.files.durable import write_whole


def study_records(study: NeedleStudy, model: str) -> list[dict[str, Any]]:
    """Flat accuracy records per length, then one for each reading speed and the peak memory."""
    records: list[dict[str, Any]] = []
    for result in study.results:
        right = sum(sample.correct for sample in result.samples)
        low, high = wilson_interval(right, len(result.samples))
        shared = {"model": model, "length": result.length, "topk": study.topk, "samples": len(result.samples)}
        records.append(
            {
                **shared,
                "task": result.task,
                "depth": None,
                "value": result.accuracy,
                "ci_low": low,
                "ci_high": high,
                "distinct_chunks": result.distinct_chunks,
                **_place(result),
            }
        )
        margins = [sample.margin for sample in result.samples if sample.margin is not None]
        if margins:
            margin = {"metric": "score_margin", "preset": model, "tokens": result.length, "value": median(margins)}
            records.append({**margin, **_place(result)})
        if result.logits_error is not None and result.form:
            error = {"metric": "logits_error", "preset": model, "tokens": result.length, "value": result.logits_error}
            records.append({**error, **_place(result)})
    for result in study.results:
        for weight in result.control_weights:
            records.append({"metric": "control_weight", "preset": model, "tokens": result.length, "value": weight})
        speed = result.length / result.read_seconds
        shared = {"preset": model, "tokens": result.length, "batch": 1, **_place(result)}
        records.append({"metric": "read_tokens_per_s", **shared, "value": speed})
        records.append({"metric": "read_s", **shared, "value": result.read_seconds})
    records.append({"metric": "peak_host_bytes", "preset": model, "value": study.peak_host_bytes})
    return records


def _place(result: LengthResult) -> dict[str, str]:
    """Where and in which form the memory lay, if it was not an ordinary one."""
    found = {"store": result.store if result.store != "device" else "", "form": result.form}
    return {name: value for name, value in found.items() if value}


def sample_record(result: LengthResult, sample: NeedleSample, model: str, topk: int) -> dict[str, Any]:
    """One line of records.jsonl."""
    return {"model": model, "task": result.task, "topk": topk, **dataclasses.asdict(sample)}


def write_study(folder: Path, study: NeedleStudy, model: str, meta: dict[str, Any]) -> None:
    """Write report.json and records.jsonl into `folder`."""
    write_json(folder / "report.json", {"meta": meta, "records": study_records(study, model)})
    lines = [
        json.dumps(sample_record(result, sample, model, study.topk))
        for result in study.results
        for sample in result.samples
    ]
    write_whole(folder / "records.jsonl", "\n".join(lines) + "\n")
