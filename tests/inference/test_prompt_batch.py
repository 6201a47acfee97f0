"""Prompts that are read together are read as each would be alone."""

import pytest
import torch

from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.inference.prompt_batch import group_pieces, share_out
from hsa_ultralong.models import HSACache
from hsa_ultralong.testing.factories import MODEL_OPTIONS, tiny_model
from tests.inference.test_batching import alone, document, memories_of

SIZES = (9, 1, 30, 17, 4, 12)


def prompts_of(memories):
    return [(document(size, 20 + n), memories[n % len(memories)]) for n, size in enumerate(SIZES)]


def read_alone(model, prompt, memory):
    cache = HSACache(model.config, memory=memory)
    with torch.no_grad():
        return model(prompt[None], past_key_values=cache, logits_to_keep=1, output_retrieval=True)


def read_all(engine, readings, most):
    """Row of every prompt, read in turns of so many tokens."""
    rows, waiting = {}, list(readings)
    while waiting:
        for pieces in engine.plan(waiting, most):
            for (reading, _), row in zip(pieces, engine.read_together(pieces), strict=True):
                if row is not None:
                    rows[id(reading)] = row
        waiting = [reading for reading in waiting[1:] + waiting[:1] if id(reading) not in rows]
    return [rows[id(reading)] for reading in readings]


@pytest.mark.parametrize("most", [1000, 50, 13, 1])
@pytest.mark.parametrize("options", ["default", "all_at_once", "two_retrieval_heads", "wide_hsa_window"])
def test_logits_and_retrieval_are_those_of_a_prompt_read_alone(options, most):
    model = tiny_model(**MODEL_OPTIONS[options])
    asked = prompts_of(memories_of(model)[: 3 if model.config.is_composable else 1])
    engine = BatchEngine(model, batch=8, max_tokens=60)
    rows = read_all(engine, [engine.begin(prompt, memory, max_new_tokens=9) for prompt, memory in asked], most)
    for row, (prompt, memory) in zip(rows, asked, strict=True):
        expected = read_alone(model, prompt, memory)
        torch.testing.assert_close(engine.logits[row], expected.logits[0, -1], rtol=0, atol=1e-9)
        for (indices, weights), found in zip(engine.retrieved, expected.retrieval, strict=True):
            kept = found.indices.shape[-1]
            assert torch.equal(indices[row, :, :kept], found.indices[0, -1]) and (indices[row, :, kept:] == -1).all()
            torch.testing.assert_close(weights[row, :, :kept], found.weights[0, -1].float())


@pytest.mark.parametrize("most", [1000, 13])
def test_rows_of_prompts_read_together_decode_what_they_decode_alone(most):
    model = tiny_model()
    asked = prompts_of(memories_of(model))
    engine = BatchEngine(model, batch=8, max_tokens=60, prefix_bytes=2**20)
    for _ in range(2):  # the second time all beginnings are known
        rows = read_all(engine, [engine.begin(prompt, memory, max_new_tokens=14) for prompt, memory in asked], most)
        steps = [engine.tokens.tolist(), *(engine.step().tolist() for _ in range(12))]
        for row, (prompt, memory) in zip(rows, asked, strict=True):
            assert [step[row] for step in steps] == alone(model, memory, prompt, 13)
            engine.leave(row)
    assert engine.prefixes.num_hits >= len(asked) and len(engine.own.free) == engine.own.num_pages


def test_beginnings_that_are_known_are_read_on_together():
    model = tiny_model()
    memory, beginning = model.memorize(document(50)), document(21, 3)
    engine = BatchEngine(model, batch=4, max_tokens=60, prefix_bytes=2**20)
    engine.leave(engine.join(beginning, memory, max_new_tokens=9))
    prompts = [torch.cat((beginning, document(size, size))) for size in (3, 8)] + [document(6, 9)]
    readings = [engine.begin(prompt, memory, max_new_tokens=9) for prompt in prompts]
    assert [reading.num_known for reading in readings] == [21, 21, 0]
    for row, prompt in zip(read_all(engine, readings, 100), prompts, strict=True):
        expected = read_alone(model, prompt, memory).logits[0, -1]
        torch.testing.assert_close(engine.logits[row], expected, rtol=0, atol=1e-9)


def test_prompts_share_one_forward(monkeypatch):
    model = tiny_model()
    engine = BatchEngine(model, batch=32, max_tokens=20)
    memory, calls, forward = model.memorize(document(50)), [], model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, **more: calls.append(1) or forward(*args, **more))
    readings = [engine.begin(document(8, seed), memory, max_new_tokens=4) for seed in range(32)]
    read_all(engine, readings, 128)
    assert len(calls) == 2


def test_what_is_read_now_is_bounded_and_nobody_waits_for_ever():
    assert share_out([300], 512) == [300] and share_out([300, 4], 8) == [4, 4]
    assert share_out([300, 4, 9], 100) == [87, 4, 9] and share_out([4, 300], 100) == [4, 96]
    assert share_out([32] * 32, 512) == [32] * 16 + [0] * 16 and share_out([], 8) == []
    assert share_out([10, 300, 300], 100) == [10, 90, 0]


def test_pieces_of_like_sizes_are_read_together():
    assert group_pieces([32] * 16) == [list(range(16))]
    assert group_pieces([256, *[8] * 8]) == [[0], list(range(1, 9))]
    assert group_pieces([0, 5, 0]) == [[1]] and group_pieces([]) == []
