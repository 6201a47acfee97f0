"""The sliding window's forward for rows that are not finite, after the kernel for Hopper (kernel_window_hopper.py)."""

from __future__ import annotations

import triton
import triton.language as tl

from hsa_ultralong.ops._overlap import begin
from hsa_ultralong.ops.sliding_window.kernel_window import _exact_row


@triton.jit(do_not_specialize=["num_rows", "num_queries", "num_keys", "window"])
def mend_kernel(
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
                _exact_row(
                    q, k + keys, v + keys, out, lse, row, (token % num_queries + num_keys - num_queries).to(tl.int32),
                    segment, key_segments + b * num_keys, num_keys, window, step, dims, scale, D, BN, HAS_SEGMENTS,
                )  # fmt: skip
