"""The fusions: how much of each retrieved chunk a token reads, from the scores of its slots, most recent first.

combine_topk gives the softmax with its lists, in one kernel on a GPU; what differs from it is made here. Called by
chunk_retriever.py; tests/nn/test_chunk_retriever.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hsa_ultralong.ops.chunk_topk.lists import softmax_fusion


def stick_breaking_fusion(scores: torch.Tensor) -> torch.Tensor:
    """w_k = sigmoid(s_k) * prod over more recent j < k of (1 - sigmoid(s_j)); the sum is at most 1."""
    empty = scores == -torch.inf
    softplus = F.softplus(scores.masked_fill(empty, 0.0)).masked_fill(empty, 0.0)
    return (scores.masked_fill(empty, 0.0) - softplus.cumsum(-1)).exp().masked_fill(empty, 0.0)


def equal_fusion(scores: torch.Tensor) -> torch.Tensor:
    """The same weight for all slots that are not empty: scores choose chunks and do not weigh them, so that what is
    read teaches retrieval nothing."""
    filled = scores > -torch.inf
    return filled / filled.sum(-1, keepdim=True).clamp_min(1).to(scores.dtype)


def fuse(
    scores: torch.Tensor,
    weights: torch.Tensor,
    fusion: str,
    position_decay: torch.Tensor | None,
    growth: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and weights (B, T, Hr, K) of a fusion, "softmax", "stick_breaking" or "none"; `weights` are the
    softmax's.

    position_decay: added to the scores once per slot before it. growth: (B, T), at least 1, what the scores of a token
    are multiplied by.
    """
    if growth is not None:
        scores = scores * growth.to(scores.dtype)[..., None, None]
        weights = softmax_fusion(scores)
    if position_decay is not None:
        rank = torch.arange(scores.shape[-1], device=scores.device, dtype=scores.dtype)
        scores = scores + rank * position_decay
        weights = softmax_fusion(scores)
    if fusion != "softmax":
        weights = equal_fusion(scores) if fusion == "none" else stick_breaking_fusion(scores)
    return scores, weights
