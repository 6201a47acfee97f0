"""The suites `short` and `ppl` of `hsa eval`: what a model thinks of given texts, nothing generated.

Records go into the same run as those of the other suites. tests/eval/test_likelihood.py, test_short_tasks.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.eval.likelihood import row_losses, tail_losses
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.short_tasks import SHORT, ShortTask, score_items
from hsa_ultralong.eval.suite import SampleRanks, SuiteProgress, SuiteRun
from hsa_ultralong.models import HSAForCausalLM

# tokens whose losses count, at the end of a context of each length
TAILS = {"ppl_last_512": 512, "ppl_last_4096": 4096}
# places at which the parts of a row begin whose losses are kept apart
_FIRST_PART = 1024
LIKELIHOOD_SUITES: dict[str, tuple[str, ...]] = {
    "short": tuple(task.name for task in SHORT),
    "ppl": (*TAILS, "ppl_position"),
}
LIKELIHOOD_TASKS = tuple(name for names in LIKELIHOOD_SUITES.values() for name in names)
_ITEMS_AT_ONCE = 64


def check_likelihood(names: Sequence[str], folder: Path | None, samples: int) -> None:
    """Refuse what is missing before any work.

    Raises:
        ValueError: without the folder of the short tasks, or a file of one in it.
    """
    short = [task for task in SHORT if task.name in names]
    if short and folder is None:
        raise ValueError(f"{short[0].name} needs the files of the short tasks: give --data short=FOLDER")
    for task in short:
        assert folder is not None
        task.items(folder, samples)


def run_likelihood(
    model: Any,
    tokenizer: Any,
    text: torch.Tensor,
    run: SuiteRun,
    *,
    tasks: Sequence[str],
    lengths: Sequence[int],
    samples: int,
    label: str,
    folder: Path | None = None,
    progress: SuiteProgress | None = None,
    ranks: SampleRanks | None = None,
) -> None:
    """Score what the run does not hold yet: the first items of short tasks (length 0 in records), and stretches of the
    text (n,) of each length, evenly spaced, none of which shares a token with another; what the text or the model has
    no room for is noted in `run.skipped`. ranks: processes that call this together, as `run_suite` has them.

    Raises:
        ValueError: where the run holds other stretches.
    """
    ranks = ranks or SampleRanks()
    limit = None if isinstance(model, HSAForCausalLM) else getattr(model.config, "max_position_embeddings", None)
    report = progress or (lambda *_: None)
    for task in SHORT:
        if task.name in tasks:
            assert folder is not None
            items = task.items(folder, samples)
            score = partial(_score_items, task, items, model, tokenizer, limit)
            _note(run, label, task.name, 0, task.metric, len(items), report, _ITEMS_AT_ONCE, score, ranks)
    for length in lengths:
        for name in (*TAILS, "ppl_position"):
            if name not in tasks:
                continue
            wrong = _misfit(name, length, len(text), limit)
            if wrong:
                run.skipped[name, length] = wrong
                continue
            starts = _starts(len(text), length, samples)
            if len(starts) < samples:
                run.skipped[name, length] = (
                    f"{name}: the text holds {len(starts)} stretches that share nothing, of {samples} samples"
                )
            _check_starts(run, name, length, starts)
            if name in TAILS:
                tails = partial(_tails, model, text, starts, length, TAILS[name])
                _note(run, label, name, length, "perplexity", len(starts), report, 1, tails, ranks)
            else:
                _note_positions(run, label, length, starts, text, model, report, ranks)


def _score_items(
    task: ShortTask, items: Sequence[Any], model: Any, tokenizer: Any, limit: int | None, part: Sequence[int]
) -> list[dict[str, Any]]:
    return score_items(task, [items[i] for i in part], model, tokenizer, limit=limit)


def _tails(
    model: Any, text: torch.Tensor, starts: Sequence[int], length: int, count: int, part: Sequence[int]
) -> list[dict[str, Any]]:
    return [
        {"start": starts[i], **_sums(tail_losses(model, text[starts[i] : starts[i] + length], count))} for i in part
    ]


def check_lengths(names: Sequence[str], lengths: Sequence[int], tokens: int) -> None:
    """Refuse perplexities of lengths of which a text of so many tokens has none: it is never recombined for them.

    Raises:
        ValueError: naming the task and the text.
    """
    for name in (*TAILS, "ppl_position"):
        if name in names and min(lengths) > tokens:
            raise ValueError(
                f"{name} reads the text as it stands, and it has {tokens:,} tokens of {min(lengths):,}; leave the task "
                "out, or give a shorter length or more text"
            )


def _misfit(name: str, length: int, tokens: int, limit: int | None) -> str | None:
    """Why a length cannot be measured."""
    if limit is not None and length > limit:
        return f"the model has positions for {limit:,} tokens"
    if length > tokens:
        return f"{name}: the text has {tokens:,} tokens of {length:,}; give more of it by --text"
    if length <= TAILS.get(name, 1):
        return f"{name} needs more than {TAILS.get(name, 1):,} tokens, got {length:,}"
    return None


def _starts(tokens: int, length: int, samples: int) -> list[int]:
    """Where stretches of a length begin, evenly spaced over the text; no more than lie in it side by side."""
    number = min(samples, tokens // length)
    return [i * (tokens - length) // max(1, number - 1) for i in range(number)]


def _check_starts(run: SuiteRun, name: str, length: int, starts: Sequence[int]) -> None:
    """Refuse to go on with stretches that begin elsewhere, as those of versions before did."""
    for record in run.records:
        is_own = record["task"].startswith(name) and record["length"] == length
        if is_own and record.get("start") not in starts[record["index"] : record["index"] + 1]:
            raise ValueError(f"the run holds other stretches of {name} at {length:,}; give another folder")


def _sums(losses: torch.Tensor) -> dict[str, Any]:
    return {"score": None, "nats": float(losses.double().sum()), "count": len(losses)}


def _note(
    run: SuiteRun, label: str, task: str, length: int, metric: str, number: int, report: SuiteProgress, step: int,
    fields: Callable[[list[int]], list[dict[str, Any]]], ranks: SampleRanks,
) -> None:  # fmt: skip
    """Add the records of a task that are missing, some at once, shared out over the processes."""
    done = run.done(task, length)
    missing = [i for i in range(number) if i not in done]
    report(task, length, len(done), number)

    def work(own: list[int]) -> list[dict[str, Any]]:
        found = fields(own) if own else []
        return [_record(label, task, length, metric, i, one) for i, one in zip(own, found, strict=True)]

    for start in range(0, len(missing), step * ranks.world):
        part = missing[start : start + step * ranks.world]
        run.add(_gathered(ranks, part, work))
        report(task, length, len(done) + start + len(part), number)


def _gathered(
    ranks: SampleRanks, part: Sequence[int], work: Callable[[list[int]], list[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """The records of some samples, each made by one process, in order at all of them."""
    parts = ranks.everywhere(lambda: work([*part[ranks.rank :: ranks.world]]))
    return sorted((record for part in parts for record in part), key=lambda record: record["index"])


def _record(label: str, task: str, length: int, metric: str, index: int, fields: dict[str, Any]) -> dict[str, Any]:
    nothing = dict.fromkeys(("depth", "certainty", "found", "rank", "weight", "margin"))
    empty: dict[str, Any] = {"query": "", "expected": [], "answered": ""}
    return {"model": label, "task": task, "length": length, "index": index, "setting": "likelihood", "metric": metric,
            **empty, **nothing, **fields}  # fmt: skip


def _note_positions(
    run: SuiteRun, label: str, length: int, starts: Sequence[int], text: torch.Tensor, model: Any,
    report: SuiteProgress, ranks: SampleRanks,
) -> None:  # fmt: skip
    """A task for each part of a row: its first 1,024 tokens, the next 1,024, the next 2,048 and so on."""
    last = _part_name(*list(_parts(length))[-1])
    done = run.done(last, length)

    def work(own: list[int]) -> list[dict[str, Any]]:
        found = []
        for index in own:
            losses = torch.cat(list(row_losses(model, text[starts[index] : starts[index] + length])))
            # losses begin with the second token
            found += [
                _record(label, _part_name(first, stop), length, "perplexity", index,
                        {"start": starts[index], **_sums(losses[max(0, first - 1) : stop - 1])})
                for first, stop in _parts(length)
            ]  # fmt: skip
        return found

    missing = [index for index in range(len(starts)) if index not in done]
    for first in range(0, len(missing), ranks.world):
        part = missing[first : first + ranks.world]
        run.add(_gathered(ranks, part, work))
        report("ppl_position", length, len(done) + first + len(part), len(starts))


def _parts(length: int) -> Iterator[tuple[int, int]]:
    first, stop = 0, _FIRST_PART
    while first < length:
        yield first, min(stop, length)
        first, stop = stop, 2 * stop


def _part_name(first: int, stop: int) -> str:
    return f"ppl_position_{human_tokens(first) if first else 0}"
