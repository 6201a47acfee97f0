"""What can go wrong in a run: stops, crashes, broken numbers, half-written files, options that cannot work."""

import hashlib
import json
import logging
import math

import pytest
import torch

from hsa_ultralong.data import TokenShards, load_tokenizer
from hsa_ultralong.eval.probes import needle_probe
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
def corpus(shards_folder):
    path, tokenizer = shards_folder
    return TokenShards.open(path, tokenizer), tokenizer


def stage(name="warmup", **options):
    fields = {"seq_len": 128, "tokens": 768, "batch_tokens": 256, "learning_rate": 2e-3, "warmup_steps": 1}
    return StageConfig(name=name, **{**fields, "mixture": {"text": 0.5, "self_copy": 0.5}, **options})


def run_config(*stages, **options):
    options = {"log_every": 1, **options}
    return TrainConfig(preset="debug", stages=list(stages or [stage()]), compile=False, **options)


def trainer(corpus, folder, config=None, **options):
    return Trainer(config or run_config(), folder, *corpus, **options)


def weights(one):
    return {name: tensor.clone() for name, tensor in one.model.state_dict().items()}


def records(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def stop_of(record):
    return record["stage"], record["step"], record["loss"], record["grad_norm"], record["learning_rate"]


def test_a_run_cut_after_every_step_equals_one_run(corpus, tmp_path):
    config = run_config(stage(), stage("long", tokens=512, schedule="cosine"), model={"gumbel_noise": True})
    whole = trainer(corpus, tmp_path / "whole", config)
    assert whole.train()
    pieces = 0
    while True:
        # the state of the random generator must come from the checkpoint
        torch.manual_seed(pieces + 99)
        part = trainer(corpus, tmp_path / "cut", config)
        if part.train(max_minutes=0):
            break
        pieces += 1
        assert part.global_step == pieces
    assert pieces == 4
    assert_equal_weights(weights(whole), weights(part))
    assert [stop_of(one) for one in records(tmp_path / "whole")] == [stop_of(one) for one in records(tmp_path / "cut")]


def test_the_last_stage_wanted_is_the_last_one_run(corpus, tmp_path):
    config = run_config(stage(), stage("long"))
    assert trainer(corpus, tmp_path, config).train(last_stage="warmup")
    resumed = trainer(corpus, tmp_path, config)
    assert (resumed.stage_index, resumed.step, resumed.global_step) == (1, 0, 3)
    with pytest.raises(ValueError, match="unknown stage 'lang'"):
        resumed.train(last_stage="lang")


def test_initial_weights_are_ignored_once_the_run_has_a_checkpoint(corpus, tmp_path):
    trainer(corpus, tmp_path).train(max_minutes=0)
    resumed = trainer(corpus, tmp_path)
    before = weights(resumed)
    resumed.initialize_from({name: torch.zeros_like(tensor) for name, tensor in before.items()})
    assert_equal_weights(before, weights(resumed))


def test_stages_that_cannot_run_are_refused_before_the_first_step(corpus, tmp_path):
    for options in ({"seq_len": 100, "batch_tokens": 200}, {"mixture": {"poems": 1.0}}, {"mixture": {}}):
        with pytest.raises(ValueError, match="stage 'long'"):
            trainer(corpus, tmp_path, run_config(stage(), stage("long", **options)))
    assert not (tmp_path / "config.json").exists()
    too_long = stage("long", seq_len=8192, batch_tokens=8192, long_documents=True)
    one = trainer(corpus, tmp_path, run_config(stage(), too_long))
    with pytest.raises(ValueError, match="stage 'long'"):
        one.train()
    assert one.global_step == 0 and one.train(last_stage="warmup")


def test_noise_and_the_documents_that_are_read_are_a_stages_choice(corpus, tmp_path):
    config = run_config(
        stage(gumbel_noise=True, isolate_documents=True), stage("next"), stage("last", gumbel_noise=True)
    )
    one = trainer(corpus, tmp_path, config)
    seen = {}

    def keep(record):
        noisy = {group.retriever.gumbel_noise for group in one.model.model.upper_groups()}
        seen[record["stage"]] = noisy | {one.model.config.gumbel_noise}

    one.listener = keep
    assert one.train()
    assert seen == {"warmup": {True}, "next": {False}, "last": {True}}
    plain = trainer(corpus, tmp_path / "plain", run_config(stage(gumbel_noise=True)))
    plain.train()
    isolated, read = ([one["loss"] for one in records(folder)[:3]] for folder in (tmp_path, tmp_path / "plain"))
    assert isolated != read and isolated == pytest.approx(read, abs=0.1)


def test_micro_batches_take_the_very_step_of_the_whole_batch(corpus, tmp_path):
    seen = []
    for rows in (0, 1, 2):
        one = stage(tokens=1024, batch_tokens=512, micro_batch_rows=rows, mixture={"text": 0.5, "self_copy": 0.5})
        trainer(corpus, tmp_path / str(rows), run_config(one)).train()
        seen.append([(record["loss"], record["grad_norm"]) for record in records(tmp_path / str(rows))])
    for other in seen[1:]:
        # rows hold different numbers of labels: the divisor is that of the whole step
        assert [number for pair in other for number in pair] == pytest.approx(
            [number for pair in seen[0] for number in pair], rel=2e-5
        )


def test_a_stage_in_segments_takes_the_very_step_of_whole_rows(corpus, tmp_path):
    seen = []
    for segment in (0, 32):
        one = stage(tokens=512, micro_batch_rows=1, piece_tokens=segment)
        trainer(corpus, tmp_path / str(segment), run_config(one)).train()
        seen.append([(record["loss"], record["grad_norm"]) for record in records(tmp_path / str(segment))])
    assert [number for pair in seen[1] for number in pair] == pytest.approx(
        [number for pair in seen[0] for number in pair], rel=1e-4
    )
    with pytest.raises(ValueError, match="multiple of chunk_size=16"):
        trainer(corpus, tmp_path / "x", run_config(stage(piece_tokens=40)))


def test_rows_that_pool_their_memory_train(corpus, tmp_path):
    one = trainer(corpus, tmp_path, run_config(stage(pool_memory=True)))
    before = weights(one)
    assert one.train() and one.model.config.chunk_topk == 128 // 16 * 2
    retrieval = [name for name in before if "retriever" in name and name.endswith("weight")]
    assert retrieval and all(not torch.equal(before[name], weights(one)[name]) for name in retrieval)
    with pytest.raises(ValueError, match="pool_memory"):
        trainer(corpus, tmp_path / "x", run_config(stage(pool_memory=True), model={"fusion": "stick_breaking"})).train()


def test_router_biases_move_against_the_load_and_survive_a_resume(corpus, tmp_path):
    options = {"num_experts": 4, "moe_intermediate_size": 8, "router_bias_update_rate": 0.25}
    config = run_config(stage(), model=options)
    one = trainer(corpus, tmp_path, config)
    one.train(max_minutes=0)
    biases = {name: tensor for name, tensor in weights(one).items() if name.endswith("router_bias")}
    assert biases and all(bias.abs().max() == 0.25 for bias in biases.values())
    again = weights(trainer(corpus, tmp_path, config))
    assert all(torch.equal(bias, again[name]) for name, bias in biases.items())


def test_a_probe_is_measured_in_evaluation_mode_at_every_length_and_changes_nothing(corpus, tmp_path):
    modes = []

    def probe(model, length):
        modes.append((model.training, torch.is_grad_enabled()))
        model(torch.full((1, length), 5), use_cache=False)
        return {"needle_accuracy": 0.5, "retrieval": {"entropy": [1.0, 2.0]}}

    plain, probed = (
        trainer(corpus, tmp_path / name, run_config(probe_every=2, probe_lengths=(192, 128)), probe=function)
        for name, function in (("plain", None), ("probed", probe))
    )
    assert plain.train() and probed.train()
    assert modes == [(False, False)] * 4
    probes = [one for one in records(tmp_path / "probed") if "probe" in one]
    assert [(one["global_step"], one["probe"]["length"]) for one in probes] == [(2, 128), (2, 192), (3, 128), (3, 192)]
    assert all(one["retrieval"] == {"entropy": [1.0, 2.0]} and "retrieval" not in one["probe"] for one in probes)
    assert_equal_weights(weights(plain), weights(probed))


def test_the_needle_probe_asks_the_same_questions_every_time(corpus, tmp_path):
    shards, tokenizer = corpus
    model = trainer(corpus, tmp_path).model.eval()
    probe = needle_probe(shards, tokenizer, rows=2, device="cpu")
    with torch.no_grad():
        first, again = (probe(model, 256) for _ in range(2))
        fresh = needle_probe(shards, tokenizer, rows=2, device="cpu")(model, 256)
    assert first == again == fresh
    # an untrained model knows as much as a guess
    assert first["answer_loss"] == pytest.approx(math.log(len(tokenizer)), rel=0.1)


def test_an_exported_model_computes_what_the_trained_one_does(corpus, tmp_path):
    one = trainer(corpus, tmp_path / "run", run_config(stage(sliding_window=8), model={"chunk_topk": 3}))
    one.train()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("mine")
    export_model(one.model, corpus[1], tmp_path / "model", topk=one.topk)
    loaded = HSAForCausalLM.from_pretrained(tmp_path / "model").float().eval()
    assert (loaded.config.chunk_topk, loaded.config.sliding_window) == (3, 8)
    assert (tmp_path / "model" / "README.md").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "run"]
    tokens = torch.arange(3, 83)[None]
    with torch.no_grad():
        one.model.eval()
        one.model.config.chunk_topk = 3
        difference = one.model(tokens).logits - loaded(tokens).logits
    assert difference.abs().max() < 0.02 * loaded(tokens).logits.abs().max() + 1e-3
    # a tokenizer that was loaded from a folder does not say so
    export_model(one.model, load_tokenizer(tmp_path / "model"), tmp_path / "again", topk=3)
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert not {"is_local", "local_files_only"} & set(settings) and "eos_token" in settings


