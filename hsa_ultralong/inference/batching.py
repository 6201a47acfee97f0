"""Rows that join and leave a batch between steps, each with a memory of its own choice.

A prompt is read in pieces between steps, then joins as a row. A memory is ranked once for all rows that read it; who
reads what is data on the device, so rows change hands without a new graph. Called by serve/worker.py;
tests/inference/test_batching.py.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hsa_ultralong.inference.decoding_state import DecodingState, StepGraphs
from hsa_ultralong.inference.engine import DecodingEngine
from hsa_ultralong.inference.own_chunks import PagedChunks
from hsa_ultralong.inference.prefixes import REWIND, Prefixes
from hsa_ultralong.inference.prompt_batch import (
    Read,
    Reading,
    cache_of_row,
    group_pieces,
    read_pieces,
    row_of,
    share_out,
)
from hsa_ultralong.inference.sampling import sample
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.row_memories import RowMemories
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.pieces import rotary_of
from hsa_ultralong.nn.readers_view import ReadersView
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.ops import ChunkVisibility
from hsa_ultralong.ops.chunk_topk.visibility import READABLE_BY_ALL

_NOBODY = -1
_MOST_GRAPHS = 32
# chunks of memories that no row reads, which a graph may rank for nothing: dearer than that is a new graph
_SPARE_CHUNKS = 1 << 14


class _Plan(NamedTuple):
    """How to step the first rows: memories in the order of the views, and graphs where it is captured."""

    state: DecodingState
    memories: list[Memory]
    views: list[MemoryView]
    graphs: StepGraphs | None = None


class BatchEngine(DecodingEngine):
    """A decoding engine whose rows are taken and given back one by one.

    Every row decodes what it would decode alone. On a GPU a step runs for as many rows as the next power of two, free
    ones computed too, which read nothing.
    """

    def __init__(
        self,
        model: HSAForCausalLM,
        *,
        batch: int,
        max_tokens: int,
        num_tokens: int | None = None,
        prefix_bytes: int = 0,
        num_owners: int = 1,
        use_graph: bool | None = None,
    ) -> None:
        """
        Args:
            batch: rows. max_tokens: of one row, prompt and answer. num_tokens: of all rows together; default room for
                all at their longest. prefix_bytes: for beginnings of prompts, 0: all are read. num_owners: those who
                share these bytes out.
        """
        self.num_tokens = batch * max_tokens if num_tokens is None else num_tokens
        if self.num_tokens < max_tokens:
            raise ValueError(f"num_tokens={self.num_tokens} of all rows cannot hold one of max_tokens={max_tokens}")
        self.known: list[Memory] = []
        self.prefixes = Prefixes(prefix_bytes, num_owners)
        self.is_taken = [False] * batch
        self.room = [0] * batch  # tokens that a row may have
        self.num_reading = 0
        self._readers: list[torch.Tensor] = []  # (B, 1) int32 each: 0 where a row reads the memory
        self._can_be_captured: list[bool] = []
        self._eager: dict[int, _Plan] = {}
        self._captured: OrderedDict[tuple[int, tuple[int, ...]], _Plan] = OrderedDict()
        self._stepped: list[Memory] = []
        super().__init__(model, None, batch=batch, max_tokens=max_tokens, use_graph=use_graph)

    def _prepare(self, use_graph: bool | None) -> None:
        if self.config.memory_positions != "none":
            raise ValueError("memory_positions='rope' is for studies: rows that join and leave read no such memory")
        # memories come later, so there is room for all that a token can retrieve
        self.state = self._empty_state(self.config.chunk_topk)
        self.own: PagedChunks = PagedChunks(  # type: ignore[assignment]
            self.model, self.batch, self._own_capacity, self.num_tokens // self.config.chunk_size, self.dtype,
            self.device,
        )  # fmt: skip
        self.sizes = [2**n for n in range(self.batch.bit_length()) if 2**n < self.batch] + [self.batch]

    # prompts ----------------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        """Rows that a prompt can be begun for."""
        return self.batch - sum(self.is_taken) - self.num_reading

    def _pages_for(self, room: int) -> int:
        return room // self.config.chunk_size

    def has_room(self, num_tokens: int) -> bool:
        """Whether a prompt and its answer of so many tokens fit beside those under way."""
        return self.num_free > 0 and self._pages_for(min(num_tokens, self.max_tokens)) <= len(self.own.free)

    def begin(
        self, prompt: torch.Tensor, memory: Memory | None = None, *, max_new_tokens: int | None = None, owner: str = ""
    ) -> Reading:
        """Take what a prompt (n,) and its answer need, as a new document; `read_on` reads it.

        Args:
            max_new_tokens: of the answer; default up to max_tokens of both. owner: whose known beginnings count.

        Raises:
            ValueError: no room, an empty or too long prompt, or another model's memory.
        """
        if self.num_free <= 0:
            raise ValueError(f"all {self.batch} rows are taken")
        if not 1 <= len(prompt) <= self.max_tokens:
            raise ValueError(f"a prompt needs 1 to {self.max_tokens} tokens here, got {len(prompt)}")
        room = self.max_tokens if max_new_tokens is None else min(self.max_tokens, len(prompt) + max_new_tokens)
        if not self.has_room(room):
            raise ValueError(f"{room:,} tokens do not fit beside those under way, of {self.num_tokens:,} in all")
        self._require_same_weights()
        if memory is not None and memory.num_chunks_of_all == 0:
            memory = None
        if memory is not None:
            self._learn(memory)
        prompt = prompt.cpu()
        known, shared = self.prefixes.find(owner, memory, prompt)
        cache = HSACache(self.config, memory=memory, rewind=REWIND) if known is None else known.cache(self.model)
        self.num_reading += 1
        reading = Reading(prompt, memory, owner, room, self.own.take(self._pages_for(room)), cache, shared=shared)
        if known is not None:
            reading.num_read = reading.num_known = len(known.tokens)
            if reading.num_read == len(prompt):
                reading.logits, reading.retrieval = known.logits, known.retrieval or []
        return reading

    def plan(self, readings: Sequence[Reading], most: int) -> list[list[tuple[Reading, int]]]:
        """What to read now of prompts, the first of which has its turn: prompts and tokens of each, up to `most` in
        all, one list for each call of `read_together`."""
        known = [[(reading, 0)] for reading in readings if reading.logits is not None]
        left = [reading for reading in readings if reading.logits is None]
        sizes = share_out([reading.num_left for reading in left], most)
        sizes = [reading.piece(size) for reading, size in zip(left, sizes, strict=True)]
        return [*known, *([(left[n], sizes[n]) for n in group] for group in group_pieces(sizes))]

    def read_together(self, pieces: Sequence[tuple[Reading, int]]) -> list[int | None]:
        """Read so many tokens more of prompts, in one forward; the row that each has then, once it is read.

        `tokens[row]` is then the first token of the answer, and `logits[row]` are its logits.
        """
        readings = [reading for reading, _ in pieces]
        if len(readings) == 1 and readings[0].logits is not None:
            only = readings[0]
            read = Read(only.cache, readings[0].logits, list(only.retrieval))
        else:
            read = read_pieces(self.model, readings, [size for _, size in pieces])
            for number, (reading, size) in enumerate(pieces):
                self._note_piece(reading, size, read, number, is_alone=len(pieces) == 1)
        sources = [number for number, reading in enumerate(readings) if reading.logits is not None]
        rows: list[int | None] = [None] * len(readings)
        for number, row in zip(sources, self._take_rows([readings[n] for n in sources], read, sources), strict=True):
            rows[number] = row
        return rows

    def _note_piece(self, reading: Reading, size: int, read: Read, number: int, *, is_alone: bool) -> None:
        reading.num_read += size
        is_whole = reading.num_left == 0
        is_worth_keeping = (is_whole or reading.num_read == reading.shared) and self.prefixes.max_bytes > 0
        if not is_alone and (is_worth_keeping or not is_whole):
            reading.cache = cache_of_row(self.model, read.cache, number, reading.num_read, reading.memory)
        if is_whole:
            reading.logits = read.logits[number : number + 1]
        if is_worth_keeping:
            found = (reading.logits.clone(), row_of(read.retrieval, number)) if reading.logits is not None else ()
            beginning = reading.prompt[: reading.num_read]
            self.prefixes.keep(reading.owner, reading.memory, beginning, reading.cache, *found)

    def read_on(self, reading: Reading, most: int | None = None) -> int | None:
        """Read up to `most` tokens more of one prompt; the row that it has then, once it is read."""
        left, row = len(reading.prompt) if most is None else most, None
        while row is None and (left > 0 or reading.logits is not None):
            size = reading.piece(left)
            (row,) = self.read_together([(reading, size)])
            left -= size
        return row

    def drop(self, reading: Reading) -> None:
        """Give back what a prompt has taken that is not read to its end."""
        self.num_reading -= 1
        self.own.give(reading.pages)

    def join(self, prompt: torch.Tensor, memory: Memory | None = None, **options: object) -> int:
        """`begin` and read all at once; returns the row."""
        reading = self.begin(prompt, memory, **options)  # type: ignore[arg-type]
        try:
            row = self.read_on(reading)
        except BaseException:
            self.drop(reading)
            raise
        assert row is not None
        return row

    # rows -------------------------------------------------------------------------------------------------------------

    def _take_rows(self, readings: Sequence[Reading], read: Read, sources: Sequence[int]) -> list[int]:
        """Rows for prompts that are read, whose states are rows `sources` of the cache."""
        if not readings:
            return []
        rows = [row for row, is_taken in enumerate(self.is_taken) if not is_taken][: len(readings)]
        lengths, cache = [len(reading.prompt) for reading in readings], read.cache
        place, source = torch.tensor([rows, list(sources)], device=self.device)
        self.own.hold(rows, [reading.pages for reading in readings])
        if cache.own_memory is not None:
            counts = [length // self.config.chunk_size for length in lengths]
            self.own.load(rows, cache.own_memory.tensors, sources, counts)
        self.state.load(place, source, cache, lengths, lambda places: rotary_of(self.config, places, self.dtype))
        found = [one._replace(indices=one.indices[source], weights=one.weights[source]) for one in read.retrieval]
        self._note(self.state, place, found)
        logits = read.logits[source]
        self.state.logits[place], self.state.tokens[place] = logits.to(self.dtype), sample(logits, *self.sampling)
        for row, reading, length in zip(rows, readings, lengths, strict=True):
            self.is_taken[row], self.room[row], self.lengths[row] = True, reading.room, length
            self._read_by(row, reading.memory)
            self.num_reading -= 1
        return rows

    def leave(self, row: int) -> None:
        """Give a row back."""
        self._read_by(row, None)
        self._clear(row)
        self.own.release(row)
        self.is_taken[row] = False

    def compact(self) -> dict[int, int]:
        """Move rows down where fewer need to be computed then; the new number of every row that was moved."""
        rows = [row for row, is_taken in enumerate(self.is_taken) if is_taken]
        moved: dict[int, int] = {}
        if not rows or self._size_for(rows[-1] + 1) == self._size_for(len(rows)):
            return moved
        for source in reversed(rows):
            target = self.is_taken.index(False)
            if target > source:
                break
            self.state.copy_row(source, target)
            self.own.move(source, target)
            self.lengths[target], self.room[target] = self.lengths[source], self.room[source]
            self.is_taken[target] = True
            memory = self.memories[source]
            assert not isinstance(memory, RowMemories)
            self._read_by(target, memory)
            self.leave(source)
            moved[source] = target
        return moved

    def _size_for(self, count: int) -> int:
        """Rows that a step for `count` of them computes."""
        return next(size for size in self.sizes if size >= count) if self.is_captured else count

    # memories ---------------------------------------------------------------------------------------------------------

    def chunk_offset(self, row: int) -> int:
        """Number of the first chunk of a row's memory in what steps report as retrieved; 0 where it has none."""
        memory, offset = self.memories[row], 0
        for other in self._stepped:
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
        self.prefixes.forget(memory)
        kept = [number for number, other in enumerate(self.known) if other is not memory]
        self.known = [self.known[number] for number in kept]
        self._readers = [self._readers[number] for number in kept]
        self._can_be_captured = [self._can_be_captured[number] for number in kept]
        self._stepped = [other for other in self._stepped if other is not memory]
        self._eager.clear()
        for key in [key for key, plan in self._captured.items() if any(other is memory for other in plan.memories)]:
            del self._captured[key]

    def _learn(self, memory: Memory) -> None:
        if any(memory is other for other in self.known):
            return
        require_same_model(self.model, memory)
        self.known.append(memory)
        self._readers.append(torch.full((self.batch, 1), _NOBODY, dtype=torch.int32, device=self.device))
        self._can_be_captured.append(self._view(memory, 1).is_capturable())

    def _read_by(self, row: int, memory: Memory | None) -> None:
        before, self.memories[row] = self.memories[row], memory
        self._eager.clear()
        for other, readers in zip(self.known, self._readers, strict=True):
            if other is before or other is memory:
                readers[row] = 0 if other is memory else _NOBODY

    # steps ------------------------------------------------------------------------------------------------------------

    def step(self) -> torch.Tensor:
        """Read the tokens at hand; returns the next ones (B,), on the device, overwritten by the next step.

        Raises:
            ValueError: if a row is as long as it may be.
        """
        rows = [row for row, is_taken in enumerate(self.is_taken) if is_taken]
        for row in rows:
            if self.lengths[row] >= self.room[row]:
                raise ValueError(f"row {row} has all tokens that it may have: {self.room[row]} of max_tokens")
        if not rows:
            return self.tokens
        for row in rows:
            self.lengths[row] += 1
        is_due = any(self.lengths[row] % self.config.chunk_size == 0 for row in rows)
        wanted = {id(self.memories[row]) for row in rows}
        read = [memory for memory in self.known if id(memory) in wanted]
        plan = self._plan(self._size_for(rows[-1] + 1), read)
        self._stepped = plan.memories
        self._run(plan.graphs, plan.state, plan.views, is_due)
        return self.tokens

    def results(self) -> tuple[list[int], list[tuple[np.ndarray, np.ndarray]]]:
        """Tokens of the rows, and what they retrieved in every group, indices and weights (b, Hr, K), on the host in
        one copy; b: up to the last row that is taken."""
        count = 1 + max((row for row, is_taken in enumerate(self.is_taken) if is_taken), default=-1)
        pairs = [(indices[:count], weights[:count]) for indices, weights in self.retrieved]
        parts = [self.tokens[:count].to(torch.int32)]
        for indices, weights in pairs:
            parts += [indices, weights.view(torch.int32)]
        on_host = torch.cat([part.flatten() for part in parts]).cpu().numpy()
        tokens, place, found = on_host[:count].tolist(), count, []
        for indices, weights in pairs:
            first, second = place + indices.numel(), place + 2 * indices.numel()
            shape = tuple(indices.shape)
            found.append(
                (on_host[place:first].reshape(shape), on_host[first:second].view(np.float32).reshape(weights.shape))
            )
            place = second
        return tokens, found

    def _plan(self, size: int, read: list[Memory]) -> _Plan:
        if self.is_captured and all(self._is_capturable(memory) for memory in read):
            return self._captured_plan(size, read)
        if size not in self._eager:
            state = self.state.first(size)
            views = [self._view_of_readers(memory, size) for memory in read]
            self._eager[size] = _Plan(state, read, [*views, self.own.view(state.positions)])
        return self._eager[size]

    def _is_capturable(self, memory: Memory) -> bool:
        return next(able for able, other in zip(self._can_be_captured, self.known, strict=True) if other is memory)

    def _view(self, memory: Memory, size: int) -> MemoryView:
        """A memory for the first rows, those that do not read it included."""
        number = next(number for number, other in enumerate(self.known) if other is memory)
        return _visible(memory, self._readers[number][:size])

    def _view_of_readers(self, memory: Memory, size: int) -> MemoryView:
        """A memory for those of the first rows that read it; which ones is known on the host."""
        rows = [row for row in range(size) if self.memories[row] is memory]
        view = _visible(memory, torch.zeros((len(rows), 1), dtype=torch.int32, device=self.device))
        return view if len(rows) == size else ReadersView(view, torch.tensor(rows, device=self.device))

    def _captured_plan(self, size: int, read: list[Memory]) -> _Plan:
        """A plan with graphs that ranks these memories, and few others."""
        spare = max(_SPARE_CHUNKS, sum(memory.num_chunks_of_all for memory in read))
        best, least = None, spare + 1
        for key, plan in self._captured.items():
            others = [memory for memory in plan.memories if all(memory is not one for one in read)]
            cost = sum(memory.num_chunks_of_all for memory in others)
            if key[0] == size and len(plan.memories) - len(others) == len(read) and cost < least:
                best, least = key, cost
        if best is not None:
            self._captured.move_to_end(best)
            return self._captured[best]
        ranked = list(read)
        for memory in self.known:  # small ones come along, so that their next reader needs no new graph
            is_new = all(memory is not one for one in ranked)
            if is_new and memory.num_chunks_of_all <= spare and self._is_capturable(memory):
                ranked.append(memory)
                spare -= memory.num_chunks_of_all
        plan = self._capture_plan(size, ranked)
        self._captured[size, tuple(map(id, ranked))] = plan
        while len(self._captured) > _MOST_GRAPHS:
            self._captured.popitem(last=False)
        return plan

    def _capture_plan(self, size: int, memories: list[Memory]) -> _Plan:
        """Graphs for the first rows; rows under way keep their state."""
        state = self.state.first(size)
        views = [*(self._view(memory, size) for memory in memories), self.own.view(state.positions)]
        kept = [*state.tensors(), self.own.table]
        saved = [part.clone() for part in kept]
        self.own.table.fill_(self.own.num_pages)  # what is completed meanwhile is nobody's
        graphs = self._capture(state, views)
        for part, old in zip(kept, saved, strict=True):
            part.copy_(old)
        return _Plan(state, memories, views, graphs)

    def capture(self, size: int) -> None:
        """Have graphs of a step of so many rows that read no memory, or small ones that are known."""
        self._captured_plan(size, [])


def _visible(memory: Memory, readers: torch.Tensor) -> MemoryView:
    """A memory for rows, readers (n, 1) int32: 0 where a row reads all of it."""
    everyone = torch.full_like(memory.segments, READABLE_BY_ALL)
    visible = ChunkVisibility(readers, torch.zeros_like(readers), everyone, torch.zeros_like(everyone))
    return memory.view(visible, is_for_all=True)
