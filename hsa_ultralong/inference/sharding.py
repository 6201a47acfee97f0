"""Share one memory out over the ranks of a process group: contiguous ranges of chunks, equal up to one.

tests/distributed/test_memory_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from hsa_ultralong.distributed import RankedMemory
from hsa_ultralong.memory import MemoryFile, open_memory
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.stored_memory import SharedMemory


def share_out(memory: Memory, group: dist.ProcessGroup | None = None) -> SharedMemory:
    """This rank's part of a memory that every rank has at hand (views; drop the whole one to free its room).

    `generate`, `ask` and the cache take it like any memory; every rank must make the same calls. The answers are those
    of the whole memory.

    Raises:
        ValueError: without a process group, or for a memory whose keys and values lie in a store.
    """
    first, stop = _range(memory.num_chunks, group)
    return SharedMemory(memory.held(first, stop), RankedMemory(first, memory.num_chunks, group))


def open_shared(path: str | Path, group: dist.ProcessGroup | None = None, **options: Any) -> SharedMemory:
    """This rank's part of a memory file, of which nothing else is kept; `options` are those of memory.open_memory.

    Raises:
        ValueError: without a process group. MemoryFileError: see open_memory.
    """
    with MemoryFile.open_unverified(Path(path)) as file:
        total = file.num_chunks
    first, stop = _range(total, group)
    return SharedMemory(open_memory(path, part=(first, stop), **options), RankedMemory(first, total, group))


def _range(total: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_initialized():
        raise ValueError("sharing a memory needs a process group: start with torchrun and call init_process_group")
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    return total * rank // world, total * (rank + 1) // world
