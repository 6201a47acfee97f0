"""The one thread that decodes: it reads prompts in pieces between steps, steps, and passes tokens on. No HTTP here.

tests/serve/test_worker.py, test_app.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from hsa_ultralong.inference.answer_text import AnswerText
from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.inference.batching import BatchEngine, Reading
from hsa_ultralong.inference.passages import Reread
from hsa_ultralong.inference.sampling import sample
from hsa_ultralong.inference.warming import warm
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.evidence import Evidence
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
    """One step of one answer: text to pass on, often empty; at the end the reason (stop, length, cancelled, timeout),
    the tokens of the prompt, and chunks with their weights: retrieved ones, and those that stood in the prompt."""

    text: str = ""
    probabilities: list[TokenProbability] = field(default_factory=list)
    finish: str | None = None
    num_tokens: int = 0
    weight: float | None = None
    chunks: list[tuple[int, float]] = field(default_factory=list)
    reread: list[tuple[int, float]] = field(default_factory=list)
    num_prompt: int = 0
    error: ServeError | None = None


@dataclass
class Request:
    """One answer that is wanted.

    Attributes:
        prompt: (n,) token ids, a new document. put: takes every Piece, on the worker's thread. owner: whose prompts
            count as known. is_whole: text is wanted at the end only, so there is a first Piece and a last one.
        is_cancelled: set it from anywhere to give the row back.
        reread: makes the prompt from what the memory holds, on the worker's thread, when its turn comes; `passages` is
            what it made.
    """

    prompt: torch.Tensor
    memory: Memory | None
    max_new_tokens: int
    put: Callable[[Piece], None]
    sampling: Sampling = field(default_factory=Sampling)
    stop: Sequence[str] = ()
    deadline: float = float("inf")
    owner: str = ""
    is_whole: bool = False
    is_cancelled: bool = False
    reread: Callable[[], Reread] | None = None
    passages: Reread | None = None

    def prepare(self) -> None:
        """Put the passages that are to be read again into the prompt, once."""
        if self.reread is not None and self.passages is None:
            self.passages = self.reread()
            self.prompt = torch.tensor(self.passages.ids)


class _Row:
    """A request under way."""

    def __init__(self, request: Request, tokenizer: Any, device: torch.device) -> None:
        self.request, self.text = request, AnswerText(tokenizer, request.stop)
        self.evidence = Evidence(request.memory)
        if request.passages is not None:
            self.evidence.begin_with(request.passages.weights)
        self.held = Piece()
        self.has_begun = False
        self.generator: torch.Generator | None = None
        if request.sampling.temperature:
            self.generator = torch.Generator(device)
            if request.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(request.sampling.seed)

    def put(self, piece: Piece) -> None:
        """Pass a piece on, or hold it back where only the whole answer is wanted."""
        if not self.request.is_whole:
            self.request.put(piece)
            return
        text, found = self.held.text + piece.text, [*self.held.probabilities, *piece.probabilities]
        if self.has_begun and piece.finish is None:
            self.held = Piece(text, found)
            return
        self.held, self.has_begun = Piece(), True
        self.request.put(replace(piece, text=text, probabilities=found))


class Worker:
    """Answers requests with one model, up to `limits.rows` at once, in the order of their arrival."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        limits: Limits,
        num_owners: int = 1,
        warm_with: Sequence[Memory] = (),
        tell: Callable[[str], object] = logger.info,
    ) -> None:
        """
        Args:
            num_owners: those who share the bytes of known beginnings out. warm_with: small memories to warm up with,
                see warming.warm; none: it is left out. tell: takes lines on the progress of that.
        """
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.engine = BatchEngine(
            model, batch=limits.rows, max_tokens=limits.context_tokens, num_tokens=limits.row_tokens,
            prefix_bytes=limits.prefix_bytes, num_owners=num_owners,
        )  # fmt: skip
        if warm_with:
            warm(self.engine, warm_with, piece=limits.piece_tokens, tell=tell)
        self.is_open: Callable[[Memory], bool] = lambda memory: True
        self.ends = set(end_tokens(model))
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, _Row] = {}
        self._readings: deque[tuple[Reading, _Row]] = deque()
        self._retired: list[tuple[Memory, threading.Event]] = []
        self._changed = threading.Condition()
        self.is_closing = False
        self.num_tokens = self.num_steps = self.num_prompt_tokens = 0
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
        return len(self._rows) + len(self._readings)

    def holds(self, memory: Memory) -> bool:
        """Whether a row reads a memory, or a request that waits will."""
        rows = [*list(self._rows.values()), *(row for _, row in list(self._readings))]
        return any(one.memory is memory for one in (*(row.request for row in rows), *list(self._waiting)))

    def retire(self, memory: Memory, seconds: float = 5.0) -> threading.Event:
        """Let go of a memory that will not be asked again, once no row reads it; waits so long for one that is idle.

        Returns: set once it is let go.
        """
        gone = threading.Event()
        with self._changed:
            self._retired.append((memory, gone))
            self._changed.notify()
        if self.is_alive and not self.holds(memory):
            gone.wait(seconds)
        return gone

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self, seconds: float = 30.0) -> None:
        """Take no more requests; those under way go on for so long, the rest is cancelled."""
        with self._changed:
            self.is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        for row in [*self._rows.values(), *(row for _, row in self._readings)]:
            row.request.is_cancelled = True
        self._thread.join(_IDLE_SECONDS + 5)

    # the thread -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._is_wanted():
                try:
                    self._turn()
                except Exception as error:  # a fault must not leave clients waiting for ever
                    self._fail(_fault(error))
        except Exception:  # not even rows can be given back: the device is gone
            logger.exception("decoding has ended")
            with self._changed:
                self.is_closing = True
                while self._waiting:
                    ended = ServeError(503, "the server cannot decode any more", "stopping")
                    self._waiting.popleft().put(Piece(finish="error", error=ended))

    def _is_wanted(self) -> bool:
        """Whether there is or will be something to do; waits for it a while."""
        with self._changed:
            if not (self._rows or self._waiting or self._readings or self._retired):
                if self.is_closing:
                    return False
                self._changed.wait(_IDLE_SECONDS)
        return True

    def _turn(self) -> None:
        if self._waiting or self._retired:
            self._let_go()
        self._admit()
        self._read()
        if self._rows:
            self._advance()

    def _fail(self, error: ServeError) -> None:
        """End all that is under way: clients are told first, whatever becomes of the rows."""
        rows, readings = list(self._rows), [reading for reading, _ in self._readings]
        states = [*self._rows.values(), *(state for _, state in self._readings)]
        self._rows.clear()
        self._readings.clear()
        for state in states:
            state.request.put(Piece(finish="error", error=error))
        for row in rows:
            self.engine.leave(row)
        for reading in readings:
            self.engine.drop(reading)

    def _admit(self) -> None:
        """Begin with those who wait, in their order, as long as there is room."""
        while self._waiting:
            request = self._waiting[0]
            reason, error = self._over(request), None
            if reason is None:
                try:
                    request.prepare()
                    if not self.engine.has_room(len(request.prompt) + request.max_new_tokens):
                        return
                    row = _Row(request, self.tokenizer, self.engine.device)
                    reading = self.engine.begin(
                        request.prompt, request.memory, max_new_tokens=request.max_new_tokens, owner=request.owner
                    )
                    self._readings.append((reading, row))
                except ValueError as refusal:
                    reason, error = "error", ServeError(400, str(refusal), "refused")
                except Exception as failure:  # of this request alone: those under way go on
                    reason, error = "error", _fault(failure)
            self._waiting.popleft()
            if reason is not None:
                request.put(Piece(finish=reason, num_prompt=len(request.prompt), error=error))

    def _read(self) -> None:
        """Read so many tokens of prompts, several in one forward: rows that run wait for no more than these."""
        for pair in list(self._readings):
            reason = self._over(pair[1].request)
            if reason is not None:
                self._readings.remove(pair)
                self.engine.drop(pair[0])
                pair[1].request.put(Piece(finish=reason, num_prompt=len(pair[1].request.prompt)))
        states = {id(reading): state for reading, state in self._readings}
        for pieces in self.engine.plan([reading for reading, _ in self._readings], self.limits.piece_tokens):
            rows = self.engine.read_together(pieces)
            self.num_prompt_tokens += sum(size for _, size in pieces)
            done = {id(reading): row for (reading, _), row in zip(pieces, rows, strict=True) if row is not None}
            if not done:
                continue
            self._readings = deque(pair for pair in self._readings if id(pair[0]) not in done)
            self._rows |= {row: states[key] for key, row in done.items()}
            tokens, retrieved = self.engine.results()
            for key, row in done.items():
                # the prompt's own retrieval counts its memory alone
                states[key].evidence.put(retrieved, row, 0)
                self._take(row, states[key], tokens[row])
        self._readings.rotate(-1)

    def _let_go(self) -> None:
        """Forget memories that nobody reads and that were retired or closed, and others once there are many."""
        held = {id(memory) for memory in self.engine.memories if memory is not None}
        held |= {id(reading.memory) for reading, _ in self._readings}
        held |= {id(request.memory) for request in self._waiting}
        idle = [memory for memory in self.engine.known if id(memory) not in held]
        many = len(self.engine.known) - self.limits.open_memories
        for number, memory in enumerate(idle):
            if number < many or not self.is_open(memory):
                self.engine.forget(memory)
        for pair in list(self._retired):
            if id(pair[0]) not in held:
                self.engine.forget(pair[0])
                self._retired.remove(pair)
                pair[1].set()

    def _advance(self) -> None:
        for row, state in list(self._rows.items()):
            reason = self._over(state.request)
            if reason is not None:
                self._finish(row, state, "", [], reason)
        if not self._rows:
            return
        for old, new in self.engine.compact().items():
            self._rows[new] = self._rows.pop(old)
        self.engine.step()
        self.num_steps += 1
        tokens, retrieved = self.engine.results()
        for row, state in list(self._rows.items()):
            state.evidence.put(retrieved, row, self.engine.chunk_offset(row))
            self._take(row, state, tokens[row])

    def _over(self, request: Request) -> str | None:
        if request.is_cancelled:
            return "cancelled"
        return "timeout" if time.monotonic() > request.deadline else None

    def _take(self, row: int, state: _Row, token: int) -> None:
        """The best token that the last step, or the prompt, gave, or one drawn in its place."""
        options = state.request.sampling
        if options.temperature:
            logits = self.engine.logits[row][None]
            drawn = sample(logits, options.temperature, options.top_k, options.top_p, state.generator)
            self.engine.tokens[row] = drawn[0]
            token = int(drawn[0])
        self.num_tokens += 1
        found: list[TokenProbability] = []
        if options.top_logprobs is not None:
            found = [_probability(self.engine.logits[row], token, options.top_logprobs)]
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
            state.put(Piece(text, found, num_tokens=count))

    def _finish(self, row: int, state: _Row, text: str, found: list[TokenProbability], reason: str) -> None:
        self.engine.leave(row)
        del self._rows[row]
        ranked = state.evidence.ranked(_MOST_CHUNKS)
        weight = ranked[0][1] if ranked else None
        count, passages = len(state.text.tokens), state.request.passages
        again: list[tuple[int, float]] = []
        if passages is not None:
            again = list(zip(passages.chunks, state.evidence.weights_of(passages.chunks), strict=True))
        number = len(state.request.prompt)
        state.put(Piece(text, found, reason, count, weight, ranked, again, number))


_MOST_CHUNKS = 64


def _fault(error: Exception) -> ServeError:
    """What a client is told of an error that is logged."""
    logger.error("decoding failed", exc_info=error)
    return ServeError(500, f"decoding failed: {type(error).__name__}", "internal")


def _probability(logits: torch.Tensor, token: int, count: int) -> TokenProbability:
    shares = logits.float().log_softmax(-1)
    best = shares.topk(min(count, len(shares))) if count else None
    pairs = [] if best is None else list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return TokenProbability(token, float(shares[token]), pairs)
