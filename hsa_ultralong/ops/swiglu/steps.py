"""What the backends of swiglu_fp8 share: which numbers are rounded to 8 bits, and when, in terms of `Steps`."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch

from hsa_ultralong.ops._common import accumulation_dtype, without_autocast

FP8 = torch.float8_e4m3fn


class Scaled(NamedTuple):
    """values (N, K) e4m3; scales (N, 1) fp32, powers of two: the matrix is their product."""

    values: torch.Tensor
    scales: torch.Tensor


class Steps(Protocol):
    """What a backend does, with contiguous matrices."""

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


def product_of_rounded(a: Scaled, b: Scaled, dtype: torch.dtype) -> torch.Tensor:
    """Steps.product in fp32, or fp64 for fp64 results, on any device."""
    left, right = (part.values.to(accumulation_dtype(dtype)) * part.scales for part in (a, b))
    with without_autocast(left.device.type):
        return (left @ right.t()).to(dtype)
