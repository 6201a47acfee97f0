"""ChunkMemory: keys, values and landmarks of chunks, with their lengths and documents. No files, no model.

Grows by doubling, so appending never copies what is there more than O(1) times a chunk. One class serves a training
row (batch B), a generation cache and a memorised library (batch 1, with document records). Facts 4, 6 and 7 of
docs/architecture.md; tests/memory/test_chunk_memory.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from hsa_ultralong.nn.views import (
    ChunkTensors,
    GraphView,
    KeyValueStore,
    LandmarkKeeper,
    LandmarkLookup,
    MemoryRanks,
    MemoryView,
    RanksView,
    StoredView,
)
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import UNUSED


@dataclass
class Continuation:
    """How to go on with an open document: keys and values of the windows of the lower layers, (1, n, Hkv, D), and the
    last lower outputs, (1, n, M)."""

    windows: list[tuple[torch.Tensor, torch.Tensor]]
    lower: torch.Tensor

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Continuation:
        """A copy elsewhere."""
        windows = [(keys.to(device, dtype), values.to(device, dtype)) for keys, values in self.windows]
        return Continuation(windows, self.lower.to(device, dtype))


@dataclass
class Document:
    """One memorised document: token ids (n,) int32, where its chunks lie, and how to go on if it is open."""

    tokens: torch.Tensor
    first_chunk: int
    num_chunks: int
    is_open: bool = False
    continuation: Continuation | None = None
    name: str = ""

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[0]


@dataclass
class ChunkMemory:
    """Chunks that a model can retrieve.

    Attributes (B is 1 for a memorised library):
        k, v: (B, C*S, Hkv, D). landmarks: (B, C, Hr, R). lengths: (B, C) int32, tokens in each chunk, 1..S.
        segments: (B, C) int32 document number. ends: (B, C) int32, position in the document after the last slot.
        documents: records of a memorised library, empty inside a forward.
        fingerprint: of the parameters that the memory depends on; a reader with another one refuses it.
        is_composable: False if the model's fusion depends on the order of chunks (fact 4): merging is refused then.
        store: where k and v lie if not in `storage`, whose k and v then have no slots; such a memory is for reading.
        lookup: finds chunks for questions without scanning all landmarks; None scans them (exact).
        ranks: set where this process holds only a part of the chunks (`documents` lists all); also for reading.
    """

    chunk_size: int
    storage: ChunkTensors
    num_chunks: int
    documents: list[Document] = field(default_factory=list)
    fingerprint: str = ""
    is_composable: bool = True
    store: KeyValueStore | None = None
    ranks: MemoryRanks | None = None
    lookup: LandmarkLookup | None = None

    @staticmethod
    def empty(
        *,
        batch: int,
        chunk_size: int,
        num_memory_heads: int,
        head_dim: int,
        num_retrieval_heads: int,
        retrieval_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        capacity: int = 0,
        fingerprint: str = "",
        is_composable: bool = True,
    ) -> ChunkMemory:
        """A memory of no chunks with room for `capacity`; `retrieval_dim` counts all retrieval heads."""

        def room(*shape: int, kind: torch.dtype = dtype, fill: int = 0) -> torch.Tensor:
            return torch.full((batch, *shape), fill, dtype=kind, device=device)

        storage = ChunkTensors(
            room(capacity * chunk_size, num_memory_heads, head_dim),
            room(capacity * chunk_size, num_memory_heads, head_dim),
            room(capacity, num_retrieval_heads, retrieval_dim // num_retrieval_heads),
            room(capacity, kind=torch.int32),
            room(capacity, kind=torch.int32, fill=UNUSED),
            room(capacity, kind=torch.int32),
        )
        return ChunkMemory(chunk_size, storage, 0, fingerprint=fingerprint, is_composable=is_composable)

    def save(self, path: str | Path, **options: Any) -> None:
        """Write the memory to a new folder: see memory.saving.save_memory."""
        from hsa_ultralong.memory.saving import save_memory

        save_memory(self, path, **options)

    @staticmethod
    def load(path: str | Path, **options: Any) -> ChunkMemory:
        """Open a saved memory, on a device, in host memory or left on disk: see memory.opening.open_memory."""
        from hsa_ultralong.memory.opening import open_memory

        return open_memory(path, **options)

    @property
    def tensors(self) -> ChunkTensors:
        """Views of the chunks in use."""
        slots = self.num_chunks * self.chunk_size
        k, v, *rest = self.storage
        return ChunkTensors(k[:, :slots], v[:, :slots], *(part[:, : self.num_chunks] for part in rest))

    @property
    def num_chunks_of_all(self) -> int:
        """Chunks of all ranks, those of this process where there is no other."""
        return self.num_chunks if self.ranks is None else self.ranks.num_chunks

    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        """What layers read of this memory; is_for_all: every token that is not padding sees every chunk."""
        # a sketch knows no other visibility; who keeps the landmarks must be asked
        lookup = self.lookup if is_for_all or isinstance(self.lookup, LandmarkKeeper) else None
        own: GraphView | StoredView = GraphView(self.tensors, visible)
        if self.store is not None or lookup is not None:
            own = StoredView(self.tensors, visible, self.store, lookup)
        return own if self.ranks is None else RanksView(own, self.ranks)

    def held_by(self, ranks: MemoryRanks, num_chunks: int) -> ChunkMemory:
        """The part of one rank: `num_chunks` chunks from ranks.first on, as views.

        Raises:
            ValueError: for a memory whose keys and values lie in a store, or is shared out already.
        """
        self._require_own_storage("shared out")
        part = self._part(self.tensors, ranks.first, ranks.first + num_chunks)
        return replace(self, storage=part, num_chunks=num_chunks, ranks=ranks, lookup=None)

    @property
    def k(self) -> torch.Tensor:
        """Raises: ValueError where keys and values lie in a store."""
        return self._own_pairs().k

    @property
    def v(self) -> torch.Tensor:
        """Raises: ValueError where keys and values lie in a store."""
        return self._own_pairs().v

    def _own_pairs(self) -> ChunkTensors:
        if self.store is not None:
            raise ValueError(
                "keys and values of this memory do not lie on the device; memory.part(first, stop) reads those of some "
                "chunks, memory.loaded() makes an ordinary memory of all"
            )
        return self.tensors

    landmarks = property(lambda self: self.tensors.landmarks)
    lengths = property(lambda self: self.tensors.lengths)
    segments = property(lambda self: self.tensors.segments)
    ends = property(lambda self: self.tensors.ends)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the unfinished tail of an open one included."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, landmarks and bookkeeping in use (token ids not counted)."""
        stored = 0 if self.store is None else self.store.num_bytes
        return stored + sum(part.numel() * part.element_size() for part in self.tensors)

    @property
    def open_document(self) -> Document | None:
        """The one document that may still grow: always the last."""
        return self.documents[-1] if self.documents and self.documents[-1].is_open else None

    def reserve(self, num_chunks: int) -> None:
        """Make room for `num_chunks` in all, at least doubling when the storage grows."""
        capacity = self.storage.landmarks.shape[1]
        if num_chunks <= capacity:
            return
        capacity = max(num_chunks, 2 * capacity)

        def grow(part: torch.Tensor, length: int, fill: int = 0) -> torch.Tensor:
            bigger = part.new_full((part.shape[0], length, *part.shape[2:]), fill)
            bigger[:, : part.shape[1]] = part
            return bigger

        k, v, landmarks, lengths, segments, ends = self.storage
        slots = capacity * self.chunk_size
        self.storage = ChunkTensors(
            grow(k, slots),
            grow(v, slots),
            grow(landmarks, capacity),
            grow(lengths, capacity),
            grow(segments, capacity, UNUSED),
            grow(ends, capacity),
        )

    def write(self, first: int, chunks: ChunkTensors) -> None:
        """Put `chunks` at chunk index `first` and following, growing as needed.

        Raises:
            ValueError: for a memory whose keys and values lie in a store.
        """
        self._require_own_storage("written to")
        self.lookup = None
        count = chunks.landmarks.shape[1]
        self.reserve(first + count)
        self.num_chunks = max(self.num_chunks, first + count)
        for name, target, source in zip(ChunkTensors._fields, self.storage, chunks, strict=True):
            unit = self.chunk_size if name in ("k", "v") else 1
            target[:, first * unit : (first + count) * unit] = source.detach()

    def splice(self, document: int, first: int, stop: int, chunks: ChunkTensors) -> None:
        """Replace chunks first..stop of a document (counted inside it) by others, any number; later chunks move.

        Raises:
            ValueError: for a memory whose keys and values lie in a store.
        """
        self._require_own_storage("changed")
        record, count = self.documents[document], chunks.landmarks.shape[1]
        shift = count - (stop - first)
        if shift:
            old = self.tensors
            place, end = record.first_chunk + stop, record.first_chunk + stop + shift
            later = self._part(old, place, self.num_chunks)
            # positions inside this document move with its chunks, those of other documents stay
            mine = slice(0, record.num_chunks - stop)
            later = ChunkTensors(*(part.clone() for part in later))
            later.ends[:, mine] += shift * self.chunk_size
            self.num_chunks += shift
            self.write(end, later)
            record.num_chunks += shift
            for other in self.documents[document + 1 :]:
                other.first_chunk += shift
        if count:
            self.write(record.first_chunk + first, chunks)

    def _part(self, tensors: ChunkTensors, first: int, stop: int) -> ChunkTensors:
        k, v, *rest = tensors
        slots = slice(first * self.chunk_size, stop * self.chunk_size)
        return ChunkTensors(k[:, slots], v[:, slots], *(x[:, first:stop] for x in rest))

    def part(self, first: int, stop: int) -> ChunkTensors:
        """Chunks first..stop, keys and values on the device in the dtype that the model reads, wherever they lie."""
        found = self._part(self.tensors, first, stop)
        if self.store is None:
            return found
        k, v = (pairs.flatten(0, 1)[None] for pairs in self.store.fetch(torch.arange(first, stop)))
        if isinstance(self.lookup, LandmarkKeeper):
            found = found._replace(landmarks=self.lookup.landmarks(first, stop, k.dtype))
        return found._replace(k=k, v=v)

    def loaded(self) -> ChunkMemory:
        """The same as an ordinary memory on the device, which can be changed; one that is ordinary is itself.

        Raises:
            ValueError: for a memory shared out over processes.
        """
        self.require_whole("loaded")
        if self.store is None:
            return self
        documents = [_plain(document) for document in self.documents]
        # landmarks and lengths are views of this memory's
        return self._ordinary(ChunkTensors(*(x.clone() for x in self.part(0, self.num_chunks))), documents)

    def _ordinary(self, tensors: ChunkTensors, documents: list[Document]) -> ChunkMemory:
        count = tensors.landmarks.shape[1]
        return ChunkMemory(self.chunk_size, tensors, count, documents, self.fingerprint, self.is_composable)

    def require_whole(self, what: str) -> None:
        """Raises: ValueError where this process holds a part only."""
        if self.ranks is not None:
            raise ValueError(f"a memory shared out over processes cannot be {what}; do it before sharing it out")

    def _require_own_storage(self, what: str) -> None:
        self.require_whole(what)
        if self.store is not None:
            raise ValueError(
                f"a memory opened from a file or on several tiers cannot be {what}; change the file with "
                "hsa_ultralong.inference.Library and open it again, or take an ordinary copy: memory.loaded()"
            )

    def write_rows(self, slots: torch.Tensor, chunks: ChunkTensors) -> None:
        """Put chunk j of row b at index slots[b, j], (B, n) int64; the caller has reserved the room."""
        rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
        for name, target, source in zip(ChunkTensors._fields, self.storage, chunks, strict=True):
            if name in ("k", "v"):
                target.unflatten(1, (-1, self.chunk_size))[rows, slots] = source.unflatten(1, (-1, self.chunk_size))
            else:
                target[rows, slots] = source

    def map_batch(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace every tensor by function(tensor): reorder, repeat or select rows of the batch."""
        self.storage = ChunkTensors(*(function(part) for part in self.storage))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ChunkMemory:
        """An ordinary copy on another device or in another float dtype, with document records of its own.

        Raises:
            ValueError: for a memory shared out over processes.
        """
        whole = self.loaded()
        moved = ChunkTensors(
            *(part.to(device, dtype if part.is_floating_point() else None, copy=True) for part in whole.tensors)
        )
        return self._ordinary(moved, [replace(document) for document in whole.documents])

    @staticmethod
    def concat(memories: Sequence[ChunkMemory]) -> ChunkMemory:
        """One memory of all documents, in the given order (fact 4: the order does not matter to the model).

        Keys and values that lie in a store are read onto the device.

        Raises:
            ValueError: if a memory holds an open document, was built by another model, or has order-dependent fusion.
        """
        if not memories:
            raise ValueError("concat needs at least one memory")
        memories = [memory.loaded() for memory in memories]
        first = memories[0]
        for number, memory in enumerate(memories):
            if memory.open_document is not None:
                raise ValueError(f"memory {number} holds an open document; close it with close_document() first")
            if memory.fingerprint != first.fingerprint:
                raise ValueError(
                    f"memory {number} was built by another model: {memory.fingerprint[:12]!r}, "
                    f"not {first.fingerprint[:12]!r}; read it again by that model (a file: hsa memory rebuild)"
                )
            if memory.chunk_size != first.chunk_size:
                raise ValueError(
                    f"memory {number} has chunks of {memory.chunk_size} tokens, the first of {first.chunk_size}"
                )
            if not memory.is_composable:
                raise ValueError(
                    "this model's fusion depends on the order of chunks (stick-breaking or position decay), so "
                    "memories cannot be merged; use a softmax-fusion model without position decay"
                )
        parts: list[ChunkTensors] = []
        documents: list[Document] = []
        chunk_offset = 0
        for memory in memories:
            shifted = [replace(doc, first_chunk=doc.first_chunk + chunk_offset) for doc in memory.documents]
            parts.append(memory.tensors._replace(segments=memory.segments + len(documents)))
            documents += shifted
            chunk_offset += memory.num_chunks
        merged = ChunkTensors(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
        return replace(first, storage=merged, num_chunks=chunk_offset, documents=documents, lookup=None)

    def select(self, documents: Sequence[int]) -> ChunkMemory:
        """A memory of only these documents (by number), in the given order, on the device.

        Raises:
            ValueError: for an unknown document number or an order-dependent model.
        """
        return ChunkMemory.concat([self._single(number) for number in documents])

    def _single(self, number: int) -> ChunkMemory:
        if not 0 <= number < len(self.documents):
            raise ValueError(f"document {number} does not exist; the memory holds {len(self.documents)}")
        self.require_whole("taken apart")
        document = _plain(self.documents[number])
        first = document.first_chunk
        part = self.part(first, first + document.num_chunks)
        part = part._replace(segments=torch.zeros_like(part.segments))
        return self._ordinary(part, [replace(document, first_chunk=0)])


def _plain(record: Document) -> Document:
    """A record of its own, token ids read if they lay in a file."""
    return Document(
        record.tokens, record.first_chunk, record.num_chunks, record.is_open, record.continuation, record.name
    )
