"""swiglu_fp8 in plain torch: which numbers are rounded to 8 bits, by which scales, and the products of rounded numbers.

A row of N numbers is kept as e4m3 numbers and one scale, the least power of two that brings its largest number to at
most 448: dividing by it rounds nothing. A product over the rows of a matrix (the gradient of a weight, or by an
input) needs it transposed, with one scale for all. The order of the steps is here too, for every backend (`Steps`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from hsa_ultralong.ops._common import accumulation_dtype, without_autocast

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
# rows without a larger number have the scale of one with it
SMALLEST = 1e-30


class Scaled(NamedTuple):
    """values (N, K) e4m3; scales (N, 1) fp32, powers of two: the matrix is their product."""

    values: torch.Tensor
    scales: torch.Tensor


class Steps(Protocol):
    """What a backend does; all take and give contiguous matrices."""

    def quantize(self, x: torch.Tensor) -> Scaled:
        """Any matrix (N, K)."""
        ...

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> Scaled:
        """silu(gate) * up, (N, F), rounded once."""
        ...

    def activate_backward(self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> Scaled:
        """Gradients of gate and of up beside one another, (N, 2F), from that of `activate`, (N, F)."""
        ...

    def transpose(self, *parts: Scaled) -> Scaled:
        """Matrices (N_i, K) as one (K, sum of N_i, padded with zeros to a multiple of 16), all scales the same."""
        ...

    def product(self, a: Scaled, b: Scaled, dtype: torch.dtype, *, is_fast: bool = False) -> torch.Tensor:
        """a b^T, (N, J), of a (N, K) and b (J, K). is_fast: sums may have fewer bits than fp32."""
        ...


def forward(
    steps: Steps, x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """The result, and what the backward needs: x, gate and up activations, their product (values, scales)."""
    rows = steps.quantize(x)
    gated, upped = (steps.product(rows, steps.quantize(weight), x.dtype, is_fast=True) for weight in (gate, up))
    hidden = steps.activate(gated, upped)
    out = steps.product(hidden, steps.quantize(down), x.dtype, is_fast=True)
    return out, *rows, gated, upped, *hidden


def backward(
    steps: Steps,
    kept: tuple[torch.Tensor, ...],
    weights: tuple[torch.Tensor, ...],
    grad_out: torch.Tensor,
    needs_x: bool,
    needs_weights: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of x, gate, up and down from what `forward` kept; those that are not needed are empty."""
    rows, gated, upped, hidden = Scaled(*kept[:2]), kept[2], kept[3], Scaled(*kept[4:])
    gate, up, down = (steps.quantize(weight) for weight in weights)
    grad_rows = steps.quantize(grad_out)
    grad_hidden = steps.product(grad_rows, steps.transpose(down), grad_out.dtype)
    grads = steps.activate_backward(gated, upped, grad_hidden)
    grad_x = grad_out.new_empty(0)
    if needs_x:
        grad_x = steps.product(grads, steps.transpose(gate, up), grad_out.dtype)
    if not needs_weights:
        return grad_x, *(weight.new_empty(0) for weight in weights)
    dtype, size = weights[0].dtype, len(gate.values)
    columns, inputs = steps.transpose(grads), steps.transpose(rows)
    halves = (Scaled(columns.values[part], columns.scales[part]) for part in (slice(0, size), slice(size, None)))
    grad_gate, grad_up = (steps.product(half, inputs, dtype) for half in halves)
    return grad_x, grad_gate, grad_up, steps.product(steps.transpose(grad_rows), steps.transpose(hidden), dtype)


def refuse_second_derivatives() -> None:
    """Raises: RuntimeError: the backward is to be differentiated (create_graph=True)."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "swiglu_fp8 has first derivatives only, and create_graph=True needs second ones: train with precision=bf16"
        )


def scales_of(x: torch.Tensor) -> torch.Tensor:
    """The scale of every row of (N, K), (N, 1)."""
    largest = x.abs().amax(-1, keepdim=True).float().nan_to_num(nan=0.0, posinf=torch.inf).clamp_min(SMALLEST)
    mantissa, exponent = torch.frexp(largest / LARGEST)
    scales = torch.exp2((exponent - (mantissa == 0.5).int()).float())
    return torch.where(largest.isinf(), largest, scales)


class TorchSteps:
    """Steps in plain torch; products of the rounded numbers in fp32, or fp64 for fp64 results."""

    def quantize(self, x: torch.Tensor) -> Scaled:
        scales = scales_of(x)
        return Scaled((x.float() / scales).to(FP8), scales)

    def activate(self, gate: torch.Tensor, up: torch.Tensor) -> Scaled:
        return self.quantize(F.silu(gate.float()) * up.float())

    def activate_backward(self, gate: torch.Tensor, up: torch.Tensor, grad: torch.Tensor) -> Scaled:
        gate, up, grad = gate.float(), up.float(), grad.float()
        share = gate.sigmoid()
        slope = share * (1 + gate * (1 - share))
        return self.quantize(torch.cat((grad * up * slope, grad * gate * share), -1))

    def transpose(self, *parts: Scaled) -> Scaled:
        scale = torch.stack([part.scales.amax() for part in parts]).amax()
        whole = torch.cat([part.values.float() * (part.scales / scale) for part in parts])
        padded = F.pad(whole.t(), (0, -len(whole) % 16)).contiguous()
        return Scaled(padded.to(FP8), scale.expand(len(padded), 1).contiguous())

    def product(self, a: Scaled, b: Scaled, dtype: torch.dtype, *, is_fast: bool = False) -> torch.Tensor:
        left, right = (part.values.to(accumulation_dtype(dtype)) * part.scales for part in (a, b))
        with without_autocast(left.device.type):
            return (left @ right.t()).to(dtype)


class _Reference(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        out, *kept = forward(TorchSteps(), x, *weights)
        ctx.save_for_backward(*weights, *kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        refuse_second_derivatives()
        saved = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        found = backward(TorchSteps(), saved[3:], saved[:3], grads[0].contiguous(), needs_x, any(needs))
        return tuple(part if part.numel() else None for part in found)


def swiglu_fp8_reference(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """The specification; shapes as in api.swiglu_fp8."""
    out: torch.Tensor = _Reference.apply(x, gate, up, down)
    return out
