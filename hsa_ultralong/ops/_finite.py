"""Shared by Triton kernels: a look at sums that costs a few instructions. Imports triton: for kernels only."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spoil_of(sums):
    """0 if all numbers of a tile are finite, else NaN: zero times them is not zero."""
    return tl.sum(tl.sum(sums * 0.0, 1), 0)


@triton.jit
def is_spoiled(sums):
    """Whether a row of a tile has numbers that are not finite. One answer for the tile would have to pass through
    shared memory, which takes 2% of a forward."""
    return tl.sum(sums * 0.0, 1) != 0.0


@triton.jit
def hidden_zero(spoil):
    """0 where `spoil` is NaN, which the compiler does not know. Added to the addresses of a pass that mostly does not
    run, it keeps the compiler from preparing them before, at the cost of registers in the loops of the usual pass."""
    return (spoil == spoil).to(tl.int32)
