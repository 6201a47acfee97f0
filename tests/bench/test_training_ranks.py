"""hsa bench training under torchrun: one process beside two, by every way; the same loss and gradient norm.

A pool over two processes is compared with one process that holds the same pool.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hsa_ultralong.bench.training import TrainingSettings
from hsa_ultralong.bench.training_ranks import RankedBench, Speed, Way, ranks_records
from hsa_ultralong.cli.main import app
from hsa_ultralong.models.presets import preset
from hsa_ultralong.testing.processes import HANG_SECONDS

ARGUMENTS = (
    "bench training --preset debug --contexts 256 --batch-tokens 1024 --micro-tokens 256,512 --steps 1 --device cpu "
    "--hardware x --spread shard,context,replicate"
)


def measured(folder, more=""):
    """Records of two processes by way and metric, and what was printed."""
    hsa = str(Path(sys.executable).with_name("hsa"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", hsa]
    command = [sys.executable, *launcher, *ARGUMENTS.split(), *more.split(), "-o", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    records = json.loads((folder / "training-x.json").read_text())["records"]
    found = {(record["parallel"], record["metric"]): record for record in records}
    assert len(found) == len(records)
    return found, result.stdout


@pytest.mark.slow
def test_one_process_beside_two_by_every_way(tmp_path):
    found, printed = measured(tmp_path)
    one = "checkpointing none"
    ways = [f"{name} 2, checkpointing none" for name in ("shard", "context", "replicate")]
    assert {parallel for parallel, _ in found} == {one, *ways}
    assert found[one, "tokens_per_s"]["gpus"] == 1 and (one, "scaling") not in found
    for way in ways:
        for metric in ("loss", "grad_norm"):
            assert found[way, metric]["value"] == pytest.approx(found[one, metric]["value"], rel=1e-4)
        speeds = found[way, "tokens_per_s"]["value"] / found[one, "tokens_per_s"]["value"]
        assert found[way, "scaling"]["value"] == pytest.approx(speeds) and found[way, "scaling"]["gpus"] == 2
    assert "shard 2" in printed and (tmp_path / "training-x.png").is_file()


@pytest.mark.slow
def test_rows_shared_in_tiles_have_the_loss_of_those_without(tmp_path):
    found, _ = measured(tmp_path, "--spread context --checkpointing full --tile-tokens 48")
    one, way = "checkpointing full", "context 2, checkpointing full, tiles of 48"
    assert {parallel for parallel, _ in found} == {one, way}
    for metric in ("loss", "grad_norm"):
        assert found[way, metric]["value"] == pytest.approx(found[one, metric]["value"], rel=1e-4)


@pytest.mark.slow
def test_a_pool_beside_the_same_pool_in_one_process(tmp_path):
    # 2,048 tokens: two forwards or more of every process, each with a pool of its own
    found, _ = measured(tmp_path, "--spread pool,shard,pool-fp32 --batch-tokens 2048")
    kept = "checkpointing none"
    one, *pools = (f"pool 2{how}, {kept}" for how in (" in one process", "", ", fp32 weights"))
    assert {parallel for parallel, _ in found} == {kept, f"shard 2, {kept}", one, *pools}
    assert found[one, "tokens_per_s"]["gpus"] == 1 and (one, "scaling") not in found
    for way in pools:
        for metric in ("loss", "grad_norm"):
            assert found[way, metric]["value"] == pytest.approx(found[one, metric]["value"], rel=1e-6)
        assert 2 * found[way, "loss"]["micro_batch_rows"] == found[one, "loss"]["micro_batch_rows"]
        speeds = found[way, "tokens_per_s"]["value"] / found[one, "tokens_per_s"]["value"]
        assert found[way, "scaling"]["value"] == pytest.approx(speeds) and found[way, "scaling"]["gpus"] == 2
    # rows that read each other have another loss than rows that do not
    assert found[one, "loss"]["value"] != pytest.approx(found[kept, "loss"]["value"], rel=1e-6)
    shard = found[f"shard 2, {kept}", "tokens_per_s"]["value"] / found[kept, "tokens_per_s"]["value"]
    assert found[f"shard 2, {kept}", "scaling"]["value"] == pytest.approx(shard)


@pytest.mark.slow
def test_a_pool_alone_is_beside_its_own_measure_only(tmp_path):
    found, _ = measured(tmp_path, "--spread pool")
    assert {parallel for parallel, _ in found} == {
        "pool 2, checkpointing none", "pool 2 in one process, checkpointing none"
    }  # fmt: skip


@pytest.mark.parametrize("fits", [True, False])
def test_pools_have_the_rows_of_the_first_and_need_not_fit_one_process(monkeypatch, fits):
    tried = []

    def measure(bench, context, rows):
        tried.append((bench.way.name, rows))
        if bench.way.gpus == 1 and not fits:
            raise torch.OutOfMemoryError
        # the first is faster with fewer rows, the second with more
        return Speed(rows if "fp32" in bench.way.name else 8 / rows, 1, 6.0, 1.0)

    monkeypatch.setattr(RankedBench, "measure", measure)

    def way(name, gpus):
        def nothing(*_):
            return None

        return Way(name, gpus, 1, nothing, (0, 0), nothing, nothing, nothing, pool_world=2)

    ways = [way("pool 2", 2), way("pool 2, fp32 weights", 2), way("pool 2 in one process", 1)]
    assert ways[0].against == ways[2].name
    settings, records, said = TrainingSettings((64,), 256, (64, 128)), [], []
    ranks_records(preset("debug"), "debug", ways, settings, torch.device("cpu"), records.append, said.append)
    assert tried == [(ways[0].name, 1), (ways[0].name, 2), (ways[1].name, 1), (ways[2].name, 2)]
    scaling = {record["parallel"]: record["value"] for record in records if record["metric"] == "scaling"}
    if fits:
        kept = "checkpointing none"
        assert scaling == {f"pool 2, {kept}": 2.0, f"pool 2, fp32 weights, {kept}": 0.25} and not said
    else:
        assert not scaling and said == ["64 tokens, 2 rows, pool 2 in one process: out of memory"]
        assert {record["gpus"] for record in records} == {2}


def test_searches_and_unknown_ways_are_refused_under_torchrun(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 29_517)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    import torch.distributed as dist

    try:
        ways = "--spread takes shard, replicate, context, pool,"
        for more, words in (
            ("--longest --max-tokens 512", "without torchrun"), ("--spread tensor", ways), ("--spread pool,", ways),
            ("--spread pool-bf16", ways), ("--offload", "needs a GPU"), ("--tile-tokens none", "expected a size"),
        ):  # fmt: skip
            result = CliRunner().invoke(app, [*ARGUMENTS.split(), *more.split(), "-o", str(tmp_path)])
            assert result.exit_code == 2 and words in " ".join(result.stderr.split())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
