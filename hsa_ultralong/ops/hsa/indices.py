"""Chunk numbers that count through several memories, seen from one of them."""

from __future__ import annotations

import torch


def within(indices: torch.Tensor, first_chunk: int | None, num_chunks: int) -> torch.Tensor:
    """Indices counted from first_chunk, those outside 0 .. num_chunks - 1 as -1; None leaves them as they are."""
    if first_chunk is None:
        return indices
    indices = indices - first_chunk
    return torch.where((indices >= 0) & (indices < num_chunks), indices, -1)