def test_exporting_again_leaves_no_weights_of_the_model_before(corpus, tmp_path):
    one = trainer(corpus, tmp_path / "run")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "notes.md", "checksums.json"):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / name).write_text("old")
    export_model(one.model, corpus[1], tmp_path / "model", topk=3)
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert "notes.md" in names and {name for name in names if "safetensors" in name} == {"model.safetensors"}
    table = json.loads((tmp_path / "model" / "checksums.json").read_text())
    assert set(table) == names - {"notes.md", "checksums.json"}
    content = (tmp_path / "model" / "model.safetensors").read_bytes()
    assert table["model.safetensors"] == hashlib.sha256(content).hexdigest()


def test_a_run_that_goes_on_with_other_settings_says_which(corpus, tmp_path, caplog):
    trainer(corpus, tmp_path, run_config(stage(tokens=1024), stage("long"))).train(max_minutes=0)
    with caplog.at_level(logging.WARNING):
        trainer(corpus, tmp_path, run_config(stage(tokens=1024), stage("long"))).train(max_minutes=0)
        (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text().replace('"seed": 0', '"seed": 3'))
        trainer(corpus, tmp_path, run_config(stage(tokens=1280), stage("long"), stage("more"), betas=(0.9, 0.9))).train(
            max_minutes=0
        )
    (message,) = [one.getMessage() for one in caplog.records if one.name.startswith("hsa_ultralong")]
    assert "warmup.tokens: 1024 -> 1280" in message and "seed: 3 -> 0" in message and "more: null ->" in message
    assert "betas: [0.9, 0.95] -> [0.9, 0.9]" in message and "long.tokens" not in message
    assert json.loads((tmp_path / "config.json").read_text())["stages"][0]["tokens"] == 1280


