"""ScoredChunks: what chunk_topk finds in one memory; softmax_fusion: the weights of what is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch

# lists that the kernel takes, and entries of all of them
MOST_LISTS, MOST_ENTRIES = 4, 1024


class ScoredChunks(NamedTuple):
    """indices (B, T, Hr, k) int32 and scores of the same shape, in the form of chunk_topk; numbers count from
    `offset`."""

    indices: torch.Tensor
    scores: torch.Tensor
    offset: int = 0


def softmax_fusion(scores: torch.Tensor) -> torch.Tensor:
    """Softmax over the kept chunks; all zero where there are none (fact 1 of docs/architecture.md)."""
    empty = scores == -torch.inf
    return scores.masked_fill(empty.all(-1, keepdim=True), 0.0).softmax(-1).masked_fill(empty, 0.0)
