"""What each token may retrieve: a memory, the pool of a batch (docs/pooled-memory.md), the row's own chunks."""

from __future__ import annotations

import torch

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.mixed_rows import MixedRows
from hsa_ultralong.memory.row_memories import RowMemories
from hsa_ultralong.models.layout import Layout, source_numbers
from hsa_ultralong.models.ranks import ALONE, ContextExchange, PoolExchange
from hsa_ultralong.nn.views import ChunkTensors, CompetingView, GraphView, MemoryView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL, UNUSED

POOLS = (False, True, "attended", "compete")
_NEVER = 2**31 - 1


def memory_view(
    memory: Memory | RowMemories | MixedRows, segments: torch.Tensor, positions: torch.Tensor
) -> MemoryView:
    """A loaded memory that every real token may read; segments and positions (B, T) of the queries.

    Its chunks end at places counted backwards from the start of the row, -S the last but one: as if it stood before.
    """
    if isinstance(memory, MixedRows):
        return memory.views(lambda one, rows: memory_view(one, segments[rows], positions[rows]), segments.device)
    everyone = torch.full_like(memory.segments, READABLE_BY_ALL)
    count = everyone.shape[1]
    ends = torch.arange(1 - count, 1, dtype=torch.int32, device=everyone.device) * memory.chunk_size
    visible = ChunkVisibility(segments, positions, everyone, ends.expand_as(everyone))
    return memory.view(visible, is_for_all=True)


def own_view(own: ChunkTensors, layout: Layout, *, is_causal: bool, context: ContextExchange = ALONE) -> MemoryView:
    """The past chunks of the token's own row and group; `is_causal`: the call's first token is the row's, so without
    packed documents all chunks that are read are full."""
    if context.rank + 1 < context.size:
        # later slices hold nothing but future
        past = own.landmarks.shape[1] // context.size * (context.rank + 1)
        slots = own.k.shape[1] // context.size * (context.rank + 1)
        own = ChunkTensors(own.k[:, :slots], own.v[:, :slots], *(part[:, :past] for part in own[2:]))
    visible = ChunkVisibility(layout.groups, layout.positions, own.segments, own.ends)
    is_full = is_causal and not layout.is_packed
    return GraphView(own, visible, is_causal=is_causal and context.rank == 0, is_full=is_full)


def pooled_view(
    own: ChunkTensors,
    layout: Layout,
    *,
    is_read: bool = True,
    context: ContextExchange = ALONE,
    ranks: PoolExchange = ALONE,
) -> MemoryView:
    """The chunks of all rows as one memory, of which a token sees those of other sources (its own come separately).

    Args:
        own: chunks of this process's rows.
        is_read: False leaves keys and values out: the chunks only compete.
        context: processes that share the rows, whose chunks `own` holds too. ranks: those that hold other rows.
    """
    batch, num_tokens = layout.segments.shape
    source_ids = layout.source_ids
    if source_ids is None:
        source_ids = torch.arange(batch, device=layout.segments.device) + ranks.rank * batch
    sources = source_numbers(source_ids if source_ids.dim() == 2 else source_ids[:, None]).expand(-1, num_tokens)
    is_reader = layout.segments >= 0
    if layout.isolated is not None:
        is_reader = is_reader & ~layout.isolated
    of_chunk = sources[:, :1]  # (B, 1)
    if source_ids.dim() == 2:
        chunk_size = own.k.shape[1] // own.landmarks.shape[1]
        of_chunk = context.gather(sources[:, ::chunk_size])  # (B, C)
    owner = torch.where(own.segments == UNUSED, UNUSED, of_chunk)
    no_slots = own.k[:, :0]
    k, v = (own.k, own.v) if is_read else (no_slots, no_slots)
    parts = [part.flatten(0, 1)[None] for part in (k, v, own.landmarks, own.lengths, owner)]  # (1, B*C, ...)
    # without keys and values there is nothing to send
    k, v, landmarks, lengths, owner = (ranks.gather(part) if part.shape[1] else part for part in parts)
    never = torch.full_like(owner, _NEVER)
    readers = torch.where(is_reader, sources, -1)  # (B, T)
    visible = ChunkVisibility(readers, torch.zeros_like(readers), owner, never, foreign="past")
    chunks = ChunkTensors(k, v, landmarks, lengths, owner, never)
    return GraphView(chunks, visible) if is_read else CompetingView(chunks, visible)
