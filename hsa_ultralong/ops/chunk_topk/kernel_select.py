"""Triton kernels of chunk_topk: scores of a tile of queries against blocks of landmarks, masked, ranked and kept.

A candidate is one int64: the fp32 ranking, mapped so that integers sort like it, above the complement of the chunk
index; so larger is better and ties go to the lower index. What is invisible or not finite lies below _REAL.
Derivation: README.md of this folder.

Grids: select_kernel and cover_kernel (tiles of BT tokens, Hr, B), a program owns the K slots of its tokens in one head;
kept_scores_kernel (B * T * Hr,), one row. Programs share nothing they write. Needed, and seen to by triton_topk.py:
contiguous operands, int32 segments and ends, KP >= K and BC >= KP powers of two, R in slabs of RS. The caller of
chunk_topk owes nothing: any landmarks, any visibility. Slots leave by descending chunk, empty ones (-1) last.
"""

from __future__ import annotations

import triton
import triton.language as tl

FOREIGN_NUMBER = {"hidden": 0, "past": 1}
# NOISE: none; its seed a number; its seed an int64 at an address, which may change between replays of a graph
NOISE_NUMBER = {"none": 0, "given": 1, "stored": 2}
_WORST = tl.constexpr(-(2**63))
_INDEX_MASK = tl.constexpr(0x7FFFFFFF)
# added to a mapped ranking: what is not finite, above and below, lands at the bottom
_TURN = tl.constexpr(0x00800000)
# the least candidate of a visible chunk with a finite ranking
_REAL = tl.constexpr((-(2**31) + 0x01000000) << 32)


