"""Which chunk a token may retrieve: one rule for sequences, padding, packed documents, pools and loaded memories.

A query token has a segment (its document) and a position in it; a chunk has a segment and an end, the position after
its last slot. Chunk i of a document ends at (i + 1) * S, so `end <= position` is fact 1 of docs/architecture.md.
Called by ops/chunk_topk; tested in tests/ops/test_chunk_topk.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

FOREIGN_RULES = ("hidden", "past")
READABLE_BY_ALL = -1
UNUSED = -2
PADDING = -1
# positions of one document, and a key behind all
_SPAN, _LAST = 1 << 31, 1 << 62


@dataclass(frozen=True)
class ChunkVisibility:
    """Int32 tensors from which the (T, C) mask of any block of queries follows; the whole mask is never stored.

    Args:
        query_segment: (B, T) int32, document of each token; -1 is padding and sees nothing.
        query_position: (B, T) int32, position of the token in its document.
        chunk_segment: (1 or B, C) int32, document of each chunk; -1 is readable by every real token, -2 by none.
        chunk_end: (1 or B, C) int32, position (in its document) after the chunk's last slot.
        foreign: chunks of other documents are "hidden" or "past" (all visible: pooled memory, loaded memories).
    """

    query_segment: torch.Tensor
    query_position: torch.Tensor
    chunk_segment: torch.Tensor
    chunk_end: torch.Tensor
    foreign: Literal["hidden", "past"] = "hidden"

    def __post_init__(self) -> None:
        if self.foreign not in FOREIGN_RULES:
            raise ValueError(f"foreign must be one of {FOREIGN_RULES}, got {self.foreign!r}")
        if self.query_segment.dim() != 2 or self.query_segment.shape != self.query_position.shape:
            raise ValueError(
                "query_segment and query_position must both be (B, T), got "
                f"{tuple(self.query_segment.shape)} and {tuple(self.query_position.shape)}"
            )
        if self.chunk_segment.dim() != 2 or self.chunk_segment.shape != self.chunk_end.shape:
            raise ValueError(
                "chunk_segment and chunk_end must both be (1 or B, C), got "
                f"{tuple(self.chunk_segment.shape)} and {tuple(self.chunk_end.shape)}"
            )
        if self.chunk_segment.shape[0] not in (1, self.query_segment.shape[0]):
            raise ValueError(
                f"chunk_segment has batch {self.chunk_segment.shape[0]}, required 1 or {self.query_segment.shape[0]}"
            )

    @property
    def num_chunks(self) -> int:
        return self.chunk_segment.shape[1]

    def mask(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Visibility of every chunk to the queries start..stop, (B, stop - start, C) bool."""
        segment = self.query_segment[:, start:stop, None]  # (B, t, 1)
        position = self.query_position[:, start:stop, None]  # (B, t, 1)
        chunk_segment, end = self.chunk_segment[:, None], self.chunk_end[:, None]  # (1 or B, 1, C)
        visible = (chunk_segment == segment) & (end <= position)  # (B, t, C)
        if self.foreign == "past":
            visible = visible | ((chunk_segment != segment) & (chunk_segment >= 0))
        visible = visible | (chunk_segment == READABLE_BY_ALL)
        return visible & (segment != PADDING) & (chunk_segment != UNUSED)

    def count(self) -> torch.Tensor:
        """Number of chunks that every query may read, (B, T) int64, without the mask of all pairs."""
        batch = self.query_segment.shape[0]
        segment, position = self.query_segment.long(), self.query_position.long()
        chunk_segment = self.chunk_segment.long().expand(batch, -1)
        is_document = chunk_segment >= 0
        # documents in order, ends in order within one; what belongs to none comes last
        keys = torch.where(is_document, chunk_segment * _SPAN + self.chunk_end.long(), _LAST).sort(-1).values
        first = segment.clamp_min(0) * _SPAN
        before = torch.searchsorted(keys, first)
        # tokens before the first one of their document see none of it
        seen = torch.searchsorted(keys, first + position.clamp_min(-1), right=True) - before
        if self.foreign == "past":
            own = torch.searchsorted(keys, first + _SPAN) - before
            seen = seen + is_document.sum(-1, keepdim=True) - own
        seen = seen + (chunk_segment == READABLE_BY_ALL).sum(-1, keepdim=True)
        return seen.masked_fill(segment == PADDING, 0)

    @staticmethod
    def causal(
        batch: int, num_tokens: int, num_chunks: int, chunk_size: int, device: torch.device | None = None
    ) -> ChunkVisibility:
        """One document per row, tokens 0..T-1, chunk i ending at (i + 1) * chunk_size."""
        position = torch.arange(num_tokens, dtype=torch.int32, device=device).expand(batch, -1)
        end = (torch.arange(num_chunks, dtype=torch.int32, device=device) + 1)[None] * chunk_size
        return ChunkVisibility(torch.zeros_like(position), position, torch.zeros_like(end), end)
