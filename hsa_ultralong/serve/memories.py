"""The memory files of a server: made, changed, listed, opened and kept open, one folder for every namespace.

A memory is served as it was last committed. In doubt it is read again: an open one counts as long as the file on disk
has its generation. Called by app.py and worker.py; tests/serve/test_app.py, test_kills.py.
"""

from __future__ import annotations

import shutil
import threading
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
from hsa_ultralong.serve.limits import Limits, ServeError
from hsa_ultralong.serve.memory_folders import SUFFIX, bytes_of, is_beginning, partial_of, refusal, states_of
from hsa_ultralong.serve.tiers import CACHE_BYTES, TIERS, OpenMemories

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
        self._guard = threading.RLock()
        self.opened = OpenMemories({"device": limits.device_bytes, "host": limits.host_bytes}, limits.open_memories)
        self._asked: dict[Path, int] = {}
        self._clock = 0
        self._writers: dict[Path, threading.Lock] = {}
        folder.mkdir(parents=True, exist_ok=True)

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
        with self._guard:
            places = [self._existing(namespace, id) for id in ids]
            stamps = tuple(self._stamp(namespace, id) for id in ids)
            key = (namespace, *ids)
            self._clock += 1
            self._asked.update(dict.fromkeys(places, self._clock))
            opened: Opened = self.opened.get(
                key, stamps, self._costs(namespace, ids), lambda store: self._read(places, ids, store)
            )
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
        """One change of a memory at a time."""
        with self._guard:
            lock = self._writers.setdefault(place, threading.Lock())
        if not lock.acquire(blocking=False):
            raise ServeError(409, f"memory {place.stem!r} is being changed; try again", "memory_busy")
        try:
            yield
        except (ValueError, OSError) as error:
            raise refusal(error, self.folder) from error
        finally:
            lock.release()

    @contextmanager
    def _writing(self, place: Path) -> Iterator[Library]:
        with self._changing(place), self._opened(place) as library:
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
        self, namespace: str, id: str, documents: Sequence[tuple[str, str]], progress: MemoryProgress | None = None
    ) -> dict[str, Any]:
        """Memorise (name, text) documents as a new memory, which is there when all of them are.

        The same call after a kill goes on where the last one stood; a call whose memory is there already and holds
        just these documents changes nothing.

        Raises:
            ServeError: the memory exists with other documents, or does not fit.
        """
        place, encoded = self._place(namespace, id), self._encoded(documents)
        begun = partial_of(place)
        with self._changing(place):
            if (place / "manifest.json").is_file():
                with self._file(namespace, id) as file:
                    self._require_ours(id, file.spec)
                    is_same = len(file.documents) == len(encoded) and is_beginning(file, encoded)
                if is_same:
                    return self.info(namespace, id)
                raise ServeError(409, f"memory {id!r} exists already, with other documents", "memory_exists")
            self._make_room(place, _count(encoded))
            begun.parent.mkdir(parents=True, exist_ok=True)
            if begun.exists() and not self._goes_on(begun, encoded):
                shutil.rmtree(begun)
            with self._library(begun) as library:
                done = 0
                for number, (name, tokens) in enumerate(encoded):
                    if number >= len(library.documents) or library.documents[number].is_open:
                        library.add(tokens, name=name, progress=_shifted(progress, done, _count(encoded)))
                    done += len(tokens)
            begun.rename(place)
            sync_folder(place.parent)
        return self.info(namespace, id)

    def append(
        self, namespace: str, id: str, documents: Sequence[tuple[str, str]], progress: MemoryProgress | None = None
    ) -> dict[str, Any]:
        """Memorise (name, text) documents behind those of a memory: all of them, or none."""
        place, encoded = self._existing(namespace, id), self._encoded(documents)
        with self._writing(place) as library:
            self._make_room(place, _count(encoded))
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
        self, namespace: str, id: str, document: int, text: str, span: tuple[int, int] | None
    ) -> dict[str, Any]:
        """Give a document (by id) another text, or tokens start..stop of it; only what changed is read again."""
        place = self._existing(namespace, id)
        tokens = self.tokenizer(text)["input_ids"] if text else []
        with self._writing(place) as library:
            self._make_room(place, len(tokens))
            self._require_document(library, id, document)
            if span is None:
                plan = library.replace(document, tokens)
            else:
                plan = library.edit(document, *span, tokens)
        return {**self.info(namespace, id), "chunks_read": plan.num_chunks}

    @staticmethod
    def _require_document(library: Library, id: str, document: int) -> None:
        if all(one.id != document for one in library.documents):
            raise ServeError(404, f"{id} holds no document {document}", "document_not_found")

    def remove(self, namespace: str, id: str, document: int) -> dict[str, Any]:
        """Delete a document (by id), and its bytes."""
        place = self._existing(namespace, id)
        with self._writing(place) as library:
            self._require_document(library, id, document)
            library.delete(document)
            library.compact()
        return self.info(namespace, id)

    def merge(self, namespace: str, id: str, others: Sequence[str]) -> dict[str, Any]:
        """Add the documents of other memories, which stay as they are; a new memory if there is none of this name."""
        place, sources = self._place(namespace, id), [self._existing(namespace, other) for other in others]
        if place in sources:
            raise ServeError(400, f"memory {id!r} cannot be merged into itself", "invalid_memory")
        for other in others:
            self._stamp(namespace, other)
        with self._changing(place):
            is_new = not (place / "manifest.json").is_file()
            self._make_room(place, 0, sum(bytes_of(source) for source in sources), needed=sources)
            if is_new:
                begun = partial_of(place)
                begun.parent.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(begun, ignore_errors=True)
                with self._library(begun) as library:
                    library.merge(sources)
                begun.rename(place)
                sync_folder(place.parent)
            else:
                with self._opened(place) as library:
                    library.merge(sources)
        return self.info(namespace, id)

    def delete(self, namespace: str, id: str) -> None:
        """Remove a memory for good; questions under way go on with what they opened."""
        place = self._existing(namespace, id)
        with self._changing(place):
            self._drop(place)

    def _drop(self, place: Path) -> None:
        with self._guard:
            # out of the way in one step, so that a kill leaves it whole or gone
            grave = place.with_name(f".{place.name}.deleted")
            shutil.rmtree(grave, ignore_errors=True)
            place.rename(grave)
            shutil.rmtree(grave, ignore_errors=True)
            namespace, id = place.parent.name, place.stem
            self.opened.close(lambda key: key[0] == namespace and id in key[1:])
            self._asked.pop(place, None)

    # room -------------------------------------------------------------------------------------------------------------

    def bytes_used(self) -> int:
        """Of all memories."""
        return sum(bytes_of(place) for place in self.folder.glob(f"*/*{SUFFIX}") if not place.is_symlink())

    def _make_room(self, place: Path, tokens: int, extra: int = 0, needed: Sequence[Path] = ()) -> None:
        """Evict others until so many tokens and bytes fit; `needed` stay."""
        bound = self.limits.disk_bytes
        if bound is None:
            return
        config = self.model.config
        heads = config.num_memory_heads * config.head_dim * 4 + config.retrieval_dim * 2 // config.chunk_size
        wanted = extra + tokens * (heads + 4)
        while self.bytes_used() + wanted > bound:
            kept = (place, *needed)
            idle = [one for one in self.folder.glob(f"*/*{SUFFIX}") if one not in kept and not self._is_changing(one)]
            if not self.limits.evict or not idle:
                raise ServeError(
                    507, f"about {wanted:,} bytes more would pass the disk budget of {bound:,}; delete memories",
                    "disk_budget",
                )  # fmt: skip
            longest = min(idle, key=lambda one: (self._asked.get(one, 0), one.stat().st_mtime))
            with self._changing(longest):
                self._drop(longest)

    def _is_changing(self, place: Path) -> bool:
        lock = self._writers.get(place)
        return lock is not None and lock.locked()


def _count(encoded: Sequence[tuple[str, torch.Tensor]]) -> int:
    return sum(len(tokens) for _, tokens in encoded)


def _shifted(progress: MemoryProgress | None, done: int, total: int) -> Callable[[int, int | None], None] | bool:
    """Progress of one document as part of all."""
    return False if progress is None else lambda read, _: progress(done + read, total)
