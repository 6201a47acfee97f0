"""Rows of questions over passages: answers stand where the row says; passages of evaluation are never asked about."""

import gzip
import json

import numpy as np
import pytest

from hsa_ultralong.data import MixtureConfig, MixtureDataset
from hsa_ultralong.data import questions as questions_module
from hsa_ultralong.data.passages import passage_id
from hsa_ultralong.data.questions import open_questions, read_questions
from tests.data.conftest import write_squad

SIZE = 16


def spans(mask):
    edges = np.flatnonzero(np.diff(np.concatenate(([0], mask.astype(int), [0]))))
    return edges.reshape(-1, 2).tolist()


def race(article, number):
    name = f"Runner{article}{number}"
    context = f"Race {article} was long. In heat {number} of it the winner was {name} after rain."
    return context, {f"Who won heat {number} of race {article}?": name}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_squad(tmp_path_factory.mktemp("questions") / "squad.json", race)


def rows(shards, tokenizer, file, kind, count=12, seq_len=512, **options):
    config = MixtureConfig({kind: 1.0}, seq_len=seq_len, chunk_size=SIZE, seed=3, questions=[str(file)], **options)
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=count)
    return [dataset[i] for i in range(count)]


def test_every_answer_stands_in_the_chunks_that_its_row_names(shards, tokenizer, file):
    cited = 0
    for row in rows(shards, tokenizer, file, "passage_questions"):
        text = tokenizer.decode(row.input_ids.tolist())
        assert "Runner" in text and not row.isolated
        for start, stop in spans(row.answer_mask):
            answer = tokenizer.decode(row.input_ids[start:stop].tolist()).split()[0]
            assert (row.evidence[start:stop] == row.evidence[start]).all()
            first, last = row.evidence[start] // SIZE
            assert 0 <= first <= last < start // SIZE
            assert answer in tokenizer.decode(row.input_ids[first * SIZE : (last + 1) * SIZE].tolist())
            cited += 1
        assert (row.evidence[~row.answer_mask] == -1).all()
    assert cited > 12


@pytest.mark.parametrize("kind", ["chat_facts", "span_copy"])
def test_made_facts_and_spans_name_the_chunks_that_tell_them(shards, tokenizer, kind):
    config = MixtureConfig({kind: 1.0}, seq_len=512, chunk_size=SIZE, seed=1)
    dataset = MixtureDataset(shards, tokenizer, config, num_rows=12)
    for row in (dataset[i] for i in range(12)):
        for start, stop in spans(row.answer_mask):
            if kind == "span_copy":
                for t in range(start, stop):
                    first, last = row.evidence[t] // SIZE
                    assert first == last and row.input_ids[t] in row.input_ids[first * SIZE : (first + 1) * SIZE]
                continue
            first, last = row.evidence[start] // SIZE
            told = tokenizer.decode(row.input_ids[first * SIZE : (last + 1) * SIZE].tolist())
            assert tokenizer.decode(row.input_ids[start:stop].tolist()).split("<")[0].strip() in told


def test_a_passage_in_the_prompt_comes_with_one_answer_and_sees_no_other(shards, tokenizer, file):
    for row in rows(shards, tokenizer, file, "passage_chat", 4):
        assert row.isolated and row.segment_ids.max() >= 2
        for number in range(row.segment_ids.max() + 1):
            inside = row.segment_ids == number
            ((start, stop),) = spans(row.answer_mask & inside)
            answer = tokenizer.decode(row.input_ids[start:stop].tolist()).strip()
            assert answer in tokenizer.decode(row.input_ids[inside & (np.arange(512) < start)].tolist())
            # the answer and the end of the document count, nothing else
            assert set(np.flatnonzero(inside & (row.labels >= 0)).tolist()) <= set(range(start, stop + 1))


def test_passages_of_evaluation_are_never_asked_about(shards, tokenizer, file, monkeypatch):
    whole = json.loads(file.read_text())
    names = {passage_id(p["context"]) for article in whole["data"] for p in article["paragraphs"]}
    held_out = [name for name in sorted(names) if int(name, 16) % 7 == 0]
    kept = names - {held_out[0]} - set(sorted(names - set(held_out))[:5])
    monkeypatch.setattr(questions_module, "evaluation_passages", lambda: frozenset(kept))
    open_questions.cache_clear()
    banks = [open_questions((str(file),), tokenizer, split) for split in ("train", "validation")]
    asked = [{passage_id(bank.texts[q.passage]) for q in bank.questions} for bank in banks]
    near = {passage_id(bank.texts[n]) for bank in banks for q in bank.questions for n in q.near}
    assert asked[0] | asked[1] == names - kept and not asked[0] & asked[1] and not near & kept
    monkeypatch.setattr(questions_module, "evaluation_passages", lambda: frozenset(names))
    open_questions.cache_clear()
    with pytest.raises(ValueError, match="kept for evaluation"):
        open_questions((str(file),), tokenizer, "train")
    open_questions.cache_clear()


def test_rows_without_a_file_of_questions_are_refused(shards, tokenizer, file, tmp_path):
    with pytest.raises(ValueError, match="--questions FILE"):
        MixtureDataset(shards, tokenizer, MixtureConfig({"passage_chat": 1.0}, seq_len=512, chunk_size=SIZE))
    with pytest.raises(ValueError, match="is no file of questions"):
        rows(shards, tokenizer, tmp_path / "none.json", "passage_chat")
    with pytest.raises(ValueError, match="use longer rows"):
        rows(shards, tokenizer, file, "passage_chat", seq_len=64)


NQ = {"question": "Who won?", "answers": ["Ann"], "ctxs": [{"title": "Race", "text": "Ann won."}]}


@pytest.mark.parametrize("other", [{"answers": "Ann"}, {"answers": [3]}, {"question": None}, {"ctxs": None}])
def test_a_record_of_another_form_is_refused(tmp_path, other):
    path = tmp_path / "nq.jsonl"
    path.write_text(json.dumps(NQ))
    assert read_questions(path).questions[0].answers == ("Ann",)
    path.write_text(json.dumps({**NQ, **other}))
    with pytest.raises(ValueError, match="is no file of NQ"):
        read_questions(path)
    asked = {"id": 0, "question": "Who?", "answers": [{"text": "Ann"}]}
    for part in ({"context": 3, "qas": [asked]}, {"context": "Ann.", "qas": [{**asked, "answers": [{"text": 3}]}]}):
        path.with_suffix(".json").write_text(json.dumps({"data": [{"paragraphs": [part]}]}))
        with pytest.raises(ValueError, match="is no SQuAD file"):
            read_questions(path.with_suffix(".json"))


def test_a_packed_file_that_was_cut_off_or_damaged_is_refused(tmp_path):
    path, packed = tmp_path / "nq.jsonl.gz", gzip.compress(json.dumps(NQ).encode())
    for data in (packed[:-12], packed[:12] + b"\xff" * 20 + packed[32:], b"plain"):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"no whole \.gz file"):
            read_questions(path)
