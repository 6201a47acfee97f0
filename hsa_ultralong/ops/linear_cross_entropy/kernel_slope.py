"""A Triton kernel for the softmax of a slice of logits: the loss of every token and d loss / d logits, from one program
a row that finds the maximum and the sum in a first pass over the row and forms the slopes in a second.

A row of 100,278 logits has 401 KB, the rows of all programs about as much as the L2 cache holds: what the first pass
reads is asked to stay. Timed: docs/kernels.md. tests/ops/test_linear_cross_entropy.py.

Grid: any number of programs, which take rows in turn; a program owns the elements of slope and losses of its rows.
Needed: contiguous logits (rows, padded) fp32, int64 labels. A label that is no column makes its loss NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

# below every finite number of fp32 that matters; stands for "none yet"
_LEAST = tl.constexpr(-3.4e38)


@triton.jit
def _load(own, place, vocab, padded, policy: tl.constexpr):
    """Logits; -inf from vocab on. The mask of the load lets numbers that lie together come together."""
    x = tl.load(own + place, mask=place < padded, other=0.0, eviction_policy=policy)
    return tl.where(place < vocab, x, -float("inf"))


@triton.jit(do_not_specialize=["rows", "ignored"])
def slope_kernel(
    logits, labels, slope, losses, rows, vocab, padded, ignored, STEPS: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """losses (rows,) fp32 and slope (rows, padded); columns from vocab on get zeros, as do rows that are ignored."""
    # numbers of a block that one thread holds lie below each other
    place = tl.arange(0, STEPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    program = tl.program_id(0).to(tl.int64)
    step = tl.num_programs(0).to(tl.int64) * padded
    own, target = logits + program * padded, slope + program * padded
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        label = tl.load(labels + row)
        is_kept = label != ignored
        top = tl.full((LANES,), _LEAST, tl.float32)
        total = tl.zeros((LANES,), tl.float32)
        for first in range(0, vocab, STEPS * LANES):
            x = _load(own, first + place, vocab, padded, "evict_last")
            above = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - above) + tl.sum(tl.exp(x - above[None, :]), 0)
            top = above
        most = tl.max(top, 0)
        norm = most + tl.log(tl.sum(total * tl.exp(top - most), 0))
        is_column = (label >= 0) & (label < vocab)
        chosen = tl.load(own + label, mask=is_column & is_kept, other=float("nan"))
        tl.store(losses + row, tl.where(is_kept, norm - chosen, 0.0))
        for first in range(0, padded, STEPS * LANES):
            column = first + place
            x = _load(own, column, vocab, padded, "evict_first")
            value = tl.where(is_kept, tl.exp(x - norm) - (column == label).to(tl.float32), 0.0)
            tl.store(target + column, value, column < padded, cache_modifier=".cs")
        own += step
        target += step
