"""Streaming top-k for small K: sorted blocks of candidates merge into a sorted list that stays in registers.

The alternative to kernel_select.select_kernel where KP is at most 32. A tile of 64 queries on 4 warps keeps every row
of scores inside one warp (wgmma), so sorting needs no shared memory; the landmarks to walk are bounded once per tile;
and few new candidates are inserted one by one, which is what most blocks of a long memory bring.
Tests: tests/ops/test_chunk_topk_triton.py.

Grid (tiles of BT tokens, Hr, B), as select_kernel, with the same owner and needs; KP is from 2 to 32, which
triton_topk.py sees to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops.chunk_topk.kernel_select import (
    _REAL,
    _WORST,
    _gumbel,
    _load_slab,
    _newest_first,
    _pack,
    _products,
    _visible,
)


@triton.jit
def _reach(
    query_segment, query_position, chunk_segment, chunk_end, C, segment, position, is_real,
    FOREIGN: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """First and last + 1 chunk that a tile might see, from the extremes of its tokens: a bound, found in O(C)."""
    counts = is_real & (segment != -1)
    lowest = tl.min(tl.where(counts, segment, 0x7FFFFFFF), 0)
    highest = tl.max(tl.where(counts, segment, -1), 0)
    furthest = tl.max(tl.where(counts, position, -0x80000000), 0)
    first = tl.full((STEP,), 0x7FFFFFFF, tl.int32)
    last = tl.zeros((STEP,), tl.int32)
    for start in range(0, C, STEP):
        chunk = start + tl.arange(0, STEP)
        ends = tl.load(chunk_end + chunk, mask=chunk < C, other=0)
        owners = tl.load(chunk_segment + chunk, mask=chunk < C, other=-2)
        near = (owners >= lowest) & (owners <= highest) & (ends <= furthest)
        if FOREIGN == 1:
            near = near | (owners >= 0)
        near = (near | (owners == -1)) & (owners != -2)
        first = tl.minimum(first, tl.where(near, chunk, 0x7FFFFFFF))
        last = tl.maximum(last, tl.where(near, chunk + 1, 0))
    last = tl.where(highest >= 0, tl.max(last, 0), 0)
    return tl.minimum(tl.min(first, 0), last), last


@triton.jit(do_not_specialize=["T", "C", "seed", "first_token"])
def merge_select_kernel(
    query, landmarks, query_segment, query_position, chunk_segment, chunk_end, factor, indices, scores,
    T, C, K, HR, seed, first_token,
    R: tl.constexpr, RP: tl.constexpr, RS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
    FOREIGN: tl.constexpr, NOISE: tl.constexpr, LANDMARK_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr,
    FEW: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The K best visible chunks of BT tokens: blocks of landmarks stream past an ascending list of KP candidates."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # late tokens see more: start with them
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    is_real = token < T
    scale = tl.load(factor + hr)
    if NOISE == 2:
        seed = tl.load(seed).to(tl.int32)
    rows = query + ((b * T + token) * HR + hr) * R
    queries = _load_slab(rows, is_real, 0, R, RS)
    segment = tl.load(query_segment + b * T + token, mask=is_real, other=-1)
    position = tl.load(query_position + b * T + token, mask=is_real, other=0)
    if LANDMARK_ROWS:
        landmarks += b * C * HR * R
    if CHUNK_ROWS:
        chunk_segment += b * C
        chunk_end += b * C
    landmarks += hr * R
    first, last = _reach(
        query_segment, query_position, chunk_segment, chunk_end, C, segment, position, is_real, FOREIGN, 512
    )
    slot = tl.arange(0, KP)[None, :]
    # empty places differ from each other, so that a candidate replaces one of them
    best = _REAL - KP + tl.zeros((BT, KP), tl.int64) + slot
    # a candidate must beat the worst that its row keeps
    bar = tl.full((BT,), _REAL - KP, tl.int64)
    disorder = tl.zeros((), tl.int32)
    for start in tl.range(first // BC * BC, last, BC, num_stages=STAGES):
        chunk = start + tl.arange(0, BC)
        exists = chunk < C
        columns = landmarks + chunk.to(tl.int64) * (HR * R)
        ranking = _products(queries, rows, is_real, columns, exists, R, RP, RS, PRECISION) * scale
        if NOISE:
            ranking += _gumbel(seed, b, first_token + token[:, None], hr, chunk[None, :])
        ends = tl.load(chunk_end + chunk, mask=exists, other=0)
        owners = tl.load(chunk_segment + chunk, mask=exists, other=-2)
        mask = _visible(segment[:, None], position[:, None], owners[None, :], ends[None, :], FOREIGN)
        keys = _pack(ranking, chunk[None, :], mask)
        fresh = tl.max(tl.sum((keys > bar[:, None]).to(tl.int32), 1), 0)
        if fresh > FEW:
            if disorder > 0:
                best = tl.sort(best)
            # one list ascends, the other descends: their larger halves are the KP best, in bitonic order
            best = tl.bitonic_merge(tl.maximum(best, tl.topk(keys, KP)))
            disorder = tl.zeros((), tl.int32)
            bar = tl.min(best, 1)
        else:
            rounds = fresh
            while rounds > 0:
                most = tl.max(keys, 1)
                best = tl.where((best == bar[:, None]) & (most > bar)[:, None], most[:, None], best)
                bar = tl.min(best, 1)
                keys = tl.where(keys == most[:, None], _WORST, keys)
                rounds -= 1
            disorder += fresh
    best = tl.sort(best)
    chosen, ranking, found = _newest_first(best, KP - 1 - slot, K)
    place = ((b * T + token[:, None]) * HR + hr) * K + slot
    kept = is_real[:, None] & (slot < K)
    tl.store(indices + place, tl.where(found, chosen, -1), mask=kept)
    tl.store(scores + place, tl.where(found, ranking, float("-inf")), mask=kept)
