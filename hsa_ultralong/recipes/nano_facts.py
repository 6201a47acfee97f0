"""Nano on facts in any sentence form: warm-up, long rows, then pools and rows of several sizes, averaged."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig


def nano_facts() -> TrainConfig:
    """`hsa train nano_facts --data SHARDS -o runs/nano-facts --device cuda --export models/nano-facts`.

    The shipped model: one H200, 15 minutes beside other runs on its card (11 alone), resumable; results/training-nano-
    facts. 9,207,362 parameters, 17.6 MiB: the preset with landmarks of 512 numbers and narrower feed-forward blocks.
    SHARDS: `hsa data corpus.txt --tokenizer checkpoints/nano -o SHARDS`.

    warmup: 2K and full coverage, as `nano`, but a third of the rows are facts in thousands of forms, and retrieval is
    told the right chunk. long: 32K. mixed: last, as what trains last decides; steps take turns between pools of 16,384,
    4,096 and 2,048 chunks, and rows of 2K, 8K and 32K; at its end the weights are their mean along the stage, with a
    share of 0.2% from before it (0.95 ** 120). `--set warmup.evidence_loss=0` and so on are the runs to compare with.
    Probes are of forms that training never has.
    """
    mixture = {
        "text": 0.3,
        "self_copy": 0.12,
        "span_copy": 0.05,
        "facts": 0.3,
        "lists": 0.12,
        "prompts": 0.06,
        "needles": 0.05,
    }
    return TrainConfig(
        preset="nano",
        model={"retrieval_dim": 512, "intermediate_size": 672},
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=310_000_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture=mixture,
                warmup_steps=100,
                chunk_topk=FULL_COVERAGE,
                evidence_loss=0.1,
                data_options={"p_hard": 0.4, "max_needles": 128, "max_questions": 64},
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=80_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=1e-3,
                mixture=mixture,
                warmup_steps=20,
                schedule="linear",
                final_learning_rate=0.5,
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
                evidence_loss=0.1,
                data_options={"p_hard": 0.4, "max_needles": 128, "max_questions": 64},
            ),
            StageConfig(
                name="mixed",
                seq_len=32_768,
                tokens=125_829_120,
                batch_tokens=1_048_576,
                learning_rate=1e-3,
                mixture={**mixture, "text": 0.22, "short_facts": 0.08},
                warmup_steps=4,
                schedule="linear",
                chunk_topk=32,
                pool_memory="compete",
                shapes=((2048, 512), (8192, 32), (2048, 32), (32_768, 4)),
                evidence_loss=0.1,
                average_decay=0.95,
                data_options={"p_hard": 0.5, "max_needles": 128, "max_questions": 64},
            ),
        ],
        parallel=ParallelConfig(activation_checkpointing="full", checkpointing_tokens=131_072),
        log_every=10,
        probe_every=800,
        probe_kind="facts",
        probe_families=(
            "facts/scenes",
            "facts/clauses",
            "facts/similar",
            "facts/absent",
            "facts/documents",
            "lists/pairs",
            "prompts",
        ),
        mfu=0.08,
    )
