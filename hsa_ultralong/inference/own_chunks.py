"""The chunks that decoding rows complete themselves: a room for every row, or pages of one room for all.

Shapes and addresses never change, so that a step fits into a CUDA graph. Called by engine.py and batching.py;
tests/inference/test_own_chunks.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch

from hsa_ultralong.nn.views import ChunkTensors, GraphView, MemoryView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED

EncodedChunks = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class RowChunks:
    """A room of its own for every row."""

    def __init__(self, model: Any, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        """capacity: full chunks of a row."""
        self.size, self.capacity = model.config.chunk_size, capacity
        # one chunk more than can be full: what is not full yet is written there and never seen
        self.storage: ChunkTensors = model.model.empty_memory(batch, dtype, device, capacity + 1).storage
        self.storage.lengths.fill_(self.size)
        ends = torch.arange(1, capacity + 2, dtype=torch.int32, device=device) * self.size
        self.storage.ends.copy_(ends.expand(batch, -1))
        self.rows = torch.arange(batch, device=device)

    def view(self, positions: torch.Tensor) -> MemoryView:
        """What rows at positions (B, 1) int32 read; the tensor is kept."""
        segments = torch.zeros_like(positions)
        return GraphView(self.storage, ChunkVisibility(segments, positions, self.storage.segments, self.storage.ends))

    def put(self, encoded: EncodedChunks, places: torch.Tensor) -> None:
        """Take k, v (B, S, Hkv, D) and landmarks (B, 1, Hr, R) of the rows whose places (B,) end a chunk."""
        k, v, landmarks = encoded
        is_full = (places % self.size == 0) & (places > 0) & (places <= self.capacity * self.size)
        slots = torch.where(is_full, places // self.size - 1, self.capacity)
        for target, source in ((self.storage.k, k), (self.storage.v, v)):
            target.unflatten(1, (-1, self.size))[self.rows, slots] = source
        self.storage.landmarks[self.rows, slots] = landmarks[:, 0]
        self.storage.segments[self.rows, slots] = torch.where(is_full, 0, UNUSED).to(torch.int32)

    def load(self, row: int, chunks: ChunkTensors, source: int, count: int) -> None:
        """Take the first `count` chunks of row `source` of others."""
        own, slots = self.storage, count * self.size
        own.k[row, :slots], own.v[row, :slots] = chunks.k[source, :slots], chunks.v[source, :slots]
        own.landmarks[row, :count], own.segments[row, :count] = chunks.landmarks[source, :count], 0

    def clear(self, row: int) -> None:
        self.storage.segments[row] = UNUSED


class PagedChunks:
    """One room for all rows: a page holds a chunk, its segment says whose it is, and a row takes what it will need."""

    def __init__(
        self, model: Any, batch: int, capacity: int, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """capacity: most full chunks of a row. num_pages: chunks of all rows together."""
        self.size, self.num_pages = model.config.chunk_size, num_pages
        # one page more, where chunks go that are not full or nobody's
        self.storage: ChunkTensors = model.model.empty_memory(1, dtype, device, num_pages + 1).storage
        self.storage.lengths.fill_(self.size)
        self.table = torch.full((batch, max(1, capacity)), num_pages, dtype=torch.int64, device=device)
        self.numbers = torch.arange(batch, dtype=torch.int32, device=device)
        self.free = list(range(num_pages))  # ascending, so that a row's pages are in the order of its text
        self.taken: dict[int, list[int]] = {}

    def take(self, count: int) -> list[int]:
        """Pages for `count` chunks, to be handed to a row by `hold`, or back by `give`."""
        assert count <= len(self.free)
        pages, self.free = self.free[:count], self.free[count:]
        return pages

    def give(self, pages: list[int]) -> None:
        for page in pages:
            bisect.insort(self.free, page)

    def hold(self, rows: Sequence[int], pages: Sequence[list[int]]) -> None:
        """Rows have these pages from now on."""
        entries = []
        for row, own in zip(rows, pages, strict=True):
            self.taken[row] = own
            entries.append(own + [self.num_pages] * (self.table.shape[1] - len(own)))
        device = self.table.device
        self.table[torch.tensor(rows, device=device)] = torch.tensor(entries, device=device)

    def view(self, positions: torch.Tensor) -> MemoryView:
        """What the first rows read, at positions (b, 1) int32; the tensor is kept."""
        segments = self.numbers[: len(positions), None]
        return GraphView(self.storage, ChunkVisibility(segments, positions, self.storage.segments, self.storage.ends))

    def put(self, encoded: EncodedChunks, places: torch.Tensor) -> None:
        """Take k, v (b, S, Hkv, D) and landmarks (b, 1, Hr, R) of the first rows where places (b,) end a chunk."""
        k, v, landmarks = encoded
        batch, own = len(places), self.storage
        is_full = (places % self.size == 0) & (places > 0)
        number = (places // self.size - 1).clamp(0, self.table.shape[1] - 1)
        pages = self.table[:batch].gather(1, number[:, None])[:, 0]
        pages = torch.where(is_full, pages, self.num_pages)
        for target, source in ((own.k, k), (own.v, v)):
            target.unflatten(1, (-1, self.size))[0, pages] = source
        own.landmarks[0, pages] = landmarks[:, 0]
        own.segments[0, pages] = torch.where(pages < self.num_pages, self.numbers[:batch], UNUSED).to(torch.int32)
        own.ends[0, pages] = places.to(torch.int32)

    def load(self, rows: Sequence[int], chunks: ChunkTensors, sources: Sequence[int], counts: Sequence[int]) -> None:
        """Rows take the first `counts` chunks of rows `sources` of others."""
        places = [
            (source, slot, self.taken[row][slot], row)
            for row, source, count in zip(rows, sources, counts, strict=True)
            for slot in range(count)
        ]
        if not places:
            return
        own = self.storage
        source, slot, page, owner = torch.tensor(places, device=self.table.device).unbind(1)
        for target, part in ((own.k, chunks.k), (own.v, chunks.v)):
            target.unflatten(1, (-1, self.size))[0, page] = part.unflatten(1, (-1, self.size))[source, slot]
        own.landmarks[0, page], own.segments[0, page] = chunks.landmarks[source, slot], owner.to(torch.int32)
        own.ends[0, page] = ((slot + 1) * self.size).to(torch.int32)

    def clear(self, row: int) -> None:
        """Nobody reads the row's chunks any more; it keeps its pages."""
        pages = self.taken.get(row)
        if pages:
            self.storage.segments[0, self.table[row, : len(pages)]] = UNUSED

    def release(self, row: int) -> None:
        """The row has no pages any more."""
        self.clear(row)
        self.table[row] = self.num_pages
        self.give(self.taken.pop(row, []))

    def move(self, source: int, target: int) -> None:
        """Row `target`, which has none, gets the pages of `source`."""
        pages = self.taken.pop(source, [])
        segments = self.storage.segments
        segments.copy_(torch.where(segments == source, target, segments))
        self.table[target] = self.table[source]
        self.table[source] = self.num_pages
        self.taken[target] = pages
