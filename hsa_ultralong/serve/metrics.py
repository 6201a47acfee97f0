"""Numbers for Prometheus, in its text form. Called by app.py; tests/serve/test_app.py."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from hsa_ultralong.serve.answers import Answers
from hsa_ultralong.serve.rows import Piece

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)


class Metrics:
    """What one server counts."""

    def __init__(self, answers: Answers) -> None:
        self.registry = CollectorRegistry()
        worker = answers.worker
        self.answers = Counter("hsa_answers", "Answers given.", ["finish"], registry=self.registry)
        self.first = Histogram(
            "hsa_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=self.registry
        )
        self.whole = Histogram("hsa_answer_seconds", "Time of a request.", buckets=_SECONDS, registry=self.registry)
        for name, text, value in (
            ("hsa_rows_running", "Answers under way.", lambda: worker.num_running),
            ("hsa_requests_waiting", "Answers that wait for a row.", lambda: worker.num_waiting),
            ("hsa_tokens_decoded", "Tokens decoded so far.", lambda: worker.num_tokens),
            ("hsa_prompt_tokens_read", "Tokens of prompts read so far.", lambda: worker.num_prompt_tokens),
            (
                "hsa_prompt_tokens_known",
                "Tokens of prompts that were known so far.",
                lambda: worker.engine.prefixes.num_tokens_saved,
            ),
            ("hsa_steps", "Decoding steps so far.", lambda: worker.num_steps),
            *(
                (f"hsa_open_{place}_bytes", f"Bytes of open memories on the {place}.", _bytes_on(answers, place))
                for place in ("device", "host")
            ),
            ("hsa_memory_bytes", "Bytes of all memories on disk.", answers.memories.bytes_used),
        ):
            Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> str:
        return generate_latest(self.registry).decode()

    async def watch(self, pieces: AsyncIterator[tuple[int, Piece]]) -> AsyncIterator[tuple[int, Piece]]:
        """The same pieces, timed and counted."""
        began, is_first = time.perf_counter(), True
        async for number, piece in pieces:
            if is_first:
                self.first.observe(time.perf_counter() - began)
                is_first = False
            if piece.finish is not None:
                self.answers.labels(piece.finish).inc()
            yield number, piece
        self.whole.observe(time.perf_counter() - began)


def _bytes_on(answers: Answers, place: str) -> Callable[[], float]:
    return lambda: answers.memories.opened.bytes_on(place)
