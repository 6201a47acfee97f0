"""What a layer reads: memories, who may see which of their chunks, and where these lie.

Every kind of view finds chunks (`topk`) and reads them (`attend`). The protocols are what stores, lookups and ranks
above this room offer. Called by the retriever, HSA and whoever makes views; tests/nn/test_chunk_retriever.py.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from hsa_ultralong.ops import ChunkVisibility, ScoredChunks, chunk_topk, hsa_attention
from hsa_ultralong.ops._common import blocks
from hsa_ultralong.ops.hsa import within

# tokens whose chunks are fetched from a store together: at most this times K of them
_TOKENS_PER_FETCH = 128
# tokens and slots up to which chunks are gathered slot by slot, with no need to know on the host which ones
_TOKENS_PER_GATHER, _MOST_GATHERED = 15, 512


class KeyValueStore(Protocol):
    """Keys and values that lie elsewhere than in a memory's storage: in host memory, in a file, on several tiers."""

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
    """The tensors of some chunks, batch first; see Memory for the shapes."""

    k: torch.Tensor
    v: torch.Tensor
    landmarks: torch.Tensor
    lengths: torch.Tensor
    segments: torch.Tensor
    ends: torch.Tensor


class LandmarkLookup(Protocol):
    """A faster way to the best chunks of a memory that every query may read, in place of scanning all landmarks."""

    @property
    def is_capturable(self) -> bool:
        """A CUDA graph can hold a search."""
        ...

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
    """A lookup that holds the landmarks itself, in another form than the memory's; it may be given any visibility."""

    @property
    def format(self) -> str: ...

    @property
    def num_bytes(self) -> int: ...

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


class Search(NamedTuple):
    """How chunks are chosen: topk of them by their scores, with a noise_seed by noisy ones; see chunk_topk."""

    topk: int
    scale: torch.Tensor | None
    noise_seed: int | torch.Tensor | None = None
    noise_start: int = 0


class MemoryView(Protocol):
    """A memory and who may see which of its chunks in the current call."""

    def num_chunks(self) -> int:
        """Chunks of the memory, those of all ranks."""
        ...

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        """Chunks that the tokens of queries (B, T, ...) may read, (B, T) int64, those of all ranks."""
        ...

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        """The best chunks of queries (B, T, Hr, R), in one list or several, in the form of chunk_topk."""
        ...

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        """Attention of queries (B, T, Hq, D) inside those of the chunks (B, T, Hr, K) that are here, of the same shape.

        first: number of this memory's first chunk; None: all chunks are of this memory. The result is None where
        nothing is ever read.
        """
        ...

    def is_capturable(self) -> bool:
        """A CUDA graph can hold both, for one token a row."""
        ...


class GraphView(NamedTuple):
    """Chunks with all their tensors at hand, in the autograd graph or not; is_full: none is short, so the operators
    need not look (on Hopper gradients are faster without lengths)."""

    memory: ChunkTensors
    visible: ChunkVisibility
    is_causal: bool = False
    is_full: bool = False

    def num_chunks(self) -> int:
        return self.memory.landmarks.shape[1]

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        return self.visible.count().expand(query.shape[:2])

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        landmarks = self.memory.landmarks.to(query.dtype)
        return [ScoredChunks(*chunk_topk(query, landmarks, self.visible, **search._asdict()))]

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        memory = self.memory
        return hsa_attention(
            q.to(memory.v.dtype), memory.k, memory.v, indices, weights, chunk_size=chunk_size,
            chunk_lengths=None if self.is_full else memory.lengths, first_chunk=first, causal=self.is_causal,
        )  # fmt: skip

    def is_capturable(self) -> bool:
        return True


class CompetingView(NamedTuple):
    """Chunks that compete for slots and weights only: they contribute a zero vector, and k and v may be missing."""

    memory: ChunkTensors
    visible: ChunkVisibility

    def num_chunks(self) -> int:
        return self.memory.landmarks.shape[1]

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        return self.visible.count().expand(query.shape[:2])

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        return GraphView(self.memory, self.visible).topk(query, search)

    def is_capturable(self) -> bool:
        return True

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        return None


