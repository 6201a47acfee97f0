"""One ordinary decoder layer: sliding-window attention and a feed-forward block, pre-norm, standard residual."""

from __future__ import annotations

import torch
from torch import nn

from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.window_attention import WindowAttention, WindowState


class DecoderLayer(nn.Module):
    """(B, T, M) -> (B, T, M): x + SWA(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, *, hidden_size: int, attention: WindowAttention, mlp: nn.Module, rms_norm_eps: float) -> None:
        super().__init__()
        self.input_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.attention = attention
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: torch.Tensor,
        rotary: RotaryTable,
        segments: torch.Tensor | None = None,
        state: WindowState | None = None,
    ) -> torch.Tensor:
        x = x + self.attention(self.input_norm(x), rotary, segments, state)
        return x + self.mlp(self.mlp_norm(x))
