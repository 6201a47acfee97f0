"""Triton kernels of chunk_topk for few queries: score all landmarks once for all queries, rank shares, merge.

Candidates are the int64 keys of kernel_select.py. The landmarks stream past once for up to BQ queries of a head; the
scan keeps every candidate, the best one of every program's share, and in each share the best one of every lane (chunks
that are equal modulo TILE). Then one program a query goes down: the K best shares, in them the K best lanes, in them
the K best candidates. Derivation: README.md of this folder.

choose_kernel takes the place of finish_kernel after the scan of kernel_hopper.py, whose shares are few, and so many
that one of them seldom holds two of the K best candidates.

Grids: scan_kernel (shares of SHARE chunks, rows of the landmarks * Hr, queries / BQ), a program owns the candidates
of its share and queries; finish_kernel and choose_kernel (queries,), one row of slots. Needed, and seen to by
triton_topk.py: SHARE a multiple of TILE, padded_chunks = shares * SHARE, and that the second launch follows the first
on one stream.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._overlap import begin
from hsa_ultralong.ops.chunk_topk.kernel_select import (
    _INDEX_MASK,
    _REAL,
    _WORST,
    _load_slab,
    _newest_first,
    _pack,
    _products,
    _ranking,
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


@triton.jit
def _compact(candidates, passed, target, before, LIMIT: tl.constexpr):
    """The candidates (rows, columns) that passed, column by column, to places before .. LIMIT of target; how many there
    are now. A column lies in one thread."""
    count = passed.to(tl.int32)
    columns = tl.sum(count, 0)
    place = before + (tl.cumsum(columns, 0) - columns)[None, :] + tl.cumsum(count, 0) - 1
    tl.store(target + place, candidates, mask=passed & (place < LIMIT))
    return before + tl.sum(columns, 0)


@triton.jit
def _rank_few(candidates, count, K, indices, scores, LIMIT: tl.constexpr, KP: tl.constexpr):
    """The K best of `count` <= LIMIT candidates into their slots: every one counts those above it."""
    place = tl.arange(0, LIMIT)
    best = tl.load(candidates + place, mask=place < count, other=_WORST)
    better = tl.sum((best[:, None] > best[None, :]).to(tl.int32), 0)
    kept = (better < K) & (best >= _REAL)
    chunk = tl.where(kept, (best & _INDEX_MASK) ^ _INDEX_MASK, -1).to(tl.int32)
    newer = tl.sum((chunk[:, None] > chunk[None, :]).to(tl.int32), 0)
    tl.store(indices + newer, chunk, mask=kept)
    tl.store(scores + newer, _ranking((best >> 32).to(tl.int32)), mask=kept)
    slot = tl.arange(0, KP)
    is_empty = (slot >= count) & (slot < K)
    tl.store(indices + slot, tl.full((KP,), -1, tl.int32), mask=is_empty)
    tl.store(scores + slot, tl.full((KP,), float("-inf"), tl.float32), mask=is_empty)


@triton.jit
def _rank_many(
    keys, lane_tops, tops, indices, scores, C, K, steps, KP: tl.constexpr, SHARES: tl.constexpr, TILE: tl.constexpr
):
    """The K best candidates of one query into their slots, from the best of all shares down as in finish_kernel."""
    best = tl.topk(tops, KP)
    share = ((best & _INDEX_MASK) ^ _INDEX_MASK) // TILE % SHARES
    lane = tl.arange(0, TILE)
    best = tl.load(lane_tops + share[:, None] * TILE + lane[None, :], mask=(lane >= 0)[None, :], other=_WORST)
    best = tl.topk(tl.reshape(best, (KP * TILE,)), KP)
    first = ((best & _INDEX_MASK) ^ _INDEX_MASK) % (SHARES * TILE)
    best = tl.full((KP,), _WORST, tl.int64)
    for start in range(0, steps, 16):
        chunk = first[:, None] + (start + tl.arange(0, 16))[None, :] * (SHARES * TILE)
        found = tl.load(keys + chunk, mask=chunk < C, other=_WORST)
        found = tl.topk(tl.reshape(found, (KP * 16,)), KP)
        best = tl.sort(tl.maximum(best, tl.flip(found, 0)), descending=True)
    slot = tl.arange(0, KP)
    index, ranking, is_found = _newest_first(best, slot, K)
    tl.store(indices + slot, tl.where(is_found, index, -1), mask=slot < K)
    tl.store(scores + slot, tl.where(is_found, ranking, float("-inf")), mask=slot < K)


@triton.jit
def _look_through(
    keys, lane_tops, least, spare, C, steps,
    SHARES: tl.constexpr, TILE: tl.constexpr, LIMIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The candidates from `least` on of one query, by way of the lanes that hold one, to LIMIT places behind LIMIT
    others; how many there are, or more than LIMIT."""
    column = tl.arange(0, WIDTH)[None, :]
    count = 0
    for start in range(0, SHARES * TILE, 4 * WIDTH):
        lane = tl.load(lane_tops + start + tl.arange(0, 4)[:, None] * WIDTH + column)
        count = _compact(lane, lane >= least, spare, count, LIMIT)
    if count <= LIMIT:
        tl.debug_barrier()
        place = column % LIMIT
        best = tl.load(spare + place, mask=place < count, other=_WORST)
        first = ((best & _INDEX_MASK) ^ _INDEX_MASK) % (SHARES * TILE)
        count = 0
        for start in range(0, steps, 4 * (WIDTH // LIMIT)):
            step = start + tl.arange(0, 4)[:, None] * (WIDTH // LIMIT) + column // LIMIT
            chunk = first + step * (SHARES * TILE)
            found = tl.load(keys + chunk, mask=(best >= least) & (chunk < C), other=_WORST)
            count = _compact(found, found >= least, spare + LIMIT, count, LIMIT)
    return count


@triton.jit(do_not_specialize=["C", "K", "steps", "rows_per_part"])
def choose_kernel(
    keys, lane_tops, share_tops, spare, indices, scores, C, K, steps, padded_chunks, rows_per_part, HR,
    KP: tl.constexpr, SHARES: tl.constexpr, TILE: tl.constexpr, LISTED: tl.constexpr, LIMIT: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Indices and scores of one query, K <= KP <= SHARES. The K best candidates are not below the K-th best among the
    best of all shares, and few others are not: those are ranked against each other. `share_tops` has the LISTED best of
    every share and what none of its others is above: if a share may have more such candidates, lanes are looked
    through, and more than LIMIT are sought from the shares down. A share holds the chunks of every SHARES-th tile.
    spare: two rows of LIMIT candidates."""
    begin(OVERLAPS)
    row = tl.program_id(0).to(tl.int64)  # (row of the landmarks * HR + hr) * rows_per_part + query
    keys += row * padded_chunks
    lane_tops += row * (SHARES * TILE)
    share_tops += row * ((LISTED + 1) * SHARES)
    spare += row * (2 * LIMIT)
    share = tl.arange(0, SHARES)
    entry = tl.load(share_tops + tl.arange(0, LISTED * SHARES)[None, :])
    tops = tl.load(share_tops + share)
    others = tl.max(tl.load(share_tops + LISTED * SHARES + share), 0)
    better = tl.sum((tops[:, None] > tops[None, :]).to(tl.int32), 0)
    least = tl.maximum(tl.max(tl.where(better == K - 1, tops, _WORST), 0), _REAL)
    if others < least:
        count = _compact(entry, entry >= least, spare, 0, LIMIT)
    else:
        count = _look_through(keys, lane_tops, least, spare, C, steps, SHARES, TILE, LIMIT, LISTED * SHARES)
        spare += LIMIT
    part = row // rows_per_part
    target = (((part // HR) * rows_per_part + row % rows_per_part) * HR + part % HR) * K
    indices += target
    scores += target
    tl.debug_barrier()
    if count <= LIMIT // 2:
        _rank_few(spare, count, K, indices, scores, LIMIT // 2, KP)
    elif count <= LIMIT:
        _rank_few(spare, count, K, indices, scores, LIMIT, KP)
    else:
        _rank_many(keys, lane_tops, tops, indices, scores, C, K, steps, KP, SHARES, TILE)
