"""What the Triton kernels do where sums are not all finite: the same sums row by row, over chosen chunks alone.

A tile multiplies rows by chunks that they did not choose, with weight 0, and 0 * NaN is NaN. So the kernels look at
their sums, which costs a few instructions, and only a program that finds something comes here. It is slow, and made of
plain sums, so that it needs no more registers than the usual pass: these decide how many programs run at once.
Tests: tests/ops/test_hsa_nonfinite.py.

Functions of one program, no grid of their own; they write only what their caller owns.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(memory, head_dims, lengths, chunk, D: tl.constexpr, S: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Keys or values (D, S) in fp32 of the chunk at `memory`, head_dims = Hkv * D; zeros in slots without a token,
    which may hold anything. They lie the other way round than in the usual pass: no address is shared with it."""
    columns, dims = tl.arange(0, S), tl.arange(0, D)
    mask = (dims[:, None] >= 0) & (columns[None, :] >= 0)
    if HAS_LENGTHS:
        mask = mask & (columns < tl.load(lengths + chunk))[None, :]
    return tl.load(memory + columns[None, :] * head_dims + dims[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def row_softmax(queries, keys, lengths, chunk, scale, S: tl.constexpr, HAS_LENGTHS: tl.constexpr):
    """Softmax of one row over one chunk, (S,); `scale` holds log2(e)."""
    columns = tl.arange(0, S)
    logits = tl.sum(keys * queries[:, None], 0) * scale
    if HAS_LENGTHS:
        logits = tl.where(columns < tl.load(lengths + chunk), logits, float("-inf"))
    p = tl.exp2(logits - tl.max(logits, 0))
    return p / tl.sum(p, 0)


@triton.jit
def exact_forward(
    q, k, v, w_row, lengths, chunks, slots, slot_step, out, first_row, count, chunk_step, head_dims, scale,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, COVERAGE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """out of the G rows of one token, from row first_row on."""
    for head in range(0, G):
        row = (first_row + head) * D + tl.arange(0, D)
        queries = tl.load(q + row).to(tl.float32)
        acc = tl.zeros_like(queries)
        for u in range(0, count):
            slot = tl.load(slots + u * slot_step)
            if slot >= 0:
                chunk = u if COVERAGE else tl.load(chunks + u)
                keys = load_tile(k + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
                p = row_softmax(queries, keys, lengths, chunk, scale, S, HAS_LENGTHS) * tl.load(w_row + slot)
                values = load_tile(v + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
                acc += tl.sum(p[None, :] * values, 1)
        tl.store(out + row, acc.to(out.dtype.element_ty))


@triton.jit
def exact_query_gradient(
    q, k, v, w_row, lengths, chunks, slots, slot_step, grad_out, grad_q, dw_row, first_row, count, chunk_step,
    head_dims, scale, logit_scale, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, COVERAGE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dq of the G rows of one token, and its dw at dw_row."""
    for head in range(0, G):
        row = (first_row + head) * D + tl.arange(0, D)
        queries = tl.load(q + row).to(tl.float32)
        upward = tl.load(grad_out + row).to(tl.float32)
        acc = tl.zeros_like(queries)
        for u in range(0, count):
            slot = tl.load(slots + u * slot_step)
            if slot >= 0:
                chunk = u if COVERAGE else tl.load(chunks + u)
                values = load_tile(v + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
                slope = tl.sum(values * upward[:, None], 0)
                keys = load_tile(k + chunk * chunk_step, head_dims, lengths, chunk, D, S, HAS_LENGTHS)
                p = row_softmax(queries, keys, lengths, chunk, scale, S, HAS_LENGTHS)
                delta = tl.sum(p * slope, 0)
                dz = p * (slope - delta) * tl.load(w_row + slot)
                acc += tl.sum(dz[None, :] * keys, 1)
                # the sum of the heads before this one
                total = tl.load(dw_row + slot, mask=head + slot * 0 > 0, other=0.0) + delta
                tl.debug_barrier()
                tl.store(dw_row + slot, total)
        tl.debug_barrier()
        tl.store(grad_q + row, (acc * logit_scale).to(grad_q.dtype.element_ty))


@triton.jit
def exact_memory_gradient(
    q, k, v, weights, lengths, grad_out, slot_map, grad_k, grad_v, chunk, first, stop, scale,
    b, hr, kv_head, T, K, HKV, HR, G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dK and dV (D, S), added to zeros of that shape, of the chunk at k and v over tokens first .. stop."""
    for token in range(first, stop):
        slot = tl.load(slot_map + token)
        if slot >= 0:
            w = tl.load(weights + ((b * T + token) * HR + hr) * K + slot)
            for head in range(0, G):
                row = ((b * T + token) * (HKV * G) + kv_head * G + head) * D + tl.arange(0, D)
                queries = tl.load(q + row).to(tl.float32)
                upward = tl.load(grad_out + row).to(tl.float32)
                values = load_tile(v, HKV * D, lengths, chunk, D, S, HAS_LENGTHS)
                slope = tl.sum(values * upward[:, None], 0)
                keys = load_tile(k, HKV * D, lengths, chunk, D, S, HAS_LENGTHS)
                p = row_softmax(queries, keys, lengths, chunk, scale, S, HAS_LENGTHS)
                dz = p * (slope - tl.sum(p * slope, 0)) * w
                grad_v += (p * w)[None, :] * upward[:, None]
                grad_k += dz[None, :] * queries[:, None]
    return grad_k, grad_v
