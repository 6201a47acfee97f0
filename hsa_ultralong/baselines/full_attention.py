"""Full attention: every token reads all tokens up to itself; with RoPE or, as NoPE, with no positions at all.

And a bare transformer of such layers, which training speed is compared with (docs/results.md).
tests/baselines/test_full_attention.py, tests/baselines/test_rivals.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.baselines.attention import SelfAttention, causal_attention
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.rotary import rotary_table
from hsa_ultralong.ops import linear_cross_entropy


class FullAttention(SelfAttention):
    """Token t reads tokens 0 .. t, keys rotated at their places (Su et al. 2021).

    O(T^2) time and O(T) memory, on a GPU by cuDNN or FlashAttention; a step of decoding reads all N keys.
    """

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, state: Any) -> torch.Tensor:
        if state is not None:
            k, v = state.extend(k, v)
        return causal_attention(q, k, v)


class FullAttentionNoPE(FullAttention):
    """The same without positions, which a causal mask alone tells apart (Kazemnejad et al. 2023)."""

    is_rotary = False


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
                x = checkpoint(layer, x, rotary, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotary)
        x = self.norm(x)[:, :-1].flatten(0, 1)
        total = linear_cross_entropy(x, self.embed_tokens.weight, labels[:, 1:].flatten())
        return total / (labels[:, 1:] != -100).sum().clamp_min(1)
