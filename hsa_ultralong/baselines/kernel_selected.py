"""Triton kernels of attention by one softmax over chosen chunks, or over compressed blocks that have ended.

Key j ends at place j * STRIDE + SIZE - 1 and is read by tokens from there on (STRIDE = SIZE = 1: plain causal); with
HAS_CHOSEN only where `mask` (B, Hs, C, T), a byte a token, says so, C chunks of BN keys, and by the lists of chunks of
a tile of BT tokens, or of tiles of a chunk, that triton_selected.py makes. tests/baselines/test_triton_selected.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

# the end of a key that does not exist
NEVER = tl.constexpr(2**31 - 1)


@triton.jit
def _reads(mask, chunk, token, is_real, num_queries, HAS_CHOSEN: tl.constexpr):
    """Which tokens of a tile have chosen the chunk."""
    if HAS_CHOSEN:
        return tl.load(mask + chunk.to(tl.int64) * num_queries + token, mask=is_real, other=0) != 0
    return is_real


@triton.jit
def forward_kernel(
    q, k, v, mask, lists, counts, out, lse, num_queries, num_keys, num_chunks, start, scale, HEADS, HKV, HS,
    D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr, SIZE: tl.constexpr,
    HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, T, Hq, D), 0 where nothing is read, and lse (B, T, Hq), to base 2, +inf there."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # those that read most begin first
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    is_real = token < num_queries
    place = start + token
    dims = tl.arange(0, D)
    row = (b * num_queries + token) * HEADS + head
    queries = tl.load(q + row[:, None] * D + dims[None, :], mask=is_real[:, None], other=0.0)
    kv_head = head * HKV // HEADS
    k += (b * num_keys * HKV + kv_head) * D
    v += (b * num_keys * HKV + kv_head) * D
    chooser = b * HS + head * HS // HEADS
    mask += chooser * num_chunks * num_queries
    last = start + tl.minimum(tile * BT + BT, num_queries) - 1
    count = tl.cdiv(tl.minimum(tl.maximum(last + 1 - SIZE + STRIDE, 0) // STRIDE, num_keys), BN)
    if HAS_CHOSEN:
        one = chooser * tl.num_programs(0) + tile
        lists += one * num_chunks
        count = tl.load(counts + one)
    acc = tl.zeros((BT, D), tl.float32)
    top = tl.full((BT,), float("-inf"), tl.float32)
    total = tl.zeros((BT,), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = i
        if HAS_CHOSEN:
            chunk = tl.load(lists + i)
        key = chunk * BN + tl.arange(0, BN)
        pointers = key.to(tl.int64)[:, None] * (HKV * D) + dims[None, :]
        exists = (key < num_keys)[:, None]
        keys = tl.load(k + pointers, mask=exists, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        end = tl.where(key < num_keys, key * STRIDE + SIZE - 1, NEVER)
        reads = _reads(mask, chunk, token, is_real, num_queries, HAS_CHOSEN)
        seen = (end[None, :] <= place[:, None]) & reads[:, None]
        logits = tl.where(seen, logits * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        values = tl.load(v + pointers, mask=exists, other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None], input_precision=PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = highest
    is_read = total > 0.0
    total = tl.where(is_read, total, 1.0)
    result = acc / total[:, None]
    tl.store(out + row[:, None] * D + dims[None, :], result.to(out.dtype.element_ty), mask=is_real[:, None])
    tl.store(lse + row, tl.where(is_read, top + tl.log2(total), float("inf")), mask=is_real)


@triton.jit
def query_gradient_kernel(
    q, k, v, mask, lists, counts, upward, lse, deltas, grad_q, num_queries, num_keys, num_chunks, start, scale,
    logit_scale, HEADS, HKV, HS, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr,
    SIZE: tl.constexpr, HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, T, Hq, D); deltas (B, T, Hq): products of out with its gradient, `upward`."""
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    token = tile * BT + tl.arange(0, BT)
    is_real = token < num_queries
    place = start + token
    dims = tl.arange(0, D)
    row = (b * num_queries + token) * HEADS + head
    operand = row[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    slopes = tl.load(upward + operand, mask=is_real[:, None], other=0.0)
    sums = tl.load(lse + row, mask=is_real, other=float("inf"))
    delta = tl.load(deltas + row, mask=is_real, other=0.0)
    kv_head = head * HKV // HEADS
    k += (b * num_keys * HKV + kv_head) * D
    v += (b * num_keys * HKV + kv_head) * D
    chooser = b * HS + head * HS // HEADS
    mask += chooser * num_chunks * num_queries
    last = start + tl.minimum(tile * BT + BT, num_queries) - 1
    count = tl.cdiv(tl.minimum(tl.maximum(last + 1 - SIZE + STRIDE, 0) // STRIDE, num_keys), BN)
    if HAS_CHOSEN:
        one = chooser * tl.num_programs(0) + tile
        lists += one * num_chunks
        count = tl.load(counts + one)
    acc = tl.zeros((BT, D), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = i
        if HAS_CHOSEN:
            chunk = tl.load(lists + i)
        key = chunk * BN + tl.arange(0, BN)
        pointers = key.to(tl.int64)[:, None] * (HKV * D) + dims[None, :]
        exists = (key < num_keys)[:, None]
        keys, values = tl.load(k + pointers, mask=exists, other=0.0), tl.load(v + pointers, mask=exists, other=0.0)
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        slope = tl.dot(slopes, tl.trans(values), input_precision=PRECISION)
        end = tl.where(key < num_keys, key * STRIDE + SIZE - 1, NEVER)
        reads = _reads(mask, chunk, token, is_real, num_queries, HAS_CHOSEN)
        seen = (end[None, :] <= place[:, None]) & reads[:, None]
        p = tl.where(seen, tl.exp2(logits * scale - sums[:, None]), 0.0)
        dz = p * (slope - delta[:, None])
        acc = tl.dot(dz.to(keys.dtype), keys, acc, input_precision=PRECISION)
    tl.store(grad_q + operand, (acc * logit_scale).to(grad_q.dtype.element_ty), mask=is_real[:, None])


@triton.jit
def key_gradient_kernel(
    q, k, v, mask, lists, counts, upward, lse, deltas, grad_k, grad_v, num_queries, num_keys, num_chunks, start, scale,
    logit_scale, HEADS, HKV, HS, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, STRIDE: tl.constexpr,
    SIZE: tl.constexpr, HAS_CHOSEN: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv (B, N, Hkv, D) of the BN keys of a chunk, over the heads that read them."""
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    key = chunk * BN + tl.arange(0, BN)
    exists = (key < num_keys)[:, None]
    end = tl.where(key < num_keys, key * STRIDE + SIZE - 1, NEVER)
    dims = tl.arange(0, D)
    operand = ((b * num_keys + key)[:, None] * HKV + kv_head) * D + dims[None, :]
    keys, values = tl.load(k + operand, mask=exists, other=0.0), tl.load(v + operand, mask=exists, other=0.0)
    sum_k = tl.zeros((BN, D), tl.float32)
    sum_v = tl.zeros((BN, D), tl.float32)
    tiles = tl.cdiv(num_queries, BT)
    group = HEADS // HKV
    for head in range(kv_head * group, kv_head * group + group):
        chooser = b * HS + head * HS // HEADS
        # the first tile with a token that sees the chunk's first key
        first = tl.maximum(chunk * BN * STRIDE + SIZE - 1 - start, 0) // BT
        count = tl.maximum(tiles - first, 0)
        if HAS_CHOSEN:
            count = tl.load(counts + chooser * num_chunks + chunk)
        for i in tl.range(0, count, num_stages=STAGES):
            tile = first + i
            if HAS_CHOSEN:
                tile = tl.load(lists + (chooser * num_chunks + chunk) * tiles + i)
            token = tile * BT + tl.arange(0, BT)
            is_real = token < num_queries
            row = (b * num_queries + token) * HEADS + head
            place = row[:, None] * D + dims[None, :]
            queries = tl.load(q + place, mask=is_real[:, None], other=0.0)
            slopes = tl.load(upward + place, mask=is_real[:, None], other=0.0)
            sums = tl.load(lse + row, mask=is_real, other=float("inf"))
            delta = tl.load(deltas + row, mask=is_real, other=0.0)
            logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)  # (BN, BT)
            slope = tl.dot(values, tl.trans(slopes), input_precision=PRECISION)
            reads = _reads(mask + chooser * num_chunks * num_queries, chunk, token, is_real, num_queries, HAS_CHOSEN)
            seen = (end[:, None] <= (start + token)[None, :]) & reads[None, :]
            p = tl.where(seen, tl.exp2(logits * scale - sums[None, :]), 0.0)
            dz = p * (slope - delta[None, :])
            sum_v = tl.dot(p.to(slopes.dtype), slopes, sum_v, input_precision=PRECISION)
            sum_k = tl.dot(dz.to(queries.dtype), queries, sum_k, input_precision=PRECISION)
    tl.store(grad_k + operand, (sum_k * logit_scale).to(grad_k.dtype.element_ty), mask=exists)
    tl.store(grad_v + operand, sum_v.to(grad_v.dtype.element_ty), mask=exists)
