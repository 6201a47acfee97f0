"""Rows of the retrieval tasks and of instructions: what is asked was stated, labels and isolation are as declared."""

import re

import numpy as np
import pytest
import torch

from hsa_ultralong.data import MixtureConfig, MixtureDataset, collate
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.testing.factories import tiny_model

SEQ_LEN, CHUNK = 1024, 16
KINDS = ("documents", "short_facts", "multi_query", "variable_tracking", "instructions")


def rows(shards, tokenizer, kind, count=12, **changes):
    options = {"seq_len": SEQ_LEN, "chunk_size": CHUNK, "seed": 3, **changes}
    dataset = MixtureDataset(shards, tokenizer, MixtureConfig({kind: 1.0}, **options), num_rows=count)
    return [dataset[i] for i in range(count)]


def documents(row, tokenizer):
    return [tokenizer.decode(row.input_ids[row.segment_ids == i].tolist()) for i in range(row.segment_ids.max() + 1)]


def answers(row, tokenizer):
    """Text of every run of answer tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], row.answer_mask.astype(int), [0]))))
    return [tokenizer.decode(row.input_ids[a:b].tolist()) for a, b in edges.reshape(-1, 2)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_is_well_formed(shards, tokenizer, kind):
    for row in rows(shards, tokenizer, kind):
        assert row.kind == kind and row.input_ids.shape == (SEQ_LEN,)
        starts = np.flatnonzero(np.diff(row.segment_ids, prepend=-2) != 0)
        assert (starts % CHUNK == 0)[row.segment_ids[starts] >= 0].all()
        assert (row.labels[row.segment_ids < 0] == -100).all()
        counted = row.labels >= 0
        assert (row.labels[counted] == row.input_ids[counted]).all()
        assert counted[row.answer_mask].all()
        assert row.isolated is (kind in ("documents", "instructions"))


def test_facts_that_are_asked_for_are_short_documents_of_their_own(shards, tokenizer):
    seen = 0
    for row in rows(shards, tokenizer, "short_facts"):
        texts = documents(row, tokenizer)
        for answer in answers(row, tokenizer):
            # the fact, and the question with its answer
            holders = [text for text in texts if answer.strip() in text]
            assert len(holders) >= 2 and all(len(text) < 120 for text in holders)
            seen += 1
    assert seen > 12


def test_all_values_asked_at_once_were_stated(shards, tokenizer):
    for row in rows(shards, tokenizer, "multi_query"):
        texts = documents(row, tokenizer)
        haystack = " ".join(text for text in texts if "Question: What are" not in text)
        for answer in answers(row, tokenizer):
            values = answer.strip().split(", ")
            assert all(value in haystack for value in values)
        assert any(", " in answer for answer in answers(row, tokenizer))


def test_chains_of_variables_lead_to_their_value(shards, tokenizer):
    for row in rows(shards, tokenizer, "variable_tracking"):
        texts = documents(row, tokenizer)
        whole = " ".join(texts)
        assigned = dict(re.findall(r"VAR (\w+) = (\w+)", whole))
        for text in texts:
            for value, names in re.findall(r"hold the value (\d+)\?\nAnswer: ([\w, ]+)", text):
                chain = names.split(", ")
                assert assigned[chain[0]] == value
                assert [assigned[name] for name in chain[1:]] == chain[:-1]
                # a variable is stated after the one that it copies
                places = [whole.index(f"VAR {name} =") for name in chain]
                assert places == sorted(places)


def test_only_the_assistants_words_are_labelled(shards, tokenizer):
    lengths = []
    for row in rows(shards, tokenizer, "instructions", count=30):
        eos = tokenizer.eos_token_id
        assert ((row.labels >= 0) == (row.answer_mask | ((row.input_ids == eos) & (row.segment_ids >= 0)))).all()
        for text in documents(row, tokenizer):
            assert text.count("User:") == text.count("Assistant:") >= 1
        lengths.append(row.segment_ids.max() + 1)
    assert min(lengths) == 1 < max(lengths)


@pytest.mark.parametrize("kind", ["documents", "instructions"])
def test_an_isolated_row_costs_what_its_documents_cost_alone(shards, tokenizer, kind):
    model = tiny_model(vocab_size=len(tokenizer), chunk_size=CHUNK).train()
    row = next(row for row in rows(shards, tokenizer, kind, seed=5) if row.segment_ids.max() >= 1)
    batch = collate([row])
    packed = model(
        batch["input_ids"], labels=batch["labels"], segment_ids=batch["segment_ids"],
        isolate_documents=batch["isolated"], num_items_in_batch=1,
    ).loss  # fmt: skip
    alone = []
    for i in range(row.segment_ids.max() + 1):
        inside = torch.from_numpy(row.segment_ids == i)
        ids, labels = batch["input_ids"][:, inside], batch["labels"][:, inside]
        alone.append(model(ids, labels=labels, use_cache=False, num_items_in_batch=1).loss)
    torch.testing.assert_close(packed, torch.stack(alone).sum(), rtol=1e-9, atol=1e-9)


def test_rows_too_short_for_a_task_are_refused_when_the_dataset_is_made(shards, tokenizer):
    with pytest.raises(ValueError, match="at least"):
        rows(shards, tokenizer, "instructions", seq_len=64)
    with pytest.raises(ValueError, match="multi_query rows need at least 8 chunks"):
        rows(shards, tokenizer, "multi_query", seq_len=64)
    with pytest.raises(ValueError, match="use a larger seq_len"):
        rows(shards, tokenizer, "multi_query", seq_len=128)


def test_length_weights_move_draws_to_long_documents(shards):
    lengths = np.diff(shards.offsets)[shards.documents("train")] - 2
    border = int(np.median(lengths))

    def share(weights):
        sampler = DocumentSampler(shards, length_weights=weights)
        rng = np.random.default_rng(0)
        # a slice may end early in a short document only
        return np.mean([len(sampler.slice(rng, border, min_tokens=border)) == border for _ in range(400)])

    assert share({border: 20.0}) > share({border: 1.0}) > share({border: 0.0})
    with pytest.raises(ValueError, match="leave no document"):
        DocumentSampler(shards, length_weights={1: 0.0})
