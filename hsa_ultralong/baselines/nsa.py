"""Native sparse attention (Yuan et al. 2025): compressed, selected and window branches, gated. tests/baselines/."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.baselines.attention import Rope, SelfAttention, sdpa
from hsa_ultralong.baselines.selected import choose_by_compressed, selected_attention
from hsa_ultralong.baselines.state import AllKeyValues, LastKeyValues, LayerState, num_blocks
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary
from hsa_ultralong.ops import sliding_window_attention

# pairs of a query and a block under one mask
_ELEMENTS = 1 << 26


class Compressor(nn.Module):
    """Blocks (B, C, l, H, D) -> (B, C, H, D): a learned mean of tokens with learned places, then y + W2 silu(W1 y).

    The paper's network reads all l * D numbers of a block; at nano size it would be a quarter of all parameters.
    """

    def __init__(self, size: int, head_dim: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.full((size,), 1 / size))
        self.places = nn.Parameter(torch.zeros(size, head_dim))
        self.up_proj = nn.Linear(head_dim, head_dim, bias=False)
        self.down_proj = nn.Linear(head_dim, head_dim, bias=False)

    def forward(self, blocks: torch.Tensor) -> torch.Tensor:
        mean = torch.einsum(
            "bclhd,l->bchd", blocks + self.places[:, None].to(blocks.dtype), self.weights.to(blocks.dtype)
        )
        return mean + self.down_proj(F.silu(self.up_proj(mean)))


class NSAState(LayerState):
    """Keys and values of the three branches, and the last tokens that no whole block holds yet."""

    def __init__(self, window: int, size: int) -> None:
        super().__init__()
        self.selected, self.compressed = AllKeyValues(), AllKeyValues()
        self.window, self.pending = LastKeyValues(window - 1), LastKeyValues(size - 1)


class NativeSparseAttention(SelfAttention):
    """Token t reads, each by a softmax of its own and weighed by gates: the compressed blocks that end at or before t;
    the K chunks (the first ones, its own and those before, and those that its weights on blocks favour, one choice a
    key-value head); and its window.

    O(T N / stride) time for the blocks, O(T K S) for the chunks (selected.py), O(T W). The cache holds all keys and
    values and those of the blocks.
    """

    is_rotary = False  # blocks are compressed before rotation

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        window: int,
        chunk_size: int,
        topk: int,
        size: int,
        stride: int,
        num_initial: int,
        num_local: int,
        impl: str,
        rope: Rope,
        **heads: Any,
    ) -> None:
        super().__init__(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=3 * num_key_value_heads,
            **heads,
        )
        self.window, self.size, self.stride, self.chunk_size, self.rope = window, size, stride, chunk_size, rope
        self.impl = impl
        self.choice = {"topk": topk, "num_initial": num_initial, "num_local": num_local}
        self.compress_keys, self.compress_values = Compressor(size, self.head_dim), Compressor(size, self.head_dim)
        self.gate_proj = nn.Linear(hidden_size, 3 * num_attention_heads, bias=False)

    def forward(self, x: torch.Tensor, rotary: RotaryTable, segments: None = None, state: Any = None) -> torch.Tensor:
        start = 0 if state is None else state.length
        q, keys, values = self.project(x)
        block_k, chunk_k, near_k = keys.chunk(3, 2)
        block_v, chunk_v, near_v = values.chunk(3, 2)
        q, chunk_k, near_k = (apply_rotary(part, rotary) for part in (q, chunk_k, near_k))
        block_k, block_v = self._compressed(block_k, block_v, state)
        if state is not None:
            chunk_k, chunk_v = state.selected.extend(chunk_k, chunk_v)
            near_k, near_v = state.window.extend(near_k, near_v)
            state.length += x.shape[1]
        chosen = choose_by_compressed(
            q.detach(), block_k.detach(), start=start, size=self.size, stride=self.stride, chunk_size=self.chunk_size,
            pool="sum", **self.choice,
        )  # fmt: skip
        branches = torch.stack(
            (
                self._read_blocks(q, block_k, block_v, start),
                selected_attention(q, chunk_k, chunk_v, chosen, chunk_size=self.chunk_size, impl=self.impl),
                sliding_window_attention(q, near_k, near_v, window=self.window),
            ),
            2,
        )  # (B, T, 3, Hq, D)
        gates = self.gate_proj(x).sigmoid().unflatten(-1, (3, -1))[..., None]
        return self.o_proj((branches * gates.to(branches.dtype)).sum(2).flatten(-2))

    def _compressed(self, k: torch.Tensor, v: torch.Tensor, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys, rotated at their blocks' first places, and values of all whole blocks so far, (B, C, Hkv, D)."""
        before = 0 if state is None else state.compressed.length
        if state is not None:
            k, v = state.pending.extend(k, v)
            first = before * self.stride - (state.pending.length - k.shape[1])
            k, v = k[:, first:], v[:, first:]
        count = num_blocks(k.shape[1], self.size, self.stride)
        if count:
            blocks = (x.unfold(1, self.size, self.stride).movedim(-1, 2) for x in (k, v))  # (B, C, l, Hkv, D) each
            k, v = (
                make(part).to(x.dtype)
                for make, part, x in zip((self.compress_keys, self.compress_values), blocks, (k, v), strict=True)
            )
            places = (before + torch.arange(count, device=k.device)) * self.stride
            k = apply_rotary(k, self.rope.at(places, k.dtype))
        else:
            k, v = k[:, :0], v[:, :0]
        return (k, v) if state is None else state.compressed.extend(k, v)

    def _read_blocks(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        """The branch of compressed blocks; 0 for tokens that see none."""
        if self.impl == "triton":
            from hsa_ultralong.baselines.triton_selected import block_attention_triton  # imports triton

            return block_attention_triton(q, k, v, size=self.size, stride=self.stride, start=start)
        # tokens before the end of the first block
        blind = min(max(self.size - 1 - start, 0), q.shape[1])
        parts = [torch.zeros_like(q[:, :blind])]
        piece = max(1, _ELEMENTS // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
        for first in range(blind, q.shape[1], piece):
            part = q[:, first : first + piece]
            seen = num_blocks(start + first + part.shape[1], self.size, self.stride)
            inputs = (part, k[:, :seen], v[:, :seen], start + first)
            if torch.is_grad_enabled() and part.requires_grad:
                parts.append(checkpoint(self._read, *inputs, use_reentrant=False, preserve_rng_state=False))
            else:
                parts.append(self._read(*inputs))
        return torch.cat(parts, 1)

    def _read(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: int) -> torch.Tensor:
        ends = torch.arange(k.shape[1], device=q.device) * self.stride + self.size
        t = torch.arange(start, start + q.shape[1], device=q.device)[:, None]
        return sdpa(q, k, v, (ends <= t + 1)[None, None])

    def new_state(self) -> NSAState:
        return NSAState(self.window, self.size)
