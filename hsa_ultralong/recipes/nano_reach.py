"""The reach of a pool without its price: half of the forwards pool a million tokens, half read their own rows only."""

from __future__ import annotations

from hsa_ultralong.train import ParallelConfig, StageConfig, TrainConfig


def nano_reach() -> TrainConfig:
    """`hsa train nano_reach --data SHARDS --init-from checkpoints/nano --device cuda -o runs/reach --export M`.

    Hardware: one GPU with 40 GiB; not measured yet. SHARDS need the model's tokenizer: `hsa data ... --tokenizer
    checkpoints/nano`.

    `nano_pool` teaches retrieval among a million tokens and unlearns some of short memories, where the right chunk
    stands out more than among a million; here every step sees both (docs/pooled-memory.md).
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="reach",
                seq_len=4096,
                tokens=83_886_080,
                batch_tokens=2_097_152,
                learning_rate=5e-4,
                mixture={"text": 0.25, "self_copy": 0.1, "needles": 0.35, "short_facts": 0.3},
                micro_batch_rows=256,
                warmup_steps=4,
                chunk_topk=32,
                pool_memory="compete",
                pool_share=0.5,
                schedule="linear",
            ),
        ],
        parallel=ParallelConfig(activation_checkpointing="full"),
        log_every=1,
        probe_every=10,
        probe_rows=8,
        mfu=0.08,
    )
