"""A Triton kernel for the softmax of a slice of logits: the loss of every token and d loss / d logits, from one program
a row that finds the maximum and the sum in a first pass over the row and forms the slopes in a second.

A row of 100,278 logits has 401 KB. The first HELD of them stay in registers, the next KEPT are asked to stay in the L2
cache, so the second pass reads the rest alone again from memory. Timed: docs/kernels.md.
tests/ops/test_linear_cross_entropy.py.

Grid: any number of programs, which take rows in turn; a program owns the elements of slope and losses of its rows.
Needed: contiguous logits (rows, padded) fp32, int64 labels, HELD <= vocab. A label that is no column makes its loss NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

# below every finite logit's exponent in fp32; stands for "none yet"
_LEAST = tl.constexpr(-3.4e38)


@triton.jit
def _joined(top, total, x):
    """Maximum and sum of exponentials, lane by lane, with one more logit each."""
    above = tl.maximum(top, x)
    return above, total * tl.exp(top - above) + tl.exp(x - above)


@triton.jit
def _load(own, place, vocab, padded, policy: tl.constexpr):
    """Logits; -inf from vocab on. The mask of the load lets numbers that lie together come together."""
    x = tl.load(own + place, mask=place < padded, other=0.0, eviction_policy=policy)
    return tl.where(place < vocab, x, -float("inf"))


@triton.jit
def _slopes(x, norm, is_label, is_kept):
    return tl.where(is_kept, tl.exp(x - norm) - is_label.to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["rows", "ignored"])
def slope_kernel(
    logits, labels, slope, losses, rows, vocab, padded, ignored,
    HELD: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses (rows,) fp32 and slope (rows, padded); columns from vocab on get zeros, as do rows that are ignored."""
    lane = tl.arange(0, BLOCK)
    column = tl.arange(0, HELD if HELD else 1)
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * padded
    own, target = logits + program * padded, slope + program * padded
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        label = tl.load(labels + row)
        is_kept = label != ignored
        top = tl.full((BLOCK,), _LEAST, tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        if HELD:
            held = tl.load(own + column, eviction_policy="evict_first")
        for first in range(HELD, HELD + KEPT, BLOCK):
            x = _load(own, first + lane, vocab, padded, "evict_last")
            top, total = _joined(top, total, x)
        for first in range(HELD + KEPT, vocab, BLOCK):
            x = _load(own, first + lane, vocab, padded, "evict_first")
            top, total = _joined(top, total, x)
        most = tl.max(top, 0)
        if HELD:
            most = tl.maximum(most, tl.max(held, 0))
        sum_of_all = tl.sum(total * tl.exp(top - most), 0)
        if HELD:
            sum_of_all += tl.sum(tl.exp(held - most), 0)
        norm = most + tl.log(sum_of_all)
        is_column = (label >= 0) & (label < vocab)
        chosen = tl.load(own + label, mask=is_column & is_kept, other=float("nan"))
        tl.store(losses + row, tl.where(is_kept, norm - chosen, 0.0))
        if HELD:
            tl.store(target + column, _slopes(held, norm, column == label, is_kept), cache_modifier=".cs")
        for first in range(HELD, padded, BLOCK):
            place = first + lane
            x = _load(own, place, vocab, padded, "evict_first")
            tl.store(target + place, _slopes(x, norm, place == label, is_kept), place < padded, cache_modifier=".cs")
        own += step
        target += step
