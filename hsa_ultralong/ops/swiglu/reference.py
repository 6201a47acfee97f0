"""swiglu_fp8 in plain torch: the steps of steps.py, and the products of the rounded numbers in fp32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from hsa_ultralong.ops.swiglu.steps import FP8, Scaled, backward, forward, product_of_rounded, refuse_second_derivatives

LARGEST = 448.0
# rows without a larger number have the scale of one with it
SMALLEST = 1e-30


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
        return product_of_rounded(a, b, dtype)


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
