"""Triton kernels of joint_attention: one softmax over the keys of all chosen chunks of a token, with a bias per chunk.

Row r of a tile is token r // GP and head r % GP, as in kernel_tiles.py. `bias` (B, Hr, C + 1, tiles * BT) is log2 of
the weights, -inf where a token has not chosen the chunk; its last chunk takes the empty slots and is never read. A tile
walks the chunks that its tokens have chosen, a chunk the tiles that have chosen it; both lists come from
triton_joint.py, which also sees to contiguous operands, D and S from 16 to 128 and BT * GP rows of at least 16.
Derivation: README.md of this folder; tests/ops/test_hsa_joint_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops.hsa.kernel_tiles import _dot


@triton.jit
def _load(pointers, present, HAS_LENGTHS: tl.constexpr):
    """Keys or values of a chunk (S, D); slots beyond its length may hold anything, and zero times that is not zero."""
    if HAS_LENGTHS:
        return tl.load(pointers, mask=present[:, None], other=0.0)
    return tl.load(pointers)


@triton.jit
def _norms(mass):
    """Logsumexps to base 2, of rows that read nothing +inf, with which their probabilities are 0."""
    return tl.where(mass == float("-inf"), float("inf"), mass * 1.4426950408889634)


@triton.jit
def joint_forward_kernel(
    q, k, v, bias, lengths, chunks, counts, out, mass,
    T, C, scale, HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, T, Hq, D), 0 where nothing is read, and mass (B, T, Hq), the logsumexp, -inf there.

    Grid (tiles, Hkv, B); chunks (B, Hr, tiles, C + 1) and how many, (B, Hr, tiles)."""
    M: tl.constexpr = BT * GP
    tiles = tl.num_programs(0)
    tile = tiles - 1 - tl.program_id(0)  # late tokens see more chunks: start with them
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, M)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    token = tile * BT + rows // GP
    is_real = (token < T) & (rows % GP < G)
    row = (b * T + token) * (HKV * G) + kv_head * G + rows % GP
    operand = row[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    chooser = b * HR + kv_head % HR
    width = tiles * BT
    bias += chooser * (C + 1) * width + token
    bias_step = b * 0 + width  # int64
    chunks += (chooser * tiles + tile) * (C + 1)
    count = tl.load(counts + chooser * tiles + tile)
    kv_row = b if KV_BATCH else b * 0
    chunk_step = b * 0 + S * HKV * D
    place = (kv_row * C * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    k_tile, v_tile = k + place, v + place
    if LENGTH_BATCH:
        lengths += b * C
    acc = tl.zeros((M, D), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = tl.load(chunks + i)
        present = columns < S
        if HAS_LENGTHS:
            present = columns < tl.load(lengths + chunk)
        keys = _load(k_tile + chunk * chunk_step, present, HAS_LENGTHS)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        logits = logits * scale + tl.load(bias + chunk * bias_step)[:, None]
        if HAS_LENGTHS:
            logits = tl.where(present[None, :], logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        values = _load(v_tile + chunk * chunk_step, present, HAS_LENGTHS)
        acc = _dot(p.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        total = total * shrink + tl.sum(p, 1)
        top = highest
    is_read = total != 0.0
    total = tl.where(is_read, total, 1.0)
    result = acc / total[:, None]
    tl.store(out + operand, result.to(out.dtype.element_ty), mask=is_real[:, None])
    logsumexp = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(mass + row, tl.where(is_read, logsumexp, float("-inf")), mask=is_real)


@triton.jit
def joint_query_gradient_kernel(
    q, k, v, bias, lengths, chunks, counts, out, mass, grad_out, grad_mass, grad_q, grad_bias, deltas,
    T, C, scale, logit_scale, HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, T, Hq, D); grad_bias (B, Hkv, C + 1, tiles * BT), the sum of dz over the keys of a chunk and the G heads,
    written where a tile has chosen the chunk; deltas (B, T, Hq), out . dO less the gradient of the mass.

    Grid and lists as in the forward; grad_mass and grad_bias may be None."""
    M: tl.constexpr = BT * GP
    tiles = tl.num_programs(0)
    tile = tiles - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, M)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    token = tile * BT + rows // GP
    is_real = (token < T) & (rows % GP < G)
    row = (b * T + token) * (HKV * G) + kv_head * G + rows % GP
    operand = row[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    slopes = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
    outputs = tl.load(out + operand, mask=is_real[:, None], other=0.0)
    delta = tl.sum(outputs.to(tl.float32) * slopes.to(tl.float32), 1)
    if grad_mass is not None:
        delta -= tl.load(grad_mass + row, mask=is_real, other=0.0)
    norm = _norms(tl.load(mass + row, mask=is_real, other=float("-inf")))
    delta = tl.where(norm == float("inf"), 0.0, delta)
    tl.store(deltas + row, delta, mask=is_real)
    chooser = b * HR + kv_head % HR
    width = tiles * BT
    bias += chooser * (C + 1) * width + token
    bias_step = b * 0 + width  # int64
    if grad_bias is not None:
        grad_bias += (b * HKV + kv_head) * (C + 1) * width + tile * BT + tl.arange(0, BT)
    chunks += (chooser * tiles + tile) * (C + 1)
    count = tl.load(counts + chooser * tiles + tile)
    kv_row = b if KV_BATCH else b * 0
    chunk_step = b * 0 + S * HKV * D
    place = (kv_row * C * S + columns[:, None]) * (HKV * D) + kv_head * D + dims[None, :]
    k_tile, v_tile = k + place, v + place
    if LENGTH_BATCH:
        lengths += b * C
    acc = tl.zeros((M, D), tl.float32)
    for i in tl.range(0, count, num_stages=STAGES):
        chunk = tl.load(chunks + i)
        present = columns < S
        if HAS_LENGTHS:
            present = columns < tl.load(lengths + chunk)
        keys = _load(k_tile + chunk * chunk_step, present, HAS_LENGTHS)
        values = _load(v_tile + chunk * chunk_step, present, HAS_LENGTHS)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        slope = _dot(slopes, tl.trans(values), None, PRECISION)
        shift = tl.load(bias + chunk * bias_step) - norm
        p = tl.exp2(logits * scale + shift[:, None])
        if HAS_LENGTHS:
            p = tl.where(present[None, :], p, 0.0)
        dz = p * (slope - delta[:, None])
        acc = _dot(dz.to(keys.dtype), keys, acc, PRECISION)
        if grad_bias is not None:
            # padded heads have p = 0
            tl.store(grad_bias + chunk * bias_step, tl.sum(tl.reshape(tl.sum(dz, 1), (BT, GP)), 1))
    tl.store(grad_q + operand, (acc * logit_scale).to(grad_q.dtype.element_ty), mask=is_real[:, None])


@triton.jit
def joint_memory_gradient_kernel(
    q, k, v, bias, lengths, lists, counts, mass, grad_out, deltas, grad_k, grad_v,
    T, C, scale, logit_scale, num_tiles, num_rows, num_splits,
    HKV, HR, KV_BATCH: tl.constexpr, LENGTH_BATCH: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, S: tl.constexpr, BT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv of a chunk over a share of the tiles that have chosen it: (splits, 1 or B, C*S, Hkv, D).

    Grid (C * splits, Hkv, 1 or B); lists of tiles (B, Hr, C, tiles + 1) and how many, (B, Hr, C). The num_rows rows of
    a batch that read one memory are added up in order."""
    M: tl.constexpr = BT * GP
    chunk = tl.program_id(0) // num_splits
    split = tl.program_id(0) % num_splits
    kv_head = tl.program_id(1)
    kv_row = tl.program_id(2).to(tl.int64)
    rows = tl.arange(0, M)
    columns = tl.arange(0, S)
    dims = tl.arange(0, D)
    slot = kv_row * C * S + chunk * S + columns
    place = slot[:, None] * (HKV * D) + kv_head * D + dims[None, :]
    keys, values = tl.load(k + place), tl.load(v + place)
    sum_k = tl.zeros((S, D), tl.float32)
    sum_v = tl.zeros((S, D), tl.float32)
    for r in range(num_rows):
        b = kv_row + r
        chooser = b * HR + kv_head % HR
        entry = chooser * C + chunk
        count = tl.load(counts + entry)
        first = count * split // num_splits
        last = count * (split + 1) // num_splits
        bias_row = bias + (chooser * (C + 1) + chunk) * (num_tiles * BT) + rows // GP
        present = columns < S
        if HAS_LENGTHS:
            present = columns < tl.load(lengths + (b * C if LENGTH_BATCH else b * 0) + chunk)
        for i in tl.range(first, last, num_stages=STAGES):
            tile = tl.load(lists + entry * (num_tiles + 1) + i)
            token = tile * BT + rows // GP
            is_real = (token < T) & (rows % GP < G)
            row = (b * T + token) * (HKV * G) + kv_head * G + rows % GP
            operand = row[:, None] * D + dims[None, :]
            queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
            slopes = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
            norm = _norms(tl.load(mass + row, mask=is_real, other=float("-inf")))
            delta = tl.load(deltas + row, mask=is_real, other=0.0)
            shift = tl.load(bias_row + tile * BT) - norm
            logits = _dot(keys, tl.trans(queries), None, PRECISION)  # (S, M)
            slope = _dot(values, tl.trans(slopes), None, PRECISION)
            p = tl.exp2(logits * scale + shift[None, :])
            dz = p * (slope - delta[None, :])
            if HAS_LENGTHS:
                p = tl.where(present[:, None], p, 0.0)
                dz = tl.where(present[:, None], dz, 0.0)
            sum_v = _dot(p.to(slopes.dtype), slopes, sum_v, PRECISION)
            sum_k = _dot(dz.to(queries.dtype), queries, sum_k, PRECISION)
    share = (split * tl.num_programs(2) + kv_row * 0) * C * S * (HKV * D) + place
    tl.store(grad_k + share, (sum_k * logit_scale).to(grad_k.dtype.element_ty))
    tl.store(grad_v + share, sum_v.to(grad_v.dtype.element_ty))
