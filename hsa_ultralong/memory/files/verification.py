"""Checking every byte of a memory, also of one that is too damaged to be opened.

Called before merging and exporting, and by the command line; tests/memory/test_files_damage.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from hsa_ultralong.memory.files.finite import WHAT, is_finite
from hsa_ultralong.memory.files.manifest import FILE, Manifest, no_memory, read_manifest
from hsa_ultralong.memory.files.reader import FileProgress, MemoryFile, name_documents, open_snapshot
from hsa_ultralong.memory.files.shard import PAGE_BYTES, Shard, ShardDamage
from hsa_ultralong.memory.files.spec import Damage, MemoryFileError, clear_errors

# rows looked at together
_STEP_BYTES = 2**25


def verify_memory(path: str | Path, progress: FileProgress | None = None) -> list[Damage]:
    """Check the manifest, the continuation, page tables, every page of every shard of a memory folder, and that the
    numbers of all documents are finite.

    Args:
        progress: called with (bytes done, bytes in all).

    Returns:
        All damaged places with the documents concerned; an empty list if there are none.

    Raises:
        MemoryFileError: the folder holds no memory at all.
    """
    folder = Path(path)
    if not os.path.lexists(folder / FILE):
        raise MemoryFileError(no_memory(folder))
    found: list[Damage] = []
    try:
        with clear_errors(folder, "opening the memory"):
            manifest, shards, _ = open_snapshot(folder, found.append)
    except MemoryFileError as error:
        return [Damage(FILE, None, str(error))]
    return found + _check_pages(manifest, shards, progress)


def verify_file(file: MemoryFile, progress: FileProgress | None = None) -> list[Damage]:
    """`verify_memory` for an open memory; a superseded one is checked through the shards that it holds open."""
    try:
        is_superseded = read_manifest(file.path).generation != file.manifest.generation
    except MemoryFileError:
        is_superseded = False
    return _check_pages(file.manifest, file.shards, progress) if is_superseded else verify_memory(file.path, progress)


def require_undamaged(file: MemoryFile, doing: str) -> None:
    """Refuse to copy from a damaged memory.

    Raises:
        MemoryFileError: names the first damage and counts the others.
    """
    damages = verify_file(file)
    if damages:
        more = f" (and {len(damages) - 1} more damaged places)" if len(damages) > 1 else ""
        raise MemoryFileError(f"{doing} refused, {file.path}/{damages[0]}{more}; restore the memory from a copy first")


def _check_pages(manifest: Manifest, shards: Mapping[int, Shard], progress: FileProgress | None) -> list[Damage]:
    found: list[Damage] = []
    total = sum(record.num_bytes for record in manifest.shards)
    done = 0
    for record in manifest.shards:
        shard = shards.get(record.number)
        if shard is None:
            # not opened, so its stated size was never compared with the file
            done += record.num_bytes
            continue
        for page in range(record.num_pages):
            try:
                shard.verify_page(page)
            except ShardDamage as error:
                found.append(name_documents(manifest, error))
            done += min(PAGE_BYTES, record.num_bytes - page * PAGE_BYTES)
            if progress is not None:
                progress(done, total)
    # a page that differs has been told of already
    return found or _check_numbers(manifest, shards)


def _check_numbers(manifest: Manifest, shards: Mapping[int, Shard]) -> list[Damage]:
    """The parts of documents that hold numbers that are not finite, one for each shard and column."""
    found: list[Damage] = []
    kinds = [(name, kind) for name, kind in manifest.spec.columns.items() if kind.dtype.is_floating_point]
    for document in manifest.documents:
        places: dict[tuple[int, str], bool] = {}
        for number, row, count in document.extents:
            shard = shards.get(number)
            for name, kind in kinds:
                step = max(1, _STEP_BYTES // kind.row_bytes)
                for first in range(row, row + count if shard is not None else row, step):
                    rows = torch.empty((min(step, row + count - first), *kind.shape), dtype=kind.dtype)
                    assert shard is not None
                    shard.read_rows(name, first, rows.view(-1).view(torch.uint8).numpy().data)
                    if not is_finite(rows):
                        places[number, name] = True
        for number, name in places:
            file = shards[number].record.file
            found.append(Damage(file, None, f"column {name} holds {WHAT}", (document.label,), (document.id,)))
    return found
