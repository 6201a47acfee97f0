"""The memory files of a server: made, changed, listed, opened and kept open, one folder for every namespace.

A memory is served as it was last committed. In doubt it is read again: an open one counts as long as the file on disk
has its generation. Called by app.py and worker.py; tests/serve/test_app.py, test_kills.py.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.files.durable import sync_folder
from hsa_ultralong.inference import Library
from hsa_ultralong.memory import ChunkMemory, Memory, MemoryFile
from hsa_ultralong.memory.files import MemoryFileError
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.serve.catalogue import Catalogue
from hsa_ultralong.serve.disk_budget import DiskBudget, file_bytes
from hsa_ultralong.serve.last_asked import LastAsked
from hsa_ultralong.serve.limits import Limits, ServeError
from hsa_ultralong.serve.memory_folders import (
    bytes_of,
    grave_of,
    is_beginning,
    partial_of,
    refusal,
    remove_graves,
    remove_uploads,
    states_of,
    uploads_of,
)
from hsa_ultralong.serve.open_memories import CACHE_BYTES, TIERS, OpenMemories
from hsa_ultralong.serve.repeated import RequestKey

# read between two commits of a new memory: what a kill may cost
COMMIT_TOKENS = 2**18
# openings of a memory that is changed meanwhile
_TRIES = 5
# (tokens read, tokens of the whole text)
MemoryProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class Opened:
    """What a question reads: `memory` holds the documents of the memories `ids`, in order; `documents` are their
    (memory id, document id)."""

    memory: Memory
    ids: tuple[str, ...]
    documents: list[tuple[str, int]]


class Memories(Catalogue):
    """All memories below a folder, asked and changed; thread-safe.

    One writer changes a memory at a time; questions go on with the state that was committed before.
    """

    def __init__(
        self,
        folder: Path,
        model: Any,
        tokenizer: Any,
        limits: Limits,
        *,
        store: str = "host",
        key_values: str = "bf16",
        landmarks: str = "bf16",
    ) -> None:
        """
        Args:
            store: the best tier for keys and values while they are asked: device, host or file. key_values, landmarks:
                forms of new files.
        """
        super().__init__(folder, model, tokenizer, key_values=key_values, landmarks=landmarks)
        self.limits, self.store, self.key_values, self.landmarks = limits, store, key_values, landmarks
        self.opened = OpenMemories({"device": limits.device_bytes, "host": limits.host_bytes}, limits.open_memories)
        self.asked = LastAsked()
        self.disk = DiskBudget(folder, limits, self.asked, self._close)
        self.uploads = uploads_of(folder)
        folder.mkdir(parents=True, exist_ok=True)
        remove_graves(folder)
        remove_uploads(self.uploads)

    # asking -----------------------------------------------------------------------------------------------------------

    def open(self, namespace: str, ids: Sequence[str]) -> Opened:
        """What a question reads: one memory, or several as one.

        Raises:
            ServeError: unknown, empty, half-read or another model's.
        """
        if len(ids) > self.limits.memories_per_request:
            raise ServeError(
                400,
                f"at most {self.limits.memories_per_request} memories a question, got {len(ids)}",
                "too_many_memories",
            )
        if len(set(ids)) < len(ids):
            raise ServeError(400, "a memory is named twice", "invalid_memory")
        places = [self._existing(namespace, id) for id in ids]
        opened: Opened = self.opened.get(
            (namespace, *ids),
            lambda: (tuple(self._stamp(namespace, id) for id in ids), self._costs(namespace, ids)),
            lambda store: self._read(places, ids, store),
        )
        for place in places:
            self.asked.note(place)
        return opened

    def _costs(self, namespace: str, ids: Sequence[str]) -> dict[str, dict[str, int]]:
        """Bytes of device and host memory on every tier that memories may lie on, the best first."""
        infos, config = [self.info(namespace, id) for id in ids], self.model.config
        chunks, size = sum(info["chunks"] for info in infos), self.model.model.embed_tokens.weight.element_size()
        pairs = chunks * config.chunk_size * 2 * config.num_memory_heads * config.head_dim * size
        landmarks = chunks * (config.retrieval_dim * size + 12)
        found = {
            "device": {"device": pairs + landmarks, "host": 0},
            "host": {"device": landmarks, "host": sum(info["bytes"] for info in infos)},
            "file": {"device": landmarks + min(pairs, CACHE_BYTES), "host": 0},
        }
        # several are put together where they are read
        tiers = TIERS[TIERS.index(self.store) :] if len(ids) == 1 else TIERS[:1]
        return {tier: found[tier] for tier in tiers}

    def _stamp(self, namespace: str, id: str) -> tuple[int, ...]:
        """What tells one state of the file from another, also of another file of this name."""
        with self._file(namespace, id) as file:
            self._require_ours(id, file.spec)
            info = self._info(id, file)
        if info["status"] == "reading":
            raise ServeError(409, f"memory {id!r} is still being read; ask it when it is ready", "memory_not_ready")
        if info["chunks"] == 0:
            raise ServeError(409, f"memory {id!r} holds nothing to read yet", "memory_empty")
        place = (self._place(namespace, id) / "manifest.json").stat()
        return int(info["generation"]), place.st_ino, place.st_mtime_ns

    def _read(self, places: Sequence[Path], ids: Sequence[str], store: str) -> Opened:
        weight = self.model.model.embed_tokens.weight
        options: dict[str, Any] = {"store": store, "device": weight.device, "dtype": weight.dtype}
        if store == "file":
            options["cache_bytes"] = CACHE_BYTES
        for _ in range(_TRIES):
            before = states_of(places)
            try:
                found = [open_memory(place, **options) for place in places]
                memory: Memory = found[0] if len(found) == 1 else ChunkMemory.concat(found)
                documents: list[tuple[str, int]] = []
                for id, place in zip(ids, places, strict=True):
                    with MemoryFile.open_unverified(place) as file:
                        documents += [(id, one.id) for one in file.documents]
            except (ValueError, OSError) as error:
                if states_of(places) == before:
                    raise refusal(error, self.folder) from error
                continue
            # one state of every file: documents are those of the chunks
            if states_of(places) == before:
                return Opened(memory, tuple(ids), documents)
        raise ServeError(409, "a memory changed while it was opened; ask again", "memory_busy")

    # changing ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _changing(self, place: Path) -> Iterator[None]:
        """One change of a memory at a time; errors as a client is told them."""
        with self.disk.changing(place):
            try:
                yield
            except (ValueError, OSError) as error:
                raise refusal(error, self.folder) from error

    @contextmanager
    def _writing(self, place: Path, key: RequestKey | None = None) -> Iterator[Library | None]:
        """A memory under change, None where the change with this key was made before."""
        with self._changing(place), self._opened(place) as library:
            if key is not None and key.is_done(library.writer.build_state):
                yield None
                return
            if key is not None:
                library.notes = key.note(library.writer.build_state)
            yield library

    @contextmanager
    def _opened(self, place: Path) -> Iterator[Library]:
        """A memory of this model and tokenizer for writing; nothing of another's is touched."""
        with MemoryFile.open_unverified(place) as file:
            self._require_ours(place.stem, file.spec)
        with Library.open(self.model, place) as library:
            # what is written is what was looked at
            self._require_ours(place.stem, library.writer.spec)
            yield library

    def create(
        self,
        namespace: str,
        id: str,
        documents: Sequence[tuple[str, str]],
        progress: MemoryProgress | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Memorise (name, text) documents as a new memory, which is there when all of them are.

        The same call after a kill goes on where the last one stood; a call whose memory is there already and holds
        just these documents changes nothing, nor does one whose `key` (of the client) made it.

        Raises:
            ServeError: the memory exists with other documents, or does not fit.
        """
        place, encoded = self._place(namespace, id), self._encoded(documents)
        begun, known = partial_of(place), RequestKey.make(key, "documents", documents)
        with self._changing(place):
            if (place / "manifest.json").is_file():
                with self._file(namespace, id) as file:
                    self._require_ours(id, file.spec)
                    is_same = known is not None and known.is_done(file.build_state)
                    is_same = is_same or (len(file.documents) == len(encoded) and is_beginning(file, encoded))
                if is_same:
                    return self.info(namespace, id)
                raise ServeError(409, f"memory {id!r} exists already, with other documents", "memory_exists")
            begun.parent.mkdir(parents=True, exist_ok=True)
            if begun.exists() and not self._goes_on(begun, encoded):
                shutil.rmtree(begun)
            wanted = file_bytes(self.spec, _sizes(encoded))
            with self.disk.room(place, wanted, is_whole=True), self._library(begun) as library:
                done = staged = 0
                for number, (name, tokens) in enumerate(encoded):
                    if number >= len(library.documents) or library.documents[number].is_open:
                        staged += len(tokens)
                        is_full = staged >= COMMIT_TOKENS
                        library.add(
                            tokens, name=name, commit=is_full, commit_tokens=COMMIT_TOKENS,
                            progress=_shifted(progress, done, _count(encoded)),
                        )  # fmt: skip
                        staged = 0 if is_full else staged
                    done += len(tokens)
                library.notes = {} if known is None else known.note({})
                library.commit()
            begun.rename(place)
            sync_folder(place.parent)
        return self.info(namespace, id)

    def append(
        self,
        namespace: str,
        id: str,
        documents: Sequence[tuple[str, str]],
        progress: MemoryProgress | None = None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Memorise (name, text) documents behind those of a memory: all of them, or none; once for a `key`."""
        place, encoded = self._existing(namespace, id), self._encoded(documents)
        with self._writing(place, RequestKey.make(key, "documents", documents)) as library:
            if library is not None:
                with self.disk.room(place, file_bytes(library.writer.spec, _sizes(encoded))):
                    done = 0
                    for name, tokens in encoded:
                        library.add(tokens, name=name, commit=False, progress=_shifted(progress, done, _count(encoded)))
                        done += len(tokens)
                    library.commit()
        return self.info(namespace, id)

    def _encoded(self, documents: Sequence[tuple[str, str]]) -> list[tuple[str, torch.Tensor]]:
        found = [(name, torch.tensor(self.tokenizer(text)["input_ids"], dtype=torch.int32)) for name, text in documents]
        if not found or any(len(tokens) == 0 for _, tokens in found):
            raise ServeError(400, "a document is empty: nothing to memorise", "empty_document")
        return found

    def _goes_on(self, place: Path, encoded: Sequence[tuple[str, torch.Tensor]]) -> bool:
        """Whether what a killed call left is the beginning of these documents, in the form of new memories."""
        try:
            with MemoryFile.open_unverified(place) as file:
                return file.spec == self.spec and is_beginning(file, encoded)
        except MemoryFileError:
            return False

    def _library(self, place: Path) -> Library:
        return Library.create(
            self.model,
            place,
            key_values=self.key_values,
            landmarks=self.landmarks,
            tokenizer=self.spec.tokenizer,
            exist_ok=True,
        )

    def replace(
        self,
        namespace: str,
        id: str,
        document: int,
        text: str,
        span: tuple[int, int] | None,
        key: str | None = None,
    ) -> dict[str, Any]:
        """Give a document (by id) another text, or tokens start..stop of it, once for a `key`; only what changed is
        read again."""
        place = self._existing(namespace, id)
        tokens = self.tokenizer(text)["input_ids"] if text else []
        with self._writing(place, RequestKey.make(key, "replace", document, text, span)) as library:
            if library is None:
                return {**self.info(namespace, id), "chunks_read": 0}
            self._require_document(library, id, document)
            spec, start, stop = library.writer.spec, *(span or (0, library.document(document).num_tokens))
            most = library.plan(document, start, stop, len(tokens)).num_chunks * spec.chunk_size
            with self.disk.room(place, file_bytes(spec, [("", most)])):
                if span is None:
                    plan = library.replace(document, tokens)
                else:
                    plan = library.edit(document, start, stop, tokens)
        return {**self.info(namespace, id), "chunks_read": plan.num_chunks}

    @staticmethod
    def _require_document(library: Library, id: str, document: int) -> None:
        if all(one.id != document for one in library.documents):
            raise ServeError(404, f"{id} holds no document {document}", "document_not_found")

    def remove(self, namespace: str, id: str, document: int) -> dict[str, Any]:
        """Delete a document (by id), and its bytes."""
        place = self._existing(namespace, id)
        with self._changing(place), self._opened(place) as library:
            if any(one.id == document for one in library.documents):
                library.delete(document)
                library.compact()
            else:
                # what a removal left that was killed between the two
                library.compact()
                self._require_document(library, id, document)
        return self.info(namespace, id)

    def merge(self, namespace: str, id: str, others: Sequence[str], key: str | None = None) -> dict[str, Any]:
        """Add the documents of other memories, which stay as they are, once for a `key`; a new memory if there is none
        of this name."""
        known, place, sources = (
            RequestKey.make(key, "merge", others),
            self._place(namespace, id),
            [self._existing(namespace, other) for other in others],
        )
        if len(set(others)) < len(others):
            raise ServeError(400, "a memory is named twice", "invalid_memory")
        if place in sources:
            raise ServeError(400, f"memory {id!r} cannot be merged into itself", "invalid_memory")
        for other in others:
            self._stamp(namespace, other)
        if (place / "manifest.json").is_file():
            with self._writing(place, known) as library:
                if library is not None:
                    with self.disk.room(place, sum(map(bytes_of, sources)), needed=sources):
                        library.merge(sources)
            return self.info(namespace, id)
        with self._changing(place):
            begun = partial_of(place)
            if begun.exists():
                shutil.rmtree(begun)
            with self.disk.room(place, sum(map(bytes_of, sources)), needed=sources):
                with self._library(begun) as library:
                    library.notes = {} if known is None else known.note({})
                    library.merge(sources)
                begun.rename(place)
                sync_folder(place.parent)
        return self.info(namespace, id)

    def delete(self, namespace: str, id: str) -> None:
        """Remove a memory for good, or what a killed request left of one; questions under way go on with what they
        opened."""
        place = self._place(namespace, id)
        if not any(one.is_dir() and not one.is_symlink() for one in (partial_of(place), grave_of(place))):
            place = self._existing(namespace, id)
        with self._changing(place):
            self.disk.remove(place)

    def _close(self, place: Path) -> None:
        namespace, id = place.parent.name, place.stem
        self.opened.close(lambda key: key[0] == namespace and id in key[1:])

    def bytes_used(self) -> int:
        """Of all memories on disk."""
        return self.disk.used()


def _sizes(encoded: Sequence[tuple[str, torch.Tensor]]) -> list[tuple[str, int]]:
    return [(name, len(tokens)) for name, tokens in encoded]


def _count(encoded: Sequence[tuple[str, torch.Tensor]]) -> int:
    return sum(len(tokens) for _, tokens in encoded)


def _shifted(progress: MemoryProgress | None, done: int, total: int) -> Callable[[int, int | None], None] | bool:
    """Progress of one document as part of all."""
    return False if progress is None else lambda read, _: progress(done + read, total)
