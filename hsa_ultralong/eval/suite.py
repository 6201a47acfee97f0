"""Many tasks at many lengths on one model: records as they come, resumable, then tables. tests/eval/test_suite.py.

A folder holds what recorded_run.py says, summary.json (docs/results.md), tables, figures and report.html.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_ultralong.eval.answers import FORCED, Reply
from hsa_ultralong.eval.evidence import passage_records, sample_digest
from hsa_ultralong.eval.haystack import count_distinct
from hsa_ultralong.eval.html_report import write_page
from hsa_ultralong.eval.metadata import command_line, run_metadata, write_json
from hsa_ultralong.eval.readers import Reader
from hsa_ultralong.eval.recorded_run import RecordedRun, model_settings, tokens_digest
from hsa_ultralong.eval.stored_runs import FIELDS, StoredRun
from hsa_ultralong.eval.suite_plots import draw_all
from hsa_ultralong.eval.suite_summary import is_share, latex, markdown, summary_records
from hsa_ultralong.eval.tasks import TASKS, Material, Sample, check_tasks, make_samples, score
from hsa_ultralong.eval.tasks.sample import Tokens, TooShort
from hsa_ultralong.files.durable import write_whole

# (task, length, samples done, samples wanted)
SuiteProgress = Callable[[str, int, int, int], None]


class SuiteRun(RecordedRun):
    """The run of a suite."""

    FIELDS = FIELDS

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        super().__init__(folder, settings)
        self.skipped: dict[tuple[str, int], str] = {}

    def of(self, task: str, length: int) -> list[dict[str, Any]]:
        """The records of a task and length."""
        return [r for r in self.records if r["task"] == task and r["length"] == length]

    def done(self, task: str, length: int) -> set[int]:
        """Indices of the samples that are known."""
        return {record["index"] for record in self.of(task, length)}


class FollowedRun(SuiteRun):
    """A run as the processes beside the first one know it: in memory, on disk at the first."""

    def __init__(self, records: Sequence[dict[str, Any]]) -> None:
        self.records, self.skipped = list(records), {}

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        self.records += records

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class SampleRanks:
    """Processes that share the samples out; `everywhere` gives what each of them found, by rank, to all."""

    rank: int = 0
    world: int = 1
    everywhere: Callable[[Callable[[], list[dict[str, Any]]]], list[list[dict[str, Any]]]] = lambda work: [work()]


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
    scoring: str = "auto",
    progress: SuiteProgress | None = None,
    ranks: SampleRanks | None = None,
) -> None:
    """Answer all samples that the run does not hold yet; a length too short for a task is noted in `run.skipped`.

    Args:
        tasks: names. samples: of each task and length, at uniform depths. model: name for the records. scoring:
            "generate", "teacher" (is every token of the one right answer the likeliest, given those before it?),
            "both", or "auto": both for tasks whose score is the teacher's verdict (the authors'), else generate.
        ranks: processes that call this together. In every round each answers its share, and the first one's run keeps
            all of them in the order that one process would give them; the others have a `FollowedRun`.

    Raises:
        ValueError: what the tasks refuse (unknown names, missing files), before the first sample.
    """
    check_tasks(tasks, material, samples)
    report, ranks = progress or (lambda *_: None), ranks or SampleRanks()
    for length in lengths:
        for task in tasks:
            if reader.limit is not None and length > reader.limit:
                run.skipped[task, length] = f"the model has positions for {reader.limit:,} tokens"
                continue
            if scoring == "teacher" and (TASKS[task].metric not in FORCED or task.endswith("_absent")):
                run.skipped[task, length] = f"{task} has no single answer to force; it needs --scoring generate"
                continue
            done = run.done(task, length)
            report(task, length, len(done), samples)
            wanted = (s for s in _samples(run, task, material, length, samples, seed) if s.index not in done)
            if len(done) >= samples:
                continue
            while batch := list(islice(wanted, reader.batch * ranks.world)):
                own = batch[ranks.rank :: ranks.world]
                parts = ranks.everywhere(lambda own=own: _answer(own, model, reader, material, scoring))  # type: ignore[misc]
                run.add(sorted((record for part in parts for record in part), key=lambda record: record["index"]))
                done |= {sample.index for sample in batch}
                del batch, own  # before the next ones are made: contexts are long
                report(task, length, len(done), samples)
            if scoring == "teacher" and not any(r["score"] is not None for r in run.of(task, length)):
                run.skipped.setdefault((task, length), f"no sample of {task} has a single answer to force")


def _replies(reader: Reader, samples: Sequence[Sample], scoring: str) -> list[Reply]:
    """Answers, with the teacher's verdict where it is wanted and the sample has one answer."""
    if scoring == "generate" or (scoring == "auto" and all(sample.forced is None for sample in samples)):
        return reader.answer(samples)
    forced = reader.forced(samples)
    if scoring == "teacher":
        return [Reply(None, [], teacher=verdict) for verdict in forced]
    return [replace(reply, teacher=v) for reply, v in zip(reader.answer(samples), forced, strict=True)]


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


