"""Retrieval: each token scores all visible landmarks, keeps the top K and turns the scores into fusion weights.

Paper sec. 2.2 (equations 1, 2, 4) and paper facts A.2. Several memories (a memorised one, then the row's own chunks)
are ranked together. Scores are fp32 from the accumulator on (fact 10). Called by models/modeling_hsa.py;
tests/nn/test_chunk_retriever.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from hsa_ultralong.nn.chunk_encoder import rms_normalize
from hsa_ultralong.nn.fusion import fuse
from hsa_ultralong.nn.views import MemoryView, Search
from hsa_ultralong.ops import ScoredChunks, combine_topk
from hsa_ultralong.ops._common import accumulation_dtype
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
        temperature_chunks: int = 0,
    ) -> None:
        super().__init__()
        self.num_retrieval_heads, self.fusion = num_retrieval_heads, fusion
        self.normalize_queries, self.gumbel_noise = normalize_queries, gumbel_noise
        self.temperature_chunks = temperature_chunks
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

    def growth(self, query: torch.Tensor, views: Sequence[MemoryView]) -> torch.Tensor | None:
        """What the scores of queries (B, T, ...) are multiplied by, (B, T) fp32; None without the option.

        It is log(n) / log(temperature_chunks), at least 1, for the n chunks that a token may read.
        """
        if not self.temperature_chunks:
            return None
        visible = torch.stack([view.num_visible(query) for view in views]).sum(0)
        return (visible.clamp_min(1).float().log() / math.log(self.temperature_chunks)).clamp_min(1)

    def forward(
        self,
        x: torch.Tensor,
        views: Sequence[MemoryView],
        *,
        topk: int,
        noise_seed: int | torch.Tensor | None = None,
        noise_start: int = 0,
        queries: torch.Tensor | None = None,
    ) -> Retrieval:
        """x (B, T, M), tokens from noise_start on of their rows; views in order of age; noise is added only in training
        of a model configured for it. queries: those of x, where they are made already."""
        if not views:
            return Retrieval.empty(x, self.num_retrieval_heads)
        use_noise = self.training and self.gumbel_noise and noise_seed is not None
        return self.select(
            self.queries(x) if queries is None else queries, self.factor(), views, topk=topk,
            noise_seed=noise_seed if use_noise else None, noise_start=noise_start,
        )  # fmt: skip

    def select(
        self,
        query: torch.Tensor,
        factor: torch.Tensor | None,
        views: Sequence[MemoryView],
        *,
        topk: int,
        noise_seed: int | torch.Tensor | None = None,
        noise_start: int = 0,
    ) -> Retrieval:
        """The chunks of queries (B, T, Hr, R) and their weights; with a noise_seed, chosen by noisy scores."""
        found: list[ScoredChunks] = []
        rankings, offsets, offset = [], [], 0
        for number, view in enumerate(views):
            seed = None if noise_seed is None else noise_seed + number
            lists = view.topk(query, Search(topk, factor, seed, noise_start))
            found += [part._replace(offset=offset + part.offset) for part in lists]
            if seed is not None:
                rankings.append(_ranking(lists[0], seed if len(views) > 1 else None, noise_start))
            offsets.append(offset)
            offset += view.num_chunks()
        indices, scores, weights = combine_topk(found, topk=topk, rankings=rankings or None)
        scores, weights = fuse(scores, weights, self.fusion, self.position_decay, self.growth(query, views))
        return Retrieval(indices, weights, scores, tuple(offsets))


def _ranking(found: ScoredChunks, noise_seed: int | torch.Tensor | None, noise_start: int) -> torch.Tensor:
    """What chunks are ranked by beside those of other views: noisy scores, where there are any."""
    ranking = found.scores.detach()
    if noise_seed is None:
        return ranking
    batch, length, heads, _ = found.indices.shape
    places = noise_start, noise_start + length
    return ranking + gumbel_noise(noise_seed, batch, *places, heads, found.indices, found.indices.device)
