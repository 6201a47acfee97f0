"""What a layer reads: the tensors of some chunks, who may see them, and where the rest of them lies.

The protocols are what stores, lookups and ranks above this room offer. Called by the retriever, HSA and whoever makes
views; tests/nn/test_chunk_retriever.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hsa_ultralong.ops import ChunkVisibility


class KeyValueStore(Protocol):
    """Keys and values that lie elsewhere than in ChunkMemory.storage: in host memory, in a file, on several tiers."""

    @property
    def format(self) -> str:
        """The form they are kept in: "bf16", "int8" ..."""
        ...

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Chunks first..stop as they are kept, on the host: (n, 2, S, Hkv, D), and scales (n, 2, S, Hkv) of 8 bits."""
        ...

    def fetch(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (n, S, Hkv, D) of chunks (n,) int64, ascending, where and in the dtype that the model reads."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values."""
        ...


@runtime_checkable
class GatheringStore(KeyValueStore, Protocol):
    """A store that is read where it lies, so that the host need not know which chunks were chosen."""

    def gather(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """k and v (n, S, Hkv, D) of chunks (n,) int32 on the device, in any order, -1 for none."""
        ...


class ChunkTensors(NamedTuple):
    """The tensors of some chunks, batch first; see ChunkMemory for the shapes."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    lengths: torch.Tensor
    segments: torch.Tensor
    ends: torch.Tensor


class LandmarkLookup(Protocol):
    """A faster way to the best chunks of a memory that every query may read, in place of scanning all landmarks."""

    def search(
        self,
        query: torch.Tensor,
        topk: int,
        *,
        visible: ChunkVisibility,
        scale: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """indices and scores (B, T, Hr, min(K, C)) of query (B, T, Hr, R), in the form of chunk_topk, scale included; a
        token of a negative segment finds nothing, any other may read every chunk."""
        ...


@runtime_checkable
class LandmarkKeeper(LandmarkLookup, Protocol):
    """A lookup that holds the landmarks itself, in another form than the memory's."""

    @property
    def format(self) -> str: ...

    def landmarks(self, first: int, stop: int, dtype: torch.dtype) -> torch.Tensor:
        """Landmarks (1, n, Hr, R) of chunks first..stop."""
        ...

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The same as they are kept, on the host: (n, Hr, R), and scales (n, Hr) of 8 bits."""
        ...


class MemoryRanks(Protocol):
    """A memory shared out over processes that all see the same queries; this one holds `first` and following chunks."""

    first: int
    num_chunks: int

    @property
    def is_capturable(self) -> bool:
        """A CUDA graph can hold what the ranks exchange."""
        ...

    def lists(
        self, indices: torch.Tensor, scores: torch.Tensor, topk: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """Every rank's candidates (B, T, Hr, K) and the number of its first chunk, from low chunks to high ones, given
        this rank's own of at most K."""
        ...

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks; the tensor itself may be overwritten by it."""
        ...


class MemoryView(NamedTuple):
    """A memory and who may see which of its chunks in the current call; `store` holds its k and v if `memory` does
    not, `ranks` hold the rest of its chunks, `lookup` replaces the scan. Chunks of a view that is not `is_read` compete
    for slots and weights only: they contribute a zero vector, and k and v may be missing."""

    memory: ChunkTensors
    visible: ChunkVisibility
    is_causal: bool = False
    store: KeyValueStore | None = None
    ranks: MemoryRanks | None = None
    lookup: LandmarkLookup | None = None
    is_read: bool = True
