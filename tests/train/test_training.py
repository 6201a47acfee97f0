"""Training: it learns, resumes exactly, stops safely, and its checkpoints are whole or absent."""

import json

import pytest
import torch

from hsa_ultralong.data import TokenShards
from hsa_ultralong.eval.probes import answer_accuracy, needle_probe
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train import (
    StageConfig,
    TrainConfig,
    Trainer,
)
from hsa_ultralong.train.export import export_model
from hsa_ultralong.train.schedule import learning_rate
from hsa_ultralong.train.stages import set_window


@pytest.fixture(scope="module")
def corpus(make_corpus):
    path, tokenizer = make_corpus(5, 1500, 500)
    return TokenShards.open(path, tokenizer), tokenizer


def stage(name="warmup", **options):
    fields = {"seq_len": 256, "tokens": 3072, "batch_tokens": 512, "learning_rate": 2e-3, "warmup_steps": 1}
    mixture = {"text": 0.4, "self_copy": 0.3, "needles": 0.3}
    return StageConfig(name=name, mixture=mixture, **{**fields, **options})


def run_config(*stages, **options):
    return TrainConfig(preset="debug", stages=list(stages or [stage()]), compile=False, log_every=1, **options)


def trainer(corpus, folder, config=None, **options):
    shards, tokenizer = corpus
    return Trainer(config or run_config(), folder, shards, tokenizer, **options)


def weights(one):
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def losses(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_vocabulary_may_be_larger_than_the_tokenizer_but_not_smaller(corpus, tmp_path):
    size = len(corpus[1])
    one = trainer(corpus, tmp_path / "large", run_config(model={"vocab_size": size + 60}))
    assert one.model.config.vocab_size == size + 60
    assert one.train()
    with pytest.raises(ValueError, match=f"no room for the {size} tokens"):
        trainer(corpus, tmp_path / "small", run_config(model={"vocab_size": size - 1}))


def test_loss_falls(corpus, tmp_path):
    one = trainer(corpus, tmp_path, run_config(stage(tokens=20_480, learning_rate=1e-2)))
    assert one.train()
    seen = losses(tmp_path)
    assert len(seen) == 40 and sum(seen[-5:]) < sum(seen[:5]) - 2.5


@pytest.mark.parametrize("stop_at", [1, 4, 6, 7])
def test_resuming_continues_bit_for_bit(corpus, tmp_path, stop_at):
    config = run_config(
        stage(),
        stage("long", seq_len=512, tokens=1536, schedule="linear"),
        model={"gumbel_noise": True, "chunk_topk": 2},
    )
    config.stages[0].chunk_topk = 2
    whole = trainer(corpus, tmp_path / "whole", config)
    assert whole.train()
    interrupted = trainer(corpus, tmp_path / "cut", config)

    def stop(record):
        interrupted.should_stop = interrupted.should_stop or record.get("global_step") == stop_at

    interrupted.listener = stop
    interrupted.train()
    assert interrupted.global_step == stop_at
    resumed = trainer(corpus, tmp_path / "cut", config)
    assert resumed.global_step == stop_at
    assert resumed.train()
    assert_equal_weights(weights(whole), weights(resumed))
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_finished_run_has_nothing_left_to_do(corpus, tmp_path):
    trainer(corpus, tmp_path).train()
    again = trainer(corpus, tmp_path)
    before = weights(again)
    assert again.train() and again.global_step == 6
    assert_equal_weights(before, weights(again))


def test_windows_change_between_stages_and_survive_a_resume(corpus, tmp_path):
    config = run_config(stage(tokens=512, sliding_window=8), stage("long", tokens=1024))
    one = trainer(corpus, tmp_path, config)
    one.train(last_stage="warmup")
    again = trainer(corpus, tmp_path, config)
    again.train()
    assert again.model.config.sliding_window == 8
    assert all(layer.attention.window == 8 for layer in again.model.model.lower_layers)


def test_set_window_changes_every_ordinary_layer(corpus, tmp_path):
    model = trainer(corpus, tmp_path).model
    set_window(model, 5)
    upper = [layer for group in model.model.upper_groups() for layer in group.layers]
    assert {layer.attention.window for layer in [*model.model.lower_layers, *upper]} == {5}


def test_experts_are_balanced_after_every_step(corpus, tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 16}
    one = trainer(corpus, tmp_path, run_config(stage(tokens=1024), model=options))
    one.train()
    biases = [tensor for name, tensor in one.model.named_buffers() if name.endswith("router_bias")]
    assert biases and any(bias.abs().max() > 0 for bias in biases)


def test_export_loads_in_bf16_with_its_topk(corpus, tmp_path):
    one = trainer(corpus, tmp_path / "run")
    one.train()
    export_model(one.model, corpus[1], tmp_path / "model", topk=3)
    loaded = HSAForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.bfloat16 and loaded.config.chunk_topk == 3
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, one.model.state_dict()[name].bfloat16()), name


