"""Passages read again: the heaviest chunks, in the memory's order, as text before the question."""

import pytest
import torch

from hsa_ultralong.inference import ask
from hsa_ultralong.inference.ask import AnswerStream
from hsa_ultralong.inference.passages import passage_texts, reread_prompt, retrieved_weights
from hsa_ultralong.inference.prompts import with_passages
from hsa_ultralong.testing.factories import random_tokens, tiny_model

SIZE, PROMPT = 4, "3 1 4 1 5 9 2 6 5"


class Words:
    """A tokenizer of numbers: "3 7" <-> [3, 7]."""

    def __call__(self, text, **_):
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, tokens, **_):
        return " ".join(str(token) for token in tokens)


@pytest.fixture(scope="module")
def asked():
    """A model and a memory of two documents, of 30 and of 10 tokens."""
    model = tiny_model()
    return model, model.memorize([random_tokens(1, length, seed=length)[0] for length in (30, 10)], names=["a", "b"])


def test_passages_are_the_heaviest_chunks_of_the_last_token_in_the_memorys_order(asked):
    model, memory = asked
    weights = retrieved_weights(model, memory, torch.tensor(Words()(PROMPT)["input_ids"]))
    alone = ask(model, Words(), memory, PROMPT, max_new_tokens=1, num_sources=99)
    # what `ask` reports of the first token
    assert sorted(weights.values(), reverse=True) == pytest.approx([one.weight for one in alone.sources])
    found = reread_prompt(model, Words(), memory, PROMPT, 3)
    assert found.chunks == sorted(sorted(weights, key=lambda chunk: -weights[chunk])[:3])
    assert found.weights == pytest.approx(weights)


def test_neighbours_are_one_text_and_documents_stay_apart(asked):
    _, memory = asked
    words = [[str(token) for token in document.tokens.tolist()] for document in memory.documents]
    # chunks 6 and 7 end the first document, the last with two tokens, 8 begins the second
    expected = [words[0][4:12], words[0][24:30], words[1][:4]]
    assert [text.split() for text in passage_texts(Words(), memory, [1, 2, 6, 7, 8])] == expected


def test_an_answer_with_passages_is_that_of_the_prompt_with_their_text(asked):
    model, memory = asked
    found = ask(model, Words(), memory, PROMPT, max_new_tokens=6, reread=3)
    chunks = [8 * one.document + one.start // SIZE for one in found.reread]
    assert chunks == sorted(chunks) and len(chunks) == 3
    longer = with_passages(PROMPT, passage_texts(Words(), memory, chunks))
    assert found.tokens == ask(model, Words(), memory, longer, max_new_tokens=6).tokens
    assert found.weight >= ask(model, Words(), memory, PROMPT, max_new_tokens=1).weight
    assert ask(model, Words(), memory, PROMPT, max_new_tokens=6).reread == []


def test_what_does_not_fit_is_left_out_the_worst_first_and_nothing_at_all_is_refused(asked):
    model, memory = asked
    weights = reread_prompt(model, Words(), memory, PROMPT, 1).weights
    best = sorted(weights, key=lambda chunk: -weights[chunk])
    found = reread_prompt(model, Words(), memory, PROMPT, 5, most_tokens=2 * SIZE)
    assert found.chunks == sorted(best[:2]) and len(found.ids) <= len(PROMPT.split()) + 2 * SIZE
    assert len(reread_prompt(model, Words(), memory, PROMPT, 999).chunks) == len(weights)
    with pytest.raises(ValueError, match="the best passage does not fit"):
        reread_prompt(model, Words(), memory, PROMPT, 5, most_tokens=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"reread": -1}, "from 1 on"), ({"reread_tokens": 9}, "say how many"), ({"unsure_below": 2}, "from 0 to 1")],
)
def test_options_that_say_nothing_are_refused(asked, options, message):
    model, memory = asked
    with pytest.raises(ValueError, match=message):
        ask(model, Words(), memory, PROMPT, **options)


def test_passages_need_a_memory_and_it_must_be_this_models(asked):
    model, memory = asked
    with pytest.raises(ValueError, match="there is no memory"):
        AnswerStream(model, Words(), None, PROMPT, reread=2)
    with pytest.raises(ValueError, match="another model"):
        ask(tiny_model(seed=1), Words(), memory, PROMPT, reread=2)


def test_without_a_memory_the_model_answers_alone(asked):
    model, _ = asked
    stream = AnswerStream(model, Words(), None, PROMPT, max_new_tokens=5)
    pieces = "".join(stream)
    tokens = torch.tensor([Words()(PROMPT)["input_ids"]])
    plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=5, do_sample=False)
    assert stream.answer.tokens == plain[0, tokens.shape[1] :].tolist()
    assert pieces == stream.answer.text and stream.answer.sources == [] and stream.answer.is_uncertain is None


def test_no_token_is_decoded_after_the_line_break_that_ends_an_answer(asked):
    class Lines(Words):
        def decode(self, tokens, **_):
            return "".join("\n" if token == ends else f" {token}" for token in tokens)

    model, memory = asked
    ends = -1
    whole = ask(model, Lines(), memory, PROMPT, max_new_tokens=9)
    ends = next(token for number, token in enumerate(whole.tokens) if number > 1 and token not in whole.tokens[:number])
    at = whole.tokens.index(ends)
    shown = []
    found = ask(model, Lines(), memory, PROMPT, max_new_tokens=9, on_text=shown.append)
    assert at < 8 and found.tokens == whole.tokens[: at + 1]
    assert found.text == "".join(shown) == "".join(f" {token}" for token in whole.tokens[:at])


def test_an_answer_that_is_broken_off_keeps_what_has_come(asked):
    model, memory = asked
    stream = AnswerStream(model, Words(), memory, PROMPT, max_new_tokens=9)
    assert next(iter(stream))
    whole = ask(model, Words(), memory, PROMPT, max_new_tokens=9)
    assert stream.answer.tokens == whole.tokens[: len(stream.answer.tokens)] and len(stream.answer.tokens) < 9
