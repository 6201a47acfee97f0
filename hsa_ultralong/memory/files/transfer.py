"""Moving chunks between shards and memories: compaction, folding of small shards, merging.

Whole shards are copied as they are where every row is wanted, else row by row. Called by MemoryWriter and
export.py; tests/memory/test_files_writing.py, test_files_refusals.py, test_files_crash.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from hsa_ultralong.files.durable import remove_file, write_file
from hsa_ultralong.files.folder import read_bytes
from hsa_ultralong.memory.files.manifest import Manifest
from hsa_ultralong.memory.files.reader import FileProgress, MemoryFile
from hsa_ultralong.memory.files.shard import PAGE_BYTES, PageSums, Shard, ShardRecord, write_page_table
from hsa_ultralong.memory.files.spec import Extent, MemoryDocument, MemoryFileError, clear_errors, splice
from hsa_ultralong.memory.files.verification import require_undamaged

if TYPE_CHECKING:
    from hsa_ultralong.memory.files.writer import MemoryWriter

logger = logging.getLogger(__name__)
_COPY_BYTES = 2**25
# Shards of about one size are folded when there are this many; a tier's shards are as many times as large.
_FOLD = 8
_SMALLEST_TIER = 4096


def compact(writer: MemoryWriter, progress: FileProgress | None = None) -> int:
    """See MemoryWriter.compact."""
    writer.publish()
    manifest = writer.committed
    before = manifest.num_bytes
    chosen = _worth_rewriting(manifest, writer.shard_bytes)
    total = sum(record.num_bytes for record in chosen)
    done = 0
    for group in _groups(chosen, 4 * writer.shard_bytes):
        _rewrite(writer, {record.number for record in group})
        done += sum(record.num_bytes for record in group)
        if progress is not None:
            progress(done, total)
    return before - writer.committed.num_bytes


def fold_small_shards(writer: MemoryWriter) -> None:
    """Join shards of similar size when there are many, so that small commits leave few files.

    A chunk is copied at most once per tier, log8(shard_bytes / bytes of a commit) times in its life. Failing is no
    harm: the memory is as committed.
    """
    tiers: dict[int, list[ShardRecord]] = {}
    for record in writer.committed.shards:
        tier = 0
        while record.num_bytes >= _SMALLEST_TIER * _FOLD ** (tier + 1):
            tier += 1
        tiers.setdefault(tier, []).append(record)
    for _, records in sorted(tiers.items()):
        group = records[:_FOLD]
        if len(group) == _FOLD and sum(record.num_bytes for record in group) <= writer.shard_bytes:
            try:
                _rewrite(writer, {record.number for record in group})
            except MemoryFileError as error:
                logger.warning("small shards were not joined: %s", error)
            return


def merge(writer: MemoryWriter, others: Sequence[MemoryFile], progress: FileProgress | None = None) -> list[int]:
    """See MemoryWriter.merge."""
    writer.spec.require_composable("merge")
    if writer.open_document is not None:
        raise MemoryFileError(
            f"{writer.path} holds the open document {writer.open_document.label}; "
            f"close it first (hsa memory close {writer.path})"
        )
    for other in others:
        writer.spec.require_compatible(other.spec, str(other.path))
        if other.manifest.open_document is not None:
            label = other.manifest.open_document.label
            raise MemoryFileError(
                f"{other.path} holds the open document {label}; close it first (hsa memory close {other.path})"
            )
    for other in others:
        require_undamaged(other, "merging")
    total = sum(other.num_bytes for other in others)
    num_copied = len(writer.staging.written)
    documents: list[MemoryDocument] = []
    done = 0
    try:
        with clear_errors(writer.path, "merging"):
            for other in others:
                documents += copy_documents(writer, other, other.documents)
                done += other.num_bytes
                if progress is not None:
                    progress(done, total)
    except BaseException:
        used = {extent.shard for document in writer.documents for extent in document.extents}
        writer.staging.drop([record for record in writer.staging.written[num_copied:] if record.number not in used])
        raise
    return [writer.adopt_document(document) for document in documents]


def copy_documents(
    writer: MemoryWriter, file: MemoryFile, documents: Sequence[MemoryDocument], progress: FileProgress | None = None
) -> list[MemoryDocument]:
    """Stage the chunks of documents of another memory; returns their records with the new places."""
    counts = Manifest(file.spec, shards=file.manifest.shards, documents=tuple(documents)).live_rows()
    total = sum(document.num_chunks for document in documents) * file.spec.row_bytes
    whole: dict[int, int] = {}
    for record in file.manifest.shards:
        if counts[record.number] == record.num_chunks:
            copied = _copy_shard(writer, file.shard(record.number))
            whole[record.number] = copied.number
    done, result = 0, []
    for document in documents:
        position = file.chunk_range(document.id)[0]
        extents: list[Extent] = []
        for shard, first, count in document.extents:
            if shard in whole:
                extents.append(Extent(whole[shard], first, count))
            else:
                extents += _copy_rows(writer, file, position, position + count)
            position += count
        result.append(replace(document, extents=splice((), 0, 0, extents)))
        done += document.num_chunks * file.spec.row_bytes
        if progress is not None:
            progress(done, total)
    return result


def _copy_shard(writer: MemoryWriter, shard: Shard) -> ShardRecord:
    """Copy a shard and its page table under a new number, checking what passes."""
    number, size = writer.take_shard_number(), shard.record.num_bytes
    record = replace(shard.record, number=number, sha256="")
    sums = PageSums()

    def pieces() -> Iterator[bytes]:
        for offset in range(0, size, PAGE_BYTES):
            yield read_bytes(shard.descriptor, offset, min(PAGE_BYTES, size - offset))

    writer.require_own_generation()
    write_file(writer.path, record.file, sums.passing(pieces()))
    if sums.finish() != list(shard.sums):
        remove_file(writer.path, record.file)
        raise MemoryFileError(f"{shard.record.file} changed while it was copied; verify the memory")
    record = write_page_table(writer.path, record, shard.sums)
    writer.staging.written.append(record)
    return record


def _copy_rows(writer: MemoryWriter, file: MemoryFile, first: int, stop: int) -> list[Extent]:
    step = max(1, _COPY_BYTES // file.spec.row_bytes)
    extents: list[Extent] = []
    for start in range(first, stop, step):
        last = min(start + step, stop)
        extents += writer.staging.add({name: file.read(name, start, last) for name in file.spec.columns})
    return extents


def _rewrite(writer: MemoryWriter, numbers: set[int]) -> None:
    """Copy the rows in use of some shards into new ones, in document order, and commit; the writer has no changes."""
    try:
        with writer.snapshot() as file, clear_errors(writer.path, "compacting"):
            for document in file.documents:
                if not any(extent.shard in numbers for extent in document.extents):
                    continue
                position = file.chunk_range(document.id)[0]
                extents: list[Extent] = []
                for extent in document.extents:
                    if extent.shard in numbers:
                        extents += _copy_rows(writer, file, position, position + extent.num_chunks)
                    else:
                        extents.append(extent)
                    position += extent.num_chunks
                writer.move_chunks(document.id, splice((), 0, 0, extents))
        writer.publish()
    except BaseException:
        writer.discard()
        raise


def _worth_rewriting(manifest: Manifest, shard_bytes: int) -> list[ShardRecord]:
    """Shards with dead rows, and small ones if there are several."""
    rows = manifest.live_rows()
    small = [record for record in manifest.shards if record.num_bytes < shard_bytes // 4]
    return [
        record
        for record in manifest.shards
        if rows[record.number] < record.num_chunks or (len(small) > 1 and record in small)
    ]


def _groups(records: Sequence[ShardRecord], num_bytes: int) -> Iterator[list[ShardRecord]]:
    """Cut into groups of about `num_bytes`: so much extra room does compaction need."""
    group: list[ShardRecord] = []
    for record in records:
        group.append(record)
        if sum(member.num_bytes for member in group) >= num_bytes:
            yield group
            group = []
    if group:
        yield group
