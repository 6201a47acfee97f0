"""What the Triton kernels do where sums are not all finite: the same sums row by row, over chosen chunks alone.

A tile multiplies rows by chunks that they did not choose, with weight 0, and 0 * NaN is NaN. So kernel_tiles looks at
its sums, which costs a few instructions, and marks the tiles where it finds something; spoiled_tiles_kernel, on the
same stream, leaves all others as they are. In one kernel the slow pass would take registers from the usual one.
`exact_memory_gradient` is a function of one program, for kernel_chunks.py. Tests: tests/ops/test_hsa_nonfinite.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._overlap import begin


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
def _forward_row(
    q, k, v, w_row, lengths, chunks, slots, slot_step, out, row, count, chunk_step, head_dims, scale,
    D: tl.constexpr, S: tl.constexpr, COVERAGE: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """out of one token and head, at row (D,)."""
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
def _query_gradient_row(
    q, k, v, w_row, lengths, chunks, slots, slot_step, grad_out, grad_q, dw_row, row, head, count, chunk_step,
    head_dims, scale, logit_scale, D: tl.constexpr, S: tl.constexpr, COVERAGE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """dq of one token and head, at row (D,); its share of the token's dw is added to that of the heads before it."""
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
            total = tl.load(dw_row + slot, mask=head + slot * 0 > 0, other=0.0) + delta
            tl.debug_barrier()
            tl.store(dw_row + slot, total)
    tl.debug_barrier()
    tl.store(grad_q + row, (acc * logit_scale).to(grad_q.dtype.element_ty))


@triton.jit
def _exact_tile(
    q, k, v, weights, lengths, chunks, counts, slot_map, out, grad_out, grad_weights,
    T, C, K, U, tile, local, num_tiles, kv_head, b, scale, logit_scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    COVERAGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
):  # fmt: skip
    """The rows of one tile, number `local` of its launch."""
    hr = kv_head % HR
    kv_row = b if KV_BATCH else b * 0
    chunk_step = b * 0 + S * HKV * D  # int64
    k += kv_row * C * chunk_step + kv_head * D
    v += kv_row * C * chunk_step + kv_head * D
    if LENGTH_BATCH:
        lengths += b * C
    if COVERAGE:
        count = tl.minimum(C, (tile * BT + BT) // S) if CAUSAL else C
        slot_map += (b * HR + hr) * C * T + tile * BT
        slot_step = T
    else:
        entry = (b * HR + hr) * num_tiles + local
        count = tl.load(counts + entry)
        chunks += entry * U
        slot_map += entry * U * BT
        slot_step = BT
    for place in range(0, tl.minimum(BT, T - tile * BT)):
        token = b * T + tile * BT + place
        for head in range(0, G):
            row = (token * (HKV * G) + kv_head * G + head) * D + tl.arange(0, D)
            if grad_out is None:
                _forward_row(
                    q, k, v, weights + (token * HR + hr) * K, lengths, chunks, slot_map + place, slot_step, out, row,
                    count, chunk_step, HKV * D, scale, D, S, COVERAGE, HAS_LENGTHS,
                )  # fmt: skip
            else:
                _query_gradient_row(
                    q, k, v, weights + (token * HR + hr) * K, lengths, chunks, slot_map + place, slot_step, grad_out,
                    out, grad_weights + (token * HKV + kv_head) * K, row, head, count, chunk_step, HKV * D, scale,
                    logit_scale, D, S, COVERAGE, HAS_LENGTHS,
                )  # fmt: skip


@triton.jit(do_not_specialize=["T", "C", "K", "U", "first_tile", "num_tiles"])
def spoiled_tiles_kernel(
    q, k, v, weights, lengths, chunks, counts, slot_map, spoiled, out, grad_out, grad_weights,
    T, C, K, U, first_tile, num_tiles, scale, logit_scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    COVERAGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr, M: tl.constexpr, SHARE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Write again what kernel_tiles wrote of spoiled tiles: out, or with grad_out dq (as `out`) and dw. A program looks
    at the M rows of SHARE of them, as one for every tile takes longer to start than to look."""
    begin(OVERLAPS)
    first = tl.program_id(0) * SHARE
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    spoiled += (b * HKV + kv_head) * num_tiles * M
    row = first * M + tl.arange(0, SHARE * M)
    if tl.max(tl.load(spoiled + row, mask=row < num_tiles * M, other=0).to(tl.int32), 0) == 0:
        return
    for local in range(first, tl.minimum(first + SHARE, num_tiles)):
        if tl.max(tl.load(spoiled + local * M + tl.arange(0, M)).to(tl.int32), 0) != 0:
            _exact_tile(
                q, k, v, weights, lengths, chunks, counts, slot_map, out, grad_out, grad_weights,
                T, C, K, U, first_tile + local, local, num_tiles, kv_head, b, scale, logit_scale,
                HKV, HR, KV_BATCH, LENGTH_BATCH, G, D, S, BT, COVERAGE, CAUSAL, HAS_LENGTHS,
            )  # fmt: skip


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
