"""A memory of its own choice for each row of a batch, or none: rows that read the same one are ranked together.

Used where prompts on different memories are read in one forward (inference/prompt_batch.py);
tests/inference/test_prompt_batch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.nn.readers_view import ReadersView
from hsa_ultralong.nn.views import MemoryView, Search
from hsa_ultralong.ops import ScoredChunks


class JoinedView(NamedTuple):
    """Several views as one, whose chunks are numbered one view after the other."""

    parts: tuple[MemoryView, ...]

    def _with_offsets(self) -> list[tuple[MemoryView, int]]:
        found, offset = [], 0
        for part in self.parts:
            found.append((part, offset))
            offset += part.num_chunks()
        return found

    def num_chunks(self) -> int:
        return sum(part.num_chunks() for part in self.parts)

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        return torch.stack([part.num_visible(query) for part in self.parts]).sum(0)

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        return [
            found._replace(offset=offset + found.offset)
            for part, offset in self._with_offsets()
            for found in part.topk(query, search)
        ]

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        total: torch.Tensor | None = None
        for part, offset in self._with_offsets():
            read = part.attend(q, indices, weights, (first or 0) + offset, chunk_size)
            if read is not None:
                total = read if total is None else total + read
        return total

    def is_capturable(self) -> bool:
        return all(part.is_capturable() for part in self.parts)


class MixedRows:
    """What the rows of a batch read: `memories` (B) of them, None for a row that reads nothing; at least one is a
    memory, and all are of one model.

    Attributes:
        distinct: each memory once, in the order of their numbers of chunks.
    """

    def __init__(self, memories: Sequence[Memory | None]) -> None:
        self.memories = list(memories)
        self.distinct = list({id(one): one for one in memories if one is not None}.values())
        self.chunk_size, self.is_composable = self.distinct[0].chunk_size, self.distinct[0].is_composable

    @property
    def num_chunks_of_all(self) -> int:
        return sum(memory.num_chunks_of_all for memory in self.distinct)

    def views(self, view: Callable[[Memory, torch.Tensor], MemoryView], device: torch.device) -> MemoryView:
        """All as one; view: of a memory for some rows (n,) int64."""
        parts = []
        for memory in self.distinct:
            rows = torch.tensor([n for n, one in enumerate(self.memories) if one is memory], device=device)
            parts.append(ReadersView(view(memory, rows), rows))
        return JoinedView(tuple(parts))

    def own_numbers(self, indices: torch.Tensor) -> torch.Tensor:
        """Numbers of chunks (B, ...) that the rows retrieved, as if each had been read beside its memory alone."""
        starts, counts, start = {}, {}, 0
        for memory in self.distinct:
            starts[id(memory)], counts[id(memory)] = start, memory.num_chunks_of_all
            start += memory.num_chunks_of_all
        pairs = [(starts.get(id(memory), 0), counts.get(id(memory), 0)) for memory in self.memories]
        found = torch.tensor(pairs, dtype=indices.dtype, device=indices.device)  # (B, 2)
        first, count = (part.view(-1, *[1] * (indices.dim() - 1)) for part in found.unbind(1))
        numbers = torch.where(indices < start, indices - first, indices - start + count)
        return torch.where(indices < 0, -1, numbers)
