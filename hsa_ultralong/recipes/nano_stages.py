"""The five stages of the paper (sec. 3.2) at nano size: from text to an instructed model on one GPU."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig


def nano_stages() -> TrainConfig:
    """`hsa train nano_stages --text corpus.txt --device cuda -o runs/stages --export models/nano-sft`.

    Hardware: one GPU with 16 GiB. Time: 5 minutes on an H200, the tokens of 200 MB of text included. Numbers: 20 of 20
    sentences at 32K and at 256K tokens (results/training-stages, needles-stages). The shipped model comes from `nano`,
    whose stages warmup and long these resemble.

    warmup: window 128 and full coverage make retrieval emerge. pretrain: sparse (K = 32) at twice the length. long:
    full coverage at 32K, long documents; anneal: the same with the rate falling to zero. sft: sparse again at 8K, with
    some needle rows kept, as short instructions alone damage extrapolation (sec. 5).
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=80_000_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture={"text": 0.3, "self_copy": 0.3, "needles": 0.4},
                warmup_steps=100,
                sliding_window=128,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="pretrain",
                seq_len=4096,
                tokens=60_000_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture={"text": 0.6, "self_copy": 0.2, "needles": 0.2},
                warmup_steps=20,
                chunk_topk=32,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=40_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=1e-3,
                mixture={"text": 0.4, "self_copy": 0.2, "needles": 0.4},
                warmup_steps=20,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="anneal",
                seq_len=32_768,
                tokens=20_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=1e-3,
                mixture={"text": 0.4, "self_copy": 0.1, "needles": 0.5},
                warmup_steps=5,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="sft",
                seq_len=8192,
                tokens=8_000_000,
                batch_tokens=65_536,
                learning_rate=2e-4,
                mixture={"instructions": 0.8, "needles": 0.2},
                warmup_steps=10,
                schedule="cosine",
                chunk_topk=32,
            ),
        ],
        probe_lengths=(2048, 8192, 32_768),
        mfu=0.08,
    )
