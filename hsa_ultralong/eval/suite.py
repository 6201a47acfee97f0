"""Many tasks at many lengths on one model: records as they come, resumable, then tables. tests/eval/test_suite.py.

A folder holds run.json (what is measured), records.jsonl (a line for every sample), summary.json (docs/results.md) and
summary.md. Records of a run that was cut off are kept, and the same run goes on from them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.eval.evidence import passage_records, sample_digest
from hsa_ultralong.eval.haystack import count_distinct
from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
from hsa_ultralong.eval.readers import Reader, Reply
from hsa_ultralong.eval.suite_summary import draw_table, latex, markdown, summary_records
from hsa_ultralong.eval.tasks import Material, Sample, check_tasks, make_samples, score
from hsa_ultralong.eval.tasks.sample import TooShort
from hsa_ultralong.files.regular import FileLock, append_text, parse_json, read_json, read_regular, write_whole

# (task, length, samples done, samples wanted)
Progress = Callable[[str, int, int, int], None]
_VERSION = 1
_RECORD_BYTES = 2**32


class SuiteRun:
    """What a folder holds of one run: settings that all its samples share, and the samples so far."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """
        Args:
            settings: all that a sample's result depends on, JSON values: model, seed, samples, haystack ...

        Raises:
            ValueError: if the folder holds another run, naming what differs.
        """
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        place = folder / "run.json"
        if place.exists():
            self._require_same(read_json(place), place)
        else:
            write_whole(place, json.dumps({"version": _VERSION, "settings": settings}, indent=1) + "\n")
        self.records: list[dict[str, Any]] = self._read()
        self.skipped: dict[tuple[str, int], str] = {}

    def _require_same(self, found: dict[str, Any], place: Path) -> None:
        if found.get("version") != _VERSION or not isinstance(found.get("settings"), dict):
            raise ValueError(f"{place} is no run of this version; give an empty folder")
        old = found["settings"]
        differs = sorted(key for key in {*old, *self.settings} if old.get(key) != self.settings.get(key))
        if differs:
            key = differs[0]
            raise ValueError(
                f"{self.folder} holds another run: {key} was {old.get(key)!r}, now {self.settings.get(key)!r}; "
                "give another folder"
            )

    def _read(self) -> list[dict[str, Any]]:
        """The samples so far; a last line that a kill cut off is taken away."""
        place = self.folder / "records.jsonl"
        if not place.exists():
            return []
        data = read_regular(place, _RECORD_BYTES)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_whole(place, whole)
        return [parse_json(line, place) for line in whole.split(b"\n") if line]

    def done(self, task: str, length: int) -> set[int]:
        """Indices of the samples that are known."""
        return {r["index"] for r in self.records if r["task"] == task and r["length"] == length}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep records, on disk before this returns to the caller."""
        self.records += records
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        append_text(self.folder / "records.jsonl", lines)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """While this runs no second process writes here.

        Raises:
            ValueError: if one does.
        """
        lock = FileLock.acquire(self.folder / "run.lock", f"{self.folder} is being written")
        try:
            yield
        finally:
            lock.release()


def run_suite(
    reader: Reader,
    material: Material,
    run: SuiteRun,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    model: str = "",
    progress: Progress | None = None,
) -> None:
    """Answer all samples that the run does not hold yet; a length too short for a task is noted in `run.skipped`.

    Args:
        tasks: names. samples: of each task and length, at uniform depths. model: name for the records.

    Raises:
        ValueError: what the tasks refuse (unknown names, missing files), before the first sample.
    """
    check_tasks(tasks, material, samples)
    report = progress or (lambda *_: None)
    for length in lengths:
        for task in tasks:
            if reader.limit is not None and length > reader.limit:
                run.skipped[task, length] = f"the model has positions for {reader.limit:,} tokens"
                continue
            done = run.done(task, length)
            report(task, length, len(done), samples)
            wanted = (s for s in _samples(run, task, material, length, samples, seed) if s.index not in done)
            if len(done) >= samples:
                continue
            while batch := list(islice(wanted, reader.batch)):
                found = [
                    _record(sample, reply, model, reader, material)
                    for sample, reply in zip(batch, reader.answer(batch), strict=True)
                ]
                run.add(found)
                done |= {sample.index for sample in batch}
                report(task, length, len(done), samples)


def _samples(
    run: SuiteRun, task: str, material: Material, length: int, samples: int, seed: int
) -> Iterator[Sample]:  # fmt: skip
    made = 0
    try:
        for sample in make_samples(task, material, length, samples, seed):
            yield sample
            made += 1
    except TooShort as error:
        run.skipped[task, length] = f"{error} (after {made} of {samples} samples)" if made else str(error)


def _record(sample: Sample, reply: Reply, model: str, reader: Reader, material: Material) -> dict[str, Any]:
    """One line of records.jsonl; the passages of what was answered rightly have places only."""
    value = score(sample.metric, reply.text, sample.answers) if sample.answers else None
    passages = passage_records(
        sample, reply.retrieved, reader.chunk_size, material.tokenizer, with_text=value is None or value < 1
    )
    return {
        "model": model, "task": sample.task, "length": sample.length, "index": sample.index, "depth": sample.depth,
        "sample": sample_digest(sample), "setting": reader.setting, "metric": sample.metric, "query": sample.query,
        "expected": list(sample.answers), "answered": reply.text, "score": value, "certainty": reply.certainty,
        "found": reply.found, "rank": reply.rank, "weight": reply.weight, "margin": reply.margin, **passages,
    }  # fmt: skip


def distinct_chunks(material: Material, length: int, chunk_size: int) -> int:
    """Different chunks of the haystack of a length."""
    return count_distinct(torch.from_numpy(material.haystack(length, length)[0]), chunk_size)


def run_settings(model: Any, material: Material, *, setting: str, samples: int, seed: int) -> dict[str, Any]:
    """What all samples of a run share: of the model its weights, of the haystack and the files their contents."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r} ".encode())
    return {
        "weights": digest.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "topk": getattr(model.config, "chunk_topk", None),
        "setting": setting,
        "chat": material.chat,
        "samples": samples,
        "seed": seed,
        "haystack": hashlib.sha256(material.text.numpy().tobytes()).hexdigest()[:16],
        "haystack_tokens": len(material.text),
        "files": {name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for name, path in material.files.items()},
    }


def write_summary(run: SuiteRun, model: Any, material: Material, *, seed: int, label: str) -> None:
    """Write summary.json, summary.md, summary.tex and scores.png of all samples so far."""
    lengths, size = sorted({record["length"] for record in run.records}), getattr(model.config, "chunk_size", 64)
    shared = {
        "topk": run.settings["topk"],
        "seed": seed,
        "distinct_chunks": {length: distinct_chunks(material, length, size) for length in lengths},
    }
    found = summary_records(run.records, shared)
    meta = run_metadata(command_line(), seed, dtype=run.settings["dtype"], settings=run.settings)
    skipped = [{"task": task, "length": length, "reason": why} for (task, length), why in run.skipped.items()]
    write_json(run.folder / "summary.json", {"meta": meta, "records": found, "skipped": skipped})
    write_whole(run.folder / "summary.md", markdown(found, run.skipped))
    write_whole(run.folder / "summary.tex", latex(found))
    draw_table(found, run.folder / "scores.png", f"{label}: score in percent, by task and length")
