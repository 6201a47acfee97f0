"""InfLLM-V2's selection (Zhao et al. 2025): chunks chosen without parameters, one softmax. tests/baselines/."""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.baselines.attention import SelfAttention, causal_attention
from hsa_ultralong.baselines.selected import choose_by_compressed, selected_attention
from hsa_ultralong.baselines.state import BlockedKeyValues, block_means


class InfLLM(SelfAttention):
    """Token t reads, in one softmax, K chunks: the first ones, its own and those before, and those with a mean of keys
    over `size` tokens that its weights favour; one choice a key-value head. The first `dense_tokens` tokens of a row
    read all before them.

    O(T N / stride) time to choose, O(T K S) to read (selected.py). The cache holds all keys and values and the means.
    """

    def __init__(
        self,
        *,
        chunk_size: int,
        topk: int,
        size: int,
        stride: int,
        num_initial: int,
        num_local: int,
        dense_tokens: int,
        impl: str,
        **heads: Any,
    ) -> None:
        super().__init__(**heads)
        self.size, self.stride, self.dense_tokens, self.impl = size, stride, dense_tokens, impl
        self.choice = {
            "size": size, "stride": stride, "chunk_size": chunk_size, "topk": topk, "num_initial": num_initial,
            "num_local": num_local,
        }  # fmt: skip

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        start, new = 0 if state is None else state.length, q.shape[1]
        if state is not None:
            k, v = state.extend(k, v)
        dense = min(max(self.dense_tokens - start, 0), new)
        parts = []
        if dense:
            reach = start + dense
            parts.append(causal_attention(q[:, :dense], k[:, :reach], v[:, :reach]))
        if dense < new:
            rest = q[:, dense:]
            means = block_means(k.detach(), self.size, self.stride) if state is None else state.means()
            chosen = choose_by_compressed(rest.detach(), means, start=start + dense, pool="max", **self.choice)  # type: ignore[arg-type]
            parts.append(selected_attention(rest, k, v, chosen, chunk_size=self.choice["chunk_size"], impl=self.impl))
        return torch.cat(parts, 1)

    def new_state(self) -> BlockedKeyValues:
        return BlockedKeyValues(self.size, self.stride)
