"""Retrieval among a million tokens, trained on rows of 2,048: the rows of a step share one memory."""

from __future__ import annotations

from hsa_ultralong.train import ParallelConfig, StageConfig, TrainConfig


def nano_pool() -> TrainConfig:
    """`hsa train nano_pool --data SHARDS --init-from checkpoints/nano --device cuda -o runs/pool --export models/pool`.

    Hardware: one GPU with 40 GiB; 77 seconds on an H200, of which 23 train, at 930,000 tokens/s (1,240,000 without a
    pool). SHARDS need the model's tokenizer: `hsa data ... --tokenizer checkpoints/nano`. Recall of 40 sentences among
    64M tokens: 39, without a pool 24 (results/needles-pooled, needles-unpooled); among 4K tokens it loses some, which
    `nano_notes` after it brings back.

    512 rows of 2,048 tokens to a forward: every token chooses its 32 chunks among the 16,384 of all rows, of which only
    those of its own row help (docs/pooled-memory.md). The same tokens without a pool, to compare with: `--set
    pool.pool_memory= --set pool.micro_batch_rows=32 --set parallel.activation_checkpointing=none`.
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="pool",
                seq_len=2048,
                tokens=20_971_520,
                batch_tokens=1_048_576,
                learning_rate=5e-4,
                mixture={"text": 0.25, "self_copy": 0.1, "needles": 0.4, "short_facts": 0.25},
                warmup_steps=4,
                chunk_topk=32,
                pool_memory="compete",
                schedule="linear",
            ),
        ],
        parallel=ParallelConfig(activation_checkpointing="full"),
        log_every=1,
        probe_every=10,
        probe_rows=8,
        mfu=0.08,
    )
