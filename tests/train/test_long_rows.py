"""A stage of long rows: segments with what they leave behind on the host, from the configuration to the plan."""

import json

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.train import ParallelConfig, apply_overrides, step_loss


def test_offloading_segments_takes_the_very_same_steps(tiny_runs, tmp_path, monkeypatch):
    asked = []
    plain = step_loss.segmented_loss_backward

    def seen(*arguments, offload, **options):
        asked.append(offload)
        return plain(*arguments, offload=offload, **options)

    monkeypatch.setattr(step_loss, "segmented_loss_backward", seen)
    curves = []
    for name, offload in (("card", "False"), ("host", "True")):
        stage = tiny_runs.stage(tokens=512, micro_batch_rows=1, piece_tokens=32)
        config = apply_overrides(tiny_runs.config(stage), [f"warmup.piece_offload={offload}"])
        tiny_runs.trainer(tmp_path / name, config).train()
        curves.append(tiny_runs.losses(tmp_path / name))
    assert curves[0] == curves[1] and len(curves[0]) == 2
    assert asked == [False] * 4 + [True] * 4


def test_options_that_do_not_go_together_are_refused(tiny_runs, tmp_path):
    with pytest.raises(ValueError, match=r"stage 'warmup': piece_offload .* set piece_tokens too"):
        tiny_runs.stage(piece_offload=True)
    config = tiny_runs.config(tiny_runs.stage(piece_tokens=32), parallel=ParallelConfig(gradient_sync="last"))
    with pytest.raises(ValueError, match=r"stage 'warmup': parallel.gradient_sync=last .* piece_tokens does not have"):
        tiny_runs.trainer(tmp_path / "x", config)
    config = tiny_runs.config(tiny_runs.stage(piece_tokens=32), parallel=ParallelConfig(offload_activations=True))
    with pytest.raises(ValueError, match="acts on whole rows; with piece_tokens take piece_offload=true"):
        tiny_runs.trainer(tmp_path, config)


def test_a_dry_run_counts_the_host(tmp_path):
    sets = ("long.piece_tokens=8192", "long.piece_offload=true", "long.seq_len=131072", "long.batch_tokens=1048576")
    arguments = ["train", "small_345m", "--dry-run", *(part for one in sets for part in ("--set", one))]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    host = {stage["stage"]: stage["host"] for stage in json.loads(result.stdout)["plan"]["stages"]}
    assert host.pop("long") == 131_072 * 1024 * 4 and not any(host.values())
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert "host" in result.stdout and "512 MiB" in result.stdout
    assert "host" not in CliRunner().invoke(app, arguments[:3], env={"COLUMNS": "160"}).stdout.split("}")[-1]
