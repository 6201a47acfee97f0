"""Triton kernel that ranks several short lists of scored chunks together, one program a token and retrieval head.

Grid (B * T * Hr,): a program owns the KEPT slots of one row, and programs share nothing. The caller of combine_topk
promises chunk numbers that are disjoint once `offset` is added; triton_combine.py sees to contiguous lists,
ENTRIES >= K0 + .. + K3 and KP >= KEPT, both powers of two. Empty slots (-1) may stand anywhere.
Candidates are the int64 keys of kernel_select.py. Tests: tests/ops/test_combined.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops.chunk_topk.kernel_select import _newest_first, _pack


@triton.jit
def _entries(indices, scores, offset, row, entry, start, K):
    """Candidates of one list of K entries at places start .. of the row, the worst one elsewhere."""
    slot = entry - start
    mine = (slot >= 0) & (slot < K)
    chunk = tl.load(indices + row * K + slot, mask=mine, other=-1)
    ranking = tl.load(scores + row * K + slot, mask=mine, other=0.0)
    return _pack(ranking, tl.maximum(chunk, 0) + offset, chunk >= 0)


@triton.jit(
    do_not_specialize=["offset_0", "offset_1", "offset_2", "offset_3", "KEPT", "K0", "K1", "K2", "K3"],
)
def combine_kernel(
    indices_0, indices_1, indices_2, indices_3, scores_0, scores_1, scores_2, scores_3,
    offset_0, offset_1, offset_2, offset_3, indices, scores, weights, KEPT, K0, K1, K2, K3,
    LISTS: tl.constexpr, ENTRIES: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """The KEPT best of up to four lists in descending order, with their scores and the softmax of these."""
    row = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, ENTRIES)
    keys = _entries(indices_0, scores_0, offset_0, row, entry, 0, K0)
    if LISTS > 1:
        keys = tl.maximum(keys, _entries(indices_1, scores_1, offset_1, row, entry, K0, K1))
    if LISTS > 2:
        keys = tl.maximum(keys, _entries(indices_2, scores_2, offset_2, row, entry, K0 + K1, K2))
    if LISTS > 3:
        keys = tl.maximum(keys, _entries(indices_3, scores_3, offset_3, row, entry, K0 + K1 + K2, K3))
    slot = tl.arange(0, KP)
    chunk, ranking, found = _newest_first(tl.topk(keys, KP), slot, KEPT)
    ranking = tl.where(found, ranking, float("-inf"))
    highest = tl.max(ranking, 0)
    powers = tl.where(found, tl.exp(ranking - tl.where(found, highest, 0.0)), 0.0)
    total = tl.sum(powers, 0)
    place = row * KEPT + slot
    tl.store(indices + place, tl.where(found, chunk, -1), mask=slot < KEPT)
    tl.store(scores + place, ranking, mask=slot < KEPT)
    tl.store(weights + place, powers / tl.where(total == 0.0, 1.0, total), mask=slot < KEPT)
