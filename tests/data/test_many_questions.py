"""Rows that ask many questions about their passages: each evidence in its own passage, changed answers, clozes."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest

from hsa_ultralong.data import MixtureConfig, MixtureDataset
from hsa_ultralong.data.changed_answers import change_answers, is_name
from hsa_ultralong.data.cloze import cloze
from hsa_ultralong.data.questions import open_questions
from tests.data.conftest import write_squad

SIZE = 16
MANY = {"questions_per_passage": 4}


def heat(article, number):
    key = f"{article}{number}"
    told = {
        f"Who won heat {key}?": f"Runner{key}",
        f"Where was heat {key}?": f"Town{key}",
        f"When was heat {key}?": f"1{key}7",
        f"Why was heat {key} stopped?": f"of rain{key}",
    }
    name, town, year, why = told.values()
    return f"In {town} they ran heat {key} in {year}. The winner was {name}. It was stopped because {why}.", told


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Four questions about each passage; all answers are different."""
    return write_squad(tmp_path_factory.mktemp("questions") / "squad.json", heat)


def rows(shards, tokenizer, file, count=8, seq_len=2048, split="train", **options):
    config = MixtureConfig(
        {"passage_questions": 1.0}, seq_len=seq_len, chunk_size=SIZE, seed=3, questions=[str(file)], **options
    )
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=count, split=split)
    return [dataset[i] for i in range(count)]


