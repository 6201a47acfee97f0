"""Decoding without waiting: one token of every sequence per step, in static buffers, as one CUDA graph on a GPU.

Sequences may share a memory, have one each, or none; a prompt is read by the ordinary forward, its state moves into the
rings and buffers of its slot. Equals the parallel forward (tests/inference/test_engine.py). Tokens reach the host one
step late, so the device never idles. Used by `hsa bench memory` and wherever many tokens are wanted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch

from hsa_ultralong.inference import beside
from hsa_ultralong.inference.decoding_state import DecodingState, StepGraphs
from hsa_ultralong.inference.late_reader import LateReader
from hsa_ultralong.inference.own_chunks import RowChunks
from hsa_ultralong.inference.sampling import sample
from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.memory.row_memories import RowMemories
from hsa_ultralong.models import HSACache, HSAForCausalLM
from hsa_ultralong.models.evaluation import evaluating
from hsa_ultralong.models.fingerprint import require_same_model
from hsa_ultralong.models.pieces import SplitParts, compiled, rotary_of
from hsa_ultralong.models.remembering import continuation_cache
from hsa_ultralong.models.views import memory_view
from hsa_ultralong.models.weights import is_plain, refuse_hooks, state_key, weights_of
from hsa_ultralong.models.wrapped import computing_dtype, device_of, unwrapped
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.views import MemoryView
from hsa_ultralong.nn.window_attention import WindowState


class Step(NamedTuple):
    """What one step gave: tokens, None for a sequence that has ended; per upper group, what the token before them
    retrieved: indices and weights (B, Hr, K), counted through all memories in order, on the host."""

    tokens: list[int | None]
    retrieved: list[tuple[torch.Tensor, torch.Tensor]]


class DecodingEngine:
    """Decodes `batch` sequences of at most `max_tokens` tokens each, prompt included, with the model as it is now.

    The model may be wrapped (wrapped.py). A change of it (training, adapters) is refused when the next prompt starts,
    and so is a memory that has grown or shrunk. One that was edited and has as many chunks as before is read as it is
    now. Sequences under way must not live through any change.

    Attributes:
        is_captured: a step is one launch of a CUDA graph, captured by the first step; otherwise the same code runs as
            it is.
        logits: (B, V) of the last step.
    """

    def __init__(
        self,
        model: HSAForCausalLM,
        memory: Memory | RowMemories | Sequence[Memory | None] | None = None,
        *,
        batch: int = 1,
        max_tokens: int = 4096,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        compile_layers: bool = False,
        tune: bool = False,
        use_graph: bool | None = None,
    ) -> None:
        """
        Args:
            memory: one that all sequences read, one (or None) for each, or RowMemories, whose prompts are all read at
                once.
            compile_layers: fuse the layers with torch.compile; takes about 20 seconds on a GPU, once per process.
            tune: with compile_layers, let the compiler measure its choices, which takes longer.
            use_graph: default on a GPU where nothing in a step needs the host (a file's store and a sketched lookup do,
                as do experts, and ranks that do not talk over NCCL) and nothing but plain layers computes.

        Raises:
            ValueError: another model's memory, a number of memories other than `batch`, sampling out of range, hooks on
                parts that a step does not call, or adapters and quantised layers that are to be compiled or captured.
        """
        beside.wait()
        model = unwrapped(model)
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise ValueError(f"need temperature >= 0, top_k >= 0, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
        rows = memory if isinstance(memory, RowMemories) else None
        memories = list(memory) if isinstance(memory, Sequence) else [memory] * (batch if rows is None else rows.batch)
        if len(memories) != batch or batch < 1 or max_tokens < 1:
            raise ValueError(f"{len(memories)} memories for batch={batch} sequences of {max_tokens} tokens")
        for one in {id(one): one for one in memories}.values():  # rows of one memory are checked once
            if one is not None:
                require_same_model(model, one.base if isinstance(one, RowMemories) else one)
        self._check_parts(model, compile_layers, use_graph)
        self.model, self.config, self.memories = model, model.config, memories
        self.batch, self.max_tokens, self.rows = batch, max_tokens, rows
        self.sampling = (temperature, top_k, top_p)
        self.device, self.dtype = device_of(model), computing_dtype(model)
        self.pieces = SplitParts(lambda piece: compiled(piece, tune)) if compile_layers else SplitParts()
        self._laid_out = [self._layout_of(memory) for memory in memories]
        self.is_captured = self._can_capture() if use_graph is None else use_graph
        self._prepare(use_graph)
        self._weights = self._weights_now()

    def _prepare(self, use_graph: bool | None) -> None:
        """State and views."""
        self._make_state()
        if use_graph is None:
            self.is_captured = self.is_captured and all(view.is_capturable() for view in self.views)
        # captured by the first step: the first token of an answer does not wait for it
        self._graphs: StepGraphs | None = None

    @staticmethod
    def _check_parts(model: HSAForCausalLM, compile_layers: bool, use_graph: bool | None) -> None:
        """Refuse what a step would pass by: it calls pieces of the upper groups, and a graph calls no Python at all."""
        groups = model.model.upper_groups()
        passed = [(group, group.hsa_layer, group.hsa_layer.hsa, group.retriever) for group in groups]
        refuse_hooks(
            "the upper decoder",
            (model, model.model, *chain(*passed)),
            "a decoding step does not call it; use generate(memory=...), which does",
        )
        if (compile_layers or use_graph) and not is_plain(model):
            raise ValueError(
                "compile_layers and use_graph need plain layers; this model has adapters, hooks or quantised weights: "
                "merge the adapters (merge_and_unload), or leave these options out"
            )

    def _weights_now(self) -> Any:
        """What the model computes with; a graph reads addresses, so there these count, and versions of tensors."""
        parts = (("model", self.model.model), ("head", self.model.lm_head))
        entries = chain(*(weights_of(name, part) for name, part in parts))
        if not self.is_captured:
            return state_key(entries)
        found = [(label, tensor) for label, tensor in entries if tensor is not None]
        return [(label, part.data_ptr(), 0 if part.is_inference() else part._version) for label, part in found]

    @staticmethod
    def _layout_of(memory: Memory | RowMemories | None) -> Any:
        """What the views of a memory depend on; the tensors' contents may change."""
        whole = memory.base if isinstance(memory, RowMemories) else memory
        return None if whole is None else (whole.storage, whole.num_chunks, whole.lookup)

    def _require_same_layout(self, row: int) -> None:
        old, new = self._laid_out[row], self._layout_of(self.memories[row])
        if old is new or all(x is y or (isinstance(x, int) and x == y) for x, y in zip(old, new, strict=True)):
            return
        raise ValueError(
            f"the memory of sequence {row} was changed after this engine was made (it had {old[1]:,} chunks, now "
            f"{new[1]:,}); make a new engine"
        )

    # state -----------------------------------------------------------------------------------------------------------

    def _make_state(self) -> None:
        config = self.config
        chunks = self._own_capacity + 1
        chunks += sum(memory.num_chunks_of_all for memory in self.memories if memory is not None)
        self.state = self._empty_state(min(config.chunk_topk, chunks))
        self.own = RowChunks(self.model, self.batch, self._own_capacity, self.dtype, self.device)
        self.views = [*self._memory_views(), self.own.view(self.state.positions)]

    def _empty_state(self, slots: int) -> DecodingState:
        self.lengths = [0] * self.batch  # places, on the host
        return DecodingState.make(self.config, self.batch, slots, self.dtype, self.device)

    @property
    def _own_capacity(self) -> int:
        """Full chunks of a row."""
        return self.max_tokens // self.config.chunk_size

    tokens = property(lambda self: self.state.tokens)
    logits = property(lambda self: self.state.logits)
    retrieved = property(lambda self: self.state.retrieved)

    def _memory_views(self) -> list[MemoryView]:
        """One view per memory, readable by the sequences that have it."""
        views: list[MemoryView] = []
        known: list[Memory | RowMemories] = []
        for memory in self.memories:
            if memory is None or memory.num_chunks_of_all == 0 or any(memory is other for other in known):
                continue
            known.append(memory)
            readers = torch.tensor([[0 if other is memory else -1] for other in self.memories], dtype=torch.int32)
            segment = readers.to(self.device)  # (B, 1)
            views.append(memory_view(memory, segment, self.state.positions))
        return views

    def _can_capture(self) -> bool:
        return self.device.type == "cuda" and not self.config.num_experts and is_plain(self.model)

    # one step ---------------------------------------------------------------------------------------------------------

    def _step(self, state: DecodingState, views: Sequence[MemoryView]) -> None:
        """Read the tokens of all rows of a state, leave the next ones there; completes no chunks."""
        inner, pieces = self.model.model, self.pieces
        state.positions.copy_(state.places[:, None])
        x, rotary = pieces.run_start(inner, state.tokens, state.seen, self.dtype)
        x = inner.read_lower(x, rotary, None, state.windows, parts=pieces)
        rows = torch.arange(len(state.tokens), device=self.device)
        state.pending[rows, state.places % self.config.chunk_size] = x[:, 0]
        found: list[Retrieval] = []
        x = inner.decode_upper(x, rotary, views, None, state.windows, parts=pieces, note=found.append)
        self._note(state, slice(None), found)
        logits, best = pieces.run_head(inner.norm, self.model.lm_head, x)
        state.logits.copy_(logits)
        state.tokens.copy_(sample(state.logits, *self.sampling) if self.sampling[0] else best)
        state.places += 1
        state.seen += 1

    @staticmethod
    def _note(state: DecodingState, rows: int | slice | torch.Tensor, retrieved: Sequence[Retrieval]) -> None:
        """Keep what the last token of the sequences retrieved in every group."""
        for (indices, weights), found in zip(state.retrieved, retrieved, strict=True):
            # the last ones are empty where more are asked for than there are chunks, as ranks do
            kept = min(found.indices.shape[-1], indices.shape[-1])
            indices[rows, :, :kept] = found.indices[:, -1, :, :kept]
            weights[rows, :, :kept] = found.weights[:, -1, :, :kept].float()
            indices[rows, :, kept:] = -1

    def _complete(self, state: DecodingState) -> None:
        """Encode the chunks that the last step filled."""
        self.own.put(self.model.model.chunk_encoder(state.pending[:, None]), state.places)

    def _capture(self, state: DecodingState, views: Sequence[MemoryView]) -> StepGraphs:
        """Graphs of a step and of completing chunks; what the rows held is lost."""
        with evaluating(self.model):
            return StepGraphs([lambda: self._step(state, views), lambda: self._complete(state)])

    def _capture_once(self) -> None:
        """Graphs for the rows under way, which keep their state, as do the random numbers that are to come."""
        # what is completed meanwhile is written again before it can be read; only that it exists must not stay
        kept = [*self.state.tensors(), self.own.storage.segments]
        saved = [part.clone() for part in kept]
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            self._graphs = self._capture(self.state, self.views)
        for part, old in zip(kept, saved, strict=True):
            part.copy_(old)

    def step(self) -> torch.Tensor:
        """Read the tokens at hand; returns the next ones (B,), on the device, overwritten by the next step.

        Raises:
            ValueError: if a sequence is as long as it may be.
        """
        if max(self.lengths) >= self.max_tokens:
            raise ValueError(f"a sequence has reached max_tokens={self.max_tokens}; make a larger engine")
        self.lengths = [length + 1 for length in self.lengths]
        is_due = any(length % self.config.chunk_size == 0 for length in self.lengths)
        if self.is_captured and self._graphs is None:
            self._capture_once()
        self._run(self._graphs, self.state, self.views, is_due)
        return self.tokens

    def _run(self, graphs: StepGraphs | None, state: DecodingState, views: Sequence[MemoryView], is_due: bool) -> None:
        """One step; is_due: some row's chunk is full then."""
        if graphs is not None:
            graphs.replay(0)
            if is_due:
                graphs.replay(1)
            return
        with evaluating(self.model):
            self._step(state, views)
            if is_due:
                self._complete(state)

    # prompts ----------------------------------------------------------------------------------------------------------

    def _clear(self, row: int) -> None:
        state = self.state
        state.tokens[row] = state.places[row] = state.seen[row] = self.lengths[row] = 0
        self.own.clear(row)

    def _require_same_weights(self) -> None:
        if self._weights != self._weights_now():
            raise ValueError(
                "the model (its weights or adapters) was changed after this engine was made; make a new one"
            )

    def start(self, row: int, prompt: torch.Tensor, *, continue_document: bool = False) -> None:
        """Read prompt (n,) token ids as a new document (or as the continuation of its memory's open one) in slot `row`.

        `tokens[row]` is then the first token of the answer, and `logits[row]` are its logits.

        Raises:
            ValueError: an empty prompt, one longer than max_tokens, a memory without an open document or with another
                number of chunks, or a model that was changed (weights, adapters) since the engine was made.
        """
        self._require_same_layout(row)
        memory, prompt = self.memories[row], prompt.to(self.device)
        if isinstance(memory, RowMemories):
            raise ValueError("the prompts of RowMemories are read together; use stream or generate")
        self._require_same_weights()
        if continue_document:
            if memory is None:
                raise ValueError(f"sequence {row} has no memory, so no document to continue")
            cache, _ = continuation_cache(self.model, memory)
        else:
            cache = HSACache(self.config, memory=memory)
        if len(prompt) == 0 or cache.num_seen + len(prompt) > self.max_tokens:
            raise ValueError(f"a prompt needs 1 to {self.max_tokens - cache.num_seen} tokens here, got {len(prompt)}")
        with evaluating(self.model):
            outputs = self.model(prompt[None], past_key_values=cache, logits_to_keep=1, output_retrieval=True)
        logits = outputs.logits[:, -1]
        # indices count the prompt's own memory alone, which is the first
        self._note(self.state, row, outputs.retrieval)
        # a continued document's windows hold more than the tokens of its open chunk
        seen = max(cache.num_seen, *(layer.state.length for layer in cache.layers))
        self._load(row, cache, 0, cache.num_seen, seen)
        self.logits[row] = logits[0]
        self.tokens[row] = sample(logits, *self.sampling)[0]

    def _start_together(self, prompts: Sequence[torch.Tensor]) -> None:
        """Read one prompt (n,) for each of the rows of RowMemories, all in one call."""
        self._require_same_weights()
        self._require_same_layout(0)
        sizes = [len(prompt) for prompt in prompts]
        if min(sizes) == 0 or max(sizes) > self.max_tokens:
            raise ValueError(f"prompts need 1 to {self.max_tokens} tokens here, got {min(sizes)} to {max(sizes)}")
        tokens = torch.zeros((self.batch, max(sizes)), dtype=torch.int64)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[len(row) - len(prompt) :] = prompt
        is_real = torch.arange(max(sizes)) >= max(sizes) - torch.tensor(sizes)[:, None]
        cache = HSACache(self.config, memory=self.rows)
        with evaluating(self.model):
            outputs = self.model(
                tokens.to(self.device), attention_mask=is_real.long().to(self.device), past_key_values=cache,
                logits_to_keep=1, output_retrieval=True,
            )  # fmt: skip
        self._note(self.state, slice(None), outputs.retrieval)
        for row, size in enumerate(sizes):
            self._load(row, cache, row, size, size)
        self.logits.copy_(outputs.logits[:, -1])
        self.tokens.copy_(sample(self.logits, *self.sampling))

    def _load(self, row: int, cache: HSACache, source: int, length: int, seen: int) -> None:
        """Move the state of the cache's sequence `source`, of `length` tokens, into the buffers of a slot; its windows
        are at place `seen`."""
        self._clear(row)
        size = self.config.chunk_size
        states: list[WindowState] = [layer.state for layer in cache.layers]
        for ring, state in zip(self.state.windows.rings, states, strict=True):
            if ring is None or state.keys is None or state.values is None:
                continue
            kept = min(state.length, seen)  # rows with masked tokens stand on the right
            # angles of the places that the kept keys have
            rotary = rotary_of(self.config, torch.arange(seen - kept, seen, device=self.device), self.dtype)
            keys, values = (part[source, state.length - kept :] for part in (state.keys, state.values))
            ring.load(row, keys, values, rotary, seen)
        rest = length % size
        if rest:
            assert cache.pending is not None
            self.state.pending[row, :rest] = cache.pending[source, cache.pending.shape[1] - rest :]
        if cache.own_memory is not None:
            self.own.load(row, cache.own_memory.tensors, source, length // size)
        self.state.places[row], self.state.seen[row], self.lengths[row] = length, seen, length

    def stream(
        self,
        prompts: Sequence[torch.Tensor],
        max_new_tokens: int,
        *,
        stop_tokens: Sequence[int] = (),
        continue_document: bool = False,
    ) -> Iterator[Step]:
        """Answers to one prompt per sequence, step by step: up to `max_new_tokens`, or through the first stop token.

        Raises:
            ValueError: another number of prompts than sequences, or what `start` refuses.
        """
        if len(prompts) != self.batch:
            raise ValueError(f"{len(prompts)} prompts for {self.batch} sequences")
        if self.rows is not None:
            if continue_document:
                raise ValueError("RowMemories have no document to continue; ask a new one")
            self._start_together(prompts)
        else:
            for row, prompt in enumerate(prompts):
                self.start(row, prompt, continue_document=continue_document)
        is_done = [False] * self.batch
        reader = LateReader(self.device)
        reader.put(self.tokens, self.retrieved)
        for number in range(1, max_new_tokens + 1):
            goes_on = number < max_new_tokens and max(self.lengths) < self.max_tokens
            is_late = goes_on and self.is_captured and self._graphs is None
            if goes_on and not is_late:
                reader.put(self.step(), self.retrieved)
            found, retrieved = reader.get()
            tokens = [None if done else token for token, done in zip(found.tolist(), is_done, strict=True)]
            is_done = [done or token in stop_tokens for token, done in zip(tokens, is_done, strict=True)]
            yield Step(tokens, retrieved)
            if all(is_done):
                return
            if is_late:
                reader.put(self.step(), self.retrieved)
            if reader.is_empty:
                return

    def generate(self, prompts: Sequence[torch.Tensor], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """The whole answers: see `stream`."""
        answers: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, max_new_tokens, **options):
            for answer, token in zip(answers, step.tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return answers
