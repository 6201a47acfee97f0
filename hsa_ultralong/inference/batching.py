"""Rows that join and leave a batch between steps, each with a memory of its own choice.

A memory is ranked once for all rows that read it; who reads what is data on the device, so rows change hands without a
new graph, and only a memory that was not there before needs one. Called by serve/worker.py;
tests/inference/test_batching.py.
"""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL

_NOBODY = -1


class BatchEngine(DecodingEngine):
    """A decoding engine whose rows are taken and given back one by one.

    Every row decodes what it would decode alone. Free rows are computed too, and read nothing.
    """

    def __init__(self, model: HSAForCausalLM, *, batch: int, max_tokens: int, use_graph: bool | None = None) -> None:
        """
        Args:
            batch: rows. max_tokens: of one row, prompt and answer.
        """
        self.known: list[Memory] = []
        self._readers: list[torch.Tensor] = []  # (B, 1) int32 each: 0 where a row reads the memory
        self.is_taken = [False] * batch
        super().__init__(model, None, batch=batch, max_tokens=max_tokens, use_graph=use_graph)

    def _make_state(self) -> None:
        super()._make_state()
        # memories come later, so there is room for all that a token can retrieve
        slots = (self.batch, self.config.num_retrieval_heads, self.config.chunk_topk)
        self.retrieved = [
            (torch.full(slots, -1, dtype=torch.int32, device=self.device), torch.zeros(slots, device=self.device))
            for _ in self.retrieved
        ]

    def _library_views(self) -> list[MemoryView]:
        views: list[MemoryView] = []
        for memory, readers in zip(self.known, self._readers, strict=True):
            everyone = torch.full_like(memory.segments, READABLE_BY_ALL)
            visible = ChunkVisibility(readers, torch.zeros_like(readers), everyone, torch.zeros_like(everyone))
            views.append(memory.view(visible, is_for_all=True))
        return views

    def join(self, prompt: torch.Tensor, memory: Memory | None = None) -> int:
        """Read a prompt (n,) as a new document in a free row; returns the row, whose first token is in `tokens`.

        Raises:
            ValueError: no free row, another model's memory, or what `start` refuses; the row is then free again.
        """
        if all(self.is_taken):
            raise ValueError(f"all {self.batch} rows are taken")
        row = self.is_taken.index(False)
        if memory is not None and memory.num_chunks_of_all == 0:
            memory = None
        if memory is not None:
            self._learn(memory)
        self.memories[row], self._laid_out[row] = memory, self._layout_of(memory)
        self._read_by(row, memory)
        try:
            self.start(row, prompt)
        except BaseException:
            self.leave(row)
            raise
        self.is_taken[row] = True
        return row

    def leave(self, row: int) -> None:
        """Give a row back."""
        self.memories[row] = self._laid_out[row] = None
        self._read_by(row, None)
        self._clear(row)
        self.is_taken[row] = False

    def chunk_offset(self, row: int) -> int:
        """Number of the first chunk of a row's memory in what steps report as retrieved; 0 where it has none."""
        memory, offset = self.memories[row], 0
        for other in self.known:
            if other is memory:
                return offset
            offset += other.num_chunks_of_all
        return 0

    def forget(self, memory: Memory) -> None:
        """Let go of a memory that no row reads; unknown ones are none to let go of.

        Raises:
            ValueError: if a row reads it.
        """
        if any(memory is other for other in self.memories):
            raise ValueError("a row still reads this memory")
        kept = [number for number, other in enumerate(self.known) if other is not memory]
        if len(kept) < len(self.known):
            self.known = [self.known[number] for number in kept]
            self._readers = [self._readers[number] for number in kept]
            self._renew()

    def _learn(self, memory: Memory) -> None:
        if any(memory is other for other in self.known):
            return
        require_same_model(self.model, memory)
        self.known.append(memory)
        self._readers.append(torch.full((self.batch, 1), _NOBODY, dtype=torch.int32, device=self.device))
        self._renew()

    def _read_by(self, row: int, memory: Memory | None) -> None:
        for other, readers in zip(self.known, self._readers, strict=True):
            readers[row] = 0 if other is memory else _NOBODY

    def _renew(self) -> None:
        """Views, and the graph, of the memories known now; rows under way keep their state."""
        self.views = [*self._library_views(), self._own_view()]
        if not self.is_captured:
            return
        state = self._state()
        saved, lengths = [part.clone() for part in state], self.lengths
        self._capture()
        for part, old in zip(state, saved, strict=True):
            part.copy_(old)
        self.lengths = lengths
        self._weights = self._weights_now()

    def _state(self) -> list[torch.Tensor]:
        rings: list[Any] = [ring for ring in self.windows.rings if ring is not None]
        kept = [self.tokens, self.logits, self.places, self.seen, self.pending, *self.own]
        return [*kept, *(part for ring in rings for part in (ring.keys, ring.values)), *sum(self.retrieved, ())]

    def step(self) -> torch.Tensor:
        for row, length in enumerate(self.lengths):
            if not self.is_taken[row] and length:
                self._clear(row)  # a free row never grows full
        return super().step()