def test_a_stage_made_shorter_than_what_is_done_is_over(corpus, tmp_path):
    one = trainer(corpus, tmp_path, run_config(stage(tokens=1024), stage("long", tokens=256)))
    one.listener = lambda record: setattr(one, "should_stop", record["step"] == 3)
    one.train()
    shorter = trainer(corpus, tmp_path, run_config(stage(tokens=512), stage("long", tokens=256)))
    assert shorter.step == 3 and shorter.train()
    assert [(one["stage"], one["global_step"]) for one in records(tmp_path)][3:] == [("long", 4)]


def test_stages_before_the_one_under_way_must_stay(corpus, tmp_path):
    trainer(corpus, tmp_path, run_config(stage(), stage("long"))).train(last_stage="warmup")
    with pytest.raises(ValueError, match="gone through the stages warmup, long, this run has new, warmup, long"):
        trainer(corpus, tmp_path, run_config(stage("new"), stage(), stage("long")))
    assert trainer(corpus, tmp_path, run_config(stage(), stage("long"), stage("new"))).train()


def test_a_smaller_window_changes_what_is_computed_and_its_own_size_does_not(corpus, tmp_path):
    model = trainer(corpus, tmp_path).model.eval()
    tokens = torch.arange(3, 63)[None]
    with torch.no_grad():
        before = model(tokens).logits
        set_window(model, 16)
        assert torch.equal(model(tokens).logits, before)
        set_window(model, 4)
        assert not torch.allclose(model(tokens).logits, before)
    assert model.model.upper_groups()[0].hsa_layer.window_attention.window == 16


def test_a_falling_rate_ends_at_its_final_fraction():
    base = {"tokens": 256 * 100, "learning_rate": 0.5, "warmup_steps": 20, "final_learning_rate": 0.1}
    for schedule in ("linear", "cosine"):
        one = stage(**base, schedule=schedule)
        rates = [learning_rate(one, step) for step in range(one.num_steps)]
        assert rates[:20] == pytest.approx([0.5 * (step + 1) / 20 for step in range(20)])
        assert max(rates) == 0.5 and rates[20:] == sorted(rates[20:], reverse=True)
        assert rates[60] == pytest.approx(0.275) and learning_rate(one, 100) == pytest.approx(0.05)
    flat = stage(tokens=256 * 3, warmup_steps=0, learning_rate=0.5)
    assert [learning_rate(flat, step) for step in range(3)] == [0.5] * 3


def test_unknown_model_options_are_refused_before_anything_is_written(corpus, tmp_path):
    with pytest.raises(ValueError, match="chunk_topk"):
        trainer(corpus, tmp_path / "run", run_config(model={"chunk_top_k": 3}))
    assert not (tmp_path / "run").exists()
