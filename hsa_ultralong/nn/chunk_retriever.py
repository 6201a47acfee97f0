"""Retrieval: each token scores all visible landmarks, keeps the top K and turns the scores into fusion weights.

Paper sec. 2.2 (equations 1, 2, 4) and paper facts A.2. Several memories (a loaded library, then the row's own chunks)
are ranked together. Scores are fp32 from the accumulator on (fact 10). Called by models/modeling_hsa.py;
tests/nn/test_chunk_retriever.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.nn.chunk_encoder import rms_normalize
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.ops import ScoredChunks, chunk_topk, combine_topk
from hsa_ultralong.ops._common import accumulation_dtype
from hsa_ultralong.ops.chunk_topk.lists import softmax_fusion
from hsa_ultralong.ops.chunk_topk.noise import gumbel_noise


class Retrieval(NamedTuple):
    """Chunks each token reads. Indices count through the views in order, descending (most recent first), -1 = empty.

    indices (B, T, Hr, K) int32; weights and scores (B, T, Hr, K) fp32; offsets: first index of every view.
    """

    indices: torch.Tensor
    weights: torch.Tensor
    scores: torch.Tensor
    offsets: tuple[int, ...]

    @staticmethod
    def empty(x: torch.Tensor, heads: int) -> Retrieval:
        """What tokens x (B, T, M) retrieve where no chunk exists: K is 0."""
        weights = x.new_zeros((*x.shape[:2], heads, 0), dtype=accumulation_dtype(x.dtype))
        return Retrieval(weights.to(torch.int32), weights, weights, ())


def stick_breaking_fusion(scores: torch.Tensor) -> torch.Tensor:
    """w_k = sigmoid(s_k) * prod over more recent j < k of (1 - sigmoid(s_j)); the sum is at most 1."""
    empty = scores == -torch.inf
    softplus = F.softplus(scores.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
    return (scores.masked_fill(empty, 0.0) - softplus.cumsum(-1)).exp().masked_fill(empty, 0.0)


class ChunkRetriever(nn.Module):
    """(B, T, M) and memories -> Retrieval."""

    def __init__(
        self,
        *,
        hidden_size: int,
        retrieval_dim: int,
        num_retrieval_heads: int,
        fusion: str,
        normalize_queries: bool,
        learned_temperature: bool,
        position_decay: bool,
        gumbel_noise: bool,
        rms_norm_eps: float,
    ) -> None:
        super().__init__()
        self.num_retrieval_heads, self.fusion = num_retrieval_heads, fusion
        self.normalize_queries, self.gumbel_noise = normalize_queries, gumbel_noise
        self.norm = nn.RMSNorm(hidden_size, eps=rms_norm_eps)
        self.query_proj = nn.Linear(hidden_size, retrieval_dim, bias=False)
        self.log_temperature = nn.Parameter(torch.zeros(num_retrieval_heads)) if learned_temperature else None
        self.position_decay = nn.Parameter(torch.zeros(())) if position_decay else None

    def queries(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, M) -> (B, T, Hr, R)."""
        query = self.query_proj(self.norm(x)).unflatten(-1, (self.num_retrieval_heads, -1))
        return rms_normalize(query).to(query.dtype) if self.normalize_queries else query

    def factor(self) -> torch.Tensor | None:
        """What products are multiplied by, 1 / (sqrt(R) * temperature), (Hr,); None without a learned temperature."""
        if self.log_temperature is None:
            return None
        dim = self.query_proj.out_features // self.num_retrieval_heads
        # 16 bits would move all scores
        return dim**-0.5 / self.log_temperature.to(accumulation_dtype(self.log_temperature.dtype)).exp()

    def forward(
        self,
        x: torch.Tensor,
        views: Sequence[MemoryView],
        *,
        topk: int,
        noise_seed: int | None = None,
        noise_start: int = 0,
    ) -> Retrieval:
        """x (B, T, M), tokens from noise_start on of their rows; views in order of age; noise is added only in training
        of a model configured for it."""
        if not views:
            return Retrieval.empty(x, self.num_retrieval_heads)
        use_noise = self.training and self.gumbel_noise and noise_seed is not None
        return self.select(
            self.queries(x), self.factor(), views, topk=topk, noise_seed=noise_seed if use_noise else None,
            noise_start=noise_start,
        )  # fmt: skip

    def select(
        self,
        query: torch.Tensor,
        factor: torch.Tensor | None,
        views: Sequence[MemoryView],
        *,
        topk: int,
        noise_seed: int | None = None,
        noise_start: int = 0,
    ) -> Retrieval:
        """The chunks of queries (B, T, Hr, R) and their weights; with a noise_seed, chosen by noisy scores."""
        found: list[ScoredChunks] = []
        rankings, offsets, offset = [], [], 0
        for number, view in enumerate(views):
            seed = None if noise_seed is None else noise_seed + number
            if view.lookup is not None and seed is None:
                indices, scores = view.lookup.search(query, topk, visible=view.visible, scale=factor)
            else:
                indices, scores = chunk_topk(
                    query, view.memory.landmarks.to(query.dtype), view.visible, topk=topk, scale=factor,
                    noise_seed=seed, noise_start=noise_start,
                )  # fmt: skip
            if view.ranks is not None and noise_seed is not None:
                raise ValueError("a memory shared out over processes is for reading: train without noise")
            parts = [(indices, scores, 0)] if view.ranks is None else view.ranks.lists(indices, scores, topk)
            found += [ScoredChunks(chunks, values, offset + first) for chunks, values, first in parts]
            if noise_seed is not None:
                ranking = scores.detach()
                if len(views) > 1:
                    batch, length, heads, _ = indices.shape
                    places = noise_start, noise_start + length
                    ranking = ranking + gumbel_noise(
                        noise_seed + number, batch, *places, heads, indices, indices.device
                    )
                rankings.append(ranking)
            offsets.append(offset)
            offset += view.memory.landmarks.shape[1] if view.ranks is None else view.ranks.num_chunks
        indices, scores, weights = combine_topk(found, topk=topk, rankings=rankings or None)
        if self.position_decay is not None:
            rank = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
            scores = scores + rank * self.position_decay
            weights = softmax_fusion(scores)
        if self.fusion != "softmax":
            weights = stick_breaking_fusion(scores)
        return Retrieval(indices, weights, scores, tuple(offsets))
