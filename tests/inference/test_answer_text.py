"""Text passed on piece by piece is the text of all tokens up to the first stop string."""

import random

import pytest

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.inference.answer_text import AnswerText

TEXTS = [
    "The code is 123.\nNext line",
    "déjà vu — 漢字 🎉🎉 ok",
    "aaSTObSTOP end",
    "\ufffd odd",
    "  spaces  and\ttabs ",
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_model(None, "cpu", "fp32")[1]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("stop", [[], ["STOP"], ["\n", "漢字"], ["d", "xyz"]])
def test_pieces_add_up_to_the_text_before_the_first_stop(tokenizer, text, stop):
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    found, shown = AnswerText(tokenizer, stop), ""
    for token in tokens:
        shown += found.put(token)
        assert not any(one in shown for one in stop)
        if found.is_stopped:
            break
    shown += found.end()
    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    ends = [whole.find(one) for one in stop if one in whole]
    assert shown == (whole[: min(ends)] if ends else whole) == found.text
    assert found.is_stopped == bool(ends)


def test_random_tokens_are_shown_as_they_decode(tokenizer):
    chance = random.Random(0)
    for _ in range(30):
        tokens = [chance.randrange(3, 8192) for _ in range(40)]
        found = AnswerText(tokenizer)
        shown = "".join(found.put(token) for token in tokens) + found.end()
        assert shown == tokenizer.decode(tokens, skip_special_tokens=True)
