"""hsa bench training under torchrun: one process beside two, by every way; the same loss and gradient norm."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hsa_ultralong.cli.main import app
from hsa_ultralong.testing.processes import HANG_SECONDS

ARGUMENTS = (
    "bench training --preset debug --contexts 256 --batch-tokens 1024 --micro-tokens 256,512 --steps 1 --device cpu "
    "--hardware x --spread shard,context,replicate"
)


@pytest.mark.slow
def test_one_process_beside_two_by_every_way(tmp_path):
    hsa = str(Path(sys.executable).with_name("hsa"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python", hsa]
    command = [sys.executable, *launcher, *ARGUMENTS.split(), "-o", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert result.returncode == 0, result.stderr
    records = json.loads((tmp_path / "training-x.json").read_text())["records"]
    found = {(record["parallel"], record["metric"]): record for record in records}
    one = "checkpointing none"
    ways = [f"{name} 2, checkpointing none" for name in ("shard", "context", "replicate")]
    assert {parallel for parallel, _ in found} == {one, *ways}
    assert found[one, "tokens_per_s"]["gpus"] == 1 and (one, "scaling") not in found
    for way in ways:
        for metric in ("loss", "grad_norm"):
            assert found[way, metric]["value"] == pytest.approx(found[one, metric]["value"], rel=1e-4)
        speeds = found[way, "tokens_per_s"]["value"] / found[one, "tokens_per_s"]["value"]
        assert found[way, "scaling"]["value"] == pytest.approx(speeds) and found[way, "scaling"]["gpus"] == 2
    assert "shard 2" in result.stdout and (tmp_path / "training-x.png").is_file()


def test_searches_and_unknown_ways_are_refused_under_torchrun(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0), ("MASTER_PORT", 29_517)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    import torch.distributed as dist

    try:
        for more, words in (("--longest --max-tokens 512", "without torchrun"), ("--spread tensor", "--spread takes")):
            result = CliRunner().invoke(app, [*ARGUMENTS.split(), *more.split(), "-o", str(tmp_path)])
            assert result.exit_code == 2 and words in result.stderr
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
