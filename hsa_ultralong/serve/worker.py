"""The one thread that decodes: it reads prompts in pieces between steps, steps, and passes tokens on. No HTTP here.

Passages that are to stand in a prompt are searched on a second thread, so that rows go on meanwhile.

tests/serve/test_worker.py, test_app.py.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hsa_ultralong.inference.ask import end_tokens
from hsa_ultralong.inference.batching import BatchEngine, Reading
from hsa_ultralong.inference.sampling import sample
from hsa_ultralong.inference.warming import warm
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import Limits, ServeError
from hsa_ultralong.serve.rows import Piece, Request, RunningRow, TokenProbability

logger = logging.getLogger(__name__)
_IDLE_SECONDS = 0.5


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
        self._preparing: deque[Request] = deque()
        self._waiting: deque[Request] = deque()
        self._rows: dict[int, RunningRow] = {}
        self._readings: deque[tuple[Reading, RunningRow]] = deque()
        self._retired: list[tuple[Memory, threading.Event]] = []
        self._changed = threading.Condition()
        self.is_closing = False
        self.num_tokens = self.num_steps = self.num_prompt_tokens = 0
        self._thread = threading.Thread(target=self._run, name="decoding", daemon=True)
        self._thread.start()
        threading.Thread(target=self._prepare, name="preparing", daemon=True).start()

    # from any thread --------------------------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ServeError: too many wait, or the server is stopping.
        """
        with self._changed:
            if self.is_closing:
                raise ServeError(503, "the server is stopping", "stopping")
            if self.num_waiting >= self.limits.waiting:
                raise ServeError(429, f"{self.limits.waiting} requests wait already; try again later", "overloaded")
            (self._waiting if request.reread is None else self._preparing).append(request)
            self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting) + len(self._preparing)

    @property
    def num_running(self) -> int:
        return len(self._rows) + len(self._readings)

    def holds(self, memory: Memory) -> bool:
        """Whether a row reads a memory, or a request that waits will."""
        rows = [*list(self._rows.values()), *(row for _, row in list(self._readings))]
        waiting = [*list(self._preparing), *list(self._waiting)]
        return any(one.memory is memory for one in (*waiting, *(row.request for row in rows)))

    def retire(self, memory: Memory, seconds: float = 5.0) -> threading.Event:
        """Let go of a memory that will not be asked again, once no row reads it; waits so long for one that is idle.

        Returns: set once it is let go.
        """
        gone = threading.Event()
        with self._changed:
            self._retired.append((memory, gone))
            self._changed.notify_all()
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
            self._changed.notify_all()
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
                waiting = [*self._preparing, *self._waiting]
                self._preparing, self._waiting = deque(), deque()
                self._changed.notify_all()
            for request in waiting:
                ended = ServeError(503, "the server cannot decode any more", "stopping")
                request.put(Piece(finish="error", error=ended))

    def _prepare(self) -> None:
        """Search the passages of one request after the other."""
        while True:
            with self._changed:
                while not self._preparing and not self.is_closing:
                    self._changed.wait()
                if not self._preparing:
                    return
                request = self._preparing[0]
            error = None
            try:
                request.prepare()
            except ValueError as refusal:
                error = ServeError(400, str(refusal), "refused")
            except Exception as failure:  # of this request alone
                error = _fault(failure)
            with self._changed:
                # it may have been told meanwhile that its time is over
                is_wanted = any(one is request for one in self._preparing)
                self._preparing = deque(one for one in self._preparing if one is not request)
                if is_wanted and error is None:
                    self._waiting.append(request)
                    self._changed.notify_all()
            if is_wanted and error is not None:
                request.put(Piece(finish="error", num_prompt=len(request.prompt), error=error))

    def _is_wanted(self) -> bool:
        """Whether there is or will be something to do; waits for it a while."""
        with self._changed:
            if not (self._rows or self._waiting or self._readings or self._retired):
                if self.is_closing and not self._preparing:
                    return False
                self._changed.wait(_IDLE_SECONDS)
        return True

    def _turn(self) -> None:
        if self._waiting or self._retired:
            self._let_go()
        self._dismiss()
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

    def _dismiss(self) -> None:
        """Tell those who wait and are given up, or whose time is over, wherever they stand in the queue."""
        with self._changed:
            over = [(one, reason) for one in (*self._preparing, *self._waiting) if (reason := self._over(one))]
            if not over:
                return
            gone = {id(request) for request, _ in over}
            self._preparing = deque(one for one in self._preparing if id(one) not in gone)
            self._waiting = deque(one for one in self._waiting if id(one) not in gone)
        for request, reason in over:
            request.put(Piece(finish=reason, num_prompt=len(request.prompt)))

    def _admit(self) -> None:
        """Begin with those who wait, in their order, as long as there is room."""
        while self._waiting:
            request, error = self._waiting[0], None
            try:
                if not self.engine.has_room(len(request.prompt) + request.max_new_tokens):
                    return
                row = RunningRow(request, self.tokenizer, self.engine.device)
                reading = self.engine.begin(
                    request.prompt, request.memory, max_new_tokens=request.max_new_tokens, owner=request.owner
                )
                self._readings.append((reading, row))
            except ValueError as refusal:
                error = ServeError(400, str(refusal), "refused")
            except Exception as failure:  # of this request alone: those under way go on
                error = _fault(failure)
            self._waiting.popleft()
            if error is not None:
                request.put(Piece(finish="error", num_prompt=len(request.prompt), error=error))

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
        held |= {id(request.memory) for request in (*list(self._preparing), *self._waiting)}
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

    def _take(self, row: int, state: RunningRow, token: int) -> None:
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

    def _finish(self, row: int, state: RunningRow, text: str, found: list[TokenProbability], reason: str) -> None:
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
