"""swiglu_fp8 with Triton kernels around the matrix products of 8-bit floats that torch has, as operators of torch: a
compiled layer holds them in its graph. Tested against reference.py under the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

from hsa_ultralong.ops._triton import (
    check_compiled,
    fp8_runs_on,
    is_interpreted,
    next_power_of_two,
    on_own_device,
    require_triton,
)
from hsa_ultralong.ops.swiglu import kernel_swiglu
from hsa_ultralong.ops.swiglu.steps import FP8, Scaled, backward, forward, product_of_rounded, refuse_second_derivatives

# rows and columns of a tile that is transposed
_TILE = (128, 128)


def _warps(size: int) -> int:
    return 4 if size <= 1024 else 8


class TritonSteps:
    """See steps.Steps."""

    def quantize(self, x: torch.Tensor) -> Scaled:
        x = x.contiguous()
        found = _empty(x.shape, x.device)
        size = next_power_of_two(x.shape[1])
        kernel_swiglu.quantize_kernel[(len(x),)](x, *found, K=x.shape[1], B=size, num_warps=_warps(size))
        return found

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> Scaled:
        found = _empty(gate.shape, gate.device)
        size = next_power_of_two(gate.shape[1])
        kernel_swiglu.activate_kernel[(len(gate),)](gate, up, *found, F=gate.shape[1], B=size, num_warps=_warps(size))
        return found

    def activate_backward(self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> Scaled:
        rows, width = gate.shape
        found = _empty((rows, 2 * width), gate.device)
        size = next_power_of_two(width)
        kernel_swiglu.activate_backward_kernel[(rows,)](gate, up, grad, *found, F=width, B=size, num_warps=_warps(size))
        return found

    def transpose(self, *parts: Scaled) -> Scaled:
        columns = parts[0].values.shape[1]
        counts = [len(part.values) for part in parts]
        stride = -(-sum(counts) // 16) * 16
        found = _empty((columns, stride), parts[0].values.device)
        total = parts[0].scales.amax()
        for part in parts[1:]:
            total = torch.maximum(total, part.scales.amax())
        start, (rows, width) = 0, _TILE
        for number, (part, count) in enumerate(zip(parts, counts, strict=True)):
            end = stride if number + 1 == len(parts) else start + count
            grid = (-(-(end - start) // rows), -(-columns // width))
            kernel_swiglu.transpose_kernel[grid](
                *part, total, *found, count, columns, start, end, stride, BR=rows, BC=width, num_warps=4
            )
            start = end
        return found

    def product(self, a: Scaled, b: Scaled, dtype: torch.dtype, *, is_fast: bool = False) -> torch.Tensor:
        if not a.values.is_cuda:  # interpreted
            return product_of_rounded(a, b, dtype)
        # a scale for every row: those of a transposed matrix are all the same
        scales = a.scales, ScalingType.RowWise, b.scales.t(), ScalingType.RowWise
        found: torch.Tensor
        if dtype != torch.bfloat16:
            # only results in bf16 take scales by rows
            scales = a.scales[:1].view(()), ScalingType.TensorWise, b.scales[:1].view(()), ScalingType.TensorWise
        found = scaled_mm(a.values, b.values.t(), *scales, output_dtype=dtype, use_fast_accum=is_fast)
        return found


def _empty(shape: tuple[int, ...], device: torch.device) -> Scaled:
    scales = torch.empty(shape[0], 1, dtype=torch.float32, device=device)
    return Scaled(torch.empty(shape, dtype=FP8, device=device), scales)


@on_own_device
def _forward(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> tuple[torch.Tensor, ...]:
    # a compiled graph does not pass require_triton
    check_compiled()
    return forward(TritonSteps(), x, gate, up, down)


@on_own_device
def _gradients(
    grad_out: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    kept: list[torch.Tensor],
    needs_x: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, ...]:
    return backward(TritonSteps(), tuple(kept), (gate, up, down), grad_out.contiguous(), needs_x, needs_weights)


# selective checkpointing forms them again, as all of a feed-forward block (train/activations.py)
_SCHEMA = "(Tensor x, Tensor gate, Tensor up, Tensor down) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
_GRADIENT_SCHEMA = (
    "(Tensor grad_out, Tensor gate, Tensor up, Tensor down, Tensor[] kept, bool needs_x, bool needs_weights) -> "
    "(Tensor, Tensor, Tensor, Tensor)"
)
_operator = torch.library.custom_op("hsa_ultralong::swiglu_fp8", _forward, mutates_args=(), schema=_SCHEMA)
_gradient_operator = torch.library.custom_op(
    "hsa_ultralong::swiglu_fp8_gradients", _gradients, mutates_args=(), schema=_GRADIENT_SCHEMA
)


@_operator.register_fake
def _shapes(x: torch.Tensor, gate: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    rows, size = x.shape[0], gate.shape[0]
    gated, upped = (x.new_empty(rows, size) for _ in range(2))
    scales, hidden_scales = (x.new_empty(rows, 1, dtype=torch.float32) for _ in range(2))
    values, hidden = (x.new_empty(rows, columns, dtype=FP8) for columns in (x.shape[1], size))
    return x.new_empty(x.shape), values, scales, gated, upped, hidden, hidden_scales


@_gradient_operator.register_fake
def _gradient_shapes(
    grad_out: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, kept: list[torch.Tensor],
    needs_x: bool, needs_weights: bool,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    weights = (part.new_empty(part.shape if needs_weights else 0) for part in (gate, up, down))
    return grad_out.new_empty(grad_out.shape if needs_x else 0), *weights


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[1:], *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, *rest: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return None, None, None, None
    if not torch.compiler.is_compiling():
        refuse_second_derivatives()
    saved = ctx.saved_tensors
    needs_x, *needs = ctx.needs_input_grad
    found = _gradient_operator(grad_out, *saved[:3], list(saved[3:]), needs_x, any(needs))
    wanted = (needs_x, *needs)
    return tuple(part if is_wanted else None for part, is_wanted in zip(found, wanted, strict=True))


_operator.register_autograd(_backward, setup_context=_keep)


def swiglu_fp8_triton(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """See api.swiglu_fp8; x in bf16."""
    require_triton("swiglu_fp8", x)
    if not is_interpreted() and not fp8_runs_on(x):
        raise RuntimeError('swiglu_fp8: impl="triton" needs compute capability 8.9 or newer; use impl="reference"')
    if x.is_cuda and x.dtype != torch.bfloat16:
        raise ValueError(f'swiglu_fp8: impl="triton" takes x in bf16, got {x.dtype}; use impl="reference"')
    out: torch.Tensor = _operator(x, gate, up, down)[0]
    return out
