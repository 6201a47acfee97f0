"""Triton kernels of the sliding window: tiles of neighbouring tokens times the G heads of one key head.

Row r of a tile is token r // GP and head r % GP, GP = G padded to a power of two, so that a tile spans few tokens and
its keys are little more than the window. A program whose sums are not all finite forms them again, row by row, and
reads the keys of the row's own window alone. Derivation: README.md. Tests: tests/ops/test_sliding_window_triton.py.

forward_kernel and query_gradient_kernel: grid (tiles of BT tokens, Hkv, B); a program owns the BT * G rows of out and
lse, or of dq and delta (B, Tq, Hq), the sum over D of grad_out * out, which key_gradient_kernel reads after it.
key_gradient_kernel: grid (blocks of BN keys, Hkv * SPLITS, B); a program owns dk and dv of its BN keys in its split's
own slice (SPLITS, B, Tk, Hkv, D), added up by the caller. No two programs write one place: no atomics, and results
repeat bit for bit. Needed: contiguous operands; Tq <= Tk, the queries at the last of the keys' places; D of
KERNEL_SIZES; BT * GP of at least 16 rows; SPLITS a divisor of the group. scale holds log2(e), as lse is to base 2;
logit_scale does not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._finite import hidden_zero, spoil_of

# a document that no token is in
_NOWHERE = tl.constexpr(-3)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=tl.float32)


@triton.jit
def _sees(place, key, segment, owner, window, HAS_SEGMENTS: tl.constexpr):
    """mask.window_mask: places and segments of queries broadcast against those of keys."""
    distance = place - key
    seen = (distance >= 0) & (distance < window)
    if HAS_SEGMENTS:
        seen = seen & (segment == owner)
    return seen


@triton.jit
def _owners(key_segments, key, num_keys, HAS_SEGMENTS: tl.constexpr):
    if HAS_SEGMENTS:
        return tl.load(key_segments + key, mask=key < num_keys, other=_NOWHERE)
    return key


@triton.jit
def _rows(
    first, b, kv_head, first_head, num_queries, query_segments, HEADS,
    COUNT: tl.constexpr, GP: tl.constexpr, G: tl.constexpr, GROUP: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """COUNT tokens from `first` on times G heads of a key head: token, which rows are real, place in (B, Tq, HEADS),
    segment."""
    rows = tl.arange(0, COUNT * GP)
    token = first + rows // GP
    is_real = (token < num_queries) & (rows % GP < G)
    row = (b * num_queries + token) * HEADS + kv_head * GROUP + first_head + rows % GP
    segment = token
    if HAS_SEGMENTS:
        segment = tl.load(query_segments + token, mask=is_real, other=-2)
    return token, is_real, row, segment


@triton.jit
def _bounds(first, last, offset, num_keys, window, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """Keys of the tokens first .. last: from where to where, and between them the blocks that all of them see whole."""
    low = tl.maximum(first + offset - window + 1, 0)
    stop = tl.minimum(last + offset + 1, num_keys)
    whole = low + tl.cdiv(tl.maximum(last + offset - window + 1 - low, 0), BN) * BN
    whole_stop = whole + tl.maximum(first + offset + 1 - whole, 0) // BN * BN
    if HAS_SEGMENTS:
        whole, whole_stop = low, low
    return low, whole, whole_stop, stop


@triton.jit
def _attend(
    acc, top, total, queries, k, v, start, stop, place, segment, key_segments, num_keys, window, step, dims, scale,
    BN: tl.constexpr, MASKED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Running sums of a tile over keys start .. stop."""
    columns = tl.arange(0, BN)
    for first in tl.range(start, stop, BN, num_stages=STAGES):
        key = first + columns
        pointers = key.to(tl.int64)[:, None] * step + dims[None, :]
        if MASKED:
            keys = tl.load(k + pointers, mask=(key < num_keys)[:, None], other=0.0)
        else:
            keys = tl.load(k + pointers)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        if MASKED:
            owner = _owners(key_segments, key, num_keys, HAS_SEGMENTS)
            seen = _sees(place[:, None], key[None, :], segment[:, None], owner[None, :], window, HAS_SEGMENTS)
            logits = tl.where(seen, logits, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 1) * scale)
        base = tl.where(highest == float("-inf"), 0.0, highest) if MASKED else highest
        p = tl.exp2(logits * scale - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, 1)
        if MASKED:
            values = tl.load(v + pointers, mask=(key < num_keys)[:, None], other=0.0)
        else:
            values = tl.load(v + pointers)
        acc = _dot(p.to(values.dtype), values, acc * shrink[:, None], PRECISION)
        top = highest
    return acc, top, total


