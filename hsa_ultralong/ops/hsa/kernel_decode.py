"""Triton kernel for few query tokens: one program per token, memory head and share of the slots; their sums add up.

Grid (B * T, Hkv, splits): a program owns the G rows of one share of `partial`, which the caller adds up. Slots
outside 0 <= index - first_chunk < C are empty, whatever their weight. Needed: per_program * splits >= K and GP >= G,
at least 16 (triton_attention.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._finite import hidden_zero, spoil_of
from hsa_ultralong.ops.hsa.kernel_exact import load_tile, row_softmax
from hsa_ultralong.ops.hsa.kernel_tiles import _dot, chunk_softmax


@triton.jit
def _exact_share(
    q, k, v, w_row, indices, lengths, partial, row, first, last, first_chunk, C, chunk_step, head_dims, scale,
    D: tl.constexpr, S: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """Slots first .. last of one row, as in kernel_exact.exact_forward."""
    queries = tl.load(q + row * D + tl.arange(0, D)).to(tl.float32)
    acc = tl.zeros_like(queries)
    for slot in range(first, last):
        chunk = tl.load(indices + slot) - first_chunk
        if (chunk >= 0) & (chunk < C):
            keys = load_tile(k + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
            p = row_softmax(queries, keys, lengths, chunk, scale, S, HAS_LENGTHS) * tl.load(w_row + slot)
            values = load_tile(v + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
            acc += tl.sum(p[None, :] * values, 1)
    tl.store(partial + row * D + tl.arange(0, D), acc)


@triton.jit(do_not_specialize=["T", "C", "K", "per_program", "first_chunk"])
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
        p, inverse, _ = chunk_softmax(logits, columns, lengths, tl.maximum(chunk, 0), scale, HAS_LENGTHS)
        p = p * (w * inverse)[:, None]
        acc = _dot(p.to(values.dtype), values, acc, PRECISION)
    partial += split.to(tl.int64) * tl.num_programs(0) * (HKV * G * D)
    tl.store(partial + operand, acc, mask=is_real)
    spoil = spoil_of(acc)
    if spoil != 0.0:
        tl.debug_barrier()
        chunk_step = kv_row * 0 + S * HKV * D  # int64
        memory = (kv_row * C * S + hidden_zero(spoil)) * (HKV * D) + kv_head * D
        for head in range(0, G):
            _exact_share(
                q, k + memory, v + memory, weights + list_row, indices + list_row, lengths, partial,
                token * (HKV * G) + kv_head * G + head, first, tl.minimum(first + per_program, K), first_chunk, C,
                chunk_step, HKV * D, scale, D, S, HAS_LENGTHS,
            )  # fmt: skip
