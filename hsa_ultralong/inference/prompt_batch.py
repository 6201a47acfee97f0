"""Pieces of several prompts read in one forward: a row reads what it would read alone.

The states of prompts are laid side by side, moved to the right where they are shorter, and taken apart again: what a
cache of rows with masked tokens holds anyway (models/cache_hsa.py). Called by batching.py;
tests/inference/test_prompt_batch.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hsa_ultralong.inference.prefixes import REWIND
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.mixed_rows import MixedRows
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.views import ChunkTensors

# places that a forward of unlike pieces may compute for nothing: half as many as it reads, and so many more
_SPARE_PLACES = 64


@dataclass
class Reading:
    """A prompt on its way to a row.

    Attributes:
        num_read: tokens read so far, those of a known beginning included. num_known: of a known beginning.
        shared: tokens that another prompt began with like this one.
        logits: (1, V) of the last token, and what it retrieved, once the prompt is read.
    """

    prompt: torch.Tensor
    memory: Memory | None
    owner: str
    room: int
    pages: list[int]
    cache: HSACache
    num_read: int = 0
    num_known: int = 0
    shared: int = 0
    logits: torch.Tensor | None = None
    retrieval: Sequence[Retrieval] = field(default_factory=list)

    @property
    def num_left(self) -> int:
        return len(self.prompt) - self.num_read

    def piece(self, most: int) -> int:
        """Tokens of the next piece, up to `most`: what another prompt has begun with as well is a piece of its own."""
        stop = min(len(self.prompt), self.num_read + most)
        if self.num_read < self.shared < stop:
            stop = self.shared
        return stop - self.num_read


class Read(NamedTuple):
    """What a forward left: the cache of all rows, logits (n, V) and what the last tokens retrieved, each row counted
    as beside its memory alone."""

    cache: HSACache
    logits: torch.Tensor
    retrieval: list[Retrieval]


def share_out(left: Sequence[int], most: int) -> list[int]:
    """Tokens to read now of prompts with so many left, at most `most` in all; 0 for those that wait.

    The first has its turn and gets at least half; the shortest of the others come along as far as they fit whole, so
    that a short prompt does not wait for the end of a long one. What is over goes to the first, then in order.
    """
    sizes = [0] * len(left)
    if not left or most < 1:
        return sizes
    sizes[0] = min(left[0], -(-most // 2) if len(left) > 1 else most)
    spare = most - sizes[0]
    for number in sorted(range(1, len(left)), key=lambda one: left[one]):
        if left[number] > spare:
            break
        sizes[number] = left[number]
        spare -= left[number]
    for number, (size, count) in enumerate(zip(sizes, left, strict=True)):
        sizes[number] += min(spare, count - size)
        spare -= sizes[number] - size
    return sizes


def group_pieces(sizes: Sequence[int]) -> list[list[int]]:
    """Numbers of pieces that are read together: such of like sizes that little is computed for nothing."""
    groups: list[list[int]] = []
    total = 0
    for number in sorted((n for n, size in enumerate(sizes) if size), key=lambda n: -sizes[n]):
        longest = sizes[groups[-1][0]] if groups else 0
        if groups and 2 * longest * (len(groups[-1]) + 1) <= 3 * (total + sizes[number]) + 2 * _SPARE_PLACES:
            groups[-1].append(number)
            total += sizes[number]
        else:
            groups.append([number])
            total = sizes[number]
    return groups


def read_pieces(model: HSAForCausalLM, readings: Sequence[Reading], sizes: Sequence[int]) -> Read:
    """Read the next sizes[i] tokens of every prompt in one forward. The caches of several prompts are left as they are:
    `cache_of_row` takes them from the result."""
    device = model.device
    longest = max(sizes)
    tokens = torch.zeros((len(readings), longest), dtype=torch.int64)
    for row, reading, size in zip(tokens, readings, sizes, strict=True):
        row[:size] = reading.prompt[reading.num_read : reading.num_read + size]
    cache = readings[0].cache if len(readings) == 1 else _side_by_side(model, readings)
    options: dict[str, Any] = {}
    if min(sizes) < longest:
        is_read = torch.arange(longest) < torch.tensor(sizes)[:, None]
        before = is_read.new_ones(len(readings), cache.num_seen) if cache.mask is None else cache.mask
        options["attention_mask"] = torch.cat((before.to(device), is_read.to(device)), 1).long()
    with evaluating(model):
        outputs = model(
            tokens.to(device), past_key_values=cache, logits_to_keep=1, output_retrieval=True, **options
        )  # fmt: skip
    found = list(outputs.retrieval)
    if isinstance(cache.memory, MixedRows):
        found = [one._replace(indices=cache.memory.own_numbers(one.indices)) for one in found]
    return Read(cache, outputs.logits[:, -1], found)


def _side_by_side(model: HSAForCausalLM, readings: Sequence[Reading]) -> HSACache:
    """One cache of the rows of several, every row moved to the right."""
    caches, memories = [reading.cache for reading in readings], [reading.memory for reading in readings]
    read: Memory | MixedRows | None = memories[0]
    if any(memory is not read for memory in memories):
        read = MixedRows(memories)
    cache = HSACache(model.config, memory=read, rewind=REWIND)
    seen = [one.num_seen for one in caches]
    for layer, *parts in zip(cache.layers, *(one.layers for one in caches), strict=True):
        layer.state.keys = _to_the_right([part.state.keys for part in parts])
        layer.state.values = _to_the_right([part.state.values for part in parts])
    cache.pending = _to_the_right([one.pending for one in caches])
    own = [one.chunks for one in caches]
    some = next((chunks for chunks in own if chunks is not None), None)
    if some is not None:
        count = max(0 if chunks is None else chunks.landmarks.shape[1] for chunks in own)
        cache.own_memory = model.model.empty_memory(len(caches), some.k.dtype, some.k.device, count)
        cache.own_memory.storage.lengths.fill_(model.config.chunk_size)
        cache.own_memory.num_chunks = count
        for row, chunks in enumerate(own):
            if chunks is not None:
                for target, part in zip(cache.own_memory.storage, chunks, strict=True):
                    target[row, : part.shape[1]] = part[0]
    cache.advance(max(seen))
    if min(seen) < max(seen):
        cache.padding = [max(seen) - count for count in seen]
        left = torch.tensor(cache.padding, device=model.device)[:, None]
        cache.mask = torch.arange(max(seen), device=model.device) >= left
    return cache


def _to_the_right(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Tensors (1, n, ...) as rows of one, zeros before the shorter ones."""
    some = next((part for part in parts if part is not None), None)
    if some is None:
        return None
    length = max(0 if part is None else part.shape[1] for part in parts)
    if all(part is not None and part.shape[1] == length for part in parts):
        return torch.cat([part for part in parts if part is not None])
    rows = some.new_zeros((len(parts), length, *some.shape[2:]))
    for row, part in zip(rows, parts, strict=True):
        if part is not None:
            row[length - part.shape[1] :] = part[0]
    return rows


