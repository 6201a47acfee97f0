"""A run of seconds on a CPU, for tests and for trying the commands."""

from __future__ import annotations

from hsa_ultralong.train import StageConfig, TrainConfig


def debug() -> TrainConfig:
    """`hsa train debug --data SHARDS -o runs/debug`: two CPU cores, under a minute; it learns nothing of use."""
    mixture = {"text": 0.3, "self_copy": 0.3, "needles": 0.4}
    return TrainConfig(
        preset="debug",
        stages=[
            StageConfig("warmup", 512, 16_384, 2048, 2e-3, mixture, warmup_steps=2),
            StageConfig("long", 1024, 8192, 2048, 6e-4, mixture, warmup_steps=1, schedule="linear"),
        ],
        compile=False,
        log_every=2,
        probe_every=8,
        probe_rows=2,
    )
