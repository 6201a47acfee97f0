"""Triton kernels in the order of tokens: a tile of adjacent tokens times the G heads of one memory head, over the union
of the chunks that these tokens selected (kernel_lists.py).

Row r of a tile is token r // GP and head r % GP, GP = G padded to a power of two. A chunk's softmax is complete in its
tile, so there is no running maximum and tiles add up. A program says in `spoiled` (B, Hkv, tiles, rows) which sums of
its rows are not finite; kernel_exact.py then forms these tiles again. Derivation: README.md of this folder.

Grid of both: (tiles of a launch, Hkv, B); a program owns the BT * G rows of out, or of dq and of its own share of dw
(B, T, Hkv, K), so nothing is added up across programs. Needed: contiguous operands, D and S powers of two from 16 to
128, BT * GP rows that a matrix product takes (triton_attention.py sees to these); every chunk once in a tile
(kernel_lists.py); with CAUSAL that no token selects a chunk beyond t // S, which the caller of hsa_attention promises.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._finite import is_spoiled
from hsa_ultralong.ops._overlap import begin


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def chunk_softmax(logits, columns, lengths, chunk, scale, HAS_LENGTHS: tl.constexpr):
    """exp(z - max z) of every row, 1 / its sum and max z, the last in units of log 2; `scale` holds log2(e)."""
    if HAS_LENGTHS:
        logits = tl.where((columns < tl.load(lengths + chunk))[None, :], logits, float("-inf"))
    top = tl.max(logits, 1) * scale
    p = tl.exp2(logits * scale - top[:, None])
    return p, 1.0 / tl.sum(p, 1), top


@triton.jit(do_not_specialize=["T", "C", "K", "U", "first_tile", "num_tiles"])
def forward_kernel(
    q, k, v, weights, lengths, chunks, counts, slot_map, spoiled, out,
    T, C, K, U, first_tile, num_tiles, scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    COVERAGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """out = sum over the chunks of the tile of w * softmax(scale q k^T) v."""
    begin(OVERLAPS)
    M: tl.constexpr = BT * GP
    local = num_tiles - 1 - tl.program_id(0)  # late tokens see more chunks: start with them
    tile = first_tile + local
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    hr = kv_head % HR
    rows = tl.arange(0, M)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    token = tile * BT + rows // GP
    is_real = (token < T) & (rows % GP < G)
    row_offset = (b * T + token) * (HKV * G) + kv_head * G + rows % GP
    queries = tl.load(q + row_offset[:, None] * D + dims[None, :], mask=is_real[:, None], other=0.0)
    w_row = weights + ((b * T + token) * HR + hr) * K
    kv_row = b if KV_BATCH else b * 0
    chunk_step = b * 0 + S * HKV * D  # int64
    tile_kv = (kv_row * C * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    k_tile, v_tile = k + tile_kv, v + tile_kv
    if LENGTH_BATCH:
        lengths += b * C
    if COVERAGE:
        count = tl.minimum(C, (tile * BT + BT) // S) if CAUSAL else C
        slot_row = slot_map + (b * HR + hr) * C * T + token
        slot_step = T
        own = is_real
    else:
        entry = (b * HR + hr) * num_tiles + local
        count = tl.load(counts + entry)
        chunks += entry * U
        slot_row = slot_map + entry * U * BT + rows // GP
        slot_step = BT
        own = rows % GP < G
    acc = tl.zeros((M, D), tl.float32)
    slot = tl.load(slot_row, mask=own, other=-1)
    for u in tl.range(0, count, num_stages=STAGES):
        chunk = u if COVERAGE else tl.load(chunks + u)
        w = tl.load(w_row + slot, mask=slot >= 0, other=0.0).to(tl.float32)
        slot_row += tl.where(u + 1 < count, slot_step, 0)
        slot = tl.load(slot_row, mask=own, other=-1)  # of the next chunk, ahead of its use
        start = chunk * chunk_step
        keys = tl.load(k_tile + start)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        p, inverse, _ = chunk_softmax(logits, columns, lengths, chunk, scale, HAS_LENGTHS)
        p = p * (w * inverse)[:, None]
        values = tl.load(v_tile + start)
        acc = _dot(p.to(values.dtype), values, acc, PRECISION)
    tl.store(out + row_offset[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=is_real[:, None])
    tl.store(spoiled + ((b * HKV + kv_head) * num_tiles + local) * M + rows, is_spoiled(acc))


@triton.jit
def query_gradient_kernel(
    q, k, v, weights, lengths, chunks, counts, slot_map, spoiled, grad_out, grad_q, grad_weights, norms, deltas,
    T, C, K, U, first_tile, num_tiles, scale, logit_scale,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    COVERAGE: tl.constexpr, CAUSAL: tl.constexpr, HAS_LENGTHS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """dq = sum over chunks of dz k, and dw = sum over the G heads of delta into (B, T, Hkv, K); with `norms` also the
    logsumexp (base 2) and delta of every row and slot, for the memory's gradients."""
    begin(OVERLAPS)
    M: tl.constexpr = BT * GP
    local = num_tiles - 1 - tl.program_id(0)
    tile = first_tile + local
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    hr = kv_head % HR
    rows = tl.arange(0, M)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    tokens = tl.arange(0, BT)
    token = tile * BT + rows // GP
    is_real = (token < T) & (rows % GP < G)
    row_offset = (b * T + token) * (HKV * G) + kv_head * G + rows % GP
    operand = row_offset[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    upward = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
    w_row = weights + ((b * T + token) * HR + hr) * K
    dw_row = grad_weights + ((b * T + tile * BT + tokens) * HKV + kv_head) * K
    of_row = ((b * T + token) * HKV + kv_head) * (K * G) + rows % GP
    kv_row = b if KV_BATCH else b * 0
    chunk_step = b * 0 + S * HKV * D  # int64
    tile_kv = (kv_row * C * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    k_tile, v_tile = k + tile_kv, v + tile_kv
    if LENGTH_BATCH:
        lengths += b * C
    if COVERAGE:
        count = tl.minimum(C, (tile * BT + BT) // S) if CAUSAL else C
        base = slot_map + (b * HR + hr) * C * T
        slot_row = base + token
        slot_token = base + tile * BT + tokens
        slot_step = T
        own = is_real
        own_token = tile * BT + tokens < T
    else:
        entry = (b * HR + hr) * num_tiles + local
        count = tl.load(counts + entry)
        chunks += entry * U
        slot_row = slot_map + entry * U * BT + rows // GP
        slot_token = slot_map + entry * U * BT + tokens
        slot_step = BT
        own = rows % GP < G
        own_token = tokens < BT
    for first in range(0, K, 16):
        # empty slots have no gradient
        place = first + tl.arange(0, 16)
        exists = (tile * BT + tokens < T)[:, None] & (place < K)[None, :]
        tl.store(dw_row[:, None] + place[None, :], tl.zeros((BT, 16), tl.float32), mask=exists)
    # other threads of this program wrote the zeros
    tl.debug_barrier()
    acc = tl.zeros((M, D), tl.float32)
    slot = tl.load(slot_row, mask=own, other=-1)
    for u in tl.range(0, count, num_stages=STAGES):
        chunk = u if COVERAGE else tl.load(chunks + u)
        target = tl.load(slot_token, mask=own_token, other=-1)
        w = tl.load(w_row + slot, mask=slot >= 0, other=0.0).to(tl.float32)
        slot_token += slot_step
        slot_row += tl.where(u + 1 < count, slot_step, 0)
        read = slot
        slot = tl.load(slot_row, mask=own, other=-1)  # of the next chunk, ahead of its use
        start = chunk * chunk_step
        keys = tl.load(k_tile + start)
        values = tl.load(v_tile + start)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        slope = _dot(upward, tl.trans(values), None, PRECISION)
        p, inverse, top = chunk_softmax(logits, columns, lengths, chunk, scale, HAS_LENGTHS)
        if HAS_LENGTHS and norms is not None:
            # slots without a token may hold anything, and nobody forms these deltas again
            slope = tl.where((columns < tl.load(lengths + chunk))[None, :], slope, 0.0)
        delta = tl.sum(p * slope, 1) * inverse
        # one multiplication and addition for each of slope - delta times the share
        share = w * inverse
        dz = p * (slope * share[:, None] - (delta * share)[:, None])
        acc = _dot(dz.to(keys.dtype), keys, acc, PRECISION)
        if norms is not None:
            tl.store(norms + of_row + read * G, top - tl.log2(inverse), mask=read >= 0)
            tl.store(deltas + of_row + read * G, delta, mask=read >= 0)
        tl.store(dw_row + target, tl.sum(tl.reshape(delta, (BT, GP)), 1), mask=target >= 0)
    acc *= logit_scale
    tl.store(grad_q + operand, acc.to(grad_q.dtype.element_ty), mask=is_real[:, None])
    tl.store(spoiled + ((b * HKV + kv_head) * num_tiles + local) * M + rows, is_spoiled(acc))
