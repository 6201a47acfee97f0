"""Triton kernels that round rows to 8-bit floats: any rows, those of a SwiGLU and of its gradient, and transposed ones.

A program holds a whole row, so its scale is known before a number is written. Launched by triton_swiglu.py; what they
compute: steps.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

_LARGEST = tl.constexpr(448.0)
_SMALLEST = tl.constexpr(1e-30)
_EXPONENT = tl.constexpr(0x7F800000)
_MANTISSA = tl.constexpr(0x007FFFFF)
# twice the exponent's bias: powers of two and their reciprocals add up to it
_RECIPROCAL = tl.constexpr(254 << 23)


@triton.jit
def _scale(largest):
    """The least power of two by which `largest` is at most 448, and what to multiply by in its place, both exact."""
    bits = tl.div_rn(tl.maximum(largest, _SMALLEST), _LARGEST).to(tl.int32, bitcast=True)
    bits = (bits + _MANTISSA) & _EXPONENT
    # of an infinite scale 0: its numbers become zeros, infinities NaN
    factor = tl.where(bits == _EXPONENT, 0, _RECIPROCAL - bits)
    return bits.to(tl.float32, bitcast=True), factor.to(tl.float32, bitcast=True)


@triton.jit
def quantize_kernel(x, values, scales, K: tl.constexpr, B: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    is_there = place < K
    numbers = tl.load(x + row * K + place, is_there, 0.0).to(tl.float32)
    scale, factor = _scale(tl.max(tl.abs(numbers), 0))
    tl.store(scales + row, scale)
    tl.store(values + row * K + place, (numbers * factor).to(tl.float8e4nv), is_there)


@triton.jit
def activate_kernel(gate, up, values, scales, F: tl.constexpr, B: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    is_there = place < F
    gated = tl.load(gate + row * F + place, is_there, 0.0).to(tl.float32)
    upped = tl.load(up + row * F + place, is_there, 0.0).to(tl.float32)
    hidden = gated * tl.sigmoid(gated) * upped
    scale, factor = _scale(tl.max(tl.abs(hidden), 0))
    tl.store(scales + row, scale)
    tl.store(values + row * F + place, (hidden * factor).to(tl.float8e4nv), is_there)


@triton.jit
def activate_backward_kernel(gate, up, grad, values, scales, F: tl.constexpr, B: tl.constexpr):
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, B)
    is_there = place < F
    gated = tl.load(gate + row * F + place, is_there, 0.0).to(tl.float32)
    upped = tl.load(up + row * F + place, is_there, 0.0).to(tl.float32)
    after = tl.load(grad + row * F + place, is_there, 0.0).to(tl.float32)
    share = tl.sigmoid(gated)
    grad_gate = after * upped * (share * (1.0 + gated * (1.0 - share)))
    grad_up = after * (gated * share)
    scale, factor = _scale(tl.max(tl.maximum(tl.abs(grad_gate), tl.abs(grad_up)), 0))
    tl.store(scales + row, scale)
    both = values + row * 2 * F + place
    tl.store(both, (grad_gate * factor).to(tl.float8e4nv), is_there)
    tl.store(both + F, (grad_up * factor).to(tl.float8e4nv), is_there)


@triton.jit
def transpose_kernel(
    values, scales, total, out, out_scales, num_rows, num_columns, start, end, stride,
    BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Rows `num_rows` of `values` into columns start .. end of `out`, those beyond the rows with zeros."""
    first, columns = tl.program_id(0) * BR, tl.program_id(1) * BC + tl.arange(0, BC)
    rows = first + tl.arange(0, BR)
    scale = tl.load(total)
    factor = tl.div_rn(tl.load(scales + rows, rows < num_rows, 0.0), scale)
    is_there = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]
    place = rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
    tile = tl.load(values + place, is_there, 0.0).to(tl.float32) * factor[:, None]
    turned = tl.trans(tile.to(tl.float8e4nv))
    targets = columns.to(tl.int64)[:, None] * stride + (start + rows)[None, :]
    tl.store(out + targets, turned, (columns < num_columns)[:, None] & (start + rows < end)[None, :])
    if (first == 0) & (start == 0):
        tl.store(out_scales + columns, tl.zeros_like(columns).to(tl.float32) + scale, columns < num_columns)