def asked(row, tokenizer):
    """(question with what stands before it, answer, document that tells it, place, told tokens' span) of each."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.answer_mask.astype(int), [0])))).reshape(-1, 2)
    found, before = [], 0
    for start, stop in edges.tolist():
        first, last = row.evidence[start].tolist()
        assert (row.evidence[start:stop] == row.evidence[start]).all() and 0 <= first <= last < start
        begin = max(before, int(np.flatnonzero(row.segment_ids == row.segment_ids[start])[0]))
        question = tokenizer.decode(row.input_ids[begin:start].tolist())
        answer = tokenizer.decode(row.input_ids[start:stop].tolist()).split("<")[0].strip()
        found.append((question, answer, int(row.segment_ids[first]), start, (first, last + 1)))
        assert row.segment_ids[first] == row.segment_ids[last] < row.segment_ids[start]
        before = stop
    return found


@pytest.mark.parametrize("more", [{}, {"p_changed": 1.0}, {"p_cloze": 0.5, "p_text": 0.3, "p_changed": 0.5}])
def test_every_answer_is_labelled_and_stands_where_its_row_says_in_its_own_passage(shards, tokenizer, file, more):
    count = 0
    for row in rows(shards, tokenizer, file, **MANY, **more):
        for question, answer, document, _, (first, last) in asked(row, tokenizer):
            assert (row.labels[row.answer_mask] == row.input_ids[row.answer_mask]).all()
            told = tokenizer.decode(row.input_ids[first:last].tolist())
            assert answer in told and len(told) < len(answer) + 12
            passage = tokenizer.decode(row.input_ids[row.segment_ids == document].tolist())
            if not more:
                assert f"heat {re.findall('heat ([0-9]+)', question)[-1]} " in passage
            count += 1
        assert (row.evidence[~row.answer_mask] == -1).all()
    assert count > 100


def test_many_questions_a_row_none_twice_and_no_two_in_turn_about_one_passage(shards, tokenizer, file):
    few = [len(asked(row, tokenizer)) for row in rows(shards, tokenizer, file)]
    made = rows(shards, tokenizer, file, **MANY)
    many = [asked(row, tokenizer) for row in made]
    assert np.mean([len(one) for one in many]) > 2 * np.mean(few)
    for row, found in zip(made, many, strict=True):
        answers, documents = [answer for _, answer, *_ in found], [document for _, _, document, *_ in found]
        assert len(set(answers)) == len(answers)
        assert all(one != other for one, other in pairwise(documents))
        assert max(documents.count(one) for one in documents) <= 4
        first = int(np.flatnonzero(row.segment_ids == row.segment_ids[found[0][3]])[0])
        assert 0.1 < 1 - first / 2048 < 0.5
    less = rows(shards, tokenizer, file, **MANY, question_share=0.1)
    assert all(len(asked(row, tokenizer)) < len(found) for row, found in zip(less, many, strict=True))


def test_rows_are_functions_of_seed_and_number(shards, tokenizer, file):
    options = {"p_cloze": 0.5, "p_text": 0.3, "p_changed": 0.5}
    one, two = (rows(shards, tokenizer, file, 3, **MANY, **options) for _ in range(2))
    assert all((a.input_ids == b.input_ids).all() for a, b in zip(one, two, strict=True))
    assert not (one[0].input_ids == one[1].input_ids).all()


def test_a_split_asks_about_its_own_passages_only(shards, tokenizer, file):
    for split in ("train", "validation"):
        bank = open_questions((str(file),), tokenizer, split)
        own = {word for one in bank.questions for word in one.text.replace("?", "").split() if word.isdigit()}
        for row in rows(shards, tokenizer, file, 4, split=split, **MANY):
            for question, *_ in asked(row, tokenizer):
                assert {word for word in question.replace("?", " ").split() if word.isdigit()} <= own


def test_only_answers_that_stand_in_the_passage_are_asked_for(shards, tokenizer, file, tmp_path):
    whole = json.loads(file.read_text())
    for article in whole["data"]:
        for paragraph in article["paragraphs"]:
            first, second, *_ = paragraph["qas"]
            first["answers"] = [{"text": "nowhere"}, {"text": first["answers"][0]["text"].lower()}]
            second["answers"] = [{"text": "nowhere"}]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(whole), encoding="utf-8")
    found = [one for row in rows(shards, tokenizer, path, 4, **MANY) for one in asked(row, tokenizer)]
    assert any(answer.startswith("runner") for _, answer, *_ in found)
    assert not any(answer == "nowhere" or "Where" in question for question, answer, *_ in found)


def test_changed_answers_stand_in_the_passage_and_the_old_ones_do_not():
    rng = np.random.default_rng(0)
    text = "Ann Lee met Bob in 1912 near the old mill. Ann Lee left 3,000 pounds, the old mill fell."
    pairs = [("Who met Bob?", "Ann Lee"), ("When did Ann Lee meet him?", "1912"), ("Where?", "the old mill"),
             ("How much?", "3,000 pounds")]  # fmt: skip
    for _ in range(20):
        changed, found = change_answers(rng, text, pairs, ["Eva Ray", "Tom", "Max Orr"], 1.0)
        (_, who), (when_asked, when), where, (_, sum_) = found
        assert who in ("Eva Ray", "Max Orr") and changed.count(who) == 2 and "Ann Lee" not in changed
        assert who in when_asked and when.startswith("19") and when in changed
        assert where == pairs[2] and sum_ in changed and sum_.endswith(" pounds")
    assert change_answers(rng, text, pairs, ["Eva Ray"], 0.0) == (text, pairs)
    # answers that hold or overlap one another stay
    for one, other in (("Ann Lee", "Ann"), ("Lee met Bob", "Ann Lee met")):
        changed, found = change_answers(rng, text, [("Who?", one), ("Who?", other)], ["Eva Ray", "Eva An Ray"], 1.0)
        assert all(answer in changed for _, answer in found)
    assert is_name("Duke of York") and not is_name("The Duke") and not is_name("rain") and not is_name("Area 51")


def test_a_cloze_asks_for_words_that_stand_once_in_the_text_and_not_in_the_question():
    text = "In 1804 Marie Dorval wrote a long letter to the harbour master of Lisbon about barley. It rained. "
    rng, seen = np.random.default_rng(1), set()
    for _ in range(60):
        pair = cloze(rng, text)
        assert pair is not None
        question, answer = pair
        assert text.count(answer) == 1 and answer not in question and question.endswith("?")
        assert len(answer.split()) <= 5
        seen.add(answer)
    assert len(seen) > 8 and cloze(rng, "Too short. No.") is None and cloze(rng, "") is None


def test_options_of_such_rows_alone_are_refused():
    for options in ({"p_changed": 0.5}, {"p_cloze": 0.5}, {"p_text": 0.5}, {"questions_per_passage": -1},
                    {**MANY, "p_text": 1.5}, {**MANY, "question_share": 2.0}):  # fmt: skip
        with pytest.raises(ValueError, match=r"questions_per_passage|must be between"):
            MixtureConfig({"passage_questions": 1.0}, seq_len=1024, chunk_size=SIZE, **options)


@pytest.mark.parametrize("option", ["question_share", "p_changed", "p_cloze", "p_text"])
def test_options_of_such_rows_are_refused_without_them(option):
    with pytest.raises(ValueError, match="go with questions_per_passage above 0"):
        MixtureConfig({"passage_questions": 1.0}, seq_len=512, chunk_size=SIZE, questions=["q.json"], **{option: 0.5})
