"""Questions and continuations on top of a memory equal the parallel forward."""

import pytest
import torch

from hsa_ultralong.inference import ask
from hsa_ultralong.inference.ask import unsure_weight
from hsa_ultralong.models import HSAConfig
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_model

GREEDY = {"max_new_tokens": 9, "do_sample": False}


@pytest.mark.parametrize("length", [40, 41, 43, 62])
@pytest.mark.parametrize("options", ["default", "hsa_only_layer", "bypass", "all_at_once"])
def test_continuing_a_document_equals_plain_generation(length, options):
    model, tokens = tiny_model(**MODEL_OPTIONS[options]), random_tokens(1, length + 3)
    plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), **GREEDY)[0, length:]
    memory = model.memorize(tokens[0, :length], close=False)
    prompt = tokens[:, length:]
    continued = model.generate(
        prompt, memory=memory, continue_document=True, attention_mask=torch.ones_like(prompt), **GREEDY
    )
    assert torch.equal(continued[0], plain)


@torch.no_grad()
def test_a_question_equals_a_packed_row_of_memory_and_question():
    model = tiny_model()
    text, question = random_tokens(1, 32)[0], random_tokens(1, 8, seed=1)[0]
    memory = model.memorize(text)
    answer = model.generate(question[None], memory=memory, max_new_tokens=1, do_sample=False)
    row = torch.cat((text, question))[None]
    segments = torch.tensor([[0] * 32 + [1] * 8], dtype=torch.int32)
    packed = model(row, segment_ids=segments, use_cache=False).logits[0, -1]
    assert answer[0, -1] == packed.argmax()


def test_left_padded_questions_answer_like_single_ones():
    model, memory = tiny_model(), tiny_model().memorize(random_tokens(1, 50)[0])
    long, short = random_tokens(1, 11, seed=1), random_tokens(1, 6, seed=2)
    single = [
        model.generate(x, memory=memory, attention_mask=torch.ones_like(x), **GREEDY)[0, -9:] for x in (long, short)
    ]
    batch = torch.cat((long, torch.cat((torch.zeros(1, 5, dtype=torch.long), short), 1)))
    mask = torch.ones_like(batch)
    mask[1, :5] = 0
    together = model.generate(batch, memory=memory, attention_mask=mask, **GREEDY)[:, -9:]
    assert torch.equal(together, torch.stack(single))


def test_beams_read_a_memory():
    model, memory = tiny_model(), tiny_model().memorize(random_tokens(1, 50)[0])
    out = model.generate(random_tokens(2, 5), memory=memory, num_beams=3, max_new_tokens=4, do_sample=False)
    assert out.shape == (2, 9)


def test_impossible_requests_are_refused():
    model, prompt = tiny_model(), random_tokens(1, 5)
    closed = model.memorize(random_tokens(1, 30)[0])
    opened = model.memorize(random_tokens(1, 30)[0], close=False)
    with pytest.raises(ValueError, match="no open document"):
        model.generate(prompt, memory=closed, continue_document=True, **GREEDY)
    with pytest.raises(ValueError, match="one sequence"):
        model.generate(prompt.repeat(2, 1), memory=opened, continue_document=True, **GREEDY)
    with pytest.raises(ValueError, match="needs a prompt"):
        model.generate(prompt[:, :0], memory=closed, **GREEDY)


class Words:
    """A tokenizer of numbers: "3 7" <-> [3, 7]."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


def test_ask_names_the_chunks_it_read():
    model = tiny_model()
    memory = model.memorize([random_tokens(1, 30)[0], random_tokens(1, 10, seed=1)[0]], names=["a", "b"])
    answer = ask(model, Words(), memory, "3 1 4 1 5", max_new_tokens=4, num_sources=2)
    assert len(answer.tokens) == 4 and answer.text == " ".join(map(str, answer.tokens))
    assert answer.weight == answer.sources[0].weight >= answer.sources[1].weight > 0
    for source in answer.sources:
        assert source.name == "ab"[source.document]
        assert 0 <= source.start < source.stop <= memory.documents[source.document].num_tokens
        assert source.start % 4 == 0 and source.stop - source.start <= 4
    with pytest.raises(ValueError, match="empty"):
        ask(model, Words(), memory, "  ")


def test_nanos_line_of_unsure_answers_falls_with_the_size_of_the_memory():
    nano = HSAConfig.from_pretrained("checkpoints/nano")
    lines = [unsure_weight(nano, chunks) for chunks in (0, 1, 64, 512, 4096, 2**18, 2**30)]
    assert lines == sorted(lines, reverse=True) and lines[0] == 0.95 and lines[-1] == 0.9
    assert unsure_weight(nano, 4096) == pytest.approx(0.95) and unsure_weight(nano, 2**14) == pytest.approx(0.9)
    assert unsure_weight(nano, 2**13) == pytest.approx(0.925)


def test_a_model_without_a_line_judges_no_answer_and_the_asker_may_draw_one():
    model, memory = tiny_model(), tiny_model().memorize(random_tokens(1, 30)[0])
    answer = ask(model, Words(), memory, "3 1 4", max_new_tokens=1)
    assert answer.threshold is None and answer.is_uncertain is None and answer.weight > 0
    model.config.unsure_below = [[1, 0.25]]
    assert ask(model, Words(), memory, "3 1 4", max_new_tokens=1).threshold == 0.25
    for below in (0, 1):
        drawn = ask(model, Words(), memory, "3 1 4", max_new_tokens=1, unsure_below=below)
        assert drawn.threshold == below and drawn.is_uncertain is (drawn.weight < below)
    with pytest.raises(ValueError, match="from 0 to 1"):
        ask(model, Words(), memory, "3 1 4", unsure_below=1.5)
