"""Tokens a second and times to the first token of the thread that decodes, without HTTP, by rows and memory.

Called by `hsa bench serve`; tests/serve/test_load.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa_ultralong.inference import memorize
from hsa_ultralong.inference.warming import small_memories
from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import Limits
from hsa_ultralong.serve.load import quantile
from hsa_ultralong.serve.rows import Piece, Request
from hsa_ultralong.serve.worker import Worker


@dataclass(frozen=True)
class ThroughputSettings:
    """lengths: tokens memorised. batches: requests at once. steps: tokens of an answer. prompt: tokens of a question.
    long_prompt: of one that is read beside others."""

    lengths: tuple[int, ...]
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    steps: int = 128
    prompt: int = 32
    long_prompt: int = 4096
    store: str = "device"
    key_values: str | None = None
    seed: int = 0


class _Silent:
    """Stands for a tokenizer: texts are not what is measured, but take a call a token."""

    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return "x" * len(tokens)


class _Answer:
    """Times of one request."""

    def __init__(self) -> None:
        self.began, self.times, self.done = time.perf_counter(), [], threading.Event()  # type: ignore[var-annotated]
        self.error: Any = None

    def put(self, piece: Piece) -> None:
        self.times.append(time.perf_counter())
        if piece.finish is not None:
            self.error = piece.error
            self.done.set()

    @property
    def first(self) -> float:
        return self.times[0] - self.began


def throughput_records(
    model: Any,
    settings: ThroughputSettings,
    keep: Callable[[str, int, int, float], None],
    tell: Callable[[str], object] = lambda _: None,
) -> None:
    """Measure every length and batch; `keep` takes (metric, tokens of the memory, batch, value), `tell` lines on the
    progress of warming up.

    Raises:
        RuntimeError: a request failed.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    vocabulary, size = model.config.vocab_size, model.config.chunk_size

    def tokens(count: int) -> torch.Tensor:
        return torch.randint(3, vocabulary, (count,), generator=generator)

    place = {"store": settings.store, "key_values": settings.key_values}
    began = time.perf_counter()
    context = -(-(settings.long_prompt + settings.steps) // size) * size
    limits = Limits(rows=max(settings.batches), context_tokens=context, waiting=4096)
    small = small_memories(model, **place) if model.device.type == "cuda" else []
    worker = Worker(model, _Silent(), limits, warm_with=small, tell=tell)
    worker.ends = set()  # answers are as long as they may be
    keep("warmup_s", 0, max(settings.batches), time.perf_counter() - began)
    try:
        for length in settings.lengths:
            began = time.perf_counter()
            memory = memorize(model, tokens(length), **place)  # type: ignore[arg-type]
            _synchronize(model)
            keep("read_s", length, 1, time.perf_counter() - began)
            _measure(worker, memory, length, settings, tokens, keep)
            worker.retire(memory)
            del memory
    finally:
        worker.close()


def _measure(
    worker: Worker, memory: Memory, length: int, settings: ThroughputSettings,
    tokens: Callable[[int], torch.Tensor], keep: Callable[[str, int, int, float], None],
) -> None:  # fmt: skip
    def ask(prompts: Sequence[torch.Tensor], count: int = settings.steps) -> list[_Answer]:
        found = []
        for prompt in prompts:
            answer = _Answer()
            worker.submit(Request(prompt, memory, count, answer.put))
            found.append(answer)
        return found

    def wait(found: Sequence[_Answer]) -> None:
        for answer in found:
            answer.done.wait()
            if answer.error is not None:
                raise RuntimeError(answer.error.message)

    question = tokens(settings.prompt)
    for metric in ("first_question_s", "second_question_s"):  # the second one's beginning is known, whole
        found = ask([question])
        wait(found)
        keep(metric, length, 1, found[0].first)
    others = ask([tokens(settings.prompt)])
    wait(others)
    keep("other_question_s", length, 1, others[0].first)
    speeds: dict[int, tuple[float, float]] = {}
    for batch in settings.batches:
        wait(ask([tokens(settings.prompt) for _ in range(batch)], 4))  # graphs of this many rows
        began = time.perf_counter()
        found = ask([tokens(settings.prompt) for _ in range(batch)])
        wait(found)
        seconds = time.perf_counter() - began
        whole = batch * settings.steps / seconds
        keep("tokens_per_s", length, batch, whole)
        # from the last first token on, all rows run
        last = max(answer.times[0] for answer in found)
        ends = max(answer.times[-1] for answer in found)
        later = sum(sum(at > last for at in answer.times) for answer in found)
        # short answers may end before another one begins
        running = later / (ends - last) if later else 0.0
        speeds[batch] = whole, running
        keep("decode_tokens_per_s", length, batch, running)
        if batch > 1 and 1 in speeds:
            for metric, value, alone in zip(("speedup", "decode_speedup"), speeds[batch], speeds[1], strict=True):
                if alone and value:
                    keep(metric, length, batch, value / alone)
        firsts = [answer.first for answer in found]
        keep("first_token_s_p50", length, batch, quantile(firsts, 0.5))
        keep("first_token_s_p99", length, batch, quantile(firsts, 0.99))
    beside = ask([tokens(settings.prompt)])
    while len(beside[0].times) < 4 and not beside[0].done.is_set():
        time.sleep(0.001)
    long = ask([tokens(settings.long_prompt)], 1)
    wait([*beside, *long])
    gaps = [after - before for before, after in zip(beside[0].times, beside[0].times[1:], strict=False)]
    keep("longest_gap_beside_a_long_prompt_s", length, 1, max(gaps, default=0.0))
    keep("long_prompt_first_token_s", length, 1, long[0].first)


def _synchronize(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
