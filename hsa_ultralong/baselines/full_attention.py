"""A plain transformer of the same width: every layer attends to all tokens before, with RoPE, through cuDNN on a GPU.

The twin that training speed is compared with (docs/results.md). tests/baselines/test_full_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.rotary import RotaryTable, apply_rotary, rotary_table
from hsa_ultralong.ops import linear_cross_entropy

_BACKENDS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip


@contextmanager
def _cudnn_first(is_cuda: bool) -> Iterator[None]:
    if not is_cuda:
        yield
        return
    with sdpa_kernel(_BACKENDS, set_priority=True):
        yield


class FullAttention(nn.Module):
    """Pre-normed input (B, T, M) -> (B, T, M); every token reads all tokens up to itself."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        use_qk_norm: bool,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.head_dim, self.group = head_dim, num_attention_heads // num_key_value_heads
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()

    def forward(self, x: torch.Tensor, rotary: RotaryTable, segments: None = None, state: None = None) -> torch.Tensor:
        """rotary: table of T indices. segments, state: there are none; they stand for the layer's interface."""
        heads = (*x.shape[:-1], -1, self.head_dim)
        v = self.v_proj(x).view(heads)
        q = apply_rotary(self.q_norm(self.q_proj(x).view(heads)), rotary).to(v.dtype)
        k = apply_rotary(self.k_norm(self.k_proj(x).view(heads)), rotary).to(v.dtype)
        k, v = (part.unsqueeze(3).expand(-1, -1, -1, self.group, -1).flatten(2, 3) for part in (k, v))
        with _cudnn_first(x.is_cuda):
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
            )
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class FullAttentionLM(nn.Module):
    """Token ids and labels -> mean loss; tied embeddings, the loss without stored logits."""

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_attention_heads: int,
        num_key_value_heads: int,
        head_dim: int,
        rope_theta: float,
        use_qk_norm: bool = True,
        rms_norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                hidden_size=hidden_size,
                attention=FullAttention(
                    hidden_size=hidden_size,
                    num_attention_heads=num_attention_heads,
                    num_key_value_heads=num_key_value_heads,
                    head_dim=head_dim,
                    use_qk_norm=use_qk_norm,
                    rms_norm_eps=rms_norm_eps,
                ),  # type: ignore[arg-type]
                mlp=SwiGLU(hidden_size=hidden_size, intermediate_size=intermediate_size),
                rms_norm_eps=rms_norm_eps,
            )
            for _ in range(num_layers)
        )
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Mean loss of labels (B, T), the tokens themselves (shifted inside)."""
        x = self.embed_tokens(input_ids)
        rotary = rotary_table(x.shape[1], self.head_dim, self.rope_theta, x.device, x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, rotary, use_reentrant=False)
            else:
                x = layer(x, rotary)
        x = self.norm(x)[:, :-1].flatten(0, 1)
        total = linear_cross_entropy(x, self.embed_tokens.weight, labels[:, 1:].flatten())
        return total / (labels[:, 1:] != -100).sum().clamp_min(1)
