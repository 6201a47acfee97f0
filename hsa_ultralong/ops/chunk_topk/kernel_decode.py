"""Triton kernels of chunk_topk for few queries: score all landmarks once for all queries, rank shares, merge.

Candidates are the int64 keys of kernel_select.py. The landmarks stream past once for up to BQ queries of a head; the
scan keeps every candidate, the best one of every program's share, and in each share the best one of every lane (chunks
that are equal modulo TILE). Then one program a query goes down: the K best shares, in them the K best lanes, in them
the K best candidates. Derivation: README.md of this folder.

Grids: scan_kernel (shares of SHARE chunks, rows of the landmarks * Hr, queries / BQ), a program owns the candidates
of its share and queries; finish_kernel (queries,), one row of slots. Needed, and seen to by triton_topk.py: SHARE a
multiple of TILE, padded_chunks = shares * SHARE, and that the second launch follows the first on one stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops.chunk_topk.kernel_select import (
    _INDEX_MASK,
    _REAL,
    _WORST,
    _load_slab,
    _newest_first,
    _pack,
    _products,
    _visible,
)

# numbers that two digits of 8 bits hold: 127 * 256
_LARGEST = tl.constexpr(32512.0)


@triton.jit
def _digits(rows, is_real, is_high, R: tl.constexpr, RP: tl.constexpr):
    """Queries at `rows` as 16-bit fixed point: their high or low digits (rows, RP) int8, and what one unit is worth.
    A query that is not finite has units of infinite worth, so that none of its scores is finite."""
    numbers = _load_slab(rows, is_real, 0, R, RP).to(tl.float32)
    step = tl.max(tl.where(numbers == numbers, tl.abs(numbers), float("inf")), 1) / _LARGEST
    whole = tl.floor(numbers / tl.where(step == 0.0, 1.0, step)[:, None] + 0.5).to(tl.int32)
    high = (whole + 128) >> 8
    digits = tl.where(is_high[:, None], high, whole - high * 256).to(tl.int8)
    return digits, tl.where(is_high, step * 256.0, step)


@triton.jit(do_not_specialize=["C", "queries"])
def scan_kernel(
    query, landmarks, query_segment, query_position, chunk_segment, chunk_end, factor,
    row_scales, keys, lane_tops, share_tops, C, HR, queries, padded_chunks,
    R: tl.constexpr, RP: tl.constexpr, RS: tl.constexpr, BQ: tl.constexpr, TILE: tl.constexpr, SHARE: tl.constexpr,
    FOREIGN: tl.constexpr, LANDMARK_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Candidates (rows of the landmarks, HR, queries, padded_chunks) of SHARE chunks for BQ of the `queries` tokens
    that share the landmarks; the best of the share, and of its chunks at every lane (chunk modulo TILE). 8-bit
    landmarks have row_scales (rows, C, HR), and meet both digits of BQ queries in one product of 2 * BQ rows."""
    split = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)  # (row of the landmarks, head)
    hr = part % HR
    b = part // HR
    number = tl.program_id(2) * BQ + tl.arange(0, BQ)
    is_real = number < queries
    token = b * queries + number
    rows = query + (token * HR + hr) * R
    scale = tl.load(factor + hr)
    if HAS_SCALES:
        row = tl.arange(0, 2 * BQ)
        wanted = tl.program_id(2) * BQ + row % BQ
        q, worth = _digits(query + ((b * queries + wanted) * HR + hr) * R, wanted < queries, row < BQ, R, RP)
    else:
        q = _load_slab(rows, is_real, 0, R, RS)
    segment = tl.load(query_segment + token, mask=is_real, other=-1)
    position = tl.load(query_position + token, mask=is_real, other=0)
    if LANDMARK_ROWS:
        landmarks += b * C * HR * R
        row_scales += b * C * HR
    if CHUNK_ROWS:
        chunk_segment += b * C
        chunk_end += b * C
    row = part * queries + number
    keys += (row * padded_chunks)[:, None]
    best = tl.full((BQ, TILE), _WORST, tl.int64)
    for start in tl.range(split * SHARE, split * SHARE + SHARE, TILE, num_stages=STAGES):
        chunk = start + tl.arange(0, TILE)
        exists = chunk < C
        columns = landmarks + (chunk.to(tl.int64) * HR + hr) * R
        if HAS_SCALES:
            products = tl.dot(q, tl.trans(_load_slab(columns, exists, 0, R, RP)), out_dtype=tl.int32)
            products = products.to(tl.float32) * worth[:, None]
            ranking = tl.sum(tl.reshape(products, (2, BQ, TILE)), 0)
            row_scale = tl.load(row_scales + chunk.to(tl.int64) * HR + hr, mask=exists, other=0.0)
            ranking *= row_scale.to(tl.float32)[None, :]
        else:
            ranking = _products(q, rows, is_real, columns, exists, R, RP, RS, PRECISION)
        ends = tl.load(chunk_end + chunk, mask=exists, other=0)
        owners = tl.load(chunk_segment + chunk, mask=exists, other=-2)
        ranking *= scale
        mask = _visible(segment[:, None], position[:, None], owners[None, :], ends[None, :], FOREIGN)
        found = _pack(ranking, chunk[None, :], mask)
        tl.store(keys + chunk[None, :], found, mask=is_real[:, None])
        best = tl.maximum(best, found)
    lane = tl.arange(0, TILE)[None, :]
    tl.store(lane_tops + ((row * tl.num_programs(0) + split) * TILE)[:, None] + lane, best, mask=is_real[:, None])
    tl.store(share_tops + row * tl.num_programs(0) + split, tl.max(best, 1), mask=is_real)


