"""Beginnings of prompts that were read before, so that they are not read again.

In doubt a miss: a beginning counts for the same owner, the same memory object with the same contents, and exactly the
same tokens. Owners share nothing, not even room, so that no one can tell from times what another has asked. Called by
batching.py; tests/inference/test_prefixes.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.stored_memory import SharedMemory
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.views import ChunkTensors

# tokens that a cache can give up: a ring needs the key of one more place than a window of the next token
REWIND = 1


@dataclass(frozen=True)
class Prefix:
    """The state after some tokens; logits (1, V) and what the last token retrieved, where it was wanted."""

    tokens: torch.Tensor
    memory: Memory | None
    contents: tuple[Any, ...]
    windows: list[tuple[torch.Tensor, torch.Tensor] | None]
    pending: torch.Tensor | None
    chunks: ChunkTensors | None
    logits: torch.Tensor | None
    retrieval: Sequence[Retrieval] | None

    @property
    def num_bytes(self) -> int:
        windows = [part for pair in self.windows if pair is not None for part in pair]
        found = [self.tokens, self.pending, self.logits, *windows, *(self.chunks or ())]
        return sum(part.nbytes for part in found if part is not None)

    def cache(self, model: HSAForCausalLM) -> HSACache:
        """A cache that goes on from here, with chunks of its own."""
        cache = HSACache(model.config, memory=self.memory, rewind=REWIND)
        for layer, pair in zip(cache.layers, self.windows, strict=True):
            # never written in place: new keys make new tensors
            layer.state.keys, layer.state.values = pair or (None, None)
        cache.pending = self.pending
        if self.chunks is not None:
            k = self.chunks.k
            cache.own_memory = model.model.empty_memory(1, k.dtype, k.device)
            cache.own_memory.write(0, self.chunks)
        cache.advance(len(self.tokens))
        return cache


class Prefixes:
    """States of beginnings, the least recently used of an owner given up first."""

    def __init__(self, max_bytes: int, num_owners: int = 1) -> None:
        """max_bytes: of all owners together, in equal shares."""
        self.max_bytes = max_bytes // max(1, num_owners)
        self.num_hits = self.num_tokens_saved = 0
        self._of: dict[str, OrderedDict[int, Prefix]] = {}
        self._next = 0

    @property
    def num_bytes(self) -> int:
        return sum(one.num_bytes for known in self._of.values() for one in known.values())

    def find(self, owner: str, memory: Memory | None, prompt: torch.Tensor) -> tuple[Prefix | None, int]:
        """The longest known beginning of a prompt (n,), and how many tokens another prompt began with like this one:
        what is worth keeping as a beginning of its own.

        The whole prompt is a beginning only where its logits are known.
        """
        best, key, shared = None, -1, 0
        contents, known = contents_of(memory), self._of.get(owner, OrderedDict())
        for number, one in list(known.items()):
            if one.memory is not memory:
                continue
            if contents is None or one.contents != contents:
                del known[number]
                continue
            common = _common(one.tokens, prompt)
            shared = max(shared, min(common, len(prompt) - 1))
            is_whole = common == len(one.tokens)
            if is_whole and common == len(prompt) and one.logits is None:
                continue
            if is_whole and (best is None or common > len(best.tokens)):
                best, key = one, number
        if best is not None:
            known.move_to_end(key)
            self.num_hits += 1
            self.num_tokens_saved += len(best.tokens)
        return best, shared

    def keep(
        self,
        owner: str,
        memory: Memory | None,
        tokens: torch.Tensor,
        cache: HSACache,
        logits: torch.Tensor | None = None,
        retrieval: Sequence[Retrieval] | None = None,
    ) -> None:
        """Note the state of a cache that has seen just these tokens (n,)."""
        contents = contents_of(memory)
        if contents is None or self.max_bytes == 0:
            return
        windows = [
            None if state.keys is None or state.values is None else (state.keys, state.values)
            for state in (layer.state for layer in cache.layers)
        ]
        chunks = None if cache.chunks is None else ChunkTensors(*(part.clone() for part in cache.chunks))
        made = Prefix(tokens.cpu(), memory, contents, windows, cache.pending, chunks, logits, retrieval)
        if made.num_bytes > self.max_bytes:
            return
        known = self._of.setdefault(owner, OrderedDict())
        for number, one in list(known.items()):
            if one.memory is memory and len(one.tokens) == len(tokens) and torch.equal(one.tokens, made.tokens):
                del known[number]
        known[self._next] = made
        self._next += 1
        while sum(one.num_bytes for one in known.values()) > self.max_bytes:
            known.popitem(last=False)

    def forget(self, memory: Memory) -> None:
        """Give up all that was read with this memory."""
        for known in self._of.values():
            for number in [number for number, one in known.items() if one.memory is memory]:
                del known[number]


def contents_of(memory: Memory | None) -> tuple[Any, ...] | None:
    """What changes with every change of a memory's contents; None where that cannot be told."""
    if memory is None:
        return ()
    # other processes may have changed their part
    if isinstance(memory, SharedMemory) or any(part.is_inference() for part in memory.storage):
        return None
    versions = [(part.data_ptr(), part._version) for part in memory.storage]
    return memory.num_chunks_of_all, id(memory.lookup), *versions


def _common(one: torch.Tensor, other: torch.Tensor) -> int:
    """Tokens that two sequences begin with alike."""
    count = min(len(one), len(other))
    differs = (one[:count] != other[:count]).nonzero()
    return int(differs[0]) if len(differs) else count
