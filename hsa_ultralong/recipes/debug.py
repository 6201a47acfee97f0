"""Runs of seconds on a CPU, for tests and for trying the commands."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig


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


def debug_stages() -> TrainConfig:
    """`hsa train debug_stages --text corpus.txt -o runs/debug --export model`: the five stages of the paper in small.

    One CPU core, about 15 seconds from text to a model that loads; it learns nothing of use. What changes from stage to
    stage is what changes in the large recipes: window, K, context, mixture, schedule.
    """
    return TrainConfig(
        preset="debug",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=512,
                tokens=6144,
                batch_tokens=2048,
                learning_rate=2e-3,
                mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
                warmup_steps=1,
                sliding_window=8,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="pretrain",
                seq_len=512,
                tokens=6144,
                batch_tokens=2048,
                learning_rate=2e-3,
                mixture={"text": 0.9, "needles": 0.1},
                warmup_steps=1,
                sliding_window=16,
                chunk_topk=4,
                gumbel_noise=True,
            ),
            StageConfig(
                name="long",
                seq_len=1024,
                tokens=6144,
                batch_tokens=2048,
                learning_rate=1e-3,
                mixture={"text": 0.6, "needles": 0.4},
                warmup_steps=1,
                micro_batch_rows=1,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="anneal",
                seq_len=1024,
                tokens=6144,
                batch_tokens=2048,
                learning_rate=1e-3,
                mixture={"text": 0.6, "needles": 0.4},
                warmup_steps=0,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="sft",
                seq_len=512,
                tokens=6144,
                batch_tokens=2048,
                learning_rate=3e-4,
                mixture={"instructions": 0.8, "needles": 0.2},
                warmup_steps=1,
                schedule="cosine",
                chunk_topk=4,
            ),
        ],
        compile=False,
        log_every=2,
        probe_every=4,
        probe_rows=2,
        probe_lengths=(512, 1024),
    )
