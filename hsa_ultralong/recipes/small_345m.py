"""The five stages at the size of the authors' released configuration, about the budget of their baseline run."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig


def small_345m() -> TrainConfig:
    """`torchrun --nproc-per-node=8 --no-python hsa train small_345m --data SHARDS -o runs/small`.

    Hardware: 8 H100 or H200, 17 GiB of each by `--dry-run`. Time: 10 hours at the 35% of peak that the plan assumes,
    not measured. Numbers: not measured.

    From the authors' baseline (docs/paper_facts.md, C.3): 31.5B tokens, 1M a step, rows of 8,192, rate 3e-4, weight
    decay 0.1, 5% synthetic retrieval. Ours: the stages, as that run had none; their tokens beside pretrain.
    """
    return TrainConfig(
        preset="small_345m",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=8192,
                tokens=2_000_000_000,
                batch_tokens=1_048_576,
                micro_batch_rows=2,
                learning_rate=3e-4,
                mixture={"text": 0.85, "self_copy": 0.1, "needles": 0.05},
                warmup_steps=300,
                sliding_window=512,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="pretrain",
                seq_len=8192,
                tokens=31_500_000_000,
                batch_tokens=1_048_576,
                micro_batch_rows=2,
                learning_rate=3e-4,
                mixture={"text": 0.95, "needles": 0.05},
                warmup_steps=300,
                chunk_topk=32,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=2_000_000_000,
                batch_tokens=1_048_576,
                micro_batch_rows=1,
                learning_rate=2e-4,
                mixture={"text": 0.9, "needles": 0.1},
                warmup_steps=100,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="anneal",
                seq_len=32_768,
                tokens=2_000_000_000,
                batch_tokens=1_048_576,
                micro_batch_rows=1,
                learning_rate=2e-4,
                mixture={"text": 0.9, "needles": 0.1},
                warmup_steps=20,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="sft",
                seq_len=8192,
                tokens=300_000_000,
                batch_tokens=524_288,
                micro_batch_rows=2,
                learning_rate=4e-5,
                mixture={"sft": 0.95, "needles": 0.05},
                warmup_steps=30,
                schedule="cosine",
                chunk_topk=32,
            ),
        ],
        parallel=ParallelConfig(activation_checkpointing="selective"),
        checkpoint_minutes=15.0,
        probe_every=500,
        probe_lengths=(8192, 65_536),
        gpus=8,
        mfu=0.35,
    )
