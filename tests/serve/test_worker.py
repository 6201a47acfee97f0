"""The worker's turns: rows go on while prompts are read, requests wait for what they need, and nothing is kept."""

import threading
import time
from dataclasses import replace

import pytest
import torch

from hsa_ultralong.inference.passages import Reread
from hsa_ultralong.serve.evidence import Evidence
from hsa_ultralong.serve.limits import Limits, ServeError
from hsa_ultralong.serve.rows import Request
from hsa_ultralong.serve.worker import Worker
from hsa_ultralong.testing.factories import tiny_model
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.inference.test_batching import alone, document

LIMITS = Limits(context_tokens=320, rows=3, piece_tokens=8, prefix_bytes=2**22)


class Letters:
    """A tokenizer whose tokens are letters."""

    def decode(self, tokens, **_):
        return "".join(chr(ord("a") + int(token)) for token in tokens)


class Asked:
    """A request, and what came of it."""

    def __init__(self, worker, prompt, count, memory=None, **options):
        self.pieces, self.worker = [], worker
        self.request = Request(prompt, memory, count, self.pieces.append, **options)
        worker.submit(self.request)

    def wait(self):
        end = time.monotonic() + HANG_SECONDS
        while not (self.pieces and self.pieces[-1].finish) and time.monotonic() < end:
            time.sleep(0.001)
        return self.pieces[-1].finish

    @property
    def text(self):
        return "".join(piece.text for piece in self.pieces)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def worker(model):
    made = Worker(model, Letters(), LIMITS)
    yield made
    made.close()


def logged(worker):
    """What the engine does from now on: ("read", tokens) and ("step", rows)."""
    log, engine = [], worker.engine
    step, read = engine.step, engine.read_together

    def noted_step():
        log.append(("step", sum(engine.is_taken)))
        return step()

    def noted_read(pieces):
        rows = read(pieces)
        log.extend(("read", size) for _, size in pieces if size)
        return rows

    engine.step, engine.read_together = noted_step, noted_read
    return log


def text_of(tokens):
    return Letters().decode(tokens)


def test_rows_go_on_while_a_long_prompt_is_read(model, worker):
    log, long = logged(worker), document(200, 2)
    running = Asked(worker, document(5, 1), 100)
    while not any(kind == "step" for kind, _ in log):
        time.sleep(0.001)
    asked = Asked(worker, long, 3)
    assert (running.wait(), asked.wait()) == ("length", "length")
    assert running.text == text_of(alone(model, None, document(5, 1), 100))
    assert asked.text == text_of(alone(model, None, long, 3))
    reads = [number for number, (kind, count) in enumerate(log) if kind == "read" and count == 8]
    assert len(reads) == 25
    between = log[reads[0] : reads[-1]]
    # no more than one piece of the prompt stands between two tokens of the row that runs
    assert [kind for kind, _ in between] == ["read", "step"] * 24


def test_a_short_prompt_does_not_wait_for_the_end_of_a_long_one(worker):
    log = logged(worker)
    long, short = Asked(worker, document(300, 2), 2), Asked(worker, document(4, 1), 1)
    long.wait(), short.wait()
    place = log.index(("read", 4))
    assert sum(count for kind, count in log[:place] if kind == "read") < 300


def test_a_request_waits_until_its_tokens_fit(model):
    worker = Worker(model, Letters(), Limits(context_tokens=64, rows=4, row_tokens=64, prefix_bytes=0))
    log = logged(worker)
    asked = [Asked(worker, document(20, seed), 20) for seed in range(3)]
    assert [one.wait() for one in asked] == ["length"] * 3
    assert [one.text for one in asked] == [text_of(alone(model, None, document(20, seed), 20)) for seed in range(3)]
    assert max(count for kind, count in log if kind == "step") == 1
    worker.close()


def test_a_whole_answer_comes_in_two_pieces(worker, model):
    memory = model.memorize(document(50))
    asked = Asked(worker, document(6, 1), 12, memory, is_whole=True)
    asked.wait()
    assert len(asked.pieces) == 2 and asked.text == text_of(alone(model, memory, document(6, 1), 12))


def test_what_was_given_up_while_it_was_read_gives_everything_back(worker):
    asked = Asked(worker, document(300, 2), 20)
    asked.request.is_cancelled = True
    assert asked.wait() == "cancelled"
    assert worker.engine.num_free == 3 and len(worker.engine.own.free) == worker.engine.own.num_pages


def test_a_known_prompt_is_not_read_again(worker):
    first, log = Asked(worker, document(40, 5), 4), logged(worker)
    first.wait()
    del log[:]
    again = Asked(worker, document(40, 5), 4)
    again.wait()
    assert again.text == first.text and all(kind == "step" for kind, _ in log)


