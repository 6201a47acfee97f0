"""Memories beside a row's own chunks: a loaded library, and the pool of a batch (docs/architecture.md, fact 9)."""

from __future__ import annotations

import torch

from hsa_ultralong.nn.chunk_memory import ChunkMemory, ChunkTensors, MemoryView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL, UNUSED

_NEVER = 2**31 - 1


def library_view(library: ChunkMemory, segments: torch.Tensor, positions: torch.Tensor) -> MemoryView:
    """A loaded memory that every real token may read; segments and positions (B, T) of the queries."""
    tensors = library.tensors
    everyone = torch.full_like(tensors.segments, READABLE_BY_ALL)
    visible = ChunkVisibility(segments, positions, everyone, torch.zeros_like(everyone))
    return MemoryView(tensors, visible, store=library.store, ranks=library.ranks, lookup=library.lookup)


def pooled_view(own: ChunkTensors, segments: torch.Tensor) -> MemoryView:
    """The chunks of all rows as one memory of which each row sees the others' part (its own comes separately)."""
    batch, num_tokens = segments.shape
    rows = torch.arange(batch, dtype=torch.int32, device=segments.device)[:, None]
    chunk_rows = torch.where(own.segments == UNUSED, UNUSED, rows).to(torch.int32)  # (B, C)
    pooled = ChunkTensors(*(part.flatten(0, 1)[None] for part in own))
    owner = chunk_rows.reshape(1, -1)
    query_rows = torch.where(segments < 0, -1, rows).to(torch.int32)  # (B, T)
    visible = ChunkVisibility(
        query_rows, torch.zeros_like(query_rows), owner, torch.full_like(owner, _NEVER), foreign="past"
    )
    return MemoryView(pooled, visible)
