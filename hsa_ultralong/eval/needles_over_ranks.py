"""Needles in a text that several processes memorise, a part each: one memory of all parts, asked by all together.

Every process has its own part of the text and of the memory; sentences are written into the part that they lie in, by
an exact edit there, and every process retrieves over all. Called by `hsa eval needles` under torchrun;
tests/eval/test_needles_over_ranks.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from hsa_ultralong.data.needles import Needle
from hsa_ultralong.eval.haystack import chunk_hashes
from hsa_ultralong.eval.metadata import peak_host_bytes
from hsa_ultralong.eval.needles import (
    Hidden,
    Keep,
    LengthResult,
    NeedleProgress,
    NeedleStudy,
    Place,
    places_in,
    task_of,
    worded,
)
from hsa_ultralong.inference import edit, memorize_together
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.stored_memory import SharedMemory
from hsa_ultralong.models import HSAForCausalLM


def part_of_text(length: int, rank: int, world: int) -> tuple[int, int]:
    """Half-open range of the tokens of a text that a process reads."""
    return length * rank // world, length * (rank + 1) // world


def store_label(store: str, world: int) -> str:
    """How records name the store of a memory that several processes hold."""
    return f"{store}, {world} processes" if world > 1 else store


def run_over_ranks(
    model: HSAForCausalLM,
    tokenizer: Any,
    part: torch.Tensor,
    *,
    length: int,
    samples: int,
    form: str = "",
    store: str = "device",
    wording: str = "own",
    piece_tokens: int | None = None,
    seed: int = 0,
    progress: NeedleProgress | None = None,
    known: Sequence[LengthResult] = (),
    keep: Keep | None = None,
) -> NeedleStudy:
    """As needles.run_forms in one form, one sentence at a time, for processes that each hold a part of the text.

    The parts are documents of their own, so that they are read at once. Every process gets the same results.

    Args:
        part: (n,) int32 on the host, the tokens of `part_of_text` for this process. length: of all parts.
        known: what an earlier run found, the same on every process. The rest as in `run_forms`.

    Raises:
        ValueError: without a process group, a part of another length, a text too short for a sentence, or a memory
            that does not fit.
    """
    report, keep = progress or (lambda *_: None), keep or (lambda _: None)
    rank, world, device = dist.get_rank(), dist.get_world_size(), model.model.embed_tokens.weight.device
    first, stop = part_of_text(length, rank, world)
    if len(part) != stop - first:
        raise ValueError(f"process {rank} of {world} reads {stop - first:,} of {length:,} tokens, got {len(part):,}")
    hidden = _HiddenOverRanks(tokenizer, part, length, worded(wording, seed + length, samples))
    hidden.task = task_of(wording)
    earlier = [sample for result in known if result.form == form for sample in result.samples]
    wanted = sorted({*range(samples)} - {sample.index for sample in earlier})
    results = [result for result in known if result.form == form]
    if wanted:
        distinct = _distinct_over_ranks(part, model.config.chunk_size, device)
        dist.barrier()
        started = time.monotonic()
        landmarks = "int8" if form == "fp8" else form
        memory = memorize_together(
            model, part, store=store, key_values=form or None, landmarks=landmarks or None, piece_tokens=piece_tokens,
            progress=lambda done, _: report(length, 0, samples, min(length, done * world)),
        )  # fmt: skip
        if device.type == "cuda":
            torch.cuda.synchronize()
        dist.barrier()
        result = LengthResult(
            length, earlier, time.monotonic() - started, distinct, _sum_over_ranks(memory.num_bytes),
            store=store_label(store, world), form=form, task=hidden.task,
        )  # fmt: skip
        for index in wanted:
            sample = hidden.ask(model, memory, form, index, {}, only_logits=False)
            assert sample is not None
            result.samples.append(sample)
            keep(result)
            report(length, index + 1, samples, length)
        results = [result]
    return NeedleStudy(results, model.config.chunk_topk, seed, _sum_over_ranks(peak_host_bytes()))


class _HiddenOverRanks(Hidden):
    """The sentences of a text of which this process holds a part; documents are the parts."""

    def __init__(self, tokenizer: Any, part: torch.Tensor, length: int, needles: Sequence[Needle]) -> None:
        super().__init__(tokenizer, part, ())
        self.length, self.rank = length, dist.get_rank()
        self.prompts, self.values = [needle.question for needle in needles], [needle.value for needle in needles]
        self.statements = [tokenizer(needle.statement, add_special_tokens=False)["input_ids"] for needle in needles]
        self.places = [self._inside(*place) for place in places_in(length, self.statements)]

    def _inside(self, start: int, stop: int) -> Place:
        """Where tokens start..stop of the whole text lie; what a border would cut lies behind it."""
        world = dist.get_world_size()
        for rank in range(world):
            begin, end = part_of_text(self.length, rank, world)
            if begin <= start < end:
                if stop <= end:
                    return Place(rank, start - begin, stop - begin)
                if rank + 1 < world and stop - start <= part_of_text(self.length, rank + 1, world)[1] - end:
                    return Place(rank + 1, 0, stop - start)
        raise ValueError(f"{self.length} tokens are too few for {len(self.statements)} needles in {world} parts")

    @contextmanager
    def written(self, model: HSAForCausalLM, memory: Memory, index: int, form: str = "") -> Iterator[Place]:
        assert isinstance(memory, SharedMemory)
        place = self.places[index]
        is_here = place.document == self.rank
        if is_here:
            edit(model, memory.own, place.start, place.stop, self.statements[index])
        yield place
        if is_here:
            edit(model, memory.own, place.start, place.stop, self.text[place.start : place.stop])


def _distinct_over_ranks(part: torch.Tensor, chunk_size: int, device: torch.device) -> int:
    """Different chunks of all parts, short ones at their ends counted."""
    own = chunk_hashes(part, chunk_size, device).unique()
    count = torch.tensor([len(own)], device=device)
    counts = [torch.zeros_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = own.new_zeros(int(torch.cat(counts).max()))
    padded[: len(own)] = own
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded)
    found = torch.cat([hashes[: int(number)] for hashes, number in zip(every, counts, strict=True)])
    return len(found.unique()) + _sum_over_ranks(int(len(part) % chunk_size > 0))


def _sum_over_ranks(number: int) -> int:
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, number)
    return sum(every)
