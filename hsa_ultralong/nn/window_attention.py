"""Sliding-window self-attention with rotary positions and query-key norm: the local half of every layer (sec. 3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hsa_ultralong.nn.ring_window import RingWindow
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary, tail
from hsa_ultralong.ops import sliding_window_attention


class WindowState:
    """Keys (not rotated) and values of the last tokens of one layer, (B, n, Hkv, D); n <= `keep`."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[1]

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Kept and new keys and values, (B, n + T, Hkv, D); the last `keep` of them stay."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), 1), torch.cat((self.values, values), 1)
        first = max(0, keys.shape[1] - self.keep)
        self.keys, self.values = keys[:, first:].detach().clone(), values[:, first:].detach().clone()
        return keys, values


def extends_a_cache(args: Iterable[Any]) -> bool:
    """Whether a layer given these extends a window that stays: run again in the backward, it would do so twice."""
    return any(isinstance(part, WindowState) for part in args)


class WindowAttention(nn.Module):
    """Pre-normed input (B, T, M) -> (B, T, M); every token reads its last `window` tokens of its own document."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        window: int,
        use_qk_norm: bool,
        rms_norm_eps: float,
        use_qkv_bias: bool = False,
    ) -> None:
        super().__init__()
        self.window, self.head_dim = window, head_dim
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=use_qkv_bias)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=use_qkv_bias)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=use_qkv_bias)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryTable,
        segments: torch.Tensor | None = None,
        state: WindowState | RingWindow | None = None,
    ) -> torch.Tensor:
        """
        Args:
            x: (B, T, M). rotary: table of at least `state.length + T` indices; with a RingWindow, of the B places.
            segments: (B, n + T) document numbers of the state's tokens and the new ones, or None for one document.
            state: keys and values of the tokens before x; updated in place.
        """
        heads = (*x.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(x).view(heads))  # (B, T, Hq, D)
        k = self.k_norm(self.k_proj(x).view(heads))  # (B, T, Hkv, D)
        v = self.v_proj(x).view(heads)
        if isinstance(state, RingWindow):
            return self.o_proj(state.attend(q, k, v, rotary).flatten(-2))
        past = 0 if state is None else state.length
        if state is not None:
            k, v = state.extend(k, v)  # (B, past + T, Hkv, D)
        query_segments = None if segments is None else segments[:, segments.shape[1] - x.shape[1] :]
        key_segments = None if segments is None else segments[:, segments.shape[1] - k.shape[1] :]
        out = sliding_window_attention(
            apply_rotary(q, tail(rotary, past)).to(v.dtype),
            apply_rotary(k, rotary).to(v.dtype),
            v,
            window=self.window,
            query_segments=query_segments,
            key_segments=key_segments,
        )
        return self.o_proj(out.flatten(-2))
