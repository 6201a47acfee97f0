"""The shipped checkpoint: nano, warm-up with self-copy at 2K, then longer and longer context (paper sec. 3.2)."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig


def nano() -> TrainConfig:
    """`hsa train nano --data SHARDS -o runs/nano --device cuda`, one H200, about 7 minutes in all, resumable.

    warmup: short window (128) and full coverage make retrieval emerge; 30% self-copy and 40% needle rows give it a
    reason. long and longer: full coverage at 32K and 128K with long documents, learning rate falling to zero:
    length generalisation is decided by the longest effective context in training. Expected numbers:
    checkpoints/nano/README.md.
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=210_000_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
                warmup_steps=100,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=60_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=1e-3,
                mixture={"text": 0.4, "self_copy": 0.2, "needles": 0.4},
                warmup_steps=20,
                schedule="linear",
                final_learning_rate=0.3,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="longer",
                seq_len=131_072,
                tokens=13_000_000,
                batch_tokens=131_072,
                learning_rate=3e-4,
                mixture={"text": 0.4, "self_copy": 0.1, "needles": 0.5},
                warmup_steps=5,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
        ],
        mfu=0.08,
    )
