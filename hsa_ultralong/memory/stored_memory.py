"""Memories for reading: keys and values left in a store (host memory, a file, tiers), or one shared out over processes.

Landmarks, lengths and documents are at hand. Saved, copied, selected and merged like any Memory. Made by opening.py and
inference/sharding.py; tests/memory/test_stores.py, tests/distributed/test_memory_ranks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from hsa_ultralong.memory.chunk_memory import ChunkMemory, Document, Memory
from hsa_ultralong.nn.views import (
    ChunkTensors,
    KeyValueStore,
    LandmarkKeeper,
    MemoryRanks,
    MemoryView,
    RanksView,
    StoredView,
)
from hsa_ultralong.ops import ChunkVisibility

# chunks fetched at a time
_STEP = 4096


@dataclass
class StoredMemory(Memory):
    """A memory whose keys and values lie in `store`; those of `storage` have no slots.

    A lookup that keeps the landmarks itself (LandmarkKeeper) stands for those of `storage`, which have no numbers then.
    """

    store: KeyValueStore = field(kw_only=True)

    @property
    def keeper(self) -> LandmarkKeeper | None:
        """What keeps the landmarks, None if they are in `storage`."""
        return self.lookup if isinstance(self.lookup, LandmarkKeeper) else None

    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        # a sketch knows no other visibility; who keeps the landmarks must be asked
        return StoredView(self.tensors, visible, self.store, self.lookup if is_for_all else self.keeper)

    def part(self, first: int, stop: int) -> ChunkTensors:
        # also where there are none: the shape of no pairs
        steps = [torch.arange(start, min(start + _STEP, stop)) for start in range(first, max(stop, first + 1), _STEP)]
        parts = zip(*(self.store.fetch(chunks) for chunks in steps), strict=True)
        k, v = (torch.cat(pairs).flatten(0, 1)[None] for pairs in parts)
        found = self._slice(first, stop)._replace(k=k, v=v)
        return found if self.keeper is None else found._replace(landmarks=self.keeper.landmarks(first, stop, k.dtype))

    def loaded(self) -> ChunkMemory:
        k, v, *rest = self.part(0, self.num_chunks)
        # landmarks and lengths are views of this memory's
        tensors = ChunkTensors(k, v, *(part.clone() for part in rest))
        return self._ordinary(tensors, [document.loaded() for document in self.documents])

    @property
    def num_bytes(self) -> int:
        _, _, landmarks, *rest = self.tensors
        kept = landmarks.nbytes if self.keeper is None else self.keeper.num_bytes
        return self.store.num_bytes + kept + sum(part.nbytes for part in rest)

    @property
    def forms(self) -> tuple[str, str]:
        return self.store.format, super().forms[1] if self.keeper is None else self.keeper.format

    def kept(self, first: int, stop: int, forms: tuple[str, str]) -> dict[str, Any]:
        places = {"keys_values": self.store, "landmarks": self.keeper}
        return {
            name: place.kept(first, stop)
            for (name, place), form in zip(places.items(), forms, strict=True)
            if place is not None and place.format == form
        }

    @property
    def k(self) -> NoReturn:  # type: ignore[override]
        """Raises: ValueError."""
        raise ValueError(
            "keys and values of this memory do not lie on the device; memory.part(first, stop) reads those of some "
            "chunks, memory.loaded() makes an ordinary memory of all"
        )

    v = k


class SharedMemory(Memory):
    """What this process holds of a memory shared out over several; `documents` lists those of all.

    Tensors, lookup and number of chunks are those of `own` as it is now.
    """

    def __init__(self, own: Memory, ranks: MemoryRanks, documents: list[Document] | None = None) -> None:
        """documents: of what all ranks have read (`join`); None: `own` lists those of all."""
        self.own, self.ranks = own, ranks
        self.chunk_size, self.fingerprint, self.is_composable = own.chunk_size, own.fingerprint, own.is_composable
        self.documents = own.documents if documents is None else documents
        self.is_joined = documents is not None
        self._lengths = self._lengths_of_own()

    storage = property(lambda self: self.own.storage)
    lookup = property(lambda self: self.own.lookup)  # type: ignore[assignment]
    num_chunks = property(lambda self: self.own.num_chunks)
    k = property(lambda self: self.own.k)
    v = property(lambda self: self.own.v)

    def _lengths_of_own(self) -> list[tuple[int, int]]:
        """What other ranks know of this one's documents; of a memory shared out each has all records, and counts."""
        if not self.is_joined:
            return [(len(self.own.documents), self.own.num_chunks)]
        return [(document.num_tokens, document.num_chunks) for document in self.own.documents]

    @property
    def num_chunks_of_all(self) -> int:
        return self.ranks.num_chunks

    @property
    def num_bytes(self) -> int:
        return self.own.num_bytes

    @property
    def forms(self) -> tuple[str, str]:
        return self.own.forms

    def view(self, visible: ChunkVisibility, *, is_for_all: bool) -> MemoryView:
        if self._lengths_of_own() != self._lengths:
            raise ValueError(
                "documents of this process changed their length after its memory was shared: an edit must replace "
                "tokens by as many; share or join the memory again"
            )
        return RanksView(self.own.view(visible, is_for_all=is_for_all), self.ranks)

    def part(self, first: int, stop: int) -> ChunkTensors:
        self.refuse("taken apart")

    def loaded(self) -> ChunkMemory:
        self.refuse("loaded or copied")

    def save(self, *_: Any, **__: Any) -> None:
        self.refuse("saved")

    def refuse(self, what: str) -> NoReturn:
        raise ValueError(f"a memory shared out over processes cannot be {what}; do it with the memory of each process")

    def __repr__(self) -> str:
        held = f"{self.num_chunks:,} of {self.num_chunks_of_all:,} chunks"
        return f"SharedMemory({held}, {len(self.documents):,} documents)"

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__
