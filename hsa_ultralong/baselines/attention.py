"""The interface of a rival's layers, and what all those with a softmax share: projections, norms, rotation.

A layer maps (x, rotary, segments, state) -> (B, T, M), as nn/decoder_layer.py calls it: `rotary` has the angles of the
T new tokens at their places in the row, `state` what is kept of those before, or None for a row from its start.
`segments` stands for the interface only: a row is one text, RivalModel moves padding out of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from hsa_ultralong.baselines.state import AllKeyValues, LayerState
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary, rotary_at

_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
# queries that are compared with all keys at once where a mask is needed
_BLOCK = 1024


class Rope(NamedTuple):
    """Frequencies of rotary positions, for layers that rotate at other places than a token's own."""

    head_dim: int
    theta: float
    scaling: dict[str, Any] | None

    def at(self, places: torch.Tensor, dtype: torch.dtype) -> RotaryTable:
        """Angles of places (n,)."""
        return rotary_at(places, self.head_dim, self.theta, dtype, self.scaling)


class SelfAttention(nn.Module):
    """Pre-normed input (B, T, M) -> (B, T, M); subclasses say what a token reads."""

    is_rotary = True

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        use_qk_norm: bool,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normed q (B, T, Hq, D) and k (B, T, Hkv, D), not rotated, and v."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        v = self.v_proj(x).view(heads)
        return (
            self.q_norm(self.q_proj(x).view(heads)).to(v.dtype),
            self.k_norm(self.k_proj(x).view(heads)).to(v.dtype),
            v,
        )

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryTable,
        segments: None = None,
        state: Any = None,
    ) -> torch.Tensor:
        """x (B, T, M) -> (B, T, M); the state is extended."""
        q, k, v = self.project(x)
        if self.is_rotary:
            q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        return self.o_proj(self.attend(q, k, v, state).flatten(-2))

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        """q (B, T, Hq, D), k and v (B, T, Hkv, D) of the new tokens -> (B, T, Hq, D)."""
        raise NotImplementedError

    def new_state(self) -> LayerState:
        """What a cache keeps for this layer, empty."""
        return AllKeyValues()


@contextmanager
def _cudnn_first(is_cuda: bool) -> Iterator[None]:
    if not is_cuda:
        yield
        return
    with sdpa_kernel(_BACKENDS, set_priority=True):
        yield


def repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """Keys or values (B, N, Hkv, D) for every one of `heads` query heads."""
    group = heads // x.shape[2]
    return x if group == 1 else x.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


def sdpa(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, **options: Any
) -> torch.Tensor:
    """torch's attention with heads third: q (B, T, Hq, D), k and v (B, N, Hkv, D), mask (B or 1, Hq or 1, T, N)."""
    k, v = repeated(k, q.shape[2]), repeated(v, q.shape[2])
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask, **options
    )
    return out.transpose(1, 2)


def causal_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Every one of the last T = q.shape[1] tokens reads all keys up to its own: (B, T, Hq, D).

    O(T N) time; memory O(T + N), where keys came before also a mask of 1,024 queries.
    """
    new, total = q.shape[1], k.shape[1]
    if new in (1, total):
        with _cudnn_first(q.is_cuda):
            return sdpa(q, k, v, is_causal=new > 1)
    places = torch.arange(total, device=q.device)
    parts = []
    for start in range(0, new, _BLOCK):
        stop = min(start + _BLOCK, new)
        reach = total - new + stop
        mask = places[:reach] <= places[reach - stop + start : reach, None]  # (t, reach)
        parts.append(sdpa(q[:, start:stop], k[:, :reach], v[:, :reach], mask[None, None]))
    return torch.cat(parts, 1)