@triton.jit
def _visible(segment, position, chunk_segment, chunk_end, FOREIGN: tl.constexpr):
    """visibility.ChunkVisibility.mask: query values broadcast against chunk values."""
    mask = (chunk_segment == segment) & (chunk_end <= position)
    if FOREIGN == 1:
        mask = mask | ((chunk_segment != segment) & (chunk_segment >= 0))
    mask = mask | (chunk_segment == -1)
    return mask & (segment != -1) & (chunk_segment != -2)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _gumbel(seed, b, token, hr, chunk):
    """noise.gumbel_noise: token and chunk broadcast."""
    state = _mix(b.to(tl.uint32) + seed.to(tl.uint32, bitcast=True))
    state = _mix(state + token.to(tl.uint32))
    state = _mix(state + hr.to(tl.uint32))
    state = _mix(state + chunk.to(tl.uint32))
    uniform = ((state >> 9).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _pack(ranking, chunk, mask):
    """Candidates; those of invisible chunks, and rankings that are not finite, are below _REAL."""
    bits = (ranking + 0.0).to(tl.int32, bitcast=True)  # + 0.0 removes -0.0
    ordered = tl.where(bits < 0, bits ^ _INDEX_MASK, bits) + _TURN
    ordered = tl.where(mask, ordered, -0x80000000)
    return (ordered.to(tl.int64) << 32) | (chunk ^ _INDEX_MASK).to(tl.int64)


@triton.jit
def _ranking(ordered):
    """The ranking that _pack mapped to these int32."""
    ordered -= _TURN
    bits = tl.where(ordered < 0, ordered ^ _INDEX_MASK, ordered)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _newest_first(best, slot, K):
    """The first K candidates (sorted) in descending chunk index: (index, ranking, whether there is one)."""
    chunk = (best & _INDEX_MASK) ^ _INDEX_MASK
    is_real = (slot < K) & (best >= _REAL)
    by_index = tl.sort(tl.where(is_real, (chunk << 32) | ((best >> 32) & 0xFFFFFFFF), _WORST), descending=True)
    return (by_index >> 32).to(tl.int32), _ranking(by_index.to(tl.int32)), by_index != _WORST


@triton.jit
def _load_slab(rows, real, slab, R: tl.constexpr, RS: tl.constexpr):
    """Columns slab .. slab + RS of the rows at these pointers, zeros outside."""
    dims = slab + tl.arange(0, RS)
    return tl.load(rows[:, None] + dims[None, :], mask=real[:, None] & (dims < R)[None, :], other=0.0)


@triton.jit
def _products(
    queries,
    rows,
    is_real,
    columns,
    exists,
    R: tl.constexpr,
    RP: tl.constexpr,
    RS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """<query, landmark> in fp32, RS dimensions at a time; `queries` are the first of them, at `rows` lie all."""
    product = tl.dot(queries, tl.trans(_load_slab(columns, exists, 0, R, RS)), input_precision=PRECISION)
    for slab in tl.static_range(RS, RP, RS):
        more = _load_slab(rows, is_real, slab, R, RS)
        block = _load_slab(columns, exists, slab, R, RS)
        product = tl.dot(more, tl.trans(block), product, input_precision=PRECISION)
    return product


@triton.jit(do_not_specialize=["T", "C", "seed", "first_token"])
def select_kernel(
    query, landmarks, query_segment, query_position, chunk_segment, chunk_end, factor, indices, scores,
    T, C, K, HR, seed, first_token,
    R: tl.constexpr, RP: tl.constexpr, RS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, KP: tl.constexpr,
    FOREIGN: tl.constexpr, NOISE: tl.constexpr, LANDMARK_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The K best visible chunks of BT tokens: blocks of landmarks stream past a sorted list of KP candidates."""
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
    best = tl.full((BT, KP), _WORST, tl.int64)
    for start in range(0, C, BC):
        chunk = start + tl.arange(0, BC)
        exists = chunk < C
        ends = tl.load(chunk_end + chunk, mask=exists, other=0)
        owners = tl.load(chunk_segment + chunk, mask=exists, other=-2)
        mask = _visible(segment[:, None], position[:, None], owners[None, :], ends[None, :], FOREIGN)
        if tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0:
            columns = landmarks + chunk.to(tl.int64) * (HR * R)
            ranking = _products(queries, rows, is_real, columns, exists, R, RP, RS, PRECISION) * scale
            if NOISE:
                ranking += _gumbel(seed, b, first_token + token[:, None], hr, chunk[None, :])
            keys = _pack(ranking, chunk[None, :], mask)
            # both lists descend: their larger halves, one reversed, are the KP best of all
            best = tl.sort(tl.maximum(best, tl.flip(tl.topk(keys, KP), 1)), descending=True)
    slot = tl.arange(0, KP)[None, :]
    chosen, ranking, found = _newest_first(best, slot, K)
    place = ((b * T + token[:, None]) * HR + hr) * K + slot
    kept = is_real[:, None] & (slot < K)
    tl.store(indices + place, tl.where(found, chosen, -1), mask=kept)
    tl.store(scores + place, tl.where(found, ranking, float("-inf")), mask=kept)


@triton.jit
def kept_scores_kernel(
    query, landmarks, factor, indices, scores, T, C, K, HR,
    R: tl.constexpr, RP: tl.constexpr, RS: tl.constexpr, BK: tl.constexpr, LANDMARK_ROWS: tl.constexpr,
):  # fmt: skip
    """factor * <query, landmark> of the kept pairs of one token: the scores without the noise of the choice."""
    row = tl.program_id(0).to(tl.int64)  # (b * T + t) * HR + hr
    b = row // HR // T
    hr = row % HR
    if LANDMARK_ROWS:
        landmarks += b * C * HR * R
    scale = tl.load(factor + hr)
    for start in range(0, K, BK):
        slot = start + tl.arange(0, BK)
        chunk = tl.load(indices + row * K + slot, mask=slot < K, other=-1)
        found = chunk >= 0
        columns = landmarks + (chunk.to(tl.int64) * HR + hr) * R
        score = tl.zeros((BK,), tl.float32)
        for slab in tl.static_range(0, RP, RS):
            dims = slab + tl.arange(0, RS)
            q = tl.load(query + row * R + dims, mask=dims < R, other=0.0).to(tl.float32)
            score += tl.sum(_load_slab(columns, found, slab, R, RS).to(tl.float32) * q[None, :], 1)
        score *= scale
        tl.store(scores + row * K + slot, tl.where(found, score, float("-inf")), mask=slot < K)


@triton.jit(do_not_specialize=["T", "C", "K"])
def cover_kernel(
    query, landmarks, query_segment, query_position, chunk_segment, chunk_end, factor, indices, scores,
    T, C, K, HR,
    R: tl.constexpr, RP: tl.constexpr, RS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    FOREIGN: tl.constexpr, LANDMARK_ROWS: tl.constexpr, CHUNK_ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Full coverage, K >= C: every visible chunk goes to the slot that the newer ones leave; nothing is ranked."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    is_real = token < T
    scale = tl.load(factor + hr)
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
    row = ((b * T + token) * HR + hr) * K
    filled = tl.zeros((BT,), tl.int32)
    blocks = tl.cdiv(C, BC)
    for number in range(0, blocks):
        chunk = (blocks - 1 - number) * BC + tl.arange(0, BC)
        exists = chunk < C
        ends = tl.load(chunk_end + chunk, mask=exists, other=0)
        owners = tl.load(chunk_segment + chunk, mask=exists, other=-2)
        mask = _visible(segment[:, None], position[:, None], owners[None, :], ends[None, :], FOREIGN)
        if tl.max(tl.max(mask.to(tl.int32), 1), 0) > 0:
            columns = landmarks + chunk.to(tl.int64) * (HR * R)
            score = _products(queries, rows, is_real, columns, exists, R, RP, RS, PRECISION) * scale
            mask = mask & (tl.abs(score) < float("inf"))
            seen = mask.to(tl.int32)
            total = tl.sum(seen, 1)
            slot = filled[:, None] + total[:, None] - tl.cumsum(seen, 1)
            filled += total
            tl.store(indices + row[:, None] + slot, tl.broadcast_to(chunk[None, :], (BT, BC)), mask=mask)
            tl.store(scores + row[:, None] + slot, score, mask=mask)
    empty = tl.arange(0, BC)
    for start in range(0, K, BC):
        slot = start + empty[None, :]
        place = row[:, None] + slot
        is_empty = is_real[:, None] & (slot >= filled[:, None]) & (slot < K)
        tl.store(indices + place, tl.full((BT, BC), -1, tl.int32), mask=is_empty)
        tl.store(scores + place, tl.full((BT, BC), float("-inf"), tl.float32), mask=is_empty)
