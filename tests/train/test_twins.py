"""A rival in the place of the model: the same rows, steps and rates; a folder that loads; refusals before any work."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.baselines.twins import TWINS
from hsa_ultralong.cli.main import app
from hsa_ultralong.eval.probes import needle_probe
from hsa_ultralong.train.export import export_model
from hsa_ultralong.train.twins import rival_of


@pytest.fixture
def twin_run(tiny_runs, tmp_path):
    """Runs a twin for a few steps in a folder of its name; returns the trainer."""

    def run(twin, name=None, **options):
        config = tiny_runs.config(twin=twin, **options)
        trainer = tiny_runs.trainer(tmp_path / (name or twin), config)
        return trainer

    return run


def test_a_twin_learns_from_the_rows_of_the_model_and_is_exported_and_loaded(tiny_runs, twin_run, tmp_path):
    twin, ours = twin_run("full_rope"), twin_run("", "ours")
    assert twin.mixtures == ours.mixtures
    assert twin.train()
    losses = [record["loss"] for record in tiny_runs.records(tmp_path / "full_rope") if "loss" in record]
    assert losses[-1] < losses[0]
    export_model(twin.model, twin.tokenizer, tmp_path / "model", topk=twin.topk)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is RivalForCausalLM and loaded.dtype == torch.bfloat16
    ids = torch.tensor([twin.tokenizer("lond")["input_ids"]])
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


@pytest.mark.parametrize("twin", [name for name in TWINS if name != "full_rope"])
def test_every_twin_learns(tiny_runs, twin_run, tmp_path, twin):
    assert twin_run(twin).train()
    losses = [record["loss"] for record in tiny_runs.records(tmp_path / twin) if "loss" in record]
    assert losses[-1] < losses[0]


def test_a_stopped_twin_goes_on_exactly_and_no_other_twin_does(tiny_runs, twin_run, tmp_path):
    twin_run("window").train()
    stopped = twin_run("window", "stopped")
    stopped.should_stop = True
    assert not stopped.train()
    stopped.folder.release()
    with pytest.raises(ValueError, match="begun with twin=window, not full_rope"):
        twin_run("full_rope", "stopped")
    with pytest.raises(ValueError, match="begun with twin=window, not hsa"):
        twin_run("", "stopped")
    assert twin_run("window", "stopped").train()
    assert tiny_runs.losses(tmp_path / "stopped") == tiny_runs.losses(tmp_path / "window")


def test_activation_checkpointing_leaves_a_twin_as_it_is(tiny_runs, twin_run, tmp_path):
    for mode in ("none", "selective", "full"):
        run = twin_run("window_sinks", mode)
        run.folder.release()
        config = tiny_runs.config(twin="window_sinks")
        config.parallel.activation_checkpointing = mode
        tiny_runs.trainer(tmp_path / mode, config).train()
    losses = [tiny_runs.losses(tmp_path / mode) for mode in ("none", "selective", "full")]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_needles_are_asked_of_a_twin_too(tiny_runs, twin_run):
    trainer = twin_run("full_nope")
    probe = needle_probe(trainer.shards, trainer.tokenizer, rows=2, device="cpu", lengths=[256], chunk_size=16)
    trainer.model.eval()
    with torch.no_grad():
        assert set(probe(trainer.model, 256)) == {"needle_accuracy", "answer_loss"}


@pytest.mark.parametrize(
    ("options", "stage", "message"),
    [
        ({"twin": "ful_rope"}, {}, "unknown twin 'ful_rope' .did you mean 'full_rope'"),
        ({"twin_options": {"num_sinks": 3}}, {}, "twin_options go with a twin"),
        ({"twin": "window", "twin_options": {"layers": ["window"]}}, {}, "cannot set layers"),
        ({"twin": "window", "twin_options": {"num_sink": 3}}, {}, "did you mean 'num_sinks'"),
        ({"twin": "window", "freeze_memory": True}, {}, "freeze_memory"),
        ({"twin": "window"}, {"pool_memory": "attended"}, "knows no pool_memory"),
        ({"twin": "window"}, {"piece_tokens": 64}, "knows no piece_tokens"),
        ({"twin": "window"}, {"isolate_documents": True}, "knows no isolate_documents"),
        ({"twin": "window"}, {"sliding_window": 8}, "keeps one window; set model.sliding_window=8"),
        ({"twin": "window"}, {"mixture": {"documents": 1.0}}, "must not read one another"),
        ({"twin": "window"}, {"mixture": {"passage_chat": 1.0}}, "must not read one another"),
        ({"twin": "window"}, {"mixture": {"prompts": 1.0}}, "must not read one another"),
        ({"twin": "window", "model": {"num_experts": 4}}, {}, "dense layers"),
    ],
)
def test_what_a_twin_cannot_do_is_refused_before_any_work(tiny_runs, tmp_path, options, stage, message):
    config = tiny_runs.config(tiny_runs.stage(**stage), **options)
    with pytest.raises(ValueError, match=message):
        tiny_runs.trainer(tmp_path / "run", config)
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_command_plans_trains_and_exports_a_twin(shards_folder, tmp_path):
    def hsa(*arguments):
        return CliRunner().invoke(app, ["train", "debug", *map(str, arguments)])

    planned = hsa("--set", "twin=window", "--dry-run", "--json")
    assert planned.exit_code == 0, planned.output
    plan = json.loads(planned.output)
    assert plan["twin"] == "window" and plan["plan"]["stages"][0]["gradients"] > 0
    shown = hsa("--set", "twin=window", "--dry-run")
    assert "debug, twin window: " in shown.output
    common = ("--set", "twin=window", "--set", "warmup.tokens=4096", "--until", "warmup", "--device", "cpu")
    made = hsa(*common, "--data", shards_folder[0], "-o", tmp_path / "run", "--export", tmp_path / "model")
    assert made.exit_code == 0, made.output
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["records"][0]["attention"] == "window"
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is RivalForCausalLM
    refused = hsa(*common, "--data", shards_folder[0], "--init-from", tmp_path / "model", "-o", tmp_path / "other")
    assert "a twin from none" in str(refused.exception) + refused.output and not (tmp_path / "other").exists()
    # a folder of one kind is not written over by the other
    ours = hsa("--data", shards_folder[0], "-o", tmp_path / "ours", "--export", tmp_path / "model")
    assert "another folder" in str(ours.exception) + ours.output


def test_the_rival_of_no_twin_is_none(tiny_runs):
    assert rival_of(tiny_runs.config(), None) is None
