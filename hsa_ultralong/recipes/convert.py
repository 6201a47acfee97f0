"""A converted transformer learns to use its memory: alignment with its source, then recall on rows that grow.

Both start from a folder of `hsa convert`, take its shape, and learn from the source beside rows (train/teaching.py).
Sizes and rates are those of SmolLM2-135M with 7 layers that read; docs/own-memory.md says what to change for others.
"""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig

# what is asked of the memory beside text: an eighth spans to quote, three eighths facts
_MEMORY = {"text": 0.5, "span_copy": 0.125, "chat_facts": 0.375}
_MORE_TEXT = {"text": 0.625, "span_copy": 0.125, "chat_facts": 0.25}


def convert_align() -> TrainConfig:
    """`hsa train convert_align --data SHARDS --init-from models/smol --teacher smol.gguf --device cuda -o runs/align
    --export-difference align.safetensors --set lora_rank=16`, one GPU.

    Rows of 256 tokens and windows of 64: three of four tokens have most of their past in the memory. The weights of
    retrieval follow the source's own attention beyond the window, the reading layers' outputs its outputs, while text
    stays close to the source. A prototype brought the error of these outputs from 1.37 to 0.16 in 20M tokens
    (docs/log.md); this recipe is not measured.
    """
    return TrainConfig(
        preset="smol_135m",
        stages=[
            StageConfig(
                name="align",
                seq_len=256,
                tokens=8_192_000,
                batch_tokens=16_384,
                learning_rate=2e-3,
                mixture=dict(_MEMORY),
                warmup_steps=50,
                schedule="linear",
                chunk_topk=FULL_COVERAGE,
                sliding_window=64,
                hsa_sliding_window=64,
                divergence=1.0,
                align_retrieval=0.3,
                align_output=1.0,
            ),
        ],
        weight_decay=0.0,
        old_rate=0.25,
        probe_kind="chat_facts",
        mfu=0.08,
    )


def convert_memory() -> TrainConfig:
    """`hsa train convert_memory --data SHARDS --init-from models/smol --teacher smol.gguf --device cuda -o runs/read
    --export models/smol-read`, one GPU; with `--set lora_rank=16 --export-difference smol.safetensors` a small file.

    Rows begin with 4 chunks and grow as they are recalled: a stage ends early when its answers have a loss below
    `advance_below`. Windows are short in all layers while rows are short, or the memory is not needed; then they widen
    to 512, at a lower rate and with more text, which brings the language back. A prototype of these stages recalled .92
    of facts at 1,024 tokens after 20M tokens, .95 at 2,048 after 40M (docs/log.md); this recipe is not measured.
    """
    return TrainConfig(
        preset="smol_135m",
        stages=[
            StageConfig(
                name="short",
                seq_len=256,
                tokens=14_000_000,
                batch_tokens=16_384,
                learning_rate=2e-3,
                mixture=dict(_MEMORY),
                warmup_steps=50,
                advance_below=0.15,
                chunk_topk=FULL_COVERAGE,
                sliding_window=64,
                hsa_sliding_window=64,
                divergence=1.0,
            ),
            StageConfig(
                name="choose",
                seq_len=1024,
                tokens=6_000_000,
                batch_tokens=16_384,
                learning_rate=2e-3,
                mixture=dict(_MEMORY),
                warmup_steps=1,
                chunk_topk=FULL_COVERAGE,
                sliding_window=128,
                hsa_sliding_window=128,
                divergence=1.0,
            ),
            StageConfig(
                name="widen",
                seq_len=2048,
                tokens=8_000_000,
                batch_tokens=16_384,
                learning_rate=1e-3,
                mixture=dict(_MORE_TEXT),
                warmup_steps=20,
                chunk_topk=FULL_COVERAGE,
                sliding_window=256,
                hsa_sliding_window=256,
                divergence=1.0,
            ),
            StageConfig(
                name="settle",
                seq_len=4096,
                tokens=12_000_000,
                batch_tokens=16_384,
                learning_rate=1e-3,
                mixture=dict(_MORE_TEXT),
                warmup_steps=20,
                schedule="linear",
                chunk_topk=FULL_COVERAGE,
                sliding_window=512,
                hsa_sliding_window=512,
                divergence=1.0,
            ),
        ],
        weight_decay=0.0,
        old_rate=0.25,
        probe_kind="chat_facts",
        probe_lengths=(1024, 8192),
        mfu=0.08,
    )
