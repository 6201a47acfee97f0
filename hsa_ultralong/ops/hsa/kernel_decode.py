"""Triton kernel for few query tokens: one program per token, memory head and share of the slots; their sums add up."""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops.hsa.kernel_tiles import _dot, chunk_softmax


@triton.jit(do_not_specialize=["first_chunk"])
def decode_kernel(
    q, k, v, weights, indices, lengths, partial,
    T, C, K, per_program, first_chunk, scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial (splits, B, T, Hq, D) fp32: the share of slots split * per_program .. of every token."""
    token = tl.program_id(0).to(tl.int64)  # b * T + t
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    b = token // T
    hr = kv_head % HR
    heads = tl.arange(0, GP)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    row_offset = token * (HKV * G) + kv_head * G + heads
    operand = row_offset[:, None] * D + dims[None, :]
    is_real = (heads < G)[:, None]
    queries = tl.load(q + operand, mask=is_real, other=0.0)
    kv_row = b if KV_BATCH else b * 0
    tile_kv = (kv_row * C * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    if LENGTH_BATCH:
        lengths += b * C
    list_row = (token * HR + hr) * K
    acc = tl.zeros((GP, D), tl.float32)
    first = split * per_program
    for slot in tl.range(first, tl.minimum(first + per_program, K), num_stages=STAGES):
        chunk = tl.load(indices + list_row + slot) - first_chunk
        chunk = tl.where(chunk < C, chunk, -1)
        w = tl.where(chunk >= 0, tl.load(weights + list_row + slot).to(tl.float32), 0.0)
        start = tile_kv + chunk.to(tl.int64) * (S * HKV * D)
        is_kept = (columns * 0 + chunk >= 0)[:, None]  # an empty slot reads nothing
        keys = tl.load(k + start, mask=is_kept, other=0.0)
        values = tl.load(v + start, mask=is_kept, other=0.0)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        p, inverse = chunk_softmax(logits, columns, lengths, tl.maximum(chunk, 0), scale, HAS_LENGTHS)
        p = p * (w * inverse)[:, None]
        acc = _dot(p.to(values.dtype), values, acc, PRECISION)
    tl.store(partial + split.to(tl.int64) * tl.num_programs(0) * (HKV * G * D) + operand, acc, mask=is_real)
