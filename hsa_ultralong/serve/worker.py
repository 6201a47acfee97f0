"""The one thread that decodes: it takes requests into free rows, steps, and passes tokens on. No HTTP here.

tests/serve/test_app.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hsa_ultralong.inference.answer_text import AnswerText
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.inference.sampling import sample
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import Limits, ServeError

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the best token. seed: of this answer's own draws. top_logprobs: alternatives per token."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class TokenProbability:
    """A token's text and log probability in nats, with the best tokens of its place."""

    token: int
    logprob: float
    best: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """One step of one answer: text to pass on, often empty; at the end the reason: stop, length, cancelled, timeout."""

    text: str = ""
    probabilities: list[TokenProbability] = field(default_factory=list)
    finish: str | None = None
    num_tokens: int = 0
    weight: float | None = None
    chunks: list[tuple[int, float]] = field(default_factory=list)
    error: ServeError | None = None


@dataclass
class Request:
    """One answer that is wanted.

    Attributes:
        prompt: (n,) token ids, a new document. put: takes every Piece, on the worker's thread.
        is_cancelled: set it from anywhere to give the row back.
    """

    prompt: torch.Tensor
    memory: Memory | None
    max_new_tokens: int
    put: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    is_cancelled: bool = False


class _Row:
    """A request under way."""

    def __init__(self, request: Request, tokenizer: Any, device: torch.device) -> None:
        self.request, self.text = request, AnswerText(tokenizer, request.stop)
        self.best: dict[int, float] = {}
        self.generator: torch.Generator | None = None
        if request.sampling.temperature:
            self.generator = torch.Generator(device)
            if request.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(request.sampling.seed)

    def note(self, retrieved: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, offset: int) -> None:
        """Keep the largest weight of every chunk of the row's memory."""
        memory = self.request.memory
        if memory is None:
            return
        for indices, weights in retrieved:
            pairs = zip(indices[row].flatten().tolist(), weights[row].flatten().tolist(), strict=True)
            for index, weight in pairs:
                own = index - offset
                if index >= 0 and 0 <= own < memory.num_chunks_of_all:
                    self.best[own] = max(self.best.get(own, 0.0), weight)


class Worker:
    """Answers requests with one model, up to `limits.rows` at once, in the order of their arrival."""

    def __init__(self, model: Any, tokenizer: Any, limits: Limits) -> None:
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.engine = BatchEngine(model, batch=limits.rows, max_tokens=limits.context_tokens)
        self.ends = set(end_tokens(model))
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, _Row] = {}
        self._changed = threading.Condition()
        self.is_closing = False
        self.num_tokens = self.num_steps = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()

    # from any thread --------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ServeError: too many wait, or the server is stopping.
        """
        with self._changed:
            if self.is_closing:
                raise ServeError(503, "the server is stopping", "stopping")
            if len(self._waiting) >= self.limits.waiting:
                raise ServeError(429, f"{self.limits.waiting} requests wait already; try again later", "overloaded")
            self._waiting.append(request)
            self._changed.notify()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._rows)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, seconds: float = 30.0) -> None:
        """Take no more requests; those under way go on for so long, the rest is cancelled."""
        with self._changed:
            self.is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        for row in list(self._rows.values()):
            row.request.is_cancelled = True
        self._thread.join(_IDLE_SECONDS + 5)

    # the thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._rows and not self._waiting:
                    if self.is_closing:
                        return
                    self._changed.wait(_IDLE_SECONDS)
            try:
                self._admit()
                if self._rows:
                    self._advance()
            except Exception as error:  # a fault must not leave clients waiting for ever
                logger.exception("decoding failed")
                self._fail(ServeError(500, f"decoding failed: {type(error).__name__}", "internal"))

    def _fail(self, error: ServeError) -> None:
        for row, state in list(self._rows.items()):
            self.engine.leave(row)
            state.request.put(Piece(finish="error", error=error))
        self._rows.clear()

    def _admit(self) -> None:
        """Give free rows to those who wait."""
        while self._waiting and not all(self.engine.is_taken):
            request = self._waiting.popleft()
            reason = self._over(request)
            if reason is not None:
                request.put(Piece(finish=reason))
                continue
            self._let_go()
            state = _Row(request, self.tokenizer, self.engine.device)
            try:
                row = self.engine.join(request.prompt, request.memory)
            except ValueError as error:
                request.put(Piece(finish="error", error=ServeError(400, str(error), "refused")))
                continue
            self._rows[row] = state
            # the prompt's own retrieval counts its memory alone
            state.note([(a.cpu(), b.cpu()) for a, b in self.engine.retrieved], row, 0)
            self._take(row, state)

    def _let_go(self) -> None:
        """Forget memories that nobody reads, once there are many."""
        held = {id(memory) for memory in self.engine.memories if memory is not None}
        idle = [memory for memory in self.engine.known if id(memory) not in held]
        for memory in idle[: max(0, len(self.engine.known) - self.limits.open_memories)]:
            self.engine.forget(memory)

    def _advance(self) -> None:
        for row, state in list(self._rows.items()):
            reason = self._over(state.request)
            if reason is not None:
                self._finish(row, state, "", [], reason)
        if not self._rows:
            return
        self.engine.step()
        self.num_steps += 1
        retrieved = [(indices.cpu(), weights.cpu()) for indices, weights in self.engine.retrieved]
        for row, state in list(self._rows.items()):
            state.note(retrieved, row, self.engine.chunk_offset(row))
            self._take(row, state)

    def _over(self, request: Request) -> str | None:
        if request.is_cancelled:
            return "cancelled"
        return "timeout" if time.monotonic() > request.deadline else None

    def _take(self, row: int, state: _Row) -> None:
        """The token that the last step, or the prompt, gave."""
        options = state.request.sampling
        logits = self.engine.logits[row][None]
        if options.temperature:
            drawn = sample(logits, options.temperature, options.top_k, options.top_p, state.generator)
            self.engine.tokens[row] = drawn[0]
        token = int(self.engine.tokens[row])
        self.num_tokens += 1
        found = [] if options.top_logprobs is None else [_probability(logits[0], token, options.top_logprobs)]
        if token in self.ends:
            state.text.tokens.append(token)
            self._finish(row, state, state.text.end(), [], "stop")
            return
        text = state.text.put(token)
        count = len(state.text.tokens)
        if state.text.is_stopped:
            self._finish(row, state, text, found, "stop")
        elif count >= state.request.max_new_tokens or self.engine.lengths[row] >= self.engine.max_tokens:
            self._finish(row, state, text + state.text.end(), found, "length")
        elif text or found:
            state.request.put(Piece(text, found, num_tokens=count))

    def _finish(self, row: int, state: _Row, text: str, found: list[TokenProbability], reason: str) -> None:
        self.engine.leave(row)
        del self._rows[row]
        ranked = sorted(state.best.items(), key=lambda item: -item[1])
        weight = ranked[0][1] if ranked else None
        count = len(state.text.tokens)
        state.request.put(Piece(text, found, reason, count, weight, ranked[:_MOST_CHUNKS]))


_MOST_CHUNKS = 64


def _probability(logits: torch.Tensor, token: int, count: int) -> TokenProbability:
    shares = logits.float().log_softmax(-1)
    best = shares.topk(min(count, len(shares))) if count else None
    pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenProbability(token, float(shares[token]), pairs)
