"""A memory that some rows of a batch read: nothing is ranked or read for the others.

Called by inference/batching.py and memory/mixed_rows.py; tests/inference/test_batching.py, test_prompt_batch.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from hsa_ultralong.nn.views import MemoryView, Search
from hsa_ultralong.ops import ScoredChunks


class ReadersView(NamedTuple):
    """What `inner` is for rows (n,) int64 of the batch; the others see none of it."""

    inner: MemoryView
    rows: torch.Tensor

    def num_chunks(self) -> int:
        return self.inner.num_chunks()

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        readers = self.inner.num_visible(query[self.rows])
        return readers.new_zeros(query.shape[:2]).index_copy_(0, self.rows, readers)

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        spread = []
        for found in self.inner.topk(query[self.rows], search):
            shape = (query.shape[0], *found.indices.shape[1:])
            indices = found.indices.new_full(shape, -1)
            scores = found.scores.new_full(shape, -torch.inf)
            indices[self.rows], scores[self.rows] = found.indices, found.scores
            spread.append(found._replace(indices=indices, scores=scores))
        return spread

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        part = self.inner.attend(q[self.rows], indices[self.rows], weights[self.rows], first, chunk_size)
        if part is None:
            return None
        return part.new_zeros((q.shape[0], *part.shape[1:])).index_copy_(0, self.rows, part)

    def is_capturable(self) -> bool:
        return False
