from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hsa_ultralong.data import (
    ROW_KINDS,
    MixtureConfig,
    MixtureDataset,
    StepSampler,
    TokenShards,
    collate,
    train_tokenizer,
)
from hsa_ultralong.data.mixture import WITH_QUESTIONS

WEIGHTS = {"text": 0.3, "self_copy": 0.3, "needles": 0.4}


def config(**changes):
    return MixtureConfig(**{"weights": WEIGHTS, "seq_len": 1024, "chunk_size": 32, "seed": 5, **changes})


@pytest.fixture(scope="module")
def dataset(shards, tokenizer):
    return MixtureDataset(shards, tokenizer, config())


def same(a, b):
    return a.kind == b.kind and all(
        np.array_equal(getattr(a, name), getattr(b, name))
        for name in ("input_ids", "labels", "segment_ids", "answer_mask")
    )


def test_item_depends_on_seed_split_and_index_alone(dataset, shards, tokenizer):
    again = MixtureDataset(TokenShards.open(shards.path), tokenizer, config())
    indices = [9, 0, 123456789, 3]
    for i in indices:
        assert same(dataset[i], again[i])
    other_seed = MixtureDataset(shards, tokenizer, config(seed=6))
    other_split = MixtureDataset(shards, tokenizer, config(), split="validation")
    for i in indices:
        assert not same(dataset[i], other_seed[i])
        assert not same(dataset[i], other_split[i])
        assert not same(dataset[i], dataset[i + 1])


def test_kinds_occur_by_weight(dataset):
    kinds = [dataset[i].kind for i in range(400)]
    for kind, weight in WEIGHTS.items():
        assert abs(kinds.count(kind) / 400 - weight) < 0.08


# SHA-256 of the first 40 rows by kind. Shipped checkpoints were trained on these streams: they must never change.
STREAMS = {
    "train": {"needles": "db1105e25e675e9e", "self_copy": "abf746a5905fcec8", "text": "1c8c5e17712f2db6"},
    "validation": {"needles": "96a360df366be40c", "self_copy": "bac2666067acb131", "text": "4b57f91c98ec36c7"},
}


@pytest.mark.parametrize("split", STREAMS)
def test_rows_of_the_first_kinds_stay_what_they_were(shards, tokenizer, split):
    digests = {kind: hashlib.sha256() for kind in WEIGHTS}
    stream = MixtureDataset(shards, tokenizer, config(), split=split)
    for i in range(40):
        row = stream[i]
        for name in ("input_ids", "labels", "segment_ids", "answer_mask"):
            digests[row.kind].update(getattr(row, name).tobytes())
    assert {kind: digest.hexdigest()[:16] for kind, digest in digests.items()} == STREAMS[split]


def test_the_share_of_synthetic_rows_is_declared():
    assert config().synthetic_share == pytest.approx(0.7)
    assert config(weights={"text": 2.0, "documents": 1.0, "sft": 1.0}).synthetic_share == 0.0


def test_workers_and_ranks_do_not_change_the_data(shards, tokenizer):
    given = {"sft", "chat", *WITH_QUESTIONS}
    weights = dict.fromkeys((kind for kind in ROW_KINDS if kind not in given), 1.0)
    dataset = MixtureDataset(shards, tokenizer, config(weights=weights, length_weights={500: 2.0}))

    def batches(num_workers, **kwargs):
        sampler = StepSampler(**kwargs)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=num_workers, collate_fn=collate)
        return [batch["input_ids"] for batch in loader]

    whole = torch.cat(batches(0, batch_size=4, num_steps=6))
    assert torch.equal(whole, torch.cat(batches(2, batch_size=4, num_steps=6)))
    for start in range(6):
        resumed = batches(0, batch_size=4, start_step=start, num_steps=6 - start)
        assert torch.equal(whole[4 * start :], torch.cat(resumed))
    # two ranks with half the rows each, from a step in the middle on
    ranks = [batches(0, batch_size=2, start_step=2, num_steps=4, rank=rank, world_size=2) for rank in range(2)]
    assert torch.equal(whole[8:], torch.cat([batch for step in zip(*ranks) for batch in step]))


