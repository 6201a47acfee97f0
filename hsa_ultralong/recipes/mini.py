"""The next size: 31M parameters by the recipe of `nano_facts`."""

from __future__ import annotations

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig


def mini() -> TrainConfig:
    """`hsa train mini --data SHARDS -o runs/mini --device cuda --export models/mini`.

    One H100 or H200 with 80 GiB, about 10 minutes by plan and 2 to start; not measured. It goes on in pieces with
    `--max-minutes 8`. 31,471,426 parameters, 60 MiB; the weights do not ship. SHARDS: text under permissive licences
    and passages of Wikipedia, `hsa data corpus.txt passages.jsonl --tokenizer checkpoints/nano -o SHARDS`.

    The stages of `nano_facts` with lower rates, and pools of at most 262,144 tokens, whose chunks fit beside the wider
    activations.
    """
    mixture = {
        "text": 0.3,
        "self_copy": 0.12,
        "span_copy": 0.05,
        "facts": 0.28,
        "lists": 0.13,
        "prompts": 0.07,
        "needles": 0.05,
    }
    return TrainConfig(
        preset="mini",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=190_000_000,
                batch_tokens=65_536,
                learning_rate=1.5e-3,
                mixture=mixture,
                warmup_steps=150,
                chunk_topk=FULL_COVERAGE,
                evidence_loss=0.1,
                data_options={"p_hard": 0.4, "max_needles": 128, "max_questions": 64},
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=40_000_000,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=8e-4,
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
                tokens=62_914_560,
                batch_tokens=524_288,
                learning_rate=6e-4,
                mixture={**mixture, "text": 0.22, "short_facts": 0.08},
                warmup_steps=4,
                schedule="linear",
                chunk_topk=32,
                pool_memory="compete",
                shapes=((2048, 128), (8192, 16), (2048, 32), (32_768, 4)),
                evidence_loss=0.1,
                average_decay=0.97,
                data_options={"p_hard": 0.5, "max_needles": 128, "max_questions": 64},
            ),
        ],
        parallel=ParallelConfig(activation_checkpointing="full", checkpointing_tokens=131_072),
        log_every=10,
        probe_every=800,
        probe_kind="facts",
        probe_families=("facts/scenes", "facts/similar", "facts/absent", "facts/documents", "lists/pairs", "prompts"),
        mfu=0.12,
    )
