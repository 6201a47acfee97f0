"""Windows alone, and windows with the first tokens of the row beside them. tests/baselines/test_rivals.py."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hsa_ultralong.baselines.attention import Rope, SelfAttention, sdpa
from hsa_ultralong.baselines.state import LastKeyValues
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary
from hsa_ultralong.ops import sliding_window_attention

# tokens whose bands of keys are laid out at once
_PIECE = 1 << 15


class Window(SelfAttention):
    """Token t reads tokens t - W + 1 .. t (Beltagy et al. 2020).

    O(T W) time and memory; the cache holds W - 1 tokens, whatever the length.
    """

    def __init__(self, *, window: int, **heads: Any) -> None:
        super().__init__(**heads)
        self.window = window

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        if state is not None:
            k, v = state.extend(k, v)
        return sliding_window_attention(q, k, v, window=self.window)

    def new_state(self) -> LastKeyValues:
        return LastKeyValues(self.window - 1)


class WindowAndSinks(SelfAttention):
    """Token t reads its window and the first A tokens of the row in one softmax, places counted inside what is read
    (Xiao et al. 2023, StreamingLLM): from t = A + W on, the sinks stand directly before the window.

    O(T (W + A)) time and memory; the cache holds W - 1 + A tokens.
    """

    is_rotary = False  # keys of sinks and of the window are rotated apart

    def __init__(self, *, window: int, num_sinks: int, rope: Rope, **heads: Any) -> None:
        super().__init__(**heads)
        self.window, self.num_sinks, self.rope = window, num_sinks, rope

    def forward(self, x: torch.Tensor, rotary: RotaryTable, segments: None = None, state: Any = None) -> torch.Tensor:
        q, k, v = self.project(x)
        start, new = 0 if state is None else state.length, x.shape[1]
        # a sink's key needs no rotation beyond its own place, which is what it has in the row
        near_k = apply_rotary(k, rotary)
        sink_k, sink_v = near_k[:, : self.num_sinks], v[:, : self.num_sinks]
        if state is not None:
            near_k, v = state.extend(near_k, v)
            sink_k, sink_v = state.first_keys, state.first_values
        places = torch.arange(start, start + new, device=x.device)
        far = self.rope.at(places.clamp_max(self.window + self.num_sinks - 1), x.dtype)
        near_q, far_q = apply_rotary(q, rotary), apply_rotary(q, far)
        out = attend_sinks(near_q, far_q, near_k, v, sink_k, sink_v, window=self.window, start=start)
        return self.o_proj(out.flatten(-2))

    def new_state(self) -> LastKeyValues:
        return LastKeyValues(self.window - 1, self.num_sinks)


def attend_sinks(
    near_q: torch.Tensor, far_q: torch.Tensor, near_k: torch.Tensor, v: torch.Tensor, sink_k: torch.Tensor,
    sink_v: torch.Tensor, *, window: int, start: int,
) -> torch.Tensor:  # fmt: skip
    """One softmax over two kinds of keys: their dimensions stand beside each other, zero in the other's place.

    near_q, far_q: (B, T, Hq, D), rotated for the window and for the sinks. near_k, v: (B, n + T, Hkv, D), n before the
    T new tokens. sink_k, sink_v: (B, A, Hkv, D). start: place of the first new token.
    """
    dim = near_q.shape[-1]
    q = torch.cat((near_q, far_q), -1)  # (B, T, Hq, 2 D)
    near_k, sink_k = F.pad(near_k, (0, dim)), F.pad(sink_k, (dim, 0))
    new, reach = q.shape[1], window - 1
    # the first key of the first band stands `reach` before the first query
    missing = reach - (near_k.shape[1] - new)
    near_k, v = (F.pad(x, (0, 0, 0, 0, max(missing, 0), 0))[:, max(-missing, 0) :] for x in (near_k, v))
    parts = []
    for first in range(0, new, _PIECE):
        stop = min(first + _PIECE, new)
        keys, values = near_k[:, first : stop + reach], v[:, first : stop + reach]
        parts.append(_piece(q[:, first:stop], keys, values, sink_k, sink_v, window, start + first))
    return torch.cat(parts, 1)


def _piece(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink_k: torch.Tensor, sink_v: torch.Tensor, window: int,
    start: int,
) -> torch.Tensor:  # fmt: skip
    """Blocks of queries, each with the band of keys that it reads, as rows of one batch."""
    batch, new, _, width2 = q.shape
    block = min(max(64, window), new)
    count, width = -(-new // block), block + window - 1
    right = count * block - new
    queries = F.pad(q, (0, 0, 0, 0, 0, right)).unflatten(1, (count, block)).flatten(0, 1)  # (B nb, b, Hq, 2 D)
    k, v = (
        F.pad(x, (0, 0, 0, 0, 0, right)).unfold(1, width, block).movedim(-1, 2).flatten(0, 1) for x in (k, v)
    )  # (B nb, b + W - 1, Hkv, ...)
    sink_k, sink_v = (x.repeat_interleave(count, 0) for x in (sink_k, sink_v))
    t = start + torch.arange(count * block, device=q.device).view(count, block, 1)
    near = t[:, :1] - (window - 1) + torch.arange(width, device=q.device)  # (nb, 1, b + W - 1)
    in_window = (near >= 0) & (near <= t) & (near > t - window)
    # a sink that is still in the window counts there
    in_sinks = torch.arange(sink_k.shape[1], device=q.device) <= t - window
    mask = torch.cat((in_sinks, in_window), -1).repeat(batch, 1, 1)[:, None]  # (B nb, 1, b, A + b + W - 1)
    out = sdpa(queries, torch.cat((sink_k, k), 1), torch.cat((sink_v, v), 1), mask, scale=(width2 // 2) ** -0.5)
    return out.unflatten(0, (batch, count)).flatten(1, 2)[:, :new]
