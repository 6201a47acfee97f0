"""A memory takes over all that another one holds, of any model, in one commit: how a memory is built again in place.

Shards are linked, not copied, where the file system can; the other memory stays whole. Called by
inference/rebuilding.py; tests/inference/test_rebuilding.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from hsa_ultralong.files.durable import link_file
from hsa_ultralong.memory.files.reader import MemoryFile
from hsa_ultralong.memory.files.spec import Extent, clear_errors
from hsa_ultralong.memory.files.verification import require_undamaged
from hsa_ultralong.memory.files.writer import MemoryWriter


def number_documents(writer: MemoryWriter, ids: Sequence[int], next_document: int, build_state: dict[str, Any]) -> None:
    """Give the documents these ids, in order, and commit: those of the memory that they were read from."""
    documents = writer.documents
    if [document.id for document in documents] != list(ids):
        writer._documents = {id: replace(d, id=id) for id, d in zip(ids, documents, strict=True)}
        writer._is_changed = True
    if writer._next_document != next_document:
        writer._next_document, writer._is_changed = next_document, True
    writer.commit(build_state)


def take_over(writer: MemoryWriter, other: MemoryFile) -> None:
    """Replace everything in a memory, its kind too, by what `other` holds, in one commit; ids stay the other's.

    Raises:
        MemoryFileError: damage there, or the files could not be linked; the memory holds what it held.
    """
    require_undamaged(other, "taking over its documents")
    manifest, state = other.manifest, other.continuation()
    try:
        numbers: dict[int, int] = {}
        with clear_errors(writer.path, "taking over documents"):
            for record in manifest.shards:
                own = replace(record, number=writer.take_shard_number())
                link_file(other.path, record.file, writer.path, own.file)
                link_file(other.path, record.pages_file, writer.path, own.pages_file)
                writer.staging.written.append(own)
                numbers[record.number] = own.number
        writer.clear_continuation()
        writer._committed = replace(writer._committed, spec=manifest.spec)
        writer._documents = {
            document.id: replace(
                document,
                extents=tuple(Extent(numbers[shard], first, count) for shard, first, count in document.extents),
            )
            for document in manifest.documents
        }
        writer._next_document, writer._is_changed = manifest.next_document, True
        if state is not None:
            writer.set_continuation(*state)
        writer.publish(other.build_state)
    except BaseException:
        writer.discard()
        raise
