"""Clauses of an open vocabulary: what a question has in common with its statement, spelling, what validation keeps."""

import re

import numpy as np
import pytest

from hsa_ultralong.data.evaluation_words import EVALUATION_WORDS
from hsa_ultralong.data.fact_clauses import NOUNS, PATTERNS, VERBS, made_up, plural, regular, sample_clause
from hsa_ultralong.data.fact_forms import sample_fact, sample_form
from hsa_ultralong.data.fact_values import Draw

WORDS = ["window", "basic", "forum", "letter", "amount"]


def draw(seed=0):
    return Draw(np.random.default_rng(seed))


@pytest.mark.parametrize("split", [0, 1])
def test_a_clause_states_one_value_and_asks_for_it_by_its_subject(split):
    drawing = draw()
    seen = set()
    for _ in range(3000):
        clause = sample_clause(drawing, split)
        assert clause.statement.count("{v}") == 1 and "{v}" not in "".join(clause.questions)
        subject = "{p}" if clause.subject == "person" else "{x}"
        assert subject in clause.statement and all("{x}" in q or "{p}" in q for q in clause.questions)
        assert not re.search(r"[{][^xvp]|[{].[^}]", clause.statement + "".join(clause.questions))
        seen.add(re.sub(r"[a-z]+", "_", clause.statement))
    assert len(seen) > (60 if split == 0 else 5)


@pytest.mark.parametrize("split", [0, 1])
def test_a_fact_of_clauses_holds_its_answer(split):
    drawing = draw(1)
    for _ in range(1000):
        fact = sample_fact(drawing, sample_form(drawing, split, "clauses"), WORDS)
        text = f"{fact.left}{fact.value}{fact.right}"
        assert fact.answer.strip() in text and text.startswith(" ") and "{" not in text + fact.question
        # the unit stands in the question, so the answer is the number alone
        if fact.question.startswith("How many"):
            assert re.fullmatch(r" [\d.,]+", fact.answer)


def test_validation_has_verbs_nouns_and_patterns_of_its_own():
    said = [set(), set()]
    for split in (0, 1):
        drawing = draw(2)
        for _ in range(4000):
            clause = sample_clause(drawing, split)
            said[split] |= set(re.findall(r"[a-z]+", f"{clause.statement} {' '.join(clause.questions)}"))
    # what the patterns themselves say, and made-up words that are words after all, belong to nobody
    spoken = set(re.findall(r"[a-z]+", " ".join(f"{p.statement} {p.questions}" for split in PATTERNS for p in split)))
    both = {verb.base for verb in VERBS} & set(NOUNS)
    listed = {word for word in [*(verb.base for verb in VERBS), *NOUNS] if len(word) > 5} - spoken - both
    held_out = listed & {*(verb.base for verb in VERBS[::8]), *NOUNS[::8]}
    assert held_out and not said[0] & held_out
    assert said[1] & listed == held_out
    assert not {p.statement for p in PATTERNS[0]} & {p.statement for p in PATTERNS[1]}


def test_words_are_spelt_as_usual_and_none_is_of_the_evaluation():
    assert [plural(word) for word in ("box", "dish", "boy", "berry", "arm")] == [
        "boxes", "dishes", "boys", "berries", "arms",
    ]  # fmt: skip
    assert [regular(base).past for base in ("add", "bake", "carve", "dry", "fan", "play", "spot", "turn")] == [
        "added", "baked", "carved", "dried", "fanned", "played", "spotted", "turned",
    ]  # fmt: skip
    words = {word for verb in VERBS for word in verb} | set(NOUNS) | {plural(noun) for noun in NOUNS}
    assert not words & EVALUATION_WORDS
    drawing = draw(3)
    made = {made_up(drawing) for _ in range(2000)}
    assert len(made) > 1500 and all(word.isalpha() and word.islower() for word in made)