class StoredView(NamedTuple):
    """Chunks whose keys and values lie in `store`, or that are found by `lookup` in place of a scan, or both."""

    memory: ChunkTensors
    visible: ChunkVisibility
    store: KeyValueStore | None = None
    lookup: LandmarkLookup | None = None

    def num_chunks(self) -> int:
        return self.memory.landmarks.shape[1]

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        return self.visible.count().expand(query.shape[:2])

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        if self.lookup is None or search.noise_seed is not None:
            return GraphView(self.memory, self.visible).topk(query, search)
        return [ScoredChunks(*self.lookup.search(query, search.topk, visible=self.visible, scale=search.scale))]

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        if self.store is None:
            return GraphView(self.memory, self.visible).attend(q, indices, weights, first, chunk_size)
        if self.num_chunks() == 0:
            return None
        own = within(indices, first, self.num_chunks())
        return _attend_fetched(q, self.store, self.memory.lengths, own, weights, chunk_size)

    def is_capturable(self) -> bool:
        is_read_in_place = self.store is None or isinstance(self.store, GatheringStore)
        return is_read_in_place and (self.lookup is None or self.lookup.is_capturable)


class RanksView(NamedTuple):
    """A memory shared out over processes, of which this one holds `own`; for reading."""

    own: MemoryView
    ranks: MemoryRanks

    def num_chunks(self) -> int:
        return self.ranks.num_chunks

    def num_visible(self, query: torch.Tensor) -> torch.Tensor:
        # the total may overwrite what it adds up
        return self.ranks.total(self.own.num_visible(query).clone())

    def topk(self, query: torch.Tensor, search: Search) -> list[ScoredChunks]:
        if search.noise_seed is not None:
            raise ValueError("a memory shared out over processes is for reading: train without noise")
        (found,) = self.own.topk(query, search)
        return [ScoredChunks(*part) for part in self.ranks.lists(found.indices, found.scores, search.topk)]

    def attend(
        self, q: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, first: int | None, chunk_size: int
    ) -> torch.Tensor | None:
        # ranks that hold no chunk take part in the sum all the same
        part = None
        if self.own.num_chunks():
            part = self.own.attend(q, indices, weights, (first or 0) + self.ranks.first, chunk_size)
        # in one dtype on all ranks, whatever each has read
        return self.ranks.total(torch.zeros_like(q) if part is None else part.to(q.dtype))

    def is_capturable(self) -> bool:
        return self.ranks.is_capturable and self.own.is_capturable()


def _attend_fetched(
    q: torch.Tensor,
    store: KeyValueStore,
    lengths: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    chunk_size: int,
) -> torch.Tensor:
    """Attention over chunks fetched for a few tokens at a time, numbered anew."""
    is_small = q.shape[1] <= _TOKENS_PER_GATHER and indices.numel() <= _MOST_GATHERED
    # a decoding step on a GPU never asks the host, however many rows it has
    is_small |= q.shape[1] == 1 and q.is_cuda
    if is_small and isinstance(store, GatheringStore):
        chunks = indices.flatten()
        k, v = (part.flatten(0, 1)[None] for part in store.gather(chunks))  # (1, n*S, Hkv, D)
        slots = torch.arange(len(chunks), dtype=torch.int32, device=q.device).view(indices.shape)
        return hsa_attention(
            q.to(v.dtype),
            k,
            v,
            torch.where(indices < 0, -1, slots),
            weights,
            chunk_size=chunk_size,
            chunk_lengths=lengths[:, chunks.clamp_min(0)],
        )
    parts = []
    for start, stop in blocks(q.shape[1], _TOKENS_PER_FETCH):
        wanted = indices[:, start:stop]
        chosen = wanted[wanted >= 0].long().unique()
        if len(chosen) == 0:
            parts.append(torch.zeros_like(q[:, start:stop]))
            continue
        k, v = (part.flatten(0, 1)[None] for part in store.fetch(chosen))  # (1, n*S, Hkv, D)
        found = torch.searchsorted(chosen, wanted.clamp_min(0).long()).to(torch.int32)
        parts.append(
            hsa_attention(
                q[:, start:stop].to(v.dtype),
                k,
                v,
                torch.where(wanted < 0, -1, found),
                weights[:, start:stop],
                chunk_size=chunk_size,
                chunk_lengths=lengths[:, chosen],
            )
        )
    return torch.cat(parts, dim=1)
