"""MemoryWriter: the one process that changes a memory on disk. Nothing is visible before `commit`, which is atomic.

Chunks are appended to new shards, never copied or changed in place; deleting and replacing only changes the document
table, and `compact` frees the room. docs/memory-format.md; tests/memory/test_files_writing.py, test_files_crash.py.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.files.durable import make_folder, remove_file, sync_folder
from hsa_ultralong.files.fields import require
from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.memory.files import transfer
from hsa_ultralong.memory.files.continuation import encode_continuation, write_continuation
from hsa_ultralong.memory.files.finite import require_finite_columns, require_finite_state
from hsa_ultralong.memory.files.housekeeping import lock_writer, remove_leftovers, require_empty, require_own_generation
from hsa_ultralong.memory.files.manifest import (
    DOCUMENT,
    FILE,
    ContinuationRecord,
    Manifest,
    document_fields,
    generation_on_disk,
    read_manifest,
    write_manifest,
)
from hsa_ultralong.memory.files.reader import FileProgress, MemoryFile
from hsa_ultralong.memory.files.shard import FOLDER
from hsa_ultralong.memory.files.spec import (
    Extent,
    MemoryDocument,
    MemoryFileError,
    MemorySpec,
    as_json_object,
    clear_errors,
    splice,
)
from hsa_ultralong.memory.files.staging import SHARD_BYTES, Staging, check_columns

logger = logging.getLogger(__name__)


class MemoryWriter:
    """Changes a memory; made by `create` or `open`, holds the lock until `close`. A context manager.

    Documents are named by their id. Leaving the `with` block, or `close`, drops what was not committed.
    """

    def __init__(self, path: Path, lock: FileLock, manifest: Manifest, shard_bytes: int) -> None:
        self.path, self.shard_bytes = path, shard_bytes
        self._lock = lock
        self._committed, self._stamp = manifest, generation_on_disk(path)
        self._documents: dict[int, MemoryDocument] = {}
        # bytes that are to be written, the record of the file that stays, or None
        self._continuation: bytes | ContinuationRecord | None = None
        self._adopt(manifest)

    @staticmethod
    def create(
        path: str | Path, spec: MemorySpec, *, exist_ok: bool = False, shard_bytes: int = SHARD_BYTES
    ) -> MemoryWriter:
        """Make a new, empty memory and open it for writing.

        Args:
            path: its folder; made if missing.
            exist_ok: open a memory that exists already, if it is of the same kind (to go on building).
            shard_bytes: most bytes of uncommitted rows in RAM, and of a shard.

        Raises:
            MemoryFileError: it exists (or is of another kind), or cannot be written.
        """
        folder = Path(path)
        if exist_ok and (folder / FILE).exists():
            writer = MemoryWriter.open(folder, shard_bytes=shard_bytes)
            try:
                writer.spec.require_compatible(spec, "what is to be written")
            except MemoryFileError:
                writer.close()
                raise
            return writer
        with clear_errors(folder, "creating the memory"):
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_writer(folder)
            try:
                require_empty(folder)
                make_folder(folder, FOLDER)
                write_manifest(folder, Manifest(spec))
                sync_folder(folder)
                sync_folder(folder.absolute().parent)
                return MemoryWriter(folder, lock, read_manifest(folder), shard_bytes)
            except BaseException:
                lock.release()
                raise

    @staticmethod
    def open(path: str | Path, *, fingerprint: str | None = None, shard_bytes: int = SHARD_BYTES) -> MemoryWriter:
        """Open an existing memory for writing and remove what killed writers left.

        Raises:
            MemoryFileError: no memory, another model's, damaged or truncated, or another writer has it open.
        """
        folder = Path(path)
        # before the lock: what is refused is left without one
        manifest, stamp = _whole_generation(folder, fingerprint)
        with clear_errors(folder, "opening the memory for writing"):
            lock = lock_writer(folder)
            try:
                if generation_on_disk(folder) != stamp:
                    manifest, _ = _whole_generation(folder, fingerprint)
                remove_leftovers(folder, manifest)
                return MemoryWriter(folder, lock, manifest, shard_bytes)
            except BaseException:
                lock.release()
                raise

    def __enter__(self) -> MemoryWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop what was not committed and give the lock back."""
        if self._is_changed:
            logger.warning("%s: changes after generation %d were not committed", self.path, self.generation)
        try:
            self.discard()
        finally:
            self._lock.release()

    @property
    def committed(self) -> Manifest:
        """The generation on disk."""
        return self._committed

    @property
    def spec(self) -> MemorySpec:
        return self._committed.spec

    @property
    def generation(self) -> int:
        """Of the last commit."""
        return self._committed.generation

    @property
    def build_state(self) -> dict[str, Any]:
        """Of the last commit."""
        return self._committed.build_state

    @property
    def documents(self) -> tuple[MemoryDocument, ...]:
        """In order, with the changes that are not committed yet."""
        return tuple(self._documents.values())

    def document(self, id: int) -> MemoryDocument:
        """The document with this id, with the changes that are not committed yet.

        Raises:
            ValueError: there is none.
        """
        if id not in self._documents:
            raise ValueError(f"document {id} does not exist in {self.path}")
        return self._documents[id]

    @property
    def open_document(self) -> MemoryDocument | None:
        """The one that may still grow: always the last."""
        last = next(reversed(self._documents.values()), None)
        return last if last is not None and last.is_open else None

    def snapshot(self) -> MemoryFile:
        """The last committed state for reading; resident columns are read when asked for."""
        return MemoryFile.open_unverified(self.path)

    def begin_document(self, name: str = "", metadata: Mapping[str, Any] | None = None) -> int:
        """Add an empty open document at the end; returns its id.

        Raises:
            ValueError: another document is open, or `metadata` is no JSON.
        """
        if self.open_document is not None:
            raise ValueError(f"{self.open_document.label} is still open; close it with close_document first")
        return self.adopt_document(MemoryDocument(0, name, as_json_object(metadata or {}, "metadata"), is_open=True))

    def append_chunks(self, id: int, columns: Mapping[str, torch.Tensor], num_tokens: int) -> None:
        """Add chunks at the end of a document.

        Args:
            columns: every column of the memory, (n, *shape) each.
            num_tokens: tokens of the whole document from now on, an open one's tail included.

        Raises:
            ValueError: unknown document, or columns that do not fit the memory.
            MemoryFileError: a full shard could not be written.
        """
        count = self.document(id).num_chunks
        self.splice_chunks(id, count, count, columns, num_tokens)

    def splice_chunks(
        self, id: int, first: int, stop: int, columns: Mapping[str, torch.Tensor] | None, num_tokens: int
    ) -> None:
        """Replace chunks first..stop of a document by others: any number, none (`columns=None`) deletes.

        Raises:
            ValueError: unknown document, a range outside it, or columns that do not fit the memory.
            MemoryFileError: numbers that are not finite, or a full shard that could not be written.
        """
        document = self.document(id)
        if not 0 <= first <= stop <= document.num_chunks:
            raise ValueError(
                f"chunks must lie within 0..{document.num_chunks} of {document.label}, got {first}..{stop}"
            )
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be >= 0, got {num_tokens}")
        new: tuple[Extent, ...] = ()
        if columns is not None and check_columns(self.spec, columns):
            require_finite_columns(columns, document.label, first)
            self.require_own_generation()
            with clear_errors(self.path, "writing a shard"):
                new = self.staging.add(columns)
        self._put(replace(document, extents=splice(document.extents, first, stop, new), num_tokens=num_tokens))

    def describe_document(self, id: int, metadata: Mapping[str, Any]) -> None:
        """Replace the metadata of a document.

        Raises:
            ValueError: unknown document, or `metadata` is no JSON.
        """
        self._require_lock()
        document = replace(self.document(id), metadata=as_json_object(metadata, "metadata"))
        self._documents[id], self._is_changed = document, True

    def close_document(self, id: int) -> None:
        """Mark a document as complete; its continuation is dropped."""
        document = self.document(id)
        if document.is_open:
            self.clear_continuation()
            self._put(replace(document, is_open=False))

    def reopen_document(self, id: int) -> None:
        """Let the last document grow again.

        Raises:
            ValueError: it is not the last.
        """
        document = self.document(id)
        if next(reversed(self._documents)) != id:
            raise ValueError(f"only the last document of a memory can be open, and {document.label} is not the last")
        self._put(replace(document, is_open=True))

    def delete_document(self, id: int) -> None:
        """Remove a document; `compact` frees its bytes for good.

        Raises:
            ValueError: unknown document.
            MemoryFileError: others follow it and the model depends on the order of chunks.
        """
        self._require_lock()
        document = self.document(id)
        if next(reversed(self._documents)) != id:
            self.spec.require_composable("delete")
        if document.is_open:
            self.clear_continuation()
        del self._documents[id]
        self._is_changed = True

    def set_continuation(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any] | None = None) -> None:
        """Store how to go on with the open document; to be set again after each change of its chunks.

        Raises:
            ValueError: no document is open, or `metadata` is no JSON.
            MemoryFileError: numbers that are not finite.
        """
        self._require_lock()
        if self.open_document is None:
            raise ValueError("a continuation needs an open document; call begin_document or reopen_document first")
        require_finite_state(tensors, self.open_document.label)
        self._continuation = encode_continuation(tensors, metadata or {})
        self._is_continuation_stale, self._is_changed = False, True

    def clear_continuation(self) -> None:
        """Store none."""
        self._require_lock()
        if self._continuation is not None:
            self._continuation, self._is_changed = None, True
        self._is_continuation_stale = False

    def commit(self, build_state: Mapping[str, Any] | None = None) -> int:
        """Make all changes visible in one step; returns the generation.

        Args:
            build_state: JSON for a builder that goes on after a kill; None keeps the former.

        Raises:
            ValueError: the open document changed after its continuation was set, or `build_state` is no JSON.
            MemoryFileError: nothing could be written, or another writer was here since the lock was removed; memory and
                staged changes are as before, so commit again or discard.
        """
        before = self.generation
        if self.publish(build_state) != before:
            transfer.fold_small_shards(self)
        return self.generation

    def publish(self, build_state: Mapping[str, Any] | None = None) -> int:
        """`commit` that leaves small shards as they are."""
        self._require_lock()
        state = self.build_state if build_state is None else as_json_object(build_state, "build_state")
        if not self._is_changed and state == self.build_state:
            return self.generation
        # what discard looks at
        self._is_changed = True
        if self._is_continuation_stale:
            raise ValueError(
                "the open document changed after its continuation was set; call set_continuation or "
                "clear_continuation before commit"
            )
        self.require_own_generation()
        with clear_errors(self.path, "committing"):
            self.staging.flush()
            manifest = replace(
                self._committed,
                generation=self.generation + 1,
                shards=(*self._committed.shards, *self.staging.written),
                documents=self.documents,
                continuation=self._write_continuation(),
                build_state=state,
                next_document=self._next_document,
                next_shard=self._next_shard,
            ).without_dead_shards()
            sync_folder(self.path / FOLDER)
            # The names of what the manifest refers to must be on disk before the manifest.
            sync_folder(self.path)
            self.require_own_generation()
            self._stamp = write_manifest(self.path, manifest)
            obsolete = (self._committed.files() | self._staged_files()) - manifest.files()
            self._committed = manifest
            self._adopt(manifest)
            sync_folder(self.path)
        for name in obsolete:
            remove_file(self.path, name)
        return self.generation

    def discard(self) -> None:
        """Drop all changes since the last commit, and the shards written for them."""
        if self._lock.is_held and (self._is_changed or self._next_shard != self._committed.next_shard):
            # What counts is the disk: an interrupt may have come just after the manifest was replaced. Without the
            # lock file the files may be another writer's.
            if is_ours := self._lock.is_in_place:
                self._committed, self._stamp = read_manifest(self.path), generation_on_disk(self.path)
            self._adopt(self._committed)
            if is_ours:
                remove_leftovers(self.path, self._committed)

    def compact(self, progress: FileProgress | None = None) -> int:
        """Free the bytes of deleted and replaced chunks for good; returns how many bytes the memory lost.

        Commits staged changes first, then rewrites group after group of shards, a commit each.

        Raises:
            MemoryFileError: damaged chunks that are still in use, or no space; the memory holds what it held.
        """
        return transfer.compact(self, progress)

    def merge(self, others: Sequence[MemoryFile], progress: FileProgress | None = None) -> list[int]:
        """Add all documents of other memories at the end, after checking every byte of them; returns the new ids.

        Staged like everything: `commit` makes it visible.

        Raises:
            MemoryFileError: another model, tokenizer or form, an order-dependent model, an open document (here or
                there), damage, or no space; nothing is added then.
        """
        return transfer.merge(self, others, progress)

    def adopt_document(self, document: MemoryDocument) -> int:
        """Add a record whose chunks are staged already, under a new id, at the end (for merging and exporting)."""
        id = self._next_document
        self._put(replace(document, id=id))
        self._next_document += 1
        return id

    def move_chunks(self, id: int, extents: Sequence[Extent]) -> None:
        """Record that the same chunks of a document lie elsewhere (for compaction)."""
        self._require_lock()
        self._documents[id] = replace(self._documents[id], extents=tuple(extents))
        self._is_changed = True

    def take_shard_number(self) -> int:
        """A shard number that was never used before."""
        self._require_lock()
        self._next_shard += 1
        return self._next_shard - 1

    def _adopt(self, manifest: Manifest) -> None:
        self._documents = {document.id: document for document in manifest.documents}
        self._next_document, self._next_shard = manifest.next_document, manifest.next_shard
        self._continuation = manifest.continuation
        self._is_continuation_stale = self._is_changed = False
        self.staging = Staging(self.path, manifest.spec, self.take_shard_number, self.shard_bytes)

    def _require_lock(self) -> None:
        if not self._lock.is_held:
            raise ValueError(f"this writer of {self.path} was closed, or belongs to a parent process; open a new one")

    def require_own_generation(self) -> None:
        """Refuse to write where another writer was."""
        self._require_lock()
        require_own_generation(self.path, self._lock, self._stamp)

    def _put(self, document: MemoryDocument) -> None:
        self._require_lock()
        require(DOCUMENT, document_fields(document), document.label)
        self._documents[document.id] = document
        self._is_changed = True
        if document.is_open and self._continuation is not None:
            self._is_continuation_stale = True

    def _staged_files(self) -> set[str]:
        return {name for record in self.staging.written for name in (record.file, record.pages_file)}

    def _write_continuation(self) -> ContinuationRecord | None:
        data = self._continuation
        return write_continuation(self.path, self.generation + 1, data) if isinstance(data, bytes) else data


def _whole_generation(folder: Path, fingerprint: str | None) -> tuple[Manifest, bytes]:
    """A manifest whose files are all there, of the right size, with right page tables and headers; and what
    `generation_on_disk` gave before."""
    stamp = generation_on_disk(folder)
    with MemoryFile.open_unverified(folder, fingerprint) as file:
        return file.manifest, stamp
