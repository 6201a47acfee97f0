"""The HSA layer: optional short window, attention inside the retrieved chunks, feed-forward (paper sec. 2.2, 3.1).

No positions enter the HSA part, unless a variant is studied (reading_variants.py). Residual "standard" adds the HSA
output to the stream; "bypass" feeds it to the feed-forward block only, as in the authors' released code (paper facts
A.2). Called by models/modeling_hsa.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.reading_variants import ReadingVariant
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.nn.window_attention import WindowAttention, WindowState


class HierarchicalSparseAttention(nn.Module):
    """Pre-normed input (B, T, M) + Retrieval + memories -> (B, T, M)."""

    def __init__(
        self,
        *,
        hidden_size: int,
        num_attention_heads: int,
        head_dim: int,
        chunk_size: int,
        use_qk_norm: bool,
        rms_norm_eps: float,
        use_qkv_bias: bool = False,
        variant: ReadingVariant | None = None,
    ) -> None:
        super().__init__()
        self.head_dim, self.chunk_size, self.variant = head_dim, chunk_size, variant
        # the keys it reads have none: without positions theirs would move all scores of a chunk alike
        self.q_proj = nn.Linear(hidden_size, num_attention_heads * head_dim, bias=use_qkv_bias)
        self.q_norm = nn.RMSNorm(head_dim, eps=rms_norm_eps) if use_qk_norm else nn.Identity()
        self.o_proj = nn.Linear(num_attention_heads * head_dim, hidden_size, bias=False)

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, M) -> (B, T, Hq, D)."""
        return self.q_norm(self.q_proj(x).unflatten(-1, (-1, self.head_dim)))

    def forward(self, x: torch.Tensor, retrieval: Retrieval, views: Sequence[MemoryView]) -> torch.Tensor:
        return self.output(self.read(self.queries(x), retrieval, views), x.dtype)

    def output(self, read: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What was read, (B, T, Hq, D) -> (B, T, M)."""
        read = read.flatten(-2)
        # autocast casts by itself; to fp32 and back would be a copy
        return self.o_proj(read if torch.is_autocast_enabled(read.device.type) else read.to(dtype))

    def read(self, q: torch.Tensor, retrieval: Retrieval, views: Sequence[MemoryView]) -> torch.Tensor:
        """Attention of queries (B, T, Hq, D) inside the retrieved chunks of all memories, of the same shape."""
        if self.variant is not None:
            return self.variant.read(q, retrieval, views, self.chunk_size)
        out: torch.Tensor | None = None
        for view, offset in zip(views, retrieval.offsets, strict=True):
            first = None if len(views) == 1 else offset
            part = view.attend(q, retrieval.indices, retrieval.weights, first, self.chunk_size)
            # outputs of several memories add up: the fusion weights are already normalised over all of them
            out = part if out is None else out if part is None else out + part
        return torch.zeros_like(q) if out is None else out


class HSALayer(nn.Module):
    """(B, T, M) -> (B, T, M): [x + SWA], then HSA with a standard or bypass residual, then the feed-forward block."""

    def __init__(
        self,
        *,
        hidden_size: int,
        window_attention: WindowAttention | None,
        hsa: HierarchicalSparseAttention,
        mlp: nn.Module,
        residual: str,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.window_attention = window_attention
        self.window_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps) if window_attention is not None else None
        self.hsa_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.hsa = hsa
        self.mlp_norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.mlp = mlp

    def forward(
        self,
        x: torch.Tensor,
        retrieval: Retrieval,
        views: Sequence[MemoryView],
        rotary: RotaryTable,
        segments: torch.Tensor | None = None,
        state: WindowState | None = None,
        queries: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Without views no chunk exists yet, and the HSA output is exactly 0 (fact 1).

        queries: of HSA (B, T, Hq, D), where a group has made them already (`asking`); x is past its window then.
        """
        if queries is not None:
            return self.feed_forward(x, self.hsa.output(self.hsa.read(queries, retrieval, views), x.dtype))
        x = self.attend_window(x, rotary, segments, state)
        read = self.hsa(self.hsa_norm(x), retrieval, views) if views else torch.zeros_like(x)
        return self.feed_forward(x, read)

    def attend_window(
        self, x: torch.Tensor, rotary: RotaryTable, segments: torch.Tensor | None, state: WindowState | None
    ) -> torch.Tensor:
        """x (B, T, M) and what its window gives."""
        if self.window_attention is None or self.window_norm is None:
            return x
        return x + self.window_attention(self.window_norm(x), rotary, segments, state)

    def feed_forward(self, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """x (B, T, M) with what it read in the memory, through the feed-forward block."""
        if self.residual == "bypass":
            return x + self.mlp(self.mlp_norm(x + read))
        x = x + read
        return x + self.mlp(self.mlp_norm(x))
