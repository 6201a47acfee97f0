"""Rows in which some questions are answered in a sentence: asked plainly as chat; a short answer is asked for."""

import json

import numpy as np
import pytest

from hsa_ultralong.data import MixtureConfig, MixtureDataset
from hsa_ultralong.data.passages import passage_id, read_squad
from tests.data.conftest import write_squad
from tests.data.test_many_questions import SIZE, asked, heat

SHORT = "Answer in a few words."


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentences")
    squad = write_squad(folder / "squad.json", heat)
    read = read_squad(squad)
    rows = [
        dict(passage=passage_id(read.texts[one.gold[0]]), question=one.text, sentence=f"It is {one.answers[0]} here.")
        for one in read.questions
    ]  # fmt: skip
    (folder / "s.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return squad, folder / "s.jsonl"


def rows(shards, tokenizer, files, kind="passage_questions", count=12, split="train", **options):
    config = MixtureConfig(
        {kind: 1.0}, seq_len=2048, chunk_size=SIZE, seed=3, questions=[str(files[0])], sentences=[str(files[1])],
        **options,
    )  # fmt: skip
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=count, split=split)
    return [dataset[i] for i in range(count)]


def replies(row, tokenizer):
    """(question, answer) of each answer of a row."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.answer_mask.astype(int), [0])))).reshape(-1, 2)
    before, found = 0, []
    for start, stop in edges.tolist():
        found.append((tokenizer.decode(row.input_ids[before:start]), tokenizer.decode(row.input_ids[start:stop])))
        before = stop
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("passage_questions", {"questions_per_passage": 4}),
        ("passage_questions", {"questions_per_passage": 4, "p_changed": 1.0, "p_cloze": 0.3}),
        ("passage_questions", {}),
        ("passage_chat", {}),
    ],
)
def test_plain_chat_gets_the_sentence_and_the_instruction_the_short_answer(shards, tokenizer, files, kind, options):
    counts = {"sentence": 0, "short": 0, "plain": 0}
    for row in rows(shards, tokenizer, files, kind, p_sentence=0.5, **options):
        for question, answer in replies(row, tokenizer):
            is_sentence = "It is" in answer and "here." in answer
            if "Question:" in question[-300:]:
                counts["plain"] += 1
                assert not is_sentence and SHORT not in question[-300:]
            else:
                counts["sentence" if is_sentence else "short"] += 1
                assert (SHORT in question[-80:]) is not is_sentence
    assert all(count > 5 for count in counts.values()), counts


def test_a_changed_answer_is_changed_in_its_sentence(shards, tokenizer, files):
    found = 0
    for row in rows(shards, tokenizer, files, questions_per_passage=4, p_changed=1.0, p_sentence=1.0):
        for _, answer, document, _, (first, last) in asked(row, tokenizer):
            if answer.startswith("It is"):
                passage = tokenizer.decode(row.input_ids[row.segment_ids == document].tolist())
                short = answer.removeprefix("It is ").removesuffix(" here.")
                assert short in passage and short in tokenizer.decode(row.input_ids[first:last].tolist())
                found += 1
    assert found > 20


def test_facts_are_answered_by_what_states_them(shards, tokenizer, files):
    count = 0
    for row in rows(shards, tokenizer, files, "chat_facts", p_sentence=1.0):
        whole = tokenizer.decode(row.input_ids.tolist())
        for question, answer in replies(row, tokenizer):
            if "Question:" not in question[-300:] and SHORT not in question[-80:]:
                said = answer.strip().removesuffix("\n")
                assert whole.lower().count(said.lower().strip()) >= 2
                count += 1
    assert count > 10


def test_without_sentences_rows_stay_what_they_were(shards, tokenizer, files):
    one = rows(shards, tokenizer, files, count=3, questions_per_passage=4)
    config = MixtureConfig(
        {"passage_questions": 1.0}, seq_len=2048, chunk_size=SIZE, seed=3, questions=[str(files[0])],
        questions_per_passage=4,
    )  # fmt: skip
    other = MixtureDataset(shards, tokenizer, config, num_rows=3)
    assert all((row.input_ids == other[i].input_ids).all() for i, row in enumerate(one))
    assert not any(SHORT in tokenizer.decode(row.input_ids.tolist()) for row in one)
    short = rows(shards, tokenizer, files, count=6, questions_per_passage=4, says_short=True, split="validation")
    assert any(SHORT in tokenizer.decode(row.input_ids.tolist()) for row in short)


def test_what_goes_with_nothing_is_refused(shards, tokenizer, files, tmp_path):
    with pytest.raises(ValueError, match="p_sentence goes with rows of"):
        MixtureConfig({"text": 1.0}, seq_len=256, p_sentence=0.5)
    with pytest.raises(ValueError, match="between 0 and 1"):
        MixtureConfig({"chat_facts": 1.0}, seq_len=256, p_sentence=1.5)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"passage": "ab", "question": "Who?", "sentence": "It was she."}) + "\n")
    with pytest.raises(ValueError, match="no sentence answers any of these questions"):
        rows(shards, tokenizer, (files[0], other), p_sentence=0.5)
