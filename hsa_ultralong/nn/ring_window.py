"""The window of a decoding sequence as a ring: shapes and addresses never change, so a step fits into a CUDA graph.

Keys are kept rotated by their place in the sequence, angles from fp64, so that a step rotates one key alone (rotary
attention depends on differences only, fact 8 of docs/architecture.md). Used by inference/engine.py through
WindowAttention; tests/inference/test_engine.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch

from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary
from hsa_ultralong.ops._common import accumulation_dtype, matmul_wide

# rows from which on a step that is not compiled multiplies matrices
_MANY_ROWS = 8


class RingWindow:
    """Keys and values (B, Hkv, W, D) of the last W tokens of every sequence; the token at place p is in slot p % W.

    `places` (B,) int64 is shared by all layers: the place of the token at hand, in the numbering of the window.
    """

    def __init__(
        self, places: torch.Tensor, *, window: int, heads: int, dim: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.places, self.window = places, window
        shape = (places.shape[0], heads, window, dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def first(self, batch: int, places: torch.Tensor) -> RingWindow:
        """The ring of the first rows, whose places are these, as views."""
        part = copy(self)
        part.places, part.keys, part.values = places, self.keys[:batch], self.values[:batch]
        return part

    def load(self, row: int, keys: torch.Tensor, values: torch.Tensor, rotary: RotaryTable, seen: int) -> None:
        """Take the last of keys (not rotated) and values (n, Hkv, D) of `seen` tokens; `rotary` of those n."""
        count = min(len(keys), self.window)
        if len(keys) < min(seen, self.window):
            raise ValueError(f"a window of {self.window} needs the last {min(seen, self.window)} keys, got {len(keys)}")
        slots = torch.arange(seen - count, seen, device=keys.device) % self.window
        turned = apply_rotary(keys, rotary).to(self.keys.dtype)
        self.keys[row, :, slots] = turned[len(keys) - count :].transpose(0, 1)
        self.values[row, :, slots] = values[len(keys) - count :].transpose(0, 1).to(self.values.dtype)

    def load_rows(
        self, rows: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, rotary: RotaryTable, places: torch.Tensor
    ) -> None:
        """Rows (n,) take keys (not rotated) and values (n, kept, Hkv, D) of the last tokens at places (n, kept), at
        most the window's; `rotary` is of all places. A place below 0 stands for no token."""
        turned = apply_rotary(keys.flatten(0, 1), rotary).view_as(keys)
        is_real, slots = (places >= 0)[..., None, None], places % self.window
        for target, part in ((self.keys, turned), (self.values, values)):
            target[rows[:, None], :, slots] = torch.where(is_real, part, 0.0).to(target.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rotary: RotaryTable) -> torch.Tensor:
        """One token of every sequence: q (B, 1, Hq, D), k and v (B, 1, Hkv, D), rotary of the B places; as q."""
        batch, heads, _, dim = self.keys.shape
        # sequences stand where apply_rotary expects tokens
        q, k = (apply_rotary(part.transpose(0, 1), rotary).transpose(0, 1).to(v.dtype) for part in (q, k))
        rows, slots = torch.arange(batch, device=q.device), self.places % self.window
        self.keys[rows, :, slots] = k[:, 0]
        self.values[rows, :, slots] = v[:, 0]
        is_filled = torch.arange(self.window, device=q.device) <= self.places[:, None]  # (B, W)
        if batch >= _MANY_ROWS and not torch.compiler.is_compiling():
            return self._attend_many(q, is_filled).to(v.dtype)
        # one query a sequence: sums over products fuse better than tiny matrix products, and stay in fp32
        wide = accumulation_dtype(v.dtype)
        grouped = q.view(batch, heads, -1, 1, dim).to(wide)  # (B, Hkv, G, 1, D)
        scores = (grouped * self.keys[:, :, None].to(wide)).sum(-1) * dim**-0.5  # (B, Hkv, G, W)
        weights = scores.masked_fill(~is_filled[:, None, None], -torch.inf).softmax(-1)
        out = (weights[..., None] * self.values[:, :, None].to(wide)).sum(-2)  # (B, Hkv, G, D)
        return out.to(v.dtype).view(q.shape)

    def _attend_many(self, q: torch.Tensor, is_filled: torch.Tensor) -> torch.Tensor:
        """The same for many rows, where all products of a step would not fit into the card's caches."""
        batch, heads, _, dim = self.keys.shape
        grouped = q.view(batch * heads, -1, dim)  # (B * Hkv, G, D)
        scores = matmul_wide(grouped, self.keys.flatten(0, 1).transpose(1, 2)) * dim**-0.5  # (B * Hkv, G, W)
        hidden = ~is_filled.repeat_interleave(heads, 0)[:, None]  # (B * Hkv, 1, W)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        return matmul_wide(weights, self.values.flatten(0, 1)).view(q.shape)


class RingWindows:
    """The rings of all layers, None for a layer without a window; options are those of RingWindow."""

    def __init__(self, places: torch.Tensor, windows: Sequence[int], **options: Any) -> None:
        self.places = places
        self.rings = [RingWindow(places, window=window, **options) if window else None for window in windows]

    def first(self, batch: int) -> RingWindows:
        """The rings of the first rows, as views."""
        part = copy(self)
        part.places = self.places[:batch]
        part.rings = [None if ring is None else ring.first(batch, part.places) for ring in self.rings]
        return part

    @property
    def length(self) -> int:
        return max((ring.window for ring in self.rings if ring is not None), default=0)

    def state(self, layer: int) -> RingWindow | None:
        return self.rings[layer]
