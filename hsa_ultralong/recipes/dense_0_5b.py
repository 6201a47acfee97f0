"""The paper's dense 0.5B model with the paper's stages (sec. 3.2, 4.1; docs/paper_facts.md, C.1)."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig


def dense_0_5b() -> TrainConfig:
    """`torchrun --nnodes=4 --nproc-per-node=8 ... --no-python hsa train dense_0_5b --data SHARDS -o runs/dense`.

    Hardware: 32 H100 or H200, 21 GiB of each by `--dry-run`. Time: 18 days at the 40% of peak that the plan assumes,
    not measured. Numbers: not measured; the paper's are in docs/paper_facts.md, D.

    From the paper: windows, contexts, 4T tokens of pre-training, 175B long, 400B annealing, 5.2M tokens a step, rate
    4.96e-4 (5.5e-5, cosine, in sft), weight decay 0.01, 1% synthetic retrieval. Not in the paper: tokens of warm-up and
    sft, steps of rate warm-up.
    """
    return TrainConfig(
        preset="dense_0_5b",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=16_384,
                tokens=20_000_000_000,
                batch_tokens=5_242_880,
                micro_batch_rows=1,
                learning_rate=4.96e-4,
                mixture={"text": 0.99, "needles": 0.01},
                warmup_steps=500,
                sliding_window=512,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="pretrain",
                seq_len=16_384,
                tokens=4_000_000_000_000,
                batch_tokens=5_242_880,
                micro_batch_rows=1,
                learning_rate=4.96e-4,
                mixture={"text": 0.99, "needles": 0.01},
                warmup_steps=500,
                sliding_window=4096,
                chunk_topk=64,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=175_000_000_000,
                batch_tokens=5_242_880,
                micro_batch_rows=1,
                learning_rate=4.96e-4,
                mixture={"text": 0.99, "needles": 0.01},
                warmup_steps=100,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="anneal",
                seq_len=32_768,
                tokens=400_000_000_000,
                batch_tokens=5_242_880,
                micro_batch_rows=1,
                learning_rate=4.96e-4,
                mixture={"text": 0.99, "needles": 0.01},
                warmup_steps=0,
                schedule="linear",
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="sft",
                seq_len=8192,
                tokens=5_000_000_000,
                batch_tokens=2_097_152,
                micro_batch_rows=1,
                learning_rate=5.5e-5,
                mixture={"sft": 0.95, "needles": 0.05},
                warmup_steps=50,
                schedule="cosine",
                chunk_topk=64,
            ),
        ],
        weight_decay=0.01,
        parallel=ParallelConfig(activation_checkpointing="selective"),
        checkpoint_minutes=30.0,
        keep_checkpoints=3,
        probe_every=1000,
        probe_lengths=(16_384, 131_072),
        gpus=32,
        mfu=0.4,
    )
