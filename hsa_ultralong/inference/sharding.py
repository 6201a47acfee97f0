"""One memory over the ranks of a process group: contiguous ranges of the chunks of one, or what every rank has read.

tests/distributed/test_memory_ranks.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from hsa_ultralong.distributed import RankedMemory
from hsa_ultralong.distributed.mesh import everywhere, patient_group
from hsa_ultralong.inference.reader import memorize
from hsa_ultralong.memory import MemoryFile, open_memory
from hsa_ultralong.memory.chunk_memory import Document, Memory
from hsa_ultralong.memory.stored_memory import SharedMemory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.fingerprint import memory_fingerprint
from hsa_ultralong.models.wrapped import computing_dtype, device_of, unwrapped


def share_out(memory: Memory, group: dist.ProcessGroup | None = None) -> SharedMemory:
    """This rank's part of a memory that every rank has at hand (views; drop the whole one to free its room).

    `generate`, `ask` and the cache take it like any memory; every rank must make the same calls. The answers are those
    of the whole memory.

    Raises:
        ValueError: without a process group, or for a memory whose keys and values lie in a store.
    """
    first, stop = _range(memory.num_chunks, group)
    return SharedMemory(memory.held(first, stop), RankedMemory(first, memory.num_chunks, group))


def open_shared(path: str | Path, group: dist.ProcessGroup | None = None, **options: Any) -> SharedMemory:
    """This rank's part of a memory file, of which nothing else is kept; `options` are those of memory.open_memory.

    Raises:
        ValueError: without a process group. MemoryFileError: see open_memory.
    """
    with MemoryFile.open_unverified(Path(path)) as file:
        total = file.num_chunks
    first, stop = _range(total, group)
    return SharedMemory(open_memory(path, part=(first, stop), **options), RankedMemory(first, total, group))


_ORDERED = "this model's fusion depends on the order of chunks, so what several processes have read cannot be joined"


class _Held(NamedTuple):
    """What a rank tells the others of the memory it has read: (name, tokens, chunks) of every document, and what all
    must agree in."""

    documents: list[tuple[str, int, int]]
    num_chunks: int
    must_agree: tuple[str, int, bool, str]
    is_closed: bool


class _RankDocument(Document):
    """A document of one rank's memory, as all ranks list it; its token ids are known there alone."""

    def __init__(self, told: tuple[str, int, int], first_chunk: int, rank: int, own: Document | None) -> None:
        self.name, self._num_tokens, self.num_chunks = told
        self.first_chunk, self._rank, self._own = first_chunk, rank, own
        self.is_open, self.continuation = False, None

    @property
    def tokens(self) -> torch.Tensor:  # type: ignore[override]
        if self._own is None:
            raise ValueError(f"the text of document {self.name!r} lies in process {self._rank}, which has read it")
        return self._own.tokens

    @property
    def num_tokens(self) -> int:
        return self._num_tokens

    def __repr__(self) -> str:
        return f"Document({self.name!r}, {self.num_tokens:,} tokens, read by process {self._rank})"

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = object.__hash__


def join(memory: Memory, group: dist.ProcessGroup | None = None) -> SharedMemory:
    """One memory of what every rank has memorised for itself: the documents of all, in the order of the ranks.

    Nothing of the memories moves, so that as many processes read as many parts of a library at once, each on its own
    card or tiers. `generate`, `ask` and the cache take the result like any memory; every rank must make the same calls.
    The answers are those of one memory of all documents. `edit(model, joined.own, ...)` on the rank that has read a
    document changes it for all, if it replaces tokens by as many. What differs between ranks in a call, an error on one
    of them included, leaves the others waiting: let that process end, torchrun ends all.

    Raises:
        ValueError: without a process group, for a document that is still open, memories of different models, one whose
            model's fusion depends on the order of chunks, or a memory that is shared out already.
    """
    if isinstance(memory, SharedMemory):
        memory.refuse("joined")
    rank, world = _place(group)
    own = _Held(
        [(document.name, document.num_tokens, document.num_chunks) for document in memory.documents],
        memory.num_chunks,
        (memory.fingerprint, memory.chunk_size, memory.is_composable, str(memory.storage.k.dtype)),
        all(not document.is_open for document in memory.documents),
    )  # fmt: skip
    every: list[Any] = [None] * world
    dist.all_gather_object(every, own, group=group)
    # all ranks see the same, so all refuse
    if len({held.must_agree for held in every}) > 1:
        raise ValueError(
            "these processes have read with different models; memorise with the same weights and dtype in all"
        )
    if not memory.is_composable:
        raise ValueError(_ORDERED)
    if not all(held.is_closed for held in every):
        raise ValueError("a document of one of the processes is still open; close it (close_document) before joining")
    documents: list[Document] = []
    first = 0
    for number, held in enumerate(every):
        for inside, told in enumerate(held.documents):
            here = memory.documents[inside] if number == rank else None
            documents.append(_RankDocument(told, first, number, here))
            first += told[2]
    before = sum(held.num_chunks for held in every[:rank])
    total = sum(held.num_chunks for held in every)
    return SharedMemory(memory, RankedMemory(before, total, group), documents)


def memorize_together(
    model: HSAForCausalLM, tokens: Any, *, group: dist.ProcessGroup | None = None, **options: Any
) -> SharedMemory:
    """Every rank memorises documents of its own; one memory of all (`join`).

    Args:
        tokens: as memorize takes them, or [] on a rank that has nothing to read.
        options: of memorize; a path as `store` is one of its own on every rank.

    Raises:
        ValueError: as in `join`, before anything is read; close=False.
        Exception: that of memorize here. OSError: naming the rank and its error, if reading failed elsewhere only.
    """
    _place(group)
    if not options.get("close", True):
        raise ValueError("documents of several processes are closed as they are read: leave close=False out")
    if not model.config.is_composable:
        raise ValueError(_ORDERED)
    read: list[Memory] = []
    is_empty = isinstance(tokens, list | tuple) and not tokens
    own = unwrapped(model).model.empty_memory if is_empty else None

    def work() -> None:
        if own is None:
            read.append(memorize(model, tokens, **options))
        else:
            dtype, device = computing_dtype(model), device_of(model)
            read.append(own(1, dtype, device, 0, fingerprint=memory_fingerprint(model)))

    # one that has no room ends all
    meeting = patient_group() if group is None else group
    try:
        everywhere(work, meeting)
    finally:
        if group is None and meeting is not None:
            dist.destroy_process_group(meeting)
    return join(read[0], group)


def _place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    if not dist.is_initialized():
        raise ValueError("sharing a memory needs a process group: start with torchrun and call init_process_group")
    return dist.get_rank(group), dist.get_world_size(group)


def _range(total: int, group: dist.ProcessGroup | None) -> tuple[int, int]:
    rank, world = _place(group)
    return total * rank // world, total * (rank + 1) // world
