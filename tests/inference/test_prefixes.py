"""A prompt whose beginning was read before is not read again, and answers as if it were."""

import pytest
import torch

from hsa_ultralong.inference import edit
from hsa_ultralong.inference.batching import BatchEngine
from hsa_ultralong.testing.factories import tiny_model
from tests.inference.test_batching import alone, document

BYTES = 2**22


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture
def engine(model):
    return BatchEngine(model, batch=2, max_tokens=80, prefix_bytes=BYTES)


def answered(engine, prompt, memory=None, owner="", count=6):
    """Tokens of the answer, and how many of the prompt were known."""
    reading = engine.begin(prompt, memory, max_new_tokens=count, owner=owner)
    known, row = reading.num_known, engine.read_on(reading)
    tokens = [int(engine.tokens[row]), *(int(engine.step()[row]) for _ in range(count - 1))]
    engine.leave(row)
    return tokens, known


@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_the_same_prompt_is_not_read_again_and_answers_the_same(model, engine, length):
    memory, prompt = model.memorize(document(50)), document(length, 1)
    expected = alone(model, memory, prompt, 6)
    assert answered(engine, prompt, memory) == (expected, 0)
    assert answered(engine, prompt, memory) == (expected, length)


def test_a_longer_prompt_goes_on_where_a_known_one_ends(model, engine):
    memory, first = model.memorize(document(50)), document(21, 1)
    longer = torch.cat((first, document(14, 2)))
    answered(engine, first, memory)
    assert answered(engine, longer, memory) == (alone(model, memory, longer, 6), 21)
    shorter = first[:9]
    assert answered(engine, shorter, memory) == (alone(model, memory, shorter, 6), 0)


def test_what_two_prompts_began_with_is_known_to_the_third(model, engine):
    common = document(26, 1)
    prompts = [torch.cat((common, torch.tensor([last]), document(5, last))) for last in (1, 2, 3)]
    found = [answered(engine, prompt) for prompt in prompts]
    assert [tokens for tokens, _ in found] == [alone(model, None, prompt, 6) for prompt in prompts]
    assert [known for _, known in found] == [0, 0, 26]


def test_another_memory_another_owner_and_another_text_are_no_hits(model, engine):
    memory, prompt = model.memorize(document(50)), document(12, 1)
    twin = model.memorize(document(50))
    answered(engine, prompt, memory, owner="anna")
    assert answered(engine, prompt, memory, owner="bob")[1] == 0
    assert answered(engine, prompt, twin, owner="anna")[1] == 0
    assert answered(engine, prompt, None, owner="anna")[1] == 0
    other = prompt.clone()
    other[3] = (other[3] + 1) % 37
    assert answered(engine, other, memory, owner="anna")[1] == 0
    assert answered(engine, prompt, memory, owner="anna")[1] == 12


def test_a_memory_that_was_edited_is_no_hit(model, engine):
    memory, prompt = model.memorize(document(50)), document(12, 1)
    before, _ = answered(engine, prompt, memory)
    edit(model, memory, 8, 20, document(12, 9))
    found = answered(engine, prompt, memory)
    assert found == (alone(model, memory, prompt, 6), 0)
    assert answered(engine, prompt, memory)[1] == 12


def test_a_memory_that_was_let_go_leaves_nothing(model, engine):
    memory = model.memorize(document(50))
    answered(engine, document(12, 1), memory)
    assert engine.prefixes.num_bytes > 0
    engine.forget(memory)
    assert engine.prefixes.num_bytes == 0


def test_the_least_recently_used_is_given_up_and_owners_do_not_push_each_other_out(model):
    prompts = [document(20, seed) for seed in range(4)]
    probe = BatchEngine(model, batch=1, max_tokens=40, prefix_bytes=BYTES)
    answered(probe, prompts[0])
    one = probe.prefixes.num_bytes
    engine = BatchEngine(model, batch=1, max_tokens=40, prefix_bytes=2 * 2 * one + 2, num_owners=2)
    answered(engine, prompts[0], owner="anna")
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        answered(engine, prompt, owner="bob")
    assert engine.prefixes.num_bytes <= 2 * 2 * one + 2
    assert answered(engine, prompts[0], owner="bob")[1] == 20
    assert answered(engine, prompts[2], owner="bob")[1] == 20
    assert answered(engine, prompts[1], owner="bob")[1] == 0
    assert answered(engine, prompts[0], owner="anna")[1] == 20


def test_without_bytes_nothing_is_kept(model):
    engine = BatchEngine(model, batch=1, max_tokens=40)
    assert [answered(engine, document(9))[1] for _ in range(2)] == [0, 0]
