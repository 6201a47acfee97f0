"""Triton kernels in the order of chunks: one chunk against the tokens that selected it (kernel_lists.InverseLists).

A unit is a part of a chunk's list; its sums go to a workspace in fp32 and are added in order by a second kernel, so
results repeat bit for bit. For full coverage the tokens follow from the position of the chunk and no list exists.
After kernel_hopper.py, which takes all gradients in one pass, slot_sum_kernel adds up what pairs add to dq.
Derivation: README.md of this folder.

Grids: listed_memory_gradient_kernel (units, Hkv / Hr) and covered_memory_gradient_kernel (C * splits, Hkv, B), a
program owns one place of the workspace; slot_sum_kernel (B * tokens of a part, Hkv), the G rows of dq, and dw in empty
slots; listed_sum_kernel (lists of a part, Hkv / Hr) and covered_sum_kernel (C, Hkv, rows of the memory), one chunk of
dk and dv. The sums follow on the same stream.
Needed: units that cover every list in order (kernel_lists.inverse_lists), the sizes of kernel_tiles.py, and for CAUSAL
its promise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._finite import hidden_zero, spoil_of
from hsa_ultralong.ops._overlap import begin
from hsa_ultralong.ops.hsa.kernel_exact import exact_memory_gradient
from hsa_ultralong.ops.hsa.kernel_tiles import _dot, chunk_softmax


@triton.jit
def _load_chunk(k, v, place, columns, lengths, chunk, HAS_LENGTHS: tl.constexpr):
    """Keys and values of one chunk, zeros in slots without a token, which may hold anything."""
    if HAS_LENGTHS:
        is_present = (columns < tl.load(lengths + chunk))[:, None]
        return tl.load(k + place, mask=is_present, other=0.0), tl.load(v + place, mask=is_present, other=0.0)
    return tl.load(k + place), tl.load(v + place)


@triton.jit
def _unit_of(unit, number, pair_starts, unit_ends, C, HR, unit_pairs):
    """Chunk, retrieval head and row of the memory of list `number`, and which pairs are those of this unit of it."""
    first_unit = tl.load(unit_ends + number - 1, mask=number > 0, other=0)
    first = tl.load(pair_starts + number) + (unit - first_unit) * unit_pairs
    stop = tl.minimum(first + unit_pairs, tl.load(pair_starts + number + 1))
    return number % C, (number // C) % HR, (number // C // HR).to(tl.int64), first, stop


@triton.jit
def _store_sums(partial, place, grad_k, grad_v, S: tl.constexpr, D: tl.constexpr):
    """dK and dV of a program at its place of the workspace."""
    target = partial + place * (2 * S * D) + tl.arange(0, S)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(target, grad_k)
    tl.store(target + S * D, grad_v)


@triton.jit
def _accumulate(
    grad_k, grad_v, keys, values, row_offset, is_real, w,
    q, grad_out, lengths, chunk, columns, dims, scale,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of rows (token, head) to the sums of one chunk; also dz (rows, S) and delta (rows,)."""
    operand = row_offset[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    upward = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
    logits = _dot(queries, tl.trans(keys), None, PRECISION)
    slope = _dot(upward, tl.trans(values), None, PRECISION)
    p, inverse, _ = chunk_softmax(logits, columns, lengths, chunk, scale, HAS_LENGTHS)
    delta = tl.sum(p * slope, 1) * inverse
    share = w * inverse
    # one multiplication and addition for each of slope - delta times the share
    dz = (p * (slope * share[:, None] - (delta * share)[:, None])).to(keys.dtype)
    p = (p * share[:, None]).to(values.dtype)
    grad_v = _dot(tl.trans(p), upward, grad_v, PRECISION)
    grad_k = _dot(tl.trans(dz), queries, grad_k, PRECISION)
    return grad_k, grad_v, dz, delta


@triton.jit
def _accumulate_transposed(
    grad_k, grad_v, keys, values, row_offset, is_real, w, norm, delta,
    q, grad_out, lengths, chunk, columns, dims, scale,
    D: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same as _accumulate where the rows' logsumexp and delta are known: tiles lie as (S, rows), so probabilities
    go from one product to the next in registers and nothing is summed over rows."""
    operand = row_offset[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    upward = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
    p = tl.exp2(_dot(keys, tl.trans(queries), None, PRECISION) * scale - norm[None, :])
    if HAS_LENGTHS:
        p = tl.where((columns < tl.load(lengths + chunk))[:, None], p, 0.0)
    p = p * w[None, :]
    grad_v = _dot(p.to(values.dtype), upward, grad_v, PRECISION)
    dz = p * (_dot(values, tl.trans(upward), None, PRECISION) - delta[None, :])
    grad_k = _dot(dz.to(keys.dtype), queries, grad_k, PRECISION)
    return grad_k, grad_v


@triton.jit
def listed_memory_gradient_kernel(
    q, k, v, weights, lengths, grad_out, norms, deltas, pairs, pair_starts, unit_ends, unit_lists, partial,
    C, K, lists, unit_pairs, scale,
    HKV, HR, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk over the pairs of one unit, into partial (units, Hkv / Hr, 2, S, D) fp32. norms, deltas:
    of query_gradient_kernel, or None."""
    begin(OVERLAPS)
    unit = tl.program_id(0).to(tl.int64)
    number = tl.load(unit_lists + unit)  # (memory row, retrieval head, chunk)
    if number >= lists:
        return
    chunk, hr, row, first, stop = _unit_of(unit, number, pair_starts, unit_ends, C, HR, unit_pairs)
    kv_head = hr + tl.program_id(1) * HR
    rows = tl.arange(0, BT * GP)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    tile_kv = ((row * C + chunk) * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    if LENGTH_BATCH:
        lengths += row * C
    keys, values = _load_chunk(k, v, tile_kv, columns, lengths, chunk, HAS_LENGTHS)
    grad_k = tl.zeros((S, D), tl.float32)
    grad_v = tl.zeros((S, D), tl.float32)
    head = kv_head * G + rows % GP
    for start in tl.range(first, stop, BT, num_stages=STAGES):
        place = start + rows // GP
        is_real = (place < stop) & (rows % GP < G)
        pair = tl.load(pairs + place, mask=is_real, other=0)
        w = tl.load(weights + pair, mask=is_real, other=0.0).to(tl.float32)
        row_offset = (pair // (K * HR)).to(tl.int64) * (HKV * G) + head
        # all of these rows chose the chunk: what is not finite reaches nothing that it should not
        if norms is None:
            grad_k, grad_v, _, _ = _accumulate(
                grad_k, grad_v, keys, values, row_offset, is_real, w,
                q, grad_out, lengths, chunk, columns, dims, scale, D, HAS_LENGTHS, PRECISION,
            )  # fmt: skip
        else:
            own = ((pair // (K * HR)).to(tl.int64) * HKV + kv_head) * (K * G) + (pair % K) * G + rows % GP
            grad_k, grad_v = _accumulate_transposed(
                grad_k, grad_v, keys, values, row_offset, is_real, w,
                tl.load(norms + own, mask=is_real, other=0.0), tl.load(deltas + own, mask=is_real, other=0.0),
                q, grad_out, lengths, chunk, columns, dims, scale, D, HAS_LENGTHS, PRECISION,
            )  # fmt: skip
    _store_sums(partial, unit * tl.num_programs(1) + tl.program_id(1), grad_k, grad_v, S, D)


@triton.jit
def slot_sum_kernel(
    parts, indices, grad_q, grad_weights, first_token, part_tokens, T, K, HKV, HR,
    G: tl.constexpr, D: tl.constexpr, N: tl.constexpr, KP: tl.constexpr, STEP: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dq of one token and memory head: the sum of what its slots add, in order. Empty slots have dw = 0."""
    begin(OVERLAPS)
    local = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    token = local // part_tokens * T + first_token + local % part_tokens
    place = tl.arange(0, N)
    slots = tl.arange(0, KP)
    indices += (token * HR + kv_head % HR) * K
    is_empty = tl.load(indices + slots, mask=slots < K, other=0) < 0
    tl.store(grad_weights + (token * HKV + kv_head) * K + slots, tl.zeros((KP,), tl.float32), mask=is_empty)
    parts += (local * HKV + kv_head) * K * (G * D) + place
    total = tl.zeros((N,), tl.float32)
    # STEP loads at a time are under way: one by one they take three times as long
    for first in range(0, K, STEP):
        for turn in tl.static_range(STEP):
            slot = tl.minimum(first + turn, K - 1)
            size = tl.where((tl.load(indices + slot) >= 0) & (first + turn < K), G * D, 0)
            total += tl.load(parts + slot * (G * D), mask=place < size, other=0.0).to(tl.float32)
    target = grad_q + (token * HKV + kv_head) * (G * D) + place
    tl.store(target, total.to(grad_q.dtype.element_ty), mask=place < G * D)


@triton.jit
def covered_memory_gradient_kernel(
    q, k, v, weights, lengths, grad_out, slot_map, partial,
    T, C, K, splits, unit_tokens, scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk over tokens split * unit_tokens .. of row b, into partial (B, Hkv, C, splits, 2, S, D)."""
    begin(OVERLAPS)
    chunk = tl.program_id(0) // splits
    split = tl.program_id(0) % splits
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    hr = kv_head % HR
    first = split * unit_tokens
    stop = tl.minimum(first + unit_tokens, T)
    if CAUSAL:
        first = tl.maximum(first, (chunk + 1) * S // BT * BT)
    rows = tl.arange(0, BT * GP)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    kv_row = b if KV_BATCH else b * 0
    tile_kv = ((kv_row * C + chunk) * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    if LENGTH_BATCH:
        lengths += b * C
    keys, values = _load_chunk(k, v, tile_kv, columns, lengths, chunk, HAS_LENGTHS)
    slot_map += ((b * HR + hr) * C + chunk) * T
    grad_k = tl.zeros((S, D), tl.float32)
    grad_v = tl.zeros((S, D), tl.float32)
    head = kv_head * G + rows % GP
    for start in tl.range(first, stop, BT, num_stages=STAGES):
        token = start + rows // GP
        is_real = (token < stop) & (rows % GP < G)
        slot = tl.load(slot_map + token, mask=is_real, other=-1)
        w = tl.load(weights + ((b * T + token) * HR + hr) * K + slot, mask=slot >= 0, other=0.0).to(tl.float32)
        row_offset = (b * T + token) * (HKV * G) + head
        grad_k, grad_v, _, _ = _accumulate(
            grad_k, grad_v, keys, values, row_offset, is_real, w,
            q, grad_out, lengths, chunk, columns, dims, scale, D, HAS_LENGTHS, PRECISION,
        )  # fmt: skip
    spoil = spoil_of(grad_k + grad_v)
    if spoil != 0.0:
        nothing = hidden_zero(spoil)
        memory = ((kv_row * C + chunk) * S + nothing) * (HKV * D) + kv_head * D
        grad_k, grad_v = exact_memory_gradient(
            q, k + memory, v + memory, weights, lengths, grad_out, slot_map + nothing,
            tl.zeros((D, S), tl.float32), tl.zeros((D, S), tl.float32), chunk, first, stop, scale,
            b, hr, kv_head, T, K, HKV, HR, G, D, S, HAS_LENGTHS,
        )  # fmt: skip
        grad_k, grad_v = tl.trans(grad_k), tl.trans(grad_v)
    _store_sums(partial, ((b * HKV + kv_head) * C + chunk) * splits + split, grad_k, grad_v, S, D)


@triton.jit
def listed_sum_kernel(
    partial, unit_ends, sums, grad_k, grad_v, part, lists, C, logit_scale,
    HKV, HR, D: tl.constexpr, S: tl.constexpr, GROUPS: tl.constexpr, ADDS: tl.constexpr, IS_LAST: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk: the sum of its units, each of GROUPS places, in order. Of several parts of the tokens,
    each of `lists` lists, all but the last leave it in sums (2, Bk, C * S, Hkv, D) fp32, and all but the first (ADDS)
    begin with what is there."""
    begin(OVERLAPS)
    number = tl.program_id(0)
    share = tl.program_id(1)
    chunk = number % C
    hr = (number // C) % HR
    row = (number // C // HR).to(tl.int64)
    own = part * lists + number
    before = tl.load(unit_ends + part * lists - 1, mask=part > 0, other=0)
    first = tl.load(unit_ends + own - 1, mask=own > 0, other=0) - before
    stop = tl.load(unit_ends + own) - before
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    tile = columns[:, None] * D + dims[None, :]
    target = ((row * C + chunk) * S + columns[:, None]) * (HKV * D) + (hr + share * HR) * D + dims[None, :]
    # all of the keys' gradients, (Bk, C * S, Hkv, D)
    size = (tl.num_programs(0) // HR).to(tl.int64) * (S * HKV * D)
    sum_k = tl.zeros((S, D), tl.float32)
    sum_v = tl.zeros((S, D), tl.float32)
    if ADDS:
        sum_k = tl.load(sums + target)
        sum_v = tl.load(sums + size + target)
    place = partial + (first.to(tl.int64) * tl.num_programs(1) + share) * (GROUPS * 2 * S * D) + tile
    for _ in range(first, stop):
        for group in tl.static_range(GROUPS):
            sum_k += tl.load(place + group * (2 * S * D))
            sum_v += tl.load(place + group * (2 * S * D) + S * D)
        place += tl.num_programs(1) * (GROUPS * 2 * S * D)
    if IS_LAST:
        tl.store(grad_k + target, (sum_k * logit_scale).to(grad_k.dtype.element_ty))
        tl.store(grad_v + target, sum_v.to(grad_v.dtype.element_ty))
    else:
        tl.store(sums + target, sum_k)
        tl.store(sums + size + target, sum_v)


@triton.jit
def covered_sum_kernel(
    partial, grad_k, grad_v, B, C, splits, unit_tokens, logit_scale,
    HKV, KV_BATCH: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr, CAUSAL: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk: the sum over rows (for a shared memory) and splits, in order."""
    begin(OVERLAPS)
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    rows = 1 if KV_BATCH else B
    first = (chunk + 1) * S // BT * BT // unit_tokens if CAUSAL else 0
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    tile = columns[:, None] * D + dims[None, :]
    sum_k = tl.zeros((S, D), tl.float32)
    sum_v = tl.zeros((S, D), tl.float32)
    place = partial + (((row * HKV + kv_head) * C + chunk) * splits + first) * (2 * S * D) + tile
    row_step = row * 0 + HKV * C * splits * (2 * S * D)  # int64
    for b in range(rows):
        for split in range(splits - first):
            sum_k += tl.load(place + b * row_step + split * (2 * S * D))
            sum_v += tl.load(place + b * row_step + split * (2 * S * D) + S * D)
    target = ((row * C + chunk) * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    tl.store(grad_k + target, (sum_k * logit_scale).to(grad_k.dtype.element_ty))
    tl.store(grad_v + target, sum_v.to(grad_v.dtype.element_ty))
