"""PackingCollator: documents on the chunk grid, and a loss that packing leaves alone, in Trainer and trl too."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from hsa_ultralong.data import PackingCollator
from hsa_ultralong.testing.factories import MODEL_OPTIONS, random_tokens, tiny_config, tiny_model

EXACT = {"rtol": 1e-10, "atol": 1e-10}
S = tiny_config().chunk_size
LENGTHS = (5, 1, 13, 4, 8, 2, 11, 3)


def documents(lengths=LENGTHS):
    return [{"input_ids": random_tokens(1, n, seed=n)[0]} for n in lengths]


def padded(features):
    """The documents as right-padded rows."""
    rows = [feature["input_ids"] for feature in features]
    labels = [feature.get("labels", feature["input_ids"]) for feature in features]
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
    }


@pytest.mark.parametrize("row_tokens", [None, 16, 24])
def test_documents_start_chunks_and_come_back_whole(row_tokens):
    batch = PackingCollator(S, row_tokens=row_tokens, pad_token_id=7)(documents())
    tokens, labels, segments = batch["input_ids"], batch["labels"], batch["segment_ids"]
    assert tokens.shape == labels.shape == segments.shape and tokens.shape[1] % S == 0
    assert tokens.shape[0] == 1 if row_tokens is None else tokens.shape[1] <= row_tokens
    assert torch.equal(batch["attention_mask"], (segments >= 0).long()) and segments.dtype == torch.int32
    assert bool((tokens[segments < 0] == 7).all()) and bool((labels[segments < 0] == -100).all())
    found = []
    for row, label, segment in zip(tokens, labels, segments):
        for number in range(int(segment.max()) + 1):
            places = (segment == number).nonzero()[:, 0]
            assert int(places[0]) % S == 0 and torch.equal(places, torch.arange(places[0], places[-1] + 1))
            assert int(label[places[0]]) == -100 and torch.equal(label[places[1:]], row[places[1:]])
            found.append(row[places].tolist())
    assert sorted(found) == sorted(feature["input_ids"].tolist() for feature in documents())


@pytest.mark.parametrize("options", ["default", "all_at_once", "mixture_of_experts"])
@pytest.mark.parametrize("row_tokens", [None, 16])
def test_the_packed_loss_is_that_of_the_documents_one_by_one(options, row_tokens):
    model = tiny_model(**MODEL_OPTIONS[options])
    batch = PackingCollator(S, row_tokens=row_tokens)(documents())
    model(**batch).loss.backward()
    packed = {name: part.grad.clone() for name, part in model.named_parameters()}
    model.zero_grad()
    count = sum(n - 1 for n in LENGTHS)
    for feature in documents():
        row = feature["input_ids"][None]
        model(row, labels=row, num_items_in_batch=count).loss.backward()
    for name, part in model.named_parameters():
        torch.testing.assert_close(packed[name], part.grad, **EXACT)


def test_documents_that_are_not_isolated_read_the_ones_before_them():
    model, batch = tiny_model(), PackingCollator(S, isolate_documents=False)(documents())
    alone = PackingCollator(S)(documents())
    with torch.no_grad():
        shared = model(**batch).loss
        assert float((shared - model(**alone).loss).abs()) > 1e-6
        del batch["isolate_documents"]
        torch.testing.assert_close(model(**batch).loss, shared, **EXACT)


def test_labels_masks_lists_and_arrays_are_read():
    features = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, -100, 3, 4, 5]},
        {"input_ids": np.array([6, 7, 8]), "attention_mask": np.array([0, 1, 1])},
        {"input_ids": torch.tensor([[9, 10]]), "token_type_ids": [[0, 0]], "labels": None},
        {"input_ids": []},
    ]
    batch = PackingCollator(4)(features)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 0, 0, 0, 7, 8, 0, 0, 9, 10, 0, 0]]
    assert batch["labels"][0, :5].tolist() == [-100, -100, 3, 4, 5]
    assert batch["segment_ids"].tolist() == [[0] * 5 + [-1] * 3 + [1] * 2 + [-1] * 2 + [2] * 2 + [-1] * 2]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "nothing to pack"),
        ([{"input_ids": []}], "nothing to pack"),
        ([{"text": "a"}], "no input_ids, but text"),
        ([{"input_ids": [1, 2], "labels": [1]}], "2 tokens and 1 labels"),
        ([{"input_ids": [1, 2], "completion_mask": [0, 1]}], "completion_mask.*say in labels"),
        ([{"input_ids": [1, 2], "seq_lengths": [1, 1]}], "packing=False"),
        ([{"input_ids": [1, 2], "position_ids": [0, 1]}], "position_ids"),
        ([{"input_ids": [1, 2], "token_type_ids": [0, 1]}], "token_type_ids"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1, 0]}], "labels at masked tokens"),
        ([{"input_ids": [[1, 2], [3, 4]]}], "one sequence"),
        ([{"input_ids": [1] * 9}], "row_tokens=8"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        PackingCollator(4, row_tokens=8)(features)


@pytest.mark.parametrize(("chunk_size", "row_tokens"), [(0, None), (4, 6), (4, 0)])
def test_sizes_that_do_not_fit_are_refused(chunk_size, row_tokens):
    with pytest.raises(ValueError, match="chunk_size"):
        PackingCollator(chunk_size, row_tokens=row_tokens)


needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers.Trainer needs accelerate"
)


def trained(folder, collator, smoothing=0.0):
    """Losses and parameters after three steps of two micro-batches of four documents, and the loss of all of them."""
    from transformers import Trainer, TrainingArguments

    model = tiny_model()
    lengths = [int(n) for n in torch.randint(2, 14, (24,), generator=torch.Generator().manual_seed(0))]
    rows = [{"input_ids": random_tokens(1, n, seed=i)[0]} for i, n in enumerate(lengths)]
    for row in rows:
        row["labels"] = row["input_ids"].clone()
        row["labels"][: len(row["labels"]) // 3] = -100
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="sgd",
        learning_rate=1e-1, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
        prediction_loss_only=True, per_device_eval_batch_size=24, label_smoothing_factor=smoothing,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, trainer.evaluate()["eval_loss"], dict(model.named_parameters())


@needs_accelerate
@pytest.mark.parametrize("row_tokens", [None, 20])
def test_trainer_takes_the_same_steps_with_packed_and_with_padded_documents(tmp_path, row_tokens):
    packed = trained(tmp_path / "a", PackingCollator(S, row_tokens=row_tokens))
    plain = trained(tmp_path / "b", padded)
    assert len(packed[0]) == 3 and packed[0] == pytest.approx(plain[0], rel=1e-6)
    assert packed[1] == pytest.approx(plain[1], rel=1e-6)
    for name, part in packed[2].items():
        torch.testing.assert_close(part, plain[2][name], rtol=1e-6, atol=1e-8)


@needs_accelerate
def test_label_smoothing_of_trainer_predicts_the_next_token(tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), label_smoothing_factor=1e-9, report_to=[], use_cpu=True)
    model, batch = tiny_model(), padded(documents())
    smoothed = Trainer(model=model, args=arguments).compute_loss(model, dict(batch))
    torch.testing.assert_close(smoothed, model(**batch).loss, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_trl_takes_the_same_steps_with_packed_and_with_padded_documents(tmp_path, tokenizer):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    found = []
    rows = [{"input_ids": random_tokens(1, 3 + i % 9, seed=i)[0].tolist()} for i in range(16)]
    for name, collator in (("a", PackingCollator(S)), ("b", None)):
        model = tiny_model(dtype=torch.float32)
        arguments = SFTConfig(
            output_dir=str(tmp_path / name), max_steps=2, per_device_train_batch_size=4, learning_rate=1e-1,
            optim="sgd", report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, logging_steps=1,
            gradient_checkpointing=False, bf16=False, dataset_kwargs={"skip_prepare_dataset": collator is not None},
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=collator,
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.train()
        found.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert found[0] == pytest.approx(found[1], rel=1e-4)
