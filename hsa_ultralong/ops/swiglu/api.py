"""A SwiGLU block whose nine products, three forward and six backward, are those of 8-bit floats."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hsa_ultralong.ops._common import choose_impl, require_shape
from hsa_ultralong.ops._triton import fp8_runs_on
from hsa_ultralong.ops.swiglu.reference import swiglu_fp8_reference

# what matrix products of 8-bit floats ask of the lengths of rows
_MULTIPLE = 16
# longest rows that one program of a kernel holds
_LONGEST = 16_384


def refuse_fp8(width: int, intermediate_size: int) -> str | None:
    """Why blocks (M, F) have no products in 8-bit floats, None where they have."""
    if width % _MULTIPLE or intermediate_size % _MULTIPLE:
        return f"widths must be multiples of {_MULTIPLE}, got {width} and {intermediate_size}"
    if max(width, intermediate_size) > _LONGEST:
        return f"widths must be at most {_LONGEST:,}, got {width} and {intermediate_size}"
    return None


def swiglu_fp8(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, *, impl: str = "auto"
) -> torch.Tensor:
    """(silu(x gate^T) * (x up^T)) down^T, every product, backward too, of e4m3 numbers (README.md).

    Args:
        x: (N, M). gate, up: (F, M). down: (M, F); any float, M and F multiples of 16.
        impl: "auto", "triton" (x in bf16, compute capability 8.9 or newer) or "reference" (products of the rounded
            numbers); "auto" is "triton" where that runs.

    Returns:
        (N, M) in the dtype of x. Gradients of the weights come in their dtype, without rounding to that of x between.

    Raises:
        ValueError: on shapes that do not fit, or an unknown impl. RuntimeError: impl="triton" cannot run here.
    """
    require_shape("down", down, (None, None))
    width, size = down.shape
    for name, weight, expected in (("x", x, (None, width)), ("gate", gate, (size, width)), ("up", up, (size, width))):
        require_shape(name, weight, expected)
    if (reason := refuse_fp8(width, size)) is not None:
        raise ValueError(f"swiglu_fp8: {reason}")
    auto = "triton" if x.dtype == torch.bfloat16 and fp8_runs_on(x) else "reference"
    name = choose_impl("swiglu_fp8", impl, ("reference", "triton"), auto)
    if not len(x):
        # zeros, whose gradients are zeros
        return F.linear(F.linear(x, gate.to(x.dtype)) * F.linear(x, up.to(x.dtype)), down.to(x.dtype))
    if name == "reference":
        return swiglu_fp8_reference(x, gate, up, down)
    from hsa_ultralong.ops.swiglu.triton_swiglu import swiglu_fp8_triton  # imports triton

    return swiglu_fp8_triton(x, gate, up, down)