def test_dataset_pickles_small_for_spawned_workers(dataset):
    data = pickle.dumps(dataset)
    assert same(pickle.loads(data)[3], dataset[3])
    assert len(data) < 500_000


def test_collate_gives_the_documented_tensors(dataset):
    batch = collate([dataset[i] for i in range(3)])
    assert set(batch) == {"input_ids", "labels", "segment_ids", "answer_mask", "evidence", "isolated", "kind"}
    types = {name: batch[name].dtype for name in batch if name != "kind"}
    assert types == {
        "input_ids": torch.int64,
        "labels": torch.int64,
        "segment_ids": torch.int32,
        "answer_mask": torch.bool,
        "evidence": torch.int32,
        "isolated": torch.bool,
    }
    shapes = {"isolated": (3,), "evidence": (3, 1024, 2)}
    assert all(batch[name].shape == shapes.get(name, (3, 1024)) for name in types)
    assert batch["kind"] == [dataset[i].kind for i in range(3)]


def test_needle_counts_grow_with_the_row():
    assert config(seq_len=2048).needle_options().max_needles == 12
    assert config(seq_len=2048).needle_options().max_questions == 8
    long = config(seq_len=1 << 16).needle_options()
    assert (long.max_needles, long.max_questions) == (64, 32)
    short = config(seq_len=256).needle_options()
    assert (short.max_needles, short.max_questions) == (4, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, "weights is empty"),
        ({"weights": {"texts": 1.0}}, "unknown kind of row 'texts'"),
        ({"weights": {"text": 0.0}}, "must be positive"),
        ({"weights": {"text": float("nan")}}, "must be positive"),
        ({"seq_len": 1000}, "multiple of chunk_size=32"),
        ({"seq_len": 0}, "multiple of chunk_size=32"),
        ({"seq_len": 64}, "needles rows need at least 4 chunks"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"chunk_size": 1}, "chunk_size must be at least 2"),
        ({"max_needles": 0}, "max_needles must be at least 1"),
        ({"p_hard": 2.0}, "p_hard must be between 0 and 1"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def test_datasets_that_cannot_work_are_refused(shards, tokenizer, documents):
    with pytest.raises(ValueError, match="another tokenizer"):
        MixtureDataset(shards, train_tokenizer(documents[:1], 300), config())
    with pytest.raises(ValueError, match="no train document has 1,048,576 tokens"):
        MixtureDataset(shards, tokenizer, config(seq_len=1 << 20, long_documents=True))
    with pytest.raises(ValueError, match="split must be one of"):
        MixtureDataset(shards, tokenizer, config(), split="test")
    with pytest.raises(ValueError, match="num_rows"):
        MixtureDataset(shards, tokenizer, config(), num_rows=0)
    few = TokenShards(shards.path, shards.manifest, shards.offsets, shards.data, shards.words[:3])
    with pytest.raises(ValueError, match="has 3 words"):
        MixtureDataset(few, tokenizer, config())
    leaked = TokenShards(shards.path, shards.manifest, shards.offsets, shards.data, (*shards.words, "falcon"))
    with pytest.raises(ValueError, match=r"evaluation words \(falcon"):
        MixtureDataset(leaked, tokenizer, config())


def test_indices_out_of_range_end_iteration(shards, tokenizer):
    short = MixtureDataset(shards, tokenizer, config(weights={"text": 1.0}), num_rows=3)
    assert len(list(short)) == len(short) == 3


def test_step_sampler_refuses_wrong_ranks():
    with pytest.raises(ValueError, match="rank must be within"):
        StepSampler(2, num_steps=1, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        StepSampler(0, num_steps=1)
