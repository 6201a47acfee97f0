"""The memory on disk: a versioned folder of immutable shards and one manifest; docs/memory-format.md."""

from hsa_ultralong.memory.files.export import export_memory
from hsa_ultralong.memory.files.reader import MemoryFile
from hsa_ultralong.memory.files.spec import Column, Damage, Extent, MemoryDocument, MemoryFileError, MemorySpec
from hsa_ultralong.memory.files.verification import verify_memory
from hsa_ultralong.memory.files.writer import MemoryWriter

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
