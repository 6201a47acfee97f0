"""Memories beyond RAM: the format on disk (`files`). No model; docs/memory-format.md."""

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

__all__ = [
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
