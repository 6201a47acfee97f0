"""Memories: what models and engines read (Memory), and the kind that grows, in device memory (ChunkMemory). No model.

A ChunkMemory grows by doubling, so appending never copies what is there more than O(1) times a chunk. One class serves
a training row (batch B), a generation cache and a memorised text (batch 1, with document records); what lies on
tiers or in a file is a StoredMemory. Facts 4, 6 and 7 of docs/architecture.md; tests/memory/test_chunk_memory.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch

from hsa_ultralong.memory.quantization import format_of
from hsa_ultralong.memory.saving import save_memory
from hsa_ultralong.nn.views import ChunkTensors, GraphView, LandmarkLookup, MemoryView, StoredView
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

    def loaded(self) -> Document:
        """A record of its own, token ids read if they lay in a file."""
        return Document(self.tokens, self.first_chunk, self.num_chunks, self.is_open, self.continuation, self.name)


@dataclass
class Memory(ABC):
    """Chunks that a model can retrieve, wherever their keys and values lie.

    Attributes (B is 1 for memorised texts):
        storage: k, v (B, C*S, Hkv, D), without slots where they lie elsewhere; landmarks (B, C, Hr, R); lengths (B, C)
            int32, tokens in each chunk, 1..S; segments (B, C) int32 document number; ends (B, C) int32, position in the
            document after the last slot. There may be room for more than `num_chunks`.
        documents: records of memorised texts, empty inside a forward.
        fingerprint: of the parameters that the memory depends on; a reader with another one refuses it.
        is_composable: False if the model's fusion depends on the order of chunks (fact 4): merging is refused then.
        lookup: finds chunks for questions without scanning all landmarks; None scans them (exact).
    """

    chunk_size: int
    storage: ChunkTensors
    num_chunks: int
    documents: list[Document] = field(default_factory=list)
    fingerprint: str = ""
    is_composable: bool = True
    lookup: LandmarkLookup | None = None

    @property
    def tensors(self) -> ChunkTensors:
        """Views of the chunks in use."""
        return self._slice(0, self.num_chunks)

    def _slice(self, first: int, stop: int) -> ChunkTensors:
        k, v, *rest = self.storage
        slots = slice(first * self.chunk_size, stop * self.chunk_size)
        return ChunkTensors(k[:, slots], v[:, slots], *(x[:, first:stop] for x in rest))

    k = property(lambda self: self.tensors.k)
    v = property(lambda self: self.tensors.v)
    landmarks = property(lambda self: self.tensors.landmarks)
    lengths = property(lambda self: self.tensors.lengths)
    segments = property(lambda self: self.tensors.segments)
    ends = property(lambda self: self.tensors.ends)

    @property
    def num_chunks_of_all(self) -> int:
        """Chunks of all processes that share the memory."""
        return self.num_chunks

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, the unfinished tail of an open one included."""
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values, landmarks and bookkeeping in use (token ids not counted)."""
        return sum(part.nbytes for part in self.tensors)

    @property
    def open_document(self) -> Document | None:
        """The one document that may still grow: always the last."""
        return self.documents[-1] if self.documents and self.documents[-1].is_open else None

    @abstractmethod
    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        """What layers read of this memory; is_for_all: every token that is not padding sees every chunk."""

    @abstractmethod
    def part(self, first: int, stop: int) -> ChunkTensors:
        """Chunks first..stop, keys and values on the device in the dtype that the model reads, wherever they lie."""

    @abstractmethod
    def loaded(self) -> ChunkMemory:
        """The same as a ChunkMemory, which can be changed; one that is a ChunkMemory is itself.

        Raises:
            ValueError: for a memory shared out over processes.
        """

    @property
    def forms(self) -> tuple[str, str]:
        """The forms that keys and values, and landmarks, are kept in: "bf16", "int8" ..."""
        return format_of(self.storage.k.dtype), format_of(self.storage.landmarks.dtype)

    def kept(self, first: int, stop: int, forms: tuple[str, str]) -> dict[str, Any]:
        """Payload and scales on the host of "keys_values" and "landmarks" of chunks, those that are in these forms."""
        return {}

    def refuse(self, what: str) -> NoReturn:
        """Raises: ValueError, as this memory cannot be `what`, with what can be done instead."""
        raise ValueError(
            f"a memory opened from a file or on several tiers cannot be {what}; change the file with "
            "hsa_ultralong.inference.Library and open it again, or take an ordinary copy: memory.loaded()"
        )

    def require_changeable(self, what: str, shift: int = 0) -> None:
        """Raises: ValueError where chunks can be neither added nor replaced, or not moved by `shift`."""
        self.refuse(what)

    def write(self, first: int, chunks: ChunkTensors) -> None:
        """Put `chunks` at chunk index `first` and following, growing as needed.

        Raises:
            ValueError: for a memory that is for reading.
        """
        self.refuse("written to")

    def splice(self, document: int, first: int, stop: int, chunks: ChunkTensors) -> None:
        """Replace chunks first..stop of a document (counted inside it) by others, any number; later chunks move.

        Raises:
            ValueError: for a memory that is for reading, or on tiers for another number of chunks.
        """
        self.refuse("changed")

    def held(self, first: int, stop: int) -> ChunkMemory:
        """Chunks first..stop as views, beside the records of all documents: what one of several processes holds.

        Raises:
            ValueError: for a memory whose keys and values lie in a store, or is shared out already.
        """
        self.refuse("shared out")

    def save(self, path: str | Path, **options: Any) -> None:
        """Write the memory to a new folder: see memory.saving.save_memory."""
        save_memory(self, path, **options)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> ChunkMemory:
        """A ChunkMemory on another device or in another float dtype, with document records of its own.

        Raises:
            ValueError: for a memory shared out over processes.
        """
        whole = self.loaded()
        moved = (part.to(device, dtype if part.is_floating_point() else None, copy=True) for part in whole.tensors)
        return self._ordinary(ChunkTensors(*moved), [document.loaded() for document in whole.documents])

    def select(self, documents: Sequence[int]) -> ChunkMemory:
        """A memory of only these documents (by number), in the given order, on the device.

        Raises:
            ValueError: for an unknown document number or an order-dependent model.
        """
        return ChunkMemory.concat([self._single(number) for number in documents])

    def _single(self, number: int) -> ChunkMemory:
        if not 0 <= number < len(self.documents):
            raise ValueError(f"document {number} does not exist; the memory holds {len(self.documents)}")
        document = self.documents[number].loaded()
        part = self.part(document.first_chunk, document.first_chunk + document.num_chunks)
        part = part._replace(segments=torch.zeros_like(part.segments))
        return self._ordinary(part, [replace(document, first_chunk=0)])

    def _ordinary(self, tensors: ChunkTensors, documents: list[Document]) -> ChunkMemory:
        count = tensors.landmarks.shape[1]
        return ChunkMemory(self.chunk_size, tensors, count, documents, self.fingerprint, self.is_composable)


def grown(part: torch.Tensor, length: int, fill: int = 0) -> torch.Tensor:
    """A tensor (B, n, ...) with room for `length`."""
    bigger = part.new_full((part.shape[0], length, *part.shape[2:]), fill)
    bigger[:, : part.shape[1]] = part
    return bigger


@dataclass
class ChunkMemory(Memory):
    """A memory with all its tensors in device memory, which grows and can be changed."""

    # opening makes memories of every kind, so opening.py puts it here
    load: ClassVar[Callable[..., Memory]]
    """memory.open_memory: a ChunkMemory with `store="device"`, else a StoredMemory, in host memory or left on disk."""

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

    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        # a lookup knows no other visibility
        if self.lookup is None or not is_for_all:
            return GraphView(self.tensors, visible)
        return StoredView(self.tensors, visible, None, self.lookup)

    def part(self, first: int, stop: int) -> ChunkTensors:
        return self._slice(first, stop)

    def loaded(self) -> ChunkMemory:
        return self

    def held(self, first: int, stop: int) -> ChunkMemory:
        return replace(self, storage=self.part(first, stop), num_chunks=stop - first, lookup=None)

    def require_changeable(self, what: str, shift: int = 0) -> None:
        pass

    def reserve(self, num_chunks: int) -> None:
        """Make room for `num_chunks` in all, at least doubling when the storage grows."""
        capacity = self.storage.landmarks.shape[1]
        if num_chunks <= capacity:
            return
        capacity = max(num_chunks, 2 * capacity)

        k, v, landmarks, lengths, segments, ends = self.storage
        slots = capacity * self.chunk_size
        self.storage = ChunkTensors(
            grown(k, slots),
            grown(v, slots),
            grown(landmarks, capacity),
            grown(lengths, capacity),
            grown(segments, capacity, UNUSED),
            grown(ends, capacity),
        )

    def write(self, first: int, chunks: ChunkTensors) -> None:
        self.lookup = None
        count = chunks.landmarks.shape[1]
        self.reserve(first + count)
        self.num_chunks = max(self.num_chunks, first + count)
        for name, target, source in zip(ChunkTensors._fields, self.storage, chunks, strict=True):
            unit = self.chunk_size if name in ("k", "v") else 1
            target[:, first * unit : (first + count) * unit] = source.detach()

    def splice(self, document: int, first: int, stop: int, chunks: ChunkTensors) -> None:
        record, count = self.documents[document], chunks.landmarks.shape[1]
        shift = count - (stop - first)
        if shift:
            place, end = record.first_chunk + stop, record.first_chunk + stop + shift
            later = self.part(place, self.num_chunks)
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

    @staticmethod
    def concat(memories: Sequence[Memory]) -> ChunkMemory:
        """One memory of all documents, in the given order (fact 4: the order does not matter to the model).

        Keys and values that lie in a store are read onto the device.

        Raises:
            ValueError: if a memory holds an open document, was built by another model, or has order-dependent fusion.
        """
        if not memories:
            raise ValueError("concat needs at least one memory")
        loaded = [memory.loaded() for memory in memories]
        first = loaded[0]
        for number, memory in enumerate(loaded):
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
        for memory in loaded:
            shifted = [replace(doc, first_chunk=doc.first_chunk + chunk_offset) for doc in memory.documents]
            parts.append(memory.tensors._replace(segments=memory.segments + len(documents)))
            documents += shifted
            chunk_offset += memory.num_chunks
        merged = ChunkTensors(*(torch.cat(columns, dim=1) for columns in zip(*parts, strict=True)))
        return replace(first, storage=merged, num_chunks=chunk_offset, documents=documents, lookup=None)
