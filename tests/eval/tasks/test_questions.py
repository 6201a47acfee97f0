"""Questions over passages that are documents of one memory."""

from __future__ import annotations

import json
import re
from importlib import resources

import pytest

from hsa_ultralong.data.passages import passage_id, read_multihop
from hsa_ultralong.eval.tasks import SUITES, Material, make_samples, questions

LENGTH = 3000
NAMES = [task.name for task in SUITES["qa"]]


@pytest.mark.parametrize("name", NAMES)
def test_questions_share_a_memory_that_holds_the_passages_of_all_of_them(material, name):
    samples = list(make_samples(name, material, LENGTH, 5))
    assert len({id(sample.notes) for sample in samples}) == 1
    for sample in samples:
        texts = [material.tokenizer.decode(list(note), skip_special_tokens=True) for note in sample.notes]
        assert len(texts) == len(set(texts))
        assert sample.gold_notes and all(sample.answers[0] in texts[number] for number in sample.gold_notes)
        assert sample.metric == "f1" and sample.also == ("em", "contains")
        assert len(sample.prompt()) + sample.max_new_tokens == LENGTH


def test_short_lengths_split_the_questions_over_several_memories(material):
    samples = list(make_samples("qa_xquad", material, 300, 8))
    assert len({sample.notes for sample in samples}) > 1
    for sample in samples:
        assert len(sample.prompt()) + sample.max_new_tokens == 300
        assert sample.gold_notes


def test_passages_without_questions_are_distractors(material):
    (sample,) = make_samples("qa_nq", material, LENGTH, 1)
    texts = [material.tokenizer.decode(list(note), skip_special_tokens=True) for note in sample.notes]
    assert sum(text.startswith("Town") for text in texts) == 30
    files = {name: path for name, path in material.files.items() if name != "wiki"}
    (sample,) = make_samples("qa_nq", Material(material.tokenizer, material.text, files=files), LENGTH, 1)
    assert not any("Town" in material.tokenizer.decode(list(note)) for note in sample.notes)


def test_of_split_sources_only_passages_of_the_evaluation_are_asked_about(material, monkeypatch):
    kept = frozenset(
        {passage_id("Race 3\nRace 3 was won by Runner 3."), passage_id("Race 5 Race 5 was won by Runner 5.")}
    )
    monkeypatch.setattr(questions, "evaluation_passages", lambda: kept)
    asked = {sample.query for sample in make_samples("qa_nq", material, LENGTH, 2)}
    assert asked == {"who won race 3", "who won race 5"}
    with pytest.raises(ValueError, match="3 samples of 2 questions"):
        list(make_samples("qa_nq", material, LENGTH, 3))
    assert len(list(make_samples("qa_xquad", material, LENGTH, 3))) == 3  # never trained on


def test_the_list_of_evaluation_passages_is_whole():
    text = (resources.files("hsa_ultralong.data") / "assets/evaluation_passages.txt").read_text()
    names = [line for line in text.split("\n") if line and not line.startswith("#")]
    # a fifth of SQuADShifts and NQ, and all 240 passages of XQuAD
    assert len(names) == 815 + 240 == len(set(names))
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in names)
    assert sum(int(name, 16) % 5 > 0 for name in names) <= 240
    assert names == sorted(names)


def test_questions_of_several_hops_without_a_context_are_left_out_and_counted(tmp_path, caplog):
    whole = {"_id": "1", "question": "Who?", "answer": "Ann", "context": [["A", ["Ann is here."]]]}
    bare = {"_id": "2", "question": "What?", "answer": "no", "evidences": []}
    path = tmp_path / "hops.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in (whole, bare)))
    assert [question.id for question in read_multihop(path).questions] == ["1"]
    assert "1 of 2 questions come without a context and are left out" in caplog.text
    path.write_text(json.dumps(bare))
    with pytest.raises(ValueError, match="no HotpotQA file"):
        read_multihop(path)
