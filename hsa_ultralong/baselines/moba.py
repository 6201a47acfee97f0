"""Top-k chunks by the mean of their keys, in the form of MoBA (Lu et al. 2025). tests/baselines/test_rivals.py."""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.baselines.attention import SelfAttention, repeated
from hsa_ultralong.baselines.selected import selected_attention
from hsa_ultralong.baselines.state import BlockedKeyValues, block_means
from hsa_ultralong.ops import ChunkVisibility, chunk_topk


class MeanTopK(SelfAttention):
    """Token t reads, in one softmax, its own chunk up to itself and the K - 1 chunks before it whose mean key has the
    largest product with its query, chosen by each query head.

    Choosing: O(T N / S) time in O(T K) memory (ops/chunk_topk). Reading: selected.py. The cache holds all keys and
    values and a mean for every chunk.
    """

    def __init__(self, *, chunk_size: int, topk: int, impl: str, **heads: Any) -> None:
        super().__init__(**heads)
        self.chunk_size, self.topk, self.impl = chunk_size, topk, impl

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        start = 0 if state is None else state.length
        if state is None:
            means = block_means(k.detach(), self.chunk_size, self.chunk_size)
        else:
            k, v = state.extend(k, v)
            means = state.means()
        chosen = self.choose(q.detach(), means, start)
        return selected_attention(q, k, v, chosen, chunk_size=self.chunk_size, impl=self.impl)

    @torch.no_grad()
    def choose(self, q: torch.Tensor, means: torch.Tensor, start: int) -> torch.Tensor:
        """(B, T, Hq, K) chunks of queries from place `start` on, the own one first, -1 for none."""
        batch, new, heads, _ = q.shape
        places = torch.arange(start, start + new, dtype=torch.int32, device=q.device)
        own = (places // self.chunk_size)[None, :, None, None].expand(batch, -1, heads, -1)
        if self.topk == 1 or means.shape[1] == 0:
            return own
        ends = (torch.arange(means.shape[1], dtype=torch.int32, device=q.device) + 1)[None] * self.chunk_size
        query = places.expand(batch, -1)
        visible = ChunkVisibility(torch.zeros_like(query), query, torch.zeros_like(ends), ends)
        others, _ = chunk_topk(q, repeated(means, heads).to(q.dtype), visible, topk=self.topk - 1)
        return torch.cat((own, others), -1)

    def new_state(self) -> BlockedKeyValues:
        return BlockedKeyValues(self.chunk_size, self.chunk_size)
