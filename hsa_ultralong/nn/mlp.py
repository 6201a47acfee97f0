"""SwiGLU feed-forward block (Shazeer 2020), as in the paper's dense layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.ops.swiglu import swiglu_fp8


class SwiGLU(nn.Module):
    """x -> down(silu(gate(x)) * up(x)), bias-free, (..., M) -> (..., M); with `trains_fp8`, in training mode, by
    products of 8-bit floats (ops/swiglu)."""

    trains_fp8 = False

    def __init__(self, *, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # without gradients too: what pieces of a row recompute must be what they computed (train/segmented.py)
        if self.trains_fp8 and self.training:
            return self._train_fp8(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        gate = F.silu(self.gate_proj(x), inplace=True)  # nothing keeps it: saves two passes over memory
        gate *= self.up_proj(x)
        return self.down_proj(gate)

    def _train_fp8(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        weights = self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight
        # on a card what the kernels do not take is an error, not a slow reference
        impl = "triton" if x.is_cuda else "auto"
        return swiglu_fp8(x.reshape(-1, x.shape[-1]), *weights, impl=impl).view(x.shape)
