"""Tuning, passages in prompts: answers count, documents apart, the best stays."""

import itertools
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.train.tuning import TuningConfig, answer_loss, tune


@pytest.fixture
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=31, **sizes))


@pytest.fixture
def batch():
    ids = torch.randint(3, 31, (1, 12))
    segments = torch.tensor([[0] * 6 + [1] * 6])
    answers = torch.zeros(1, 12, dtype=torch.bool)
    answers[:, 9:11] = True
    return {"input_ids": ids, "segment_ids": segments, "answer_mask": answers, "labels": ids}


@torch.no_grad()
def test_the_loss_is_that_of_the_answers_each_document_by_itself(model, batch):
    alone = model(batch["input_ids"][:, 6:]).logits[0]
    wanted = torch.nn.functional.cross_entropy(alone[2:4], batch["input_ids"][0, 9:11])
    torch.testing.assert_close(answer_loss(model, batch), wanted)


def test_it_ends_when_the_score_no_longer_rises_and_keeps_the_best(model, batch):
    scores = iter([0.1, 0.4, 0.2, 0.3, 0.5])
    kept = []

    def measure():
        kept.append(model.lm_head.weight.detach().clone())
        return {"f1": next(scores)}

    def batches():
        while True:
            yield batch

    records = tune(model, batches(), measure, TuningConfig(steps=40, learning_rate=1e-2, every=4, patience=2))
    assert [one["step"] for one in records] == [0, 4, 8, 12] and records[-1]["loss"] < records[1]["loss"]
    assert torch.equal(model.lm_head.weight, kept[1]) and not torch.equal(kept[1], kept[3])


def test_the_same_score_again_is_no_better_one(model, batch):
    config = TuningConfig(steps=40, learning_rate=1e-2, every=1, patience=2)
    assert len(tune(model, itertools.repeat(batch), lambda: {"f1": 0.0}, config)) == 3


def test_the_loss_of_a_record_is_the_mean_of_the_steps_since_the_last_one(model, batch):
    config = TuningConfig(steps=5, learning_rate=0.0, every=4, patience=9)
    first, second, last = tune(model, itertools.repeat(batch), lambda: {"f1": 0.0}, config)
    assert first["loss"] == 0 and last["step"] == 5 and last["loss"] == pytest.approx(second["loss"])


def test_hsa_tune_writes_a_model_and_its_curve(tmp_path, shards_folder):
    tokenizer = shards_folder[1]
    runner = CliRunner()
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes, **ids)).save_pretrained(tmp_path / "source")
    tokenizer.save_pretrained(tmp_path / "source")
    told = [(f"Heat {i} was won by Runner{i}.", f"Who won heat {i}?", f"Runner{i}") for i in range(30)]
    asked = [
        {"context": text, "qas": [{"id": who, "question": what, "answers": [{"text": who}]}]}
        for text, what, who in told
    ]
    (tmp_path / "q.json").write_text(json.dumps({"data": [{"paragraphs": asked}]}))
    words = ["tune", "source", "--questions", "q.json", "-o", "tuned", "--steps", "2", "--every", "1", "--rows", "1"]
    words = [str(tmp_path / word) if word in ("source", "q.json", "tuned") else word for word in words]
    refused = runner.invoke(app, [*words, "--seq-len", "4096"])
    assert refused.exit_code == 2 and "reads at most 2048 tokens" in " ".join(refused.stderr.split())
    made = runner.invoke(app, [*words, "--seq-len", "256", "--held-out", "9999", "--device", "cpu"])
    assert made.exit_code == 0 and "step 1: loss" in made.output, made.output
    assert "9999" not in made.output
    records = json.loads((tmp_path / "tuned" / "tuning.json").read_text())["records"]
    assert [one["step"] for one in records] == [0, 1, 2] and all(0 <= one["f1"] <= 1 for one in records)
    LlamaForCausalLM.from_pretrained(tmp_path / "tuned")
