"""Rows that join and leave decode what they decode alone."""

import pytest
import torch

from hsa_ultralong.inference import DecodingEngine
from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model


def document(length, seed=0):
    return random_tokens(1, length, seed=seed)[0]


def alone(model, memory, prompt, count):
    """Tokens, and what each step retrieved."""
    engine = DecodingEngine(model, memory, max_tokens=200)
    return [step.tokens[0] for step in engine.stream([prompt], count)]


@pytest.mark.parametrize("options", ["default", "two_retrieval_heads", "hsa_only_layer"])
def test_rows_that_join_and_leave_decode_what_they_decode_alone(options):
    model = tiny_model(**MODEL_OPTIONS[options])
    memories = [model.memorize(document(150)), model.memorize([document(70, 1), document(33, 2)]), None]
    # (step at which it joins, memory, prompt, tokens wanted)
    plan = [(0, 0, 9, 40), (0, 1, 70, 7), (3, 2, 1, 30), (12, 0, 33, 20), (13, 1, 64, 60), (30, 0, 5, 12)]
    requests = [(at, memories[m], document(n, 10 + i), count) for i, (at, m, n, count) in enumerate(plan)]
    engine = BatchEngine(model, batch=3, max_tokens=160)
    waiting, running, found = list(enumerate(requests)), {}, {}
    for now in range(200):
        while waiting and waiting[0][1][0] <= now and not all(engine.is_taken):
            number, (_, memory, prompt, count) = waiting.pop(0)
            row = engine.join(prompt, memory)
            running[row], found[number] = (number, count), [int(engine.tokens[row])]
        if not running and not waiting:
            break
        engine.step()
        for row, (number, count) in list(running.items()):
            if len(found[number]) < count:
                found[number].append(int(engine.tokens[row]))
            if len(found[number]) == count:
                engine.leave(row)
                del running[row]
    assert sorted(found) == list(range(len(plan)))
    for number, (_, memory, prompt, count) in enumerate(requests):
        assert found[number] == alone(model, memory, prompt, count)


def test_a_free_row_never_grows_full_and_a_taken_one_is_refused():
    model = tiny_model()
    engine = BatchEngine(model, batch=2, max_tokens=12)
    row = engine.join(document(4))
    for _ in range(8):
        engine.step()
    with pytest.raises(ValueError, match="max_tokens"):
        engine.step()
    engine.leave(row)
    for _ in range(30):
        engine.step()
    engine.join(document(4))
    engine.join(document(5))
    with pytest.raises(ValueError, match="all 2 rows are taken"):
        engine.join(document(6))


def test_a_memory_is_let_go_only_when_no_row_reads_it():
    model = tiny_model()
    first, second = model.memorize(document(80)), model.memorize(document(90, 1))
    engine = BatchEngine(model, batch=2, max_tokens=80)
    row, other = engine.join(document(5), first), engine.join(document(6), second)
    with pytest.raises(ValueError, match="reads this memory"):
        engine.forget(first)
    engine.leave(row)
    assert engine.chunk_offset(other) == first.num_chunks
    engine.forget(first)
    assert engine.chunk_offset(other) == 0 and len(engine.views) == 2
    tokens = [int(engine.tokens[other])]
    for _ in range(9):
        tokens.append(int(engine.step()[other]))
    assert tokens == alone(model, second, document(6), 10)


def test_a_prompt_that_is_refused_leaves_the_row_free():
    model = tiny_model()
    engine = BatchEngine(model, batch=1, max_tokens=10)
    with pytest.raises(ValueError, match="needs 1 to 10 tokens"):
        engine.join(document(11))
    assert engine.is_taken == [False]
    assert engine.join(document(3)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_new_memory_changes_nothing_for_rows_that_run_in_a_graph():
    model = tiny_model().float().cuda()
    first, second = model.memorize(document(150)), model.memorize(document(90, 1))
    engine = BatchEngine(model, batch=2, max_tokens=100)
    row = engine.join(document(5), first)
    tokens = [int(engine.tokens[row])]
    for number in range(30):
        if number == 10:
            engine.join(document(7, 3), second)
        tokens.append(int(engine.step()[row]))
    assert engine.is_captured
    assert tokens == alone(model, first, document(5), 31)