def test_a_run_can_start_from_other_weights(corpus, tmp_path):
    one, other = trainer(corpus, tmp_path / "one"), trainer(corpus, tmp_path / "two", run_config(seed=3))
    other.initialize_from(one.model.state_dict())
    assert_equal_weights(weights(one), weights(other))


def test_the_probe_counts_exact_answers(corpus, tmp_path):
    shards, tokenizer = corpus
    model = trainer(corpus, tmp_path).model.eval()
    measured = needle_probe(shards, tokenizer, rows=2, device="cpu")(model, 512)
    assert 0 <= measured["needle_accuracy"] <= 1 and measured["answer_loss"] > 0
    names = {"entropy", "distance", "beyond_window"}
    assert {name: len(values) for name, values in measured["retrieval"].items()} == dict.fromkeys(
        names, model.config.num_upper_groups
    )
    tokens = torch.randint(3, 300, (1, 64))
    guess = model(tokens, use_cache=False).logits.argmax(-1)
    answer = torch.zeros(1, 64, dtype=torch.bool)
    answer[0, 10:12] = answer[0, 20] = True
    tokens[0, 20] = guess[0, 19]
    batch = {"input_ids": tokens, "segment_ids": torch.zeros(1, 64, dtype=torch.int32), "answer_mask": answer}
    right, count, _, length = answer_accuracy(model, batch, "cpu")
    assert (right, count, length) == (1, 2, 3)


def test_learning_rates_warm_up_and_fall_as_declared():
    base = {"tokens": 512 * 110, "warmup_steps": 10, "learning_rate": 1.0}
    assert [learning_rate(stage(**base), step) for step in (0, 4, 9, 50, 109)] == [0.1, 0.5, 1.0, 1.0, 1.0]
    linear = stage(**base, schedule="linear", final_learning_rate=0.2)
    assert learning_rate(linear, 60) == pytest.approx(0.6) and learning_rate(linear, 110) == pytest.approx(0.2)
    cosine = stage(**base, schedule="cosine")
    assert learning_rate(cosine, 60) == pytest.approx(0.5) and learning_rate(cosine, 110) == pytest.approx(0.0)


def test_families_are_probed_apart_and_named_in_the_records(tiny_runs, tmp_path):
    families = ("facts/similar", "lists/pairs", "prompts")
    config = tiny_runs.config(tiny_runs.stage(seq_len=256, tokens=256), probe_kind="facts", probe_families=families)
    probe = needle_probe(
        tiny_runs.shards, tiny_runs.tokenizer, rows=2, device="cpu", lengths=[256], chunk_size=16, kind="facts",
        families=config.probe_families,
    )  # fmt: skip
    tiny_runs.trainer(tmp_path / "run", config, probe=probe).train()
    (measured,) = [one["probe"] for one in tiny_runs.records(tmp_path / "run") if "probe" in one]
    assert all(0 <= measured[f"family/{name}"] <= 1 for name in families)
    with pytest.raises(ValueError, match="probe_families are kinds of rows or"):
        tiny_runs.config(probe_families=("facts/none",))
