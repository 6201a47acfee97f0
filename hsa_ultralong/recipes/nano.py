"""The shipped checkpoint: nano, warm-up with self-copy at 2K, then longer and longer context (paper sec. 3.2, nano scale)."""

from __future__ import annotations

from hsa_ultralong.train import StageConfig, TrainConfig


def nano() -> TrainConfig:
    """`hsa train nano --data SHARDS -o runs/nano --device cuda`, one H200, about 20 minutes in all, resumable.

    warmup: short window (128) and full coverage make retrieval emerge; 30% self-copy and 40% needle rows give it a
    reason. long: full coverage at 32K with long documents, learning rate falling to zero: length generalisation is
    decided by the longest effective context in training. Expected numbers: checkpoints/nano/README.md.
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=420_000_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
                warmup_steps=100,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=60_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=6e-4,
                mixture={"text": 0.4, "self_copy": 0.2, "needles": 0.4},
                warmup_steps=20,
                schedule="linear",
                long_documents=True,
            ),
        ],
    )