def test_a_retired_memory_is_forgotten(worker, model):
    memory = model.memorize(document(50))
    Asked(worker, document(6, 1), 3, memory).wait()
    assert worker.engine.known == [memory]
    worker.retire(memory, HANG_SECONDS)
    assert worker.engine.known == []


def test_a_failing_step_ends_the_requests_and_the_worker_goes_on(worker, model, caplog):
    def broken():
        raise RuntimeError("nobody sees this")

    step, worker.engine.step = worker.engine.step, broken
    asked = Asked(worker, document(6, 1), 5)
    assert asked.wait() == "error" and asked.pieces[-1].error.message == "decoding failed: RuntimeError"
    worker.engine.step = step
    again = Asked(worker, document(6, 1), 5)
    assert again.wait() == "length" and again.text == text_of(alone(model, None, document(6, 1), 5))


def test_a_request_that_cannot_begin_is_told_so_and_the_others_go_on(worker, model):
    def broken():
        raise RuntimeError("nobody sees this")

    running = Asked(worker, document(6, 1), 60)
    asked = Asked(worker, document(6, 2), 5, reread=broken)
    assert asked.wait() == "error" and asked.pieces[-1].error.message == "decoding failed: RuntimeError"
    assert running.wait() == "length" and running.text == text_of(alone(model, None, document(6, 1), 60))
    begin, worker.engine.begin = worker.engine.begin, lambda *_, **__: broken()
    again = Asked(worker, document(6, 2), 5)
    assert again.wait() == "error" and again.pieces[-1].error.status == 500 and worker.num_waiting == 0
    worker.engine.begin = begin


def test_a_worker_that_cannot_go_on_tells_all_who_wait(model):
    def broken(*_):
        raise RuntimeError("the device is gone")

    worker = Worker(model, Letters(), Limits(context_tokens=64, rows=1, prefix_bytes=0))
    reads, worker.engine.read_together = worker.engine.read_together, lambda pieces: time.sleep(0.001) or [None]
    asked = [Asked(worker, document(6, seed), 5) for seed in range(3)]
    worker.engine.step = worker.engine.leave = worker.engine.drop = broken
    worker.engine.read_together = reads
    assert [one.wait() for one in asked] == ["error"] * 3
    worker._thread.join(HANG_SECONDS)
    with pytest.raises(ServeError) as refused:
        Asked(worker, document(6, 9), 5)
    assert refused.value.status == 503 and not worker.is_alive


def test_rows_go_on_while_passages_are_searched(worker, model):
    goes_on, threads, prompt = threading.Event(), [], document(6, 2)

    def searched():
        threads.append(threading.current_thread())
        assert goes_on.wait(HANG_SECONDS)
        return Reread(prompt.tolist(), [], {})

    asked = Asked(worker, document(3, 2), 5, reread=searched)
    assert worker.num_waiting == 1
    other = Asked(worker, document(6, 1), 60)
    assert other.wait() == "length" and not asked.pieces and threads[0] is not worker._thread
    goes_on.set()
    assert asked.wait() == "length" and asked.text == text_of(alone(model, None, prompt, 5))


def test_who_waits_is_told_when_its_time_is_over_wherever_it_stands(model):
    worker, goes_on, never = Worker(model, Letters(), replace(LIMITS, rows=1)), threading.Event(), threading.Event()
    step = worker.engine.step

    def late():
        assert goes_on.wait(HANG_SECONDS)
        return step()

    worker.engine.step = late
    over = {"deadline": time.monotonic() - 1}
    running, first = Asked(worker, document(5, 1), 100), Asked(worker, document(5, 2), 5)
    asked = [Asked(worker, document(5, 3), 5, **over), Asked(worker, document(5, 3), 5, reread=never.wait, **over)]
    goes_on.set()
    assert [one.wait() for one in asked] == ["timeout", "timeout"] and not first.pieces
    never.set()
    assert (running.wait(), first.wait()) == ("length", "length")
    worker.close()


def test_evidence_is_the_largest_weight_of_every_chunk(model):
    memory = model.memorize(document(50))  # 13 chunks
    found, expected = Evidence(memory), {}
    source = torch.Generator().manual_seed(0)
    for step in range(90):
        offset = 5 * (step % 2)
        indices = torch.randint(-1, 25, (2, 1, 3), generator=source, dtype=torch.int32).numpy()
        weights = torch.rand((2, 1, 3), generator=source).numpy()
        found.put([(indices, weights)], step % 2, offset)
        for index, weight in zip(indices[step % 2, 0].tolist(), weights[step % 2, 0].tolist(), strict=True):
            if index >= 0 and 0 <= index - offset < 13:
                expected[index - offset] = max(expected.get(index - offset, 0.0), weight)
    assert dict(found.ranked()) == expected and [w for _, w in found.ranked()] == sorted(expected.values())[::-1]
    assert found.ranked(2) == found.ranked()[:2] and found.weights_of(list(expected)) == list(expected.values())
    assert Evidence(None).ranked() == []
