"""hsa bench training: a point per context and attention, runs that add up, a figure, the FLOP of both models."""

import json

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.bench import training as training_module
from hsa_ultralong.bench.training import TrainingSettings, build, parameters, training_records
from hsa_ultralong.cli.main import app
from hsa_ultralong.models import accounting
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.graphs import EagerCapture

ARGUMENTS = (
    "bench training --preset debug --contexts 64,128 --batch-tokens 256 --micro-tokens 128 --steps 1 --device cpu"
)


def test_the_command_writes_results_and_figure_and_adds_to_them(tmp_path):
    for _ in range(2):
        result = CliRunner().invoke(app, [*ARGUMENTS.split(), "--hardware", "x", "-o", str(tmp_path)])
        assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "training-x.json").read_text())
    points = {(r["metric"], r["attention"], r["context"]) for r in found["records"]}
    assert len(points) == len(found["records"]) == 3 * 2 * 2 and len(found["meta"]["runs"]) == 2
    assert {r["run"] for r in found["records"]} == {1}
    speeds = {(r["attention"], r["context"]): r["value"] for r in found["records"] if r["metric"] == "tokens_per_s"}
    for record in found["records"]:
        if record["metric"] == "mfu" and record["attention"] == "hsa":
            flops = accounting.flops_per_token(preset("debug"), record["context"], training=True)
            assert record["value"] == pytest.approx(speeds["hsa", record["context"]] * flops / 989e12)
    assert (tmp_path / "training-x.png").read_bytes().startswith(b"\x89PNG")


def test_full_attention_costs_more_the_longer_the_row():
    config = preset("small_345m")
    twin = build("full", config, torch.device("meta"), "none")
    hsa, full = (
        [count(length) for length in (8192, 131_072)]
        for count in (
            lambda length: accounting.flops_per_token(config, length, training=True),
            lambda length: accounting.full_attention_training_flops(config, length, parameters(twin), 16),
        )
    )
    assert full[0] < hsa[0] * 1.2 and full[1] > 3 * hsa[1]


def test_the_second_twin_has_the_layers_and_the_parameters_of_the_model():
    config = preset("small_345m")
    model, less, same = (build(kind, config, torch.device("meta"), "none") for kind in training_module.ATTENTIONS)
    assert len(less.layers) == 16 and len(same.layers) == 19
    assert parameters(less) < 0.9 * parameters(model) and 0.98 < parameters(same) / parameters(model) < 1.02


def test_out_of_memory_ends_a_point_and_not_the_run():
    failures, found = [], []
    settings = TrainingSettings(contexts=(64,), batch_tokens=64, micro_tokens=(64, 128), steps=1)

    def prepare(model, checkpointing):
        def refuse(module, arguments, options):
            if (options.get("labels") if options else arguments[0]).shape[0] > 1:
                raise torch.OutOfMemoryError("no room")

        model.register_forward_pre_hook(refuse, with_kwargs=True)

    training_records(
        preset("debug"), "debug", "hsa", settings, torch.device("cpu"), found.append, prepare, failures.append
    )
    assert [record["micro_batch_rows"] for record in found] == [1, 1, 1] and len(failures) == 1


@pytest.mark.parametrize(
    ("kinds", "name", "words"),
    [("hsa,all", "debug", "attention is one of"), ("hsa,full_rope", "moe_8b_a1b", "a twin has dense layers")],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(tmp_path, kinds, name, words):
    command = f"bench training --preset {name} --contexts 64 --attention {kinds} --device cpu -o {tmp_path}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code != 0 and words in f"{result.output}{result.exception}" and not [*tmp_path.iterdir()]


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="attention is one of hsa, full, full_rope; got 'none'"):
        build("none", preset("debug"), torch.device("cpu"), "none")


@pytest.mark.parametrize("has_noise", [False, True])
def test_steps_by_graphs_are_the_steps_without(monkeypatch, has_noise):
    """On a CPU, with a stand-in that runs what a graph would: the same weights after as many steps of the same rows."""
    EagerCapture.reset()
    found, models, config = [], [], preset("debug", chunk_topk=2, gumbel_noise=has_noise)
    monkeypatch.setattr(training_module, "_STEPS_BEFORE", 2)
    monkeypatch.setattr(training_module, "build", lambda *built: models.append(build(*built)) or models[-1])
    for steps, make_capture in ((4, None), (2, EagerCapture)):
        settings = TrainingSettings(contexts=(64,), batch_tokens=256, micro_tokens=(128,), steps=steps)
        training_records(
            config, "debug", "hsa", settings, torch.device("cpu"), found.append, lambda *_: None,
            make_capture=make_capture,
        )  # fmt: skip
    assert EagerCapture.captured == 1 and EagerCapture.replayed == 4 * 2 and EagerCapture.waited == [True, False]
    assert [record["parallel"] for record in found[::3]] == ["checkpointing none", "checkpointing none, CUDA graphs"]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_what_no_graph_holds_is_refused_before_a_model_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("hsa_ultralong.cli.common.choose_device", lambda _: "cuda")
    monkeypatch.setattr("hsa_ultralong.distributed.mesh.init_distributed", lambda _: torch.device("cpu"))
    arguments = f"bench training --preset moe_8b_a1b --graphs -o {tmp_path} --hardware x --no-compile"
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == 2 and "--graphs cannot hold a mixture of experts" in result.output


def test_graphs_are_refused_where_there_are_none(tmp_path):
    result = CliRunner().invoke(app, [*ARGUMENTS.split(), "--graphs", "-o", str(tmp_path)])
    assert result.exit_code == 2 and "--graphs is for timed steps of one process on a GPU" in result.output
    assert not list(tmp_path.iterdir())
