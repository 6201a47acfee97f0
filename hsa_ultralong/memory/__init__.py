"""Memories beyond device memory: files, stores, 8-bit formats, a landmark index. No model; docs/memory-format.md."""

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Memory
from hsa_ultralong.memory.files import (
    Column,
    Damage,
    Extent,
    MemoryDocument,
    MemoryFile,
    MemoryFileError,
    MemorySpec,
    MemoryWriter,
    export_memory,
    verify_memory,
)
from hsa_ultralong.memory.landmark_index import LandmarkIndex
from hsa_ultralong.memory.landmark_lists import LandmarkLists
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.memory.saving import save_memory
from hsa_ultralong.memory.stored_memory import StoredMemory
from hsa_ultralong.memory.tiers import TieredStore

__all__ = [
    "ChunkMemory",
    "LandmarkIndex",
    "LandmarkLists",
    "Memory",
    "StoredMemory",
    "TieredStore",
    "open_memory",
    "save_memory",
    "Column",
    "MemorySpec",
    "MemoryDocument",
    "Extent",
    "MemoryFile",
    "MemoryWriter",
    "export_memory",
    "verify_memory",
    "Damage",
    "MemoryFileError",
]
