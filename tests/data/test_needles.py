from __future__ import annotations

import re

import numpy as np
import pytest

from hsa_ultralong.data import (
    EVALUATION_ADJECTIVES,
    EVALUATION_NOUNS,
    EVALUATION_WORDS,
    evaluation_needles,
    namespaced_rng,
    sample_needles,
)

WORDS = [a + b + "en" for a in ("bar", "cot", "dim", "fal", "gor", "hup") for b in ("an", "el", "is", "ot", "um", "yr")]


def test_statement_question_and_completion_say_the_same_fact():
    for needle in [*sample_needles(np.random.default_rng(0), 30, WORDS), *evaluation_needles(0, 30)]:
        assert needle.answer == f" {needle.value}"
        assert needle.statement.startswith(" ") and needle.statement.endswith(f" {needle.value}.")
        for text in (needle.statement, needle.question, needle.completion):
            assert needle.key in text
        assert needle.question.endswith("?\nAnswer:")
        assert needle.value not in needle.question + needle.completion


def test_main_template_reads_as_documented():
    needle = evaluation_needles(0, 1)[0]
    assert needle.statement == f" The secret code of the {needle.key} is {needle.value}."
    assert needle.question == f"Question: What is the secret code of the {needle.key}?\nAnswer:"
    assert needle.completion == f"The secret code of the {needle.key} is"


def test_keys_and_values_are_unique():
    for n in (1, 5, 36):
        needles = sample_needles(np.random.default_rng(n), n, WORDS, p_hard=0.9)
        assert len({needle.key for needle in needles}) == n
        assert len({needle.value for needle in needles}) == n


def test_most_values_are_seven_digits_and_the_others_of_all_kinds():
    rng = np.random.default_rng(0)
    values = [needle.value for _ in range(60) for needle in sample_needles(rng, 36, WORDS)]
    seven = np.mean([bool(re.fullmatch(r"\d{7}", value)) for value in values])
    assert 0.68 < seven < 0.76
    for pattern in (r"[1-9]\d{3}", r"[1-9]\d{7}", r"[a-z]+ [a-z]+", r"(?=.*[A-Z])(?=.*\d)[A-Z\d]{6}"):
        assert any(re.fullmatch(pattern, value) for value in values)


def test_hard_needles_share_one_word():
    words = [f"w{'abcdefghij'[i // 100]}{'abcdefghij'[i // 10 % 10]}{'abcdefghij'[i % 10]}" for i in range(1000)]
    for p_hard, low, high in ((0.0, 0, 3), (1.0, 38, 39)):
        keys = [tuple(n.key.split()) for n in sample_needles(np.random.default_rng(4), 40, words, p_hard=p_hard)]
        shared = sum(any(a in (x, y) or b in (x, y) for x, y in keys[:i]) for i, (a, b) in enumerate(keys))
        assert low <= shared <= high + 1


def test_training_keys_never_hold_an_evaluation_word(shards):
    rng = np.random.default_rng(0)
    keys = {word for _ in range(50) for n in sample_needles(rng, 20, shards.words) for word in n.key.split()}
    assert not keys & EVALUATION_WORDS


def test_evaluation_words_are_64_times_64_and_different():
    assert len(EVALUATION_ADJECTIVES) == len(EVALUATION_NOUNS) == 64
    assert len(EVALUATION_WORDS) == 128


def test_evaluation_is_a_function_of_its_seed_and_has_its_own_namespace():
    assert evaluation_needles(7, 20) == evaluation_needles(7, 20)
    assert evaluation_needles(7, 20) != evaluation_needles(8, 20)
    assert len({needle.key for needle in evaluation_needles(1, 4096)}) == 4096
    draws = {namespaced_rng(space, 0).integers(1 << 62) for space in ("mixture", "evaluation-needles", "probe")}
    assert len(draws) == 3


def test_wrong_arguments_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="too few words"):
        sample_needles(rng, 3, WORDS[:5])
    with pytest.raises(ValueError, match="between 0 and 1"):
        sample_needles(rng, 3, WORDS, p_hard=1.5)
    with pytest.raises(ValueError, match=r"1\.\.4096"):
        evaluation_needles(0, 5000)
    with pytest.raises(ValueError, match="non-negative"):
        evaluation_needles(-1, 5)