def cache_of_row(model: HSAForCausalLM, cache: HSACache, row: int, num_seen: int, memory: Memory | None) -> HSACache:
    """The cache that one row would have alone after `num_seen` tokens, in tensors of its own."""
    own = HSACache(model.config, memory=memory, rewind=REWIND)

    def last(part: torch.Tensor) -> torch.Tensor:
        return part[row : row + 1, max(0, part.shape[1] - num_seen) :].clone()

    for layer, source in zip(own.layers, cache.layers, strict=True):
        if source.state.keys is not None and source.state.values is not None:
            layer.state.keys, layer.state.values = last(source.state.keys), last(source.state.values)
    if cache.pending is not None:
        own.pending = last(cache.pending)
    count = num_seen // model.config.chunk_size
    if count and cache.own_memory is not None:
        size = model.config.chunk_size
        units = (size, size, 1, 1, 1, 1)
        parts = zip(cache.own_memory.tensors, units, strict=True)
        k, v, *rest = (part[row : row + 1, : count * unit] for part, unit in parts)
        own.own_memory = model.model.empty_memory(1, k.dtype, k.device)
        own.own_memory.write(0, ChunkTensors(k, v, *rest))
    own.advance(num_seen)
    return own


def row_of(retrieval: Sequence[Retrieval], row: int) -> list[Retrieval]:
    """What one row retrieved, in tensors of its own."""
    part = slice(row, row + 1)
    return [
        Retrieval(one.indices[part].clone(), one.weights[part].clone(), one.scores[part].clone(), one.offsets)
        for one in retrieval
    ]
