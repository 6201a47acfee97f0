"""Facts in any form, short prompts and lists: what is asked was said, and every token of an answer names its source."""

import re

import numpy as np
import pytest
import torch

from hsa_ultralong.data import MixtureConfig, MixtureDataset, collate, fact_rows
from hsa_ultralong.data.evaluation_words import EVALUATION_WORDS
from hsa_ultralong.data.fact_forms import FAMILIES, Draw, sample_fact, sample_form
from hsa_ultralong.data.fact_values import VALUE_KINDS, value_of
from hsa_ultralong.data.mixture import FORM_FAMILIES

CHUNK = 16
KINDS = ("facts", "prompts", "lists")


def dataset(shards, tokenizer, kind, split="train", seq_len=1024, **options):
    config = MixtureConfig({kind: 1.0}, seq_len=seq_len, chunk_size=CHUNK, seed=3, **options)
    return MixtureDataset(shards, tokenizer, config, split=split)


def spans(mask):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return edges.reshape(-1, 2).tolist()


@pytest.fixture(scope="module")
def made(shards, tokenizer):
    found = {}
    for kind in KINDS:
        data = dataset(shards, tokenizer, kind)
        found[kind] = [data[i] for i in range(30)]
    return found


def cited(row):
    """Tokens that a row knows to repeat one, and the places of these."""
    places = np.flatnonzero(row.evidence[:, 0] >= 0)
    assert (row.evidence[:, 0] == row.evidence[:, 1]).all()
    return places, row.evidence[places, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_well_formed_and_follow_from_their_number(made, shards, tokenizer, kind):
    again = dataset(shards, tokenizer, kind)
    for number, row in enumerate(made[kind][:5]):
        assert (again[number].input_ids == row.input_ids).all() and (again[number].evidence == row.evidence).all()
    for row in made[kind]:
        starts = np.flatnonzero(np.diff(row.segment_ids, prepend=-2) != 0)
        assert row.kind == kind and row.isolated is (kind == "prompts")
        assert (starts % CHUNK == 0)[row.segment_ids[starts] >= 0].all()
        assert (row.labels[row.answer_mask] == row.input_ids[row.answer_mask]).all() and row.answer_mask.any()


@pytest.mark.parametrize("kind", KINDS)
def test_what_tells_a_token_is_an_earlier_one_of_the_same_text(made, tokenizer, kind):
    """Up to how a tokenizer cuts the beginning and end of a word behind another sign."""
    equal = total = 0
    for row in made[kind]:
        places, told = cited(row)
        assert row.answer_mask[places].all()
        assert (told < places).all()
        assert (row.segment_ids[told] <= row.segment_ids[places]).all()
        equal += int((row.input_ids[told] == row.input_ids[places]).sum())
        total += len(places)
    assert total > 100 and equal > 0.9 * total


def test_what_was_never_said_is_answered_so(shards, tokenizer):
    data = dataset(shards, tokenizer, "facts", family="absent")
    for i in range(8):
        row = data[i]
        for start, stop in spans(row.answer_mask):
            assert tokenizer.decode(row.input_ids[start:stop].tolist()).strip() == "unknown"
            assert (row.evidence[start:stop, 0] == -1).all()


def test_what_was_not_said_may_be_near_what_was():
    """The same subject and another attribute, or a subject that shares a word; never what is said."""
    words, draw, near = ["stone", "ladder", "plough", "mill"], Draw(np.random.default_rng(4)), 0
    for _ in range(60):
        form = sample_form(draw, 0, "attributes")
        pairs = [(sample_fact(draw, form, words, f"the stone {word}"), form) for word in ("mill", "ladder")]
        other = fact_rows._unsaid(draw, 0, pairs, words, 1.0, 0)
        near += other.subject == "the stone mill" or other.subject.startswith("the stone ")
        assert other.subject != "the stone mill" or other.question not in {
            question.replace("{x}", other.subject) for question in form.questions
        }
    assert near > 30


def test_links_of_a_chain_stand_in_any_order_and_have_names_of_several_shapes(shards, tokenizer):
    data, ordered, shapes = dataset(shards, tokenizer, "lists", family="chain"), [], set()
    for i in range(24):
        row = data[i]
        for start, stop in spans(row.answer_mask):
            told = row.evidence[start:stop, 0]
            ordered.append(bool((np.diff(told[told >= 0]) > 0).all()))
            text = tokenizer.decode(row.input_ids[start:stop].tolist()).split(",")[0].strip()
            shapes.add(re.sub("[A-Z]", "A", re.sub("[0-9]+", "9", text)))
    assert True in ordered and False in ordered and {"AA9", "AAAAA"} <= shapes


def test_lists_and_facts_are_asked_behind_a_text_too_and_with_the_blank_said(shards, tokenizer):
    for kind in ("facts", "lists"):
        data = dataset(shards, tokenizer, kind, inline_fraction=1.0)
        rows = [data[i] for i in range(12)]
        inline = [row for row in rows if row.segment_ids[np.flatnonzero(row.answer_mask)[-1]] == row.segment_ids[0]]
        assert inline
        begun = {tokenizer.decode(row.input_ids[start : start + 1].tolist())[0] for row in rows
                 for start, _ in spans(row.answer_mask)}  # fmt: skip
        assert " " in begun and begun != {" "}


def test_a_changed_fact_is_said_later_and_counts(shards, tokenizer):
    data, later = dataset(shards, tokenizer, "facts", family="changed"), 0
    marks = "Correction|As of today|Update|from now on|has changed|Forget what|latest news"
    for i in range(12):
        row = data[i]
        for start, _ in spans(row.answer_mask):
            if row.evidence[start, 0] >= 0:
                before = tokenizer.decode(
                    row.input_ids[max(0, row.evidence[start, 0] - 160) : row.evidence[start, 0]].tolist()
                )
                later += bool(re.search(marks, before))
    assert later > 5


def test_facts_at_a_border_straddle_it(shards, tokenizer):
    data = dataset(shards, tokenizer, "facts", family="border")
    row = data[0]
    straddling = total = 0
    for i in range(8):
        row = data[i]
        for start, stop in spans(row.answer_mask):
            chunks = row.evidence[start:stop, 0] // CHUNK
            if stop - start > 1 and chunks[0] >= 0:
                total += 1
                straddling += chunks[0] != chunks[-1]
    assert straddling > 0.3 * total > 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_can_be_had_alone(shards, tokenizer, kind):
    for family in FORM_FAMILIES[kind]:
        assert dataset(shards, tokenizer, kind, "validation", family=family)[1].answer_mask.any()
    with pytest.raises(ValueError, match="family of"):
        dataset(shards, tokenizer, kind, family="nothing")


def forms(split, count):
    draw = Draw(np.random.default_rng(0))
    return {sample_form(draw, split).core for _ in range(count)}


def test_there_are_thousands_of_forms_and_validation_shares_none():
    training, validation = forms(0, 6000), forms(1, 400)
    assert len(training) > 2000 and len(validation) > 60
    assert not training & validation


def test_a_form_begun_again_continues_with_the_value():
    draw = Draw(np.random.default_rng(1))
    words = ["stone", "ladder", "plough", "mill"]
    stems = 0
    for _ in range(200):
        fact = sample_fact(draw, sample_form(draw), words)
        statement = fact.left + fact.value + fact.right
        assert fact.value.strip() == fact.answer.strip() and "{" not in statement.replace('{"', "")
        if fact.stem:
            stems += 1
            assert statement.strip().startswith(f"{fact.stem}{fact.answer}")
    assert stems > 40


def test_values_have_many_shapes_and_no_words_of_the_evaluation_of_their_own():
    draw = Draw(np.random.default_rng(2))
    for kind in VALUE_KINDS:
        values = {value_of(kind, draw, ["stone", "mill", "plough"]) for _ in range(60)}
        assert len(values) > (2 if kind == "word" else 8)
        assert not EVALUATION_WORDS & set(re.findall("[a-z]+", " ".join(values)))
    assert set(FAMILIES) <= set(FORM_FAMILIES["facts"])


def test_copies_are_told_by_the_first_saying(shards, tokenizer):
    for kind in ("self_copy", "span_copy"):
        data = dataset(shards, tokenizer, kind)
        for i in range(4):
            row = data[i]
            places, told = cited(row)
            assert len(places) > 100 and (row.input_ids[told] == row.input_ids[places]).all()
    assert collate([data[0], data[1]])["evidence"].shape == (2, 1024, 2)
    assert collate([data[0]])["evidence"].dtype == torch.int32
