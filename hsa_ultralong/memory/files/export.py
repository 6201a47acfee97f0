"""Documents of a memory as a new one, without dead chunks.

Called by the command line and by rebuilding; tests/memory/test_files_writing.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hsa_ultralong.memory.files.housekeeping import new_folder
from hsa_ultralong.memory.files.reader import FileProgress, MemoryFile
from hsa_ultralong.memory.files.spec import MemoryFileError
from hsa_ultralong.memory.files.staging import SHARD_BYTES
from hsa_ultralong.memory.files.transfer import copy_documents
from hsa_ultralong.memory.files.verification import require_undamaged
from hsa_ultralong.memory.files.writer import MemoryWriter


def export_memory(
    file: MemoryFile,
    path: str | Path,
    documents: Sequence[int] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: FileProgress | None = None,
) -> None:
    """Write documents of a memory as a new one, without dead chunks, after checking every byte of the source.

    The new folder appears complete or not at all.

    Args:
        path: the new folder.
        documents: ids in the wanted order; None for all, an open one and the builder's state included.

    Raises:
        ValueError: an unknown or repeated document.
        MemoryFileError: the folder exists, the model depends on the order of chunks, an open document that would not
            be the last, damage, or no space.
    """
    selected = file.documents if documents is None else tuple(file.document(id) for id in documents)
    if len({document.id for document in selected}) != len(selected):
        raise ValueError("documents must be different, got one twice")
    if selected != file.documents:
        file.spec.require_composable("select")
    for document in selected[:-1]:
        if document.is_open:
            raise MemoryFileError(f"{document.label} is open and must be the last of the new memory; close it first")
    with new_folder(Path(path), "exporting") as partial:
        require_undamaged(file, "exporting")
        with MemoryWriter.create(partial, file.spec, shard_bytes=shard_bytes) as writer:
            for document in copy_documents(writer, file, selected, progress):
                writer.adopt_document(document)
            state = file.continuation()
            if writer.open_document is not None and state is not None:
                writer.set_continuation(*state)
            # what was noted about an open document belongs to it
            writer.commit(build_state=file.build_state if documents is None or writer.open_document else None)
