"""Sizes that do not fit are refused before anything starts; one process needs no mesh."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.distributed.mesh import (
    ParallelConfig,
    build_mesh,
    data_rank,
    data_world,
    init_distributed,
    total,
)


def test_one_process_has_no_mesh_and_all_rows():
    assert build_mesh(ParallelConfig(), "cpu") is None
    assert (data_rank(None), data_world(None)) == (0, 1)
    assert torch.equal(total(torch.ones(2), None), torch.ones(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"replicate": 2}, "does not fit 1 process: .* start 2 with torchrun"),
        ({"shard": 4, "context": 2}, "shard=4 x context=2 does not fit 1 process: .* start 8"),
        ({"expert": 2}, "expert must be 1 or shard \\* context = 1"),
    ],
)
def test_sizes_must_fit_the_processes(sizes, message):
    with pytest.raises(ValueError, match=message):
        build_mesh(ParallelConfig(**sizes), "cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"replicate": 0},
        {"shard": -1},
        {"context": 0},
        {"mlp_tile_tokens": -1},
        {"param_dtype": "float16"},
        {"gradient_sync": "first"},
        {"activation_checkpointing": "some"},
        {"checkpointing_tokens": 4096},
    ],
)
def test_impossible_options_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ParallelConfig(**options)


def test_without_torchrun_nothing_starts(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert init_distributed("cpu") == torch.device("cpu")
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match=r"LOCAL_RANK.*torchrun"):
        init_distributed("cpu")


def test_a_local_rank_without_a_gpu_is_told_the_number_to_start(monkeypatch):
    for name, value in {
        "WORLD_SIZE": "8",
        "RANK": "3",
        "LOCAL_RANK": "3",
        "MASTER_ADDR": "h",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="--nproc-per-node=2"):
        init_distributed("cuda")
