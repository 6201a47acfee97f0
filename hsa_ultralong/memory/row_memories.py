"""Memories of the rows of a batch that share most of their chunks: one base for all, and each row's difference from it.

Chunks have no order (fact 4 of docs/architecture.md), so a row that hides some chunks of the base and brings others
reads exactly the memory in which the others stand in their places. Used by the evaluation, where contexts of one length
differ by a few facts; tests/memory/test_row_memories.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.nn.views import ChunkTensors, GraphView, MemoryView, Search
from hsa_ultralong.ops import ChunkVisibility, ScoredChunks
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL, UNUSED


class RowsView(NamedTuple):
    """A view of the base and one of the rows' own chunks, which are numbered after it."""

    base: MemoryView
    own: GraphView

    def num_chunks(self) -> int:
        return self.base.num_chunks() + self.own.num_chunks()

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        return self.base.num_visible(query) + self.own.num_visible(query)

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        after = self.base.num_chunks()
        own = [part._replace(offset=after + part.offset) for part in self.own.topk(query, search)]
        return [*self.base.topk(query, search), *own]

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        start = first or 0
        base = self.base.attend(q, indices, weights, start, chunk_size)
        own = self.own.attend(q, indices, weights, start + self.base.num_chunks(), chunk_size)
        return own if base is None else base if own is None else base + own

    def is_capturable(self) -> bool:
        return self.base.is_capturable() and self.own.is_capturable()


class Chunk(NamedTuple):
    """k, v (S, Hkv, D), landmark (Hr, R), tokens in it."""

    k: torch.Tensor
    v: torch.Tensor
    landmark: torch.Tensor
    length: int


@dataclass
class RowMemories:
    """What each row of a batch may read: the base's chunks, some hidden from it, and chunks of its own.

    Attributes:
        base: a memory that is for reading here. hidden: (B, C) bool, chunks of the base that a row does not see.
        own: P chunks of each row, (B, P*S, Hkv, D) and (B, P, ...); those whose segment is -2 are room only.
    """

    base: Memory
    hidden: torch.Tensor
    own: ChunkTensors

    def __post_init__(self) -> None:
        if not self.base.is_composable:
            raise ValueError("rows that share a memory need fusion without order (fact 4); give each row its own")
        batch = self.own.landmarks.shape[0]
        if tuple(self.hidden.shape) != (batch, self.base.num_chunks):
            raise ValueError(
                f"hidden must be ({batch}, {self.base.num_chunks}) for {batch} rows of {self.base.num_chunks} chunks, "
                f"got {tuple(self.hidden.shape)}"
            )

    @staticmethod
    def laid(base: Memory, hidden: torch.Tensor, rows: Sequence[Sequence[Chunk]]) -> RowMemories:
        """hidden (B, C) bool; rows: the chunks of each row's own, any number."""
        size, room = base.chunk_size, max(map(len, rows))
        k, v, landmarks, lengths, segments, ends = (
            part.new_zeros((len(rows), room * (size if number < 2 else 1), *part.shape[2:]))
            for number, part in enumerate(base.storage)
        )
        lengths.fill_(size)
        segments.fill_(UNUSED)
        for row, chunks in enumerate(rows):
            count = len(chunks)
            if count:
                k[row, : count * size] = torch.cat([chunk.k for chunk in chunks])
                v[row, : count * size] = torch.cat([chunk.v for chunk in chunks])
                landmarks[row, :count] = torch.stack([chunk.landmark for chunk in chunks])
                lengths[row, :count] = torch.tensor([chunk.length for chunk in chunks], dtype=torch.int32)
                segments[row, :count] = READABLE_BY_ALL
        own = ChunkTensors(k, v, landmarks, lengths, segments, ends)
        return RowMemories(base, hidden.to(landmarks.device), own)

    @property
    def batch(self) -> int:
        return self.hidden.shape[0]

    chunk_size = property(lambda self: self.base.chunk_size)
    is_composable = property(lambda self: self.base.is_composable)
    segments = property(lambda self: self.base.segments)

    @property
    def num_chunks_of_all(self) -> int:
        """Numbers of chunks: the base's, then those of a row."""
        return self.base.num_chunks + self.own.landmarks.shape[1]

    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        """What layers read: every real token of a row all that the row may see, whatever `visible` says of chunks."""
        places = visible.query_segment, visible.query_position

        def readable(hidden: torch.Tensor) -> ChunkVisibility:
            segments = torch.where(hidden, UNUSED, READABLE_BY_ALL).to(torch.int32)
            return ChunkVisibility(*places, segments, torch.zeros_like(segments))

        base = self.base.view(readable(self.hidden), is_for_all=False)
        return RowsView(base, GraphView(self.own, readable(self.own.segments == UNUSED)))
