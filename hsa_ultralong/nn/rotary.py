"""Rotary position embedding from local indices, angles formed in fp64 (fact 8 of docs/architecture.md).

Rotary attention depends on differences of positions only and windows are short, so angles come from the index inside
the current call (cached keys are kept unrotated and rotated at use): exact at any absolute position. Su et al. 2021.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class RotaryTable(NamedTuple):
    """cos and sin of every local index, (T, D / 2) each."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotary_table(length: int, head_dim: int, theta: float, device: torch.device, dtype: torch.dtype) -> RotaryTable:
    """Angles index * theta^(-2j / D), formed in fp64, stored in fp32 (fp64 for fp64 models)."""
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency  # (T, D / 2)
    return RotaryTable(angle.cos().to(stored), angle.sin().to(stored))


def apply_rotary(x: torch.Tensor, table: RotaryTable) -> torch.Tensor:
    """Rotate x (..., T, H, D) by the angles of indices 0..T-1 of `table`; pairs are (j, j + D / 2)."""
    length = x.shape[-3]
    cos, sin = (part[:length, None] for part in table)  # (T, 1, D / 2)
    left, right = x.to(cos.dtype).chunk(2, dim=-1)
    turned = (torch.addcmul(left * cos, right, sin, value=-1), torch.addcmul(right * cos, left, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def tail(table: RotaryTable, start: int) -> RotaryTable:
    """The table from index `start` on."""
    return RotaryTable(table.cos[start:], table.sin[start:])
