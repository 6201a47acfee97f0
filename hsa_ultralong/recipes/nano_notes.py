"""The last stage of the shipped checkpoint: facts that are documents of their own, on a CPU."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, StageConfig, TrainConfig


def nano_notes() -> TrainConfig:
    """`hsa train nano_notes --data SHARDS --init-from runs/export -o runs/notes --export checkpoints/mine`, after
    `nano`; one CPU core, 29 minutes.

    Two rows in five hide sentences that are whole documents, as `hsa memory append` makes them, among others like them;
    the rows of a step compete for retrieval. Of 40 such facts behind 262,144 tokens of a book it finds 28 (`hsa eval
    needles --notes`, results/needles-notes), `nano` alone none (docs/log.md). SHARDS need the model's
    tokenizer: `hsa data ... --tokenizer checkpoints/nano`.
    """
    return TrainConfig(
        preset="nano",
        stages=[
            StageConfig(
                name="notes",
                seq_len=1024,
                tokens=1_000_000,
                batch_tokens=8192,
                learning_rate=3e-4,
                mixture={"text": 0.25, "needles": 0.35, "short_facts": 0.4},
                warmup_steps=10,
                micro_batch_rows=8,
                pool_memory="compete",
                schedule="linear",
                chunk_topk=FULL_COVERAGE,
            ),
        ],
        compile=False,
        log_every=5,
        probe_every=30,
        probe_rows=8,
    )