@triton.jit(do_not_specialize=["shares", "rows_per_part"])
def finish_kernel(
    keys, lane_tops, share_tops, indices, scores, shares, padded_chunks, K, rows_per_part, HR,
    KP: tl.constexpr, SHARES: tl.constexpr, KS: tl.constexpr, KL: tl.constexpr,
    SHARE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Indices and scores of one query: the K best shares by their best candidate hold the K best lanes, and these the
    K best candidates; a candidate says where it comes from."""
    row = tl.program_id(0).to(tl.int64)  # (row of the landmarks * HR + hr) * rows_per_part + query
    entry = tl.arange(0, SHARES)
    best = tl.topk(tl.load(share_tops + row * shares + entry, mask=entry < shares, other=_WORST), KS)
    share = ((best & _INDEX_MASK) ^ _INDEX_MASK) // SHARE  # (KS,)
    lane = tl.arange(0, TILE)
    best = tl.load(
        lane_tops + (row * shares + share)[:, None] * TILE + lane[None, :],
        mask=(best >= _REAL)[:, None] & (lane >= 0)[None, :], other=_WORST,
    )  # fmt: skip
    best = tl.topk(tl.reshape(best, (KS * TILE,)), KL)
    chunk = (best & _INDEX_MASK) ^ _INDEX_MASK  # (KL,)
    first = chunk // SHARE * SHARE + chunk % TILE
    step = tl.arange(0, SHARE // TILE)
    best = tl.load(
        keys + row * padded_chunks + first[:, None] + step[None, :] * TILE,
        mask=(best >= _REAL)[:, None] & (step >= 0)[None, :], other=_WORST,
    )  # fmt: skip
    best = tl.topk(tl.reshape(best, (KL * (SHARE // TILE),)), KP)
    slot = tl.arange(0, KP)
    chunk, ranking, found = _newest_first(best, slot, K)
    part = row // rows_per_part
    place = ((part // HR) * rows_per_part + row % rows_per_part) * HR + part % HR
    tl.store(indices + place * K + slot, tl.where(found, chunk, -1), mask=slot < K)
    tl.store(scores + place * K + slot, tl.where(found, ranking, float("-inf")), mask=slot < K)
