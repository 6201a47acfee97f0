"""Share one memory out over the ranks of a process group: contiguous ranges of chunks, equal up to one."""

from __future__ import annotations

import torch.distributed as dist

from hsa_ultralong.distributed import RankedMemory
from hsa_ultralong.nn.chunk_memory import ChunkMemory


def share_out(memory: ChunkMemory, group: dist.ProcessGroup | None = None) -> ChunkMemory:
    """This rank's part of a memory that every rank has at hand (views; drop the whole one to free its room).

    `generate`, `ask` and the cache take it like any memory; every rank must make the same calls. The answers are those
    of the whole memory.

    Raises:
        ValueError: without a process group, or for a memory whose keys and values lie in a store.
    """
    if not dist.is_initialized():
        raise ValueError("share_out needs a process group: start with torchrun and call init_process_group first")
    rank, world, total = dist.get_rank(group), dist.get_world_size(group), memory.num_chunks
    first, stop = total * rank // world, total * (rank + 1) // world
    return memory.held_by(RankedMemory(first, total, group), stop - first)