@triton.jit
def exact_row(
    q, k, v, out, lse, row, place, segment, key_segments, num_keys, window, step, dims, scale,
    D: tl.constexpr, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """out and lse of one row, from the keys that it sees."""
    queries = tl.load(q + row * D + dims).to(tl.float32)
    acc = tl.zeros_like(queries)
    top = place * 0.0 + float("-inf")
    total = place * 0.0
    columns = tl.arange(0, BN)
    for first in range(tl.maximum(place - window + 1, 0), place + 1, BN):
        key = first + columns
        owner = _owners(key_segments, key, num_keys, HAS_SEGMENTS)
        seen = _sees(place, key, segment, owner, window, HAS_SEGMENTS)
        pointers = key.to(tl.int64)[:, None] * step + dims[None, :]
        keys = tl.load(k + pointers, mask=seen[:, None], other=0.0).to(tl.float32)
        logits = tl.where(seen, tl.sum(keys * queries[None, :], 1) * scale, float("-inf"))
        highest = tl.maximum(top, tl.max(logits, 0))
        base = tl.where(highest == float("-inf"), 0.0, highest)
        p = tl.exp2(logits - base)
        shrink = tl.exp2(top - base)
        values = tl.load(v + pointers, mask=seen[:, None], other=0.0).to(tl.float32)
        acc = acc * shrink + tl.sum(p[:, None] * values, 0)
        total = total * shrink + tl.sum(p, 0)
        top = highest
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * D + dims, (acc / total).to(out.dtype.element_ty))
    tl.store(lse + row, top + tl.log2(total))


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window"])
def forward_kernel(
    q, k, v, query_segments, key_segments, out, lse, num_queries, num_keys, window, scale, HKV,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out (B, Tq, Hq, D) and lse (B, Tq, Hq), the logarithm to base 2 of the sum of exp(scale q k^T)."""
    first = tl.program_id(0) * BT
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, D)
    offset = num_keys - num_queries
    step = HKV * D
    k += b * num_keys * step + kv_head * D
    v += b * num_keys * step + kv_head * D
    query_segments += b * num_queries
    key_segments += b * num_keys
    token, is_real, row, segment = _rows(
        first, b, kv_head, 0, num_queries, query_segments, HKV * G, BT, GP, G, G, HAS_SEGMENTS
    )
    operand = row[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    last = tl.minimum(first + BT, num_queries) - 1
    low, whole, whole_stop, stop = _bounds(first, last, offset, num_keys, window, BN, HAS_SEGMENTS)
    acc = tl.zeros((BT * GP, D), tl.float32)
    top = tl.full((BT * GP,), float("-inf"), tl.float32)
    total = tl.zeros((BT * GP,), tl.float32)
    acc, top, total = _attend(
        acc, top, total, queries, k, v, low, whole, token + offset, segment, key_segments, num_keys, window, step, dims,
        scale, BN, True, HAS_SEGMENTS, PRECISION, 1,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, k, v, whole, whole_stop, token + offset, segment, key_segments, num_keys, window,
        step, dims, scale, BN, False, HAS_SEGMENTS, PRECISION, STAGES,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, queries, k, v, whole_stop, stop, token + offset, segment, key_segments, num_keys, window, step,
        dims, scale, BN, True, HAS_SEGMENTS, PRECISION, STAGES if HAS_SEGMENTS else 1,
    )  # fmt: skip
    total = tl.where(total == 0.0, 1.0, total)
    tl.store(out + operand, (acc / total[:, None]).to(out.dtype.element_ty), mask=is_real[:, None])
    tl.store(lse + row, top + tl.log2(total), mask=is_real)
    spoil = spoil_of(acc)
    if spoil != 0.0:
        first += hidden_zero(spoil)
        tl.debug_barrier()  # the same places are written again, by other threads
        for one in range(first, last + 1):
            mine = one
            if HAS_SEGMENTS:
                mine = tl.load(query_segments + one)
            for head in range(0, G):
                exact_row(
                    q, k, v, out, lse, (b * num_queries + one) * (HKV * G) + kv_head * G + head, one + offset, mine,
                    key_segments, num_keys, window, step, dims, scale, D, BN, HAS_SEGMENTS,
                )  # fmt: skip


@triton.jit
def _query_gradient(
    acc, queries, upward, lse, delta, k, v, start, stop, place, segment, key_segments, num_keys, window, step, dims,
    scale, BN: tl.constexpr, MASKED: tl.constexpr, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Add dz k over keys start .. stop."""
    columns = tl.arange(0, BN)
    for first in tl.range(start, stop, BN, num_stages=STAGES):
        key = first + columns
        pointers = key.to(tl.int64)[:, None] * step + dims[None, :]
        if MASKED:
            exists = (key < num_keys)[:, None]
            keys, values = tl.load(k + pointers, mask=exists, other=0.0), tl.load(v + pointers, mask=exists, other=0.0)
        else:
            keys, values = tl.load(k + pointers), tl.load(v + pointers)
        logits = _dot(queries, tl.trans(keys), None, PRECISION)
        slope = _dot(upward, tl.trans(values), None, PRECISION)
        p = tl.exp2(logits * scale - lse[:, None])
        dz = p * (slope - delta[:, None])
        if MASKED:
            owner = _owners(key_segments, key, num_keys, HAS_SEGMENTS)
            seen = _sees(place[:, None], key[None, :], segment[:, None], owner[None, :], window, HAS_SEGMENTS)
            dz = tl.where(seen, dz, 0.0)
        acc = _dot(dz.to(keys.dtype), keys, acc, PRECISION)
    return acc


@triton.jit
def exact_query_gradient(
    q, k, v, grad_out, out, lse, grad_q, row, place, segment, key_segments, num_keys, window, step, dims, scale,
    logit_scale, D: tl.constexpr, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dq of one row, from the keys that it sees."""
    queries = tl.load(q + row * D + dims).to(tl.float32)
    upward = tl.load(grad_out + row * D + dims).to(tl.float32)
    delta = tl.sum(upward * tl.load(out + row * D + dims).to(tl.float32), 0)
    acc = tl.zeros_like(queries)
    columns = tl.arange(0, BN)
    for first in range(tl.maximum(place - window + 1, 0), place + 1, BN):
        key = first + columns
        owner = _owners(key_segments, key, num_keys, HAS_SEGMENTS)
        seen = _sees(place, key, segment, owner, window, HAS_SEGMENTS)
        pointers = key.to(tl.int64)[:, None] * step + dims[None, :]
        values = tl.load(v + pointers, mask=seen[:, None], other=0.0).to(tl.float32)
        slope = tl.sum(values * upward[None, :], 1)
        keys = tl.load(k + pointers, mask=seen[:, None], other=0.0).to(tl.float32)
        p = tl.exp2(tl.sum(keys * queries[None, :], 1) * scale - tl.load(lse + row))
        dz = tl.where(seen, p * (slope - delta), 0.0)
        acc += tl.sum(tl.where(seen[:, None], dz[:, None] * keys, 0.0), 0)
    tl.store(grad_q + row * D + dims, (acc * logit_scale).to(grad_q.dtype.element_ty))


@triton.jit
def query_gradient_kernel(
    q, k, v, query_segments, key_segments, grad_out, out, lse, grad_q, deltas, num_queries, num_keys, window, scale,
    logit_scale, HKV, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dq (B, Tq, Hq, D), and deltas (B, Tq, Hq), the products of out with its gradient."""
    first = tl.program_id(0) * BT
    kv_head = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    dims = tl.arange(0, D)
    offset = num_keys - num_queries
    step = HKV * D
    k += b * num_keys * step + kv_head * D
    v += b * num_keys * step + kv_head * D
    query_segments += b * num_queries
    key_segments += b * num_keys
    token, is_real, row, segment = _rows(
        first, b, kv_head, 0, num_queries, query_segments, HKV * G, BT, GP, G, G, HAS_SEGMENTS
    )
    operand = row[:, None] * D + dims[None, :]
    queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
    upward = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
    result = tl.load(out + operand, mask=is_real[:, None], other=0.0)
    delta = tl.sum(upward.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(deltas + row, delta, mask=is_real)
    highest = tl.load(lse + row, mask=is_real, other=float("inf"))
    last = tl.minimum(first + BT, num_queries) - 1
    low, whole, whole_stop, stop = _bounds(first, last, offset, num_keys, window, BN, HAS_SEGMENTS)
    acc = tl.zeros((BT * GP, D), tl.float32)
    acc = _query_gradient(
        acc, queries, upward, highest, delta, k, v, low, whole, token + offset, segment, key_segments, num_keys, window,
        step, dims, scale, BN, True, HAS_SEGMENTS, PRECISION, 1,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, upward, highest, delta, k, v, whole, whole_stop, token + offset, segment, key_segments, num_keys,
        window, step, dims, scale, BN, False, HAS_SEGMENTS, PRECISION, STAGES,
    )  # fmt: skip
    acc = _query_gradient(
        acc, queries, upward, highest, delta, k, v, whole_stop, stop, token + offset, segment, key_segments, num_keys,
        window, step, dims, scale, BN, True, HAS_SEGMENTS, PRECISION, STAGES if HAS_SEGMENTS else 1,
    )  # fmt: skip
    tl.store(grad_q + operand, (acc * logit_scale).to(grad_q.dtype.element_ty), mask=is_real[:, None])
    spoil = spoil_of(acc)
    if spoil != 0.0:
        first += hidden_zero(spoil)
        tl.debug_barrier()
        for one in range(first, last + 1):
            mine = one
            if HAS_SEGMENTS:
                mine = tl.load(query_segments + one)
            for head in range(0, G):
                exact_query_gradient(
                    q, k, v, grad_out, out, lse, grad_q, (b * num_queries + one) * (HKV * G) + kv_head * G + head,
                    one + offset, mine, key_segments, num_keys, window, step, dims, scale, logit_scale, D, BN,
                    HAS_SEGMENTS,
                )  # fmt: skip


@triton.jit
def exact_key_gradient(
    q, k, v, query_segments, grad_out, lse, deltas, place, key, exists, owner, first, stop, b, kv_head, split,
    num_queries, num_keys, window, scale, HKV, SPLITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """Sums of dk and dv (BN, D) over the tokens first .. stop, of keys at `place`, from the rows that see them."""
    dims = tl.arange(0, D)
    sum_k, sum_v = tl.zeros((BN, D), tl.float32), tl.zeros((BN, D), tl.float32)
    for one in range(first, stop):
        mine = one
        if HAS_SEGMENTS:
            mine = tl.load(query_segments + one)
        seen = _sees(one + num_keys - num_queries, key, mine, owner, window, HAS_SEGMENTS)
        for head in range(0, G):
            row = (b * num_queries + one) * (HKV * SPLITS * G) + (kv_head * SPLITS + split) * G + head
            queries = tl.load(q + row * D + dims).to(tl.float32)
            upward = tl.load(grad_out + row * D + dims).to(tl.float32)
            wide = tl.load(v + place, mask=exists, other=0.0).to(tl.float32)
            slope = tl.sum(wide * upward[None, :], 1)
            wide = tl.load(k + place, mask=exists, other=0.0).to(tl.float32)
            p = tl.exp2(tl.sum(wide * queries[None, :], 1) * scale - tl.load(lse + row))
            dz = p * (slope - tl.load(deltas + row))
            sum_v += tl.where(seen[:, None], p[:, None] * upward[None, :], 0.0)
            sum_k += tl.where(seen[:, None], dz[:, None] * queries[None, :], 0.0)
    return sum_k, sum_v


@triton.jit
def key_gradient_kernel(
    q, k, v, query_segments, key_segments, grad_out, lse, deltas, grad_k, grad_v, num_queries, num_keys, window, scale,
    logit_scale, HKV, SPLITS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dk and dv (SPLITS, B, Tk, Hkv, D) of BN keys, over G of the SPLITS * G heads that read them."""
    start = tl.program_id(0) * BN
    kv_head = tl.program_id(1) // SPLITS
    split = tl.program_id(1) % SPLITS
    b = tl.program_id(2).to(tl.int64)
    columns = tl.arange(0, BN)
    dims = tl.arange(0, D)
    offset = num_keys - num_queries
    key = start + columns
    exists = (key < num_keys)[:, None]
    place = ((b * num_keys + key) * HKV + kv_head)[:, None] * D + dims[None, :]
    keys = tl.load(k + place, mask=exists, other=0.0)
    values = tl.load(v + place, mask=exists, other=0.0)
    query_segments += b * num_queries
    owner = _owners(key_segments + b * num_keys, key, num_keys, HAS_SEGMENTS)
    first = tl.maximum(start - offset, 0)
    stop = tl.minimum(start + BN - 1 - offset + window, num_queries)
    sum_k = tl.zeros((BN, D), tl.float32)
    sum_v = tl.zeros((BN, D), tl.float32)
    for at in tl.range(first, stop, BT, num_stages=STAGES):
        token, is_real, row, segment = _rows(
            at, b, kv_head, split * G, num_queries, query_segments, HKV * SPLITS * G, BT, GP, G, SPLITS * G,
            HAS_SEGMENTS,
        )  # fmt: skip
        operand = row[:, None] * D + dims[None, :]
        queries = tl.load(q + operand, mask=is_real[:, None], other=0.0)
        upward = tl.load(grad_out + operand, mask=is_real[:, None], other=0.0)
        highest = tl.load(lse + row, mask=is_real, other=float("inf"))
        delta = tl.load(deltas + row, mask=is_real, other=0.0)
        logits = _dot(keys, tl.trans(queries), None, PRECISION)
        slope = _dot(values, tl.trans(upward), None, PRECISION)
        seen = _sees(token[None, :] + offset, key[:, None], segment[None, :], owner[:, None], window, HAS_SEGMENTS)
        p = tl.where(seen, tl.exp2(logits * scale - highest[None, :]), 0.0)
        dz = tl.where(seen, p * (slope - delta[None, :]), 0.0)
        sum_v = _dot(p.to(upward.dtype), upward, sum_v, PRECISION)
        sum_k = _dot(dz.to(queries.dtype), queries, sum_k, PRECISION)
    spoil = spoil_of(sum_k + sum_v)
    if spoil != 0.0:
        first += hidden_zero(spoil)
        sum_k, sum_v = exact_key_gradient(
            q, k, v, query_segments, grad_out, lse, deltas, place, key, exists, owner, first, stop, b, kv_head, split,
            num_queries, num_keys, window, scale, HKV, SPLITS, G, D, BN, HAS_SEGMENTS,
        )  # fmt: skip
    place += split * tl.num_programs(2).to(tl.int64) * num_keys * HKV * D
    tl.store(grad_k + place, (sum_k * logit_scale).to(grad_k.dtype.element_ty), mask=exists)
    tl.store(grad_v + place, sum_v.to(grad_v.dtype.element_ty), mask=exists)