def _answer(
    samples: Sequence[Sample], model: str, reader: Reader, material: Material, scoring: str
) -> list[dict[str, Any]]:
    if not samples:
        return []
    # checksums of long contexts beside the answers
    with ThreadPoolExecutor() as pool:
        digests = pool.map(sample_digest, samples)
        replies = _replies(reader, samples, scoring)
        rows = list(zip(samples, replies, digests, strict=True))
    return [_record(sample, reply, digest, model, reader, material) for sample, reply, digest in rows]


def _record(
    sample: Sample, reply: Reply, digest: str, model: str, reader: Reader, material: Material
) -> dict[str, Any]:
    """One line of records.jsonl; the passages of what was answered rightly have places only.

    Where the teacher's verdict is the score, the first of `scores` is the task's own metric of what was generated.
    """
    metric, teacher, scores = sample.metric, reply.teacher, {}
    if reply.text is not None and sample.answers:
        scores = {name: _score(sample, name, reply.text) for name in (metric, *sample.also)}
    if reply.text is None or (sample.forced is not None and teacher is not None):
        metric, value, teacher = "teacher", None if teacher is None else float(teacher), None
    else:
        value = scores.pop(metric, None)
    device = getattr(getattr(reader, "model", None), "device", "cpu")
    passages = passage_records(
        sample, reply.retrieved, reader.chunk_size, material.tokenizer, with_text=value is None or value < 1
    )
    return {
        "model": model, "task": sample.task, "length": sample.length, "index": sample.index, "depth": sample.depth,
        "sample": digest, "setting": reader.setting, "metric": metric, "query": sample.query,
        "expected": list(sample.answers), "answered": reply.text or "", "score": value, "scores": scores,
        "teacher": teacher, "certainty": reply.certainty, "found": reply.found, "rank": reply.rank,
        "weight": reply.weight, "margin": reply.margin, **passages,
        # the contexts of a task are alike, so the first one says how much it repeats
        **({"distinct_chunks": distinct_chunks(sample, reader.chunk_size, device)} if sample.index == 0 else {}),
    }  # fmt: skip


def _score(sample: Sample, metric: str, text: str) -> float:
    return score(metric, text, sample.answers, sample.query)


def distinct_chunks(sample: Sample, chunk_size: int, device: torch.device | str = "cpu") -> int:
    """Different chunks among those of the context and of the notes, counted on a device."""
    whole: list[Tokens] = []
    for text in (sample.context, *sample.notes):
        # each ends in a chunk of its own
        whole += [np.asarray(text, dtype=np.int32), np.full(-len(text) % chunk_size, -1, dtype=np.int32)]
    return count_distinct(torch.from_numpy(np.concatenate(whole)), chunk_size, device)


def run_settings(
    model: Any, material: Material, reader: Reader | None, *, samples: int, seed: int, scoring: str = "auto"
) -> dict[str, Any]:
    """What all samples of a run share: of the model its weights, of the haystack and the files their contents. Without
    a reader likelihoods alone are measured."""
    chosen = {name: value for name in ("reread", "passage_tokens") if (value := getattr(reader, name, None))}
    return {
        **model_settings(model),
        "setting": "likelihood" if reader is None else reader.setting,
        # runs of before these choices existed read nothing again, had five passages and generated
        **chosen,
        **({} if scoring == "generate" else {"scoring": scoring}),
        "chat": material.chat,
        **({"answer_tokens": material.answer_tokens} if material.answer_tokens else {}),
        "samples": samples,
        "seed": seed,
        "haystack": tokens_digest(material.text),
        "haystack_tokens": len(material.text),
        "files": {name: _digest(path) for name, path in material.files.items()},
    }


def _digest(path: Path) -> str:
    """Of a file, or of the files below a folder."""
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            found.update(file.relative_to(path).as_posix().encode() + file.read_bytes())
    return found.hexdigest()[:16]


def write_summary(run: SuiteRun, *, seed: int, label: str) -> None:
    """Write summary.json, summary.md, summary.tex, records.jsonl.xz, figures and report.html of all samples so far."""
    found = summary_records(run.records, {"topk": run.settings["topk"], "seed": seed})
    meta = run_metadata(command_line(), seed, dtype=run.settings["dtype"], settings=run.settings)
    skipped = [{"task": task, "length": length, "reason": why} for (task, length), why in run.skipped.items()]
    write_json(run.folder / "summary.json", {"meta": meta, "records": found, "skipped": skipped})
    write_whole(run.folder / "summary.md", markdown(found, run.skipped))
    write_whole(run.folder / "summary.tex", latex(found))
    run.pack()
    scored = [record for record in run.records if "nats" not in record or record["score"] is not None]
    if scored:  # figures and the page show shares, not perplexities
        draw_all(scored, [record for record in found if is_share(record["metric"])], run.folder, label)
        write_page([StoredRun(label, run.settings, scored, meta, run.skipped)], run.folder / "report.html")
