"""The sliding window's forward on Hopper: launches of kernel_window_hopper.py and of what mends its rows.

Imports gluon, so triton_window.py imports it only where it runs. Tests: tests/ops/test_window_hopper.py.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._launch import PreparedLaunch, are_aligned
from hsa_ultralong.ops._overlap import overlap
from hsa_ultralong.ops._triton import num_processors
from hsa_ultralong.ops.sliding_window.kernel_window_hopper import described, window_forward_kernel
from hsa_ultralong.ops.sliding_window.kernel_window_mend import mend_forward_kernel

# groups of warps of a program (three), places of its ring, registers of a thread
OPTIONS: dict[str, Any] = {"GROUPS": 3, "STAGES": 8, "REGISTERS": 160}
# rows of lse that a program of the mending kernel looks at
_MENDED_ROWS = 1024


class _Plan(NamedTuple):
    kernel: PreparedLaunch
    mend: PreparedLaunch
    tiles: int
    # tokens of a group's tile, and heads
    box: tuple[int, int]


@lru_cache(maxsize=256)
def plan_of(
    shape: tuple[int, ...], kv_heads: int, dtype: torch.dtype, index: int | None, has_segments: bool, is_aligned: bool
) -> _Plan:
    """What follows from the shape of q, and from what Triton compiles anew for."""
    batch, num_queries, num_heads, dim = shape
    group = num_heads // kv_heads
    tiles = batch * kv_heads * -(-num_queries // (OPTIONS["GROUPS"] * 64 // group))
    constants: dict[str, Any] = {"G": group, "HAS_SEGMENTS": has_segments, "num_warps": 4, "is_kept": is_aligned}
    rows = batch * num_queries * num_heads
    return _Plan(
        PreparedLaunch(window_forward_kernel, (min(tiles, num_processors(index)),), **constants, **OPTIONS),
        PreparedLaunch(
            mend_forward_kernel,
            (-(-rows // _MENDED_ROWS),),
            D=dim,
            BN=64,
            ROWS=_MENDED_ROWS,
            **constants,
            **overlap(index),
        ),
        tiles,
        (64 // group, group),
    )


def run_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: tuple[torch.Tensor, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
    sizes: tuple[int, int, int, float],
    has_segments: bool,
) -> None:
    """Fill out (B, Tq, Hq, 64) and lse (B, Tq, Hq) fp32 of contiguous operands; `sizes`: Tq, Tk, window, and the scale
    times log2(e)."""
    kv_heads = k.shape[2]
    plan = plan_of(q.shape, kv_heads, q.dtype, q.device.index, has_segments, are_aligned(*segments, out, lse))
    plan.kernel(
        described(q, *plan.box), described(k, 64, 1), described(v, 64, 1), described(out, *plan.box), lse, *segments,
        *sizes[:3], kv_heads, plan.tiles, sizes[3],
    )  # fmt: skip
    plan.mend(q, k, v, *segments, out, lse, lse.numel(), *sizes, kv_heads)
