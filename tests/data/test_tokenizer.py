from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hsa_ultralong.data import (
    PieceTokenizer,
    evaluation_needles,
    load_tokenizer,
    sample_needles,
    tokenizer_fingerprint,
    train_tokenizer,
)

TEXTS = (
    "plain words",
    "  two  blanks \n\n\ttabs\r\n",
    "digits 1234567 and x9y8",
    "é漢字🙂 \u00a0 \x00\x1e",
    "injected <|eos|> and <|bos|>",
    "don't , . ! ?",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_byte_for_byte(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens_are_0_1_2_and_text_cannot_inject_them(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert min(tokenizer.encode("<|bos|><|eos|><|pad|>", add_special_tokens=False)) > 2


def test_every_digit_is_its_own_token(tokenizer):
    ids = tokenizer.encode("4821937", add_special_tokens=False)
    assert [tokenizer.decode([i]) for i in ids] == list("4821937")


def test_saved_tokenizer_loads_with_the_same_fingerprint(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert loaded("a <|eos|> b 12")["input_ids"] == tokenizer("a <|eos|> b 12")["input_ids"]


def test_fingerprint_ignores_padding_but_not_the_vocabulary(tokenizer, documents):
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["a", "a b c"], padding=True)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(train_tokenizer(documents[:2], 300)) != before


def test_training_refuses_a_small_vocabulary_and_no_text():
    with pytest.raises(ValueError, match="at least 259"):
        train_tokenizer(["text"], vocab_size=100)
    with pytest.raises(ValueError, match="no text"):
        train_tokenizer([], vocab_size=300)


def test_loading_names_what_is_missing(tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer directory"):
        load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_cached_pieces_give_the_tokenizers_own_tokens(tokenizer, shards):
    pieces = PieceTokenizer(tokenizer, shards.words)
    assert pieces.is_exact
    needles = sample_needles(np.random.default_rng(1), 300, shards.words) + evaluation_needles(0, 100)
    for needle in needles:
        for text in (
            needle.statement,
            needle.question + needle.answer,
            f"{needle.completion}{needle.answer}.",
            "\n" + needle.question,
            needle.answer,
        ):
            assert pieces.encode(text) == tokenizer.encode(text, add_special_tokens=False)


def test_prompt_and_answer_tokenise_apart(tokenizer):
    needle = evaluation_needles(3, 1)[0]
    for prompt in (needle.question, needle.completion):
        parts = [tokenizer.encode(part, add_special_tokens=False) for part in (prompt, needle.answer)]
        assert parts[0] + parts[1] == tokenizer.encode(prompt + needle.answer, add_special_tokens=False)
