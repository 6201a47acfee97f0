"""Triton kernels that form again, row by row, what kernels for Hopper found not finite in the sliding window.

The forward leaves NaN in lse. The gradients leave four flags for every tile of 64 rows of dq and, behind these, for
every block of 64 keys; they have no segments. Where nothing is marked each costs a launch and a look.
Tests: tests/ops/test_window_hopper.py and test_window_hopper_gradients.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._overlap import begin
from hsa_ultralong.ops.sliding_window.kernel_window import exact_key_gradient, exact_query_gradient, exact_row


@triton.jit
def _mend_tile(
    q, k, v, grad_out, out, lse, grad_q, number, num_queries, num_keys, window, scale, logit_scale, HKV,
    G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dq of a tile's rows."""
    tiles = tl.cdiv(num_queries, BT)
    kv_head = number // tiles % HKV
    b = (number // tiles // HKV).to(tl.int64)
    first = number % tiles * BT
    dims = tl.arange(0, D)
    k += b * num_keys * (HKV * D) + kv_head * D
    v += b * num_keys * (HKV * D) + kv_head * D
    for one in range(first, tl.minimum(first + BT, num_queries)):
        for head in range(0, G):
            exact_query_gradient(
                q, k, v, grad_out, out, lse, grad_q, (b * num_queries + one) * (HKV * G) + kv_head * G + head,
                one + num_keys - num_queries, one, k, num_keys, window, HKV * D, dims, scale, logit_scale, D, BN, False,
            )  # fmt: skip


@triton.jit
def _mend_block(
    q, k, v, grad_out, lse, deltas, grad_k, grad_v, number, num_queries, num_keys, window, scale, logit_scale, HKV,
    G: tl.constexpr, D: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    blocks = tl.cdiv(num_keys, BN)
    kv_head = number // blocks % HKV
    b = (number // blocks // HKV).to(tl.int64)
    start = number % blocks * BN
    key = start + tl.arange(0, BN)
    exists = (key < num_keys)[:, None]
    place = ((b * num_keys + key) * HKV + kv_head)[:, None] * D + tl.arange(0, D)[None, :]
    first = tl.maximum(start + num_queries - num_keys, 0)
    stop = tl.minimum(start + BN - 1 + num_queries - num_keys + window, num_queries)
    sum_k, sum_v = exact_key_gradient(
        q, k, v, q, grad_out, lse, deltas, place, key, exists, key, first, stop, b, kv_head, 0,
        num_queries, num_keys, window, scale, HKV, 1, G, D, BN, False,
    )  # fmt: skip
    tl.store(grad_k + place, (sum_k * logit_scale).to(grad_k.dtype.element_ty), mask=exists)
    tl.store(grad_v + place, sum_v.to(grad_v.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window", "tiles", "blocks"])
def mend_gradients_kernel(
    q, k, v, grad_out, out, lse, deltas, grad_q, grad_k, grad_v, flags, num_queries, num_keys, window, scale,
    logit_scale, tiles, blocks, HKV, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    SHARE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Tiles of dq, then blocks of dk and dv, of whose four flags one is set; a program looks at SHARE of both."""
    begin(OVERLAPS)
    programs = tl.num_programs(0)
    four = tl.arange(0, 4)
    places = tl.program_id(0) + tl.arange(0, SHARE) * programs
    is_one = (places < tiles + blocks)[:, None]
    found = tl.load(flags + places[:, None] * 4 + four[None, :], mask=is_one, other=0)
    if tl.max(tl.max(found, 1), 0) > 0:
        for number in range(tl.program_id(0), tiles + blocks, programs):
            if tl.max(tl.load(flags + number * 4 + four), 0) > 0:
                if number < tiles:
                    _mend_tile(
                        q, k, v, grad_out, out, lse, grad_q, number, num_queries, num_keys, window, scale, logit_scale,
                        HKV, G, D, BT, BN,
                    )  # fmt: skip
                else:
                    _mend_block(
                        q, k, v, grad_out, lse, deltas, grad_k, grad_v, number - tiles, num_queries, num_keys, window,
                        scale, logit_scale, HKV, G, D, BN,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_keys", "window"])
def mend_forward_kernel(
    q, k, v, query_segments, key_segments, out, lse, num_rows, num_queries, num_keys, window, scale, HKV,
    G: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, ROWS: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Form again every row of out and lse whose lse is NaN, from the keys of its own window. Grid: (blocks of ROWS rows
    of lse,)."""
    begin(OVERLAPS)
    first = tl.program_id(0) * ROWS
    places = tl.arange(0, ROWS)
    logsums = tl.load(lse + first + places, mask=first + places < num_rows, other=0.0)
    spoiled = (logsums != logsums).to(tl.int32)
    if tl.max(spoiled, 0) != 0:
        dims = tl.arange(0, D)
        step = HKV * D
        for place in range(ROWS):
            if tl.max(tl.where(places == place, spoiled, 0), 0) != 0:
                row = (first + place).to(tl.int64)
                token = row // (HKV * G)
                b = token // num_queries
                keys = b * num_keys * step + row % (HKV * G) // G * D
                segment = token
                if HAS_SEGMENTS:
                    segment = tl.load(query_segments + token)
                exact_row(
                    q, k + keys, v + keys, out, lse, row, (token % num_queries + num_keys - num_queries).to(tl.int32),
                    segment, key_segments + b * num_keys, num_keys, window, step, dims, scale, D, BN, HAS_SEGMENTS,
                )  # fmt: skip
