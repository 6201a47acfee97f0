"""A converted transformer learns to use its memory: alignment with its source, recall on rows that grow, many chunks,
questions.

All start from a folder of `hsa convert`, take its shape, and learn from the source beside rows (train/teaching.py).
Sizes and rates are those of SmolLM2-135M with 7 layers that read; docs/own-memory.md says what to change for others.
"""

from __future__ import annotations

from dataclasses import replace

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig

# what is asked of the memory beside text: an eighth spans to quote, three eighths facts
_MEMORY = {"text": 0.5, "span_copy": 0.125, "chat_facts": 0.375}
_MORE_TEXT = {"text": 0.625, "span_copy": 0.125, "chat_facts": 0.25}
# facts of one form beside each other, so that the form does not tell which one is meant
_HARD = {"p_hard": 0.5}
# chunks of 16M tokens: the margin that retrieval needs there is asked for from short rows on
_CHUNKS = 262_144
# weight of the loss that asks for it: at 1.0 its gradient is nearly all that the clipped step keeps, at 0 recall does
# not carry over to longer rows (docs/log.md)
_EVIDENCE = 0.1
# forwards of the long stage have more; the others recompute nothing, which took longer than all else
_CHECKPOINTING_TOKENS = 65_536


def convert_align() -> TrainConfig:
    """`hsa train convert_align --data SHARDS --init-from models/smol --teacher smol.gguf --device cuda -o runs/align
    --export-difference align.safetensors --set lora_rank=16`, one GPU.

    Rows of 256 tokens and windows of 64: three of four tokens have most of their past in the memory. The weights of
    retrieval follow the source's own attention beyond the window, the reading layers' outputs its outputs, while text
    stays close to the source. SmolLM2-135M with low rank on one H100: the error of these outputs falls to 0.21 and 61%
    of facts are recalled in rows of 256, after 8M tokens (docs/log.md).
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
                evidence_loss=_EVIDENCE,
                evidence_chunks=_CHUNKS,
                data_options=dict(_HARD),
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
    to 512, at a lower rate and with more text, which brings the language back. Retrieval is told which chunks hold an
    answer, among those of all rows of a step. SmolLM2-135M on one H100, 36M tokens with low rank: 86% of facts recalled
    at 1,024 tokens, 80% at 4,096 and at 8,192 (docs/log.md).
    """
    stages = [
        _stage("short", 256, 14_000_000, 2e-3, _MEMORY, window=64, warmup_steps=50, advance_below=0.15),
        _stage("choose", 1024, 6_000_000, 2e-3, _MEMORY, window=128, warmup_steps=1),
        _stage("widen", 2048, 8_000_000, 1e-3, _MORE_TEXT, window=256),
        _stage("settle", 4096, 12_000_000, 1e-3, _MORE_TEXT, window=512, schedule="linear"),
    ]
    return _run(stages, "chat_facts", (1024, 8192))


def convert_long() -> TrainConfig:
    """`hsa train convert_long --data SHARDS --init-from models/smol --from-difference read.safetensors --teacher
    smol.gguf --device cuda -o runs/long --set lora_rank=16 --export-difference long.safetensors`, after convert_memory.

    Eight rows of 8,192 tokens, as far as SmolLM2 itself reads, are one memory of 1,024 chunks, of which 64 are kept.
    Measured as a part of convert_smol.
    """
    return _run([_long()], "chat_facts", (8192, 32_768))


def convert_sft() -> TrainConfig:
    """`hsa train convert_sft --data SHARDS --questions squadshifts.json --questions nq.jsonl.gz --chat persona.csv
    --chat dolly.jsonl --init-from models/smol --from-difference long.safetensors --teacher smol.gguf --device cuda
    -o runs/sft --set lora_rank=16 --export-difference smol.safetensors`, after convert_long.

    Questions that people asked about passages, from memory and with the passage in the prompt; conversations, on which
    the model follows its source as on text; the rest keeps recall and language. Measured as a part of
    convert_smol.
    """
    return _run([_sft("questions")], "passage_questions", (4096, 16_384))


def convert_smol() -> TrainConfig:
    """`hsa train convert_smol --data SHARDS --questions squadshifts.json --questions nq.jsonl.gz --chat persona.csv
    --chat dolly.jsonl --init-from models/smol --teacher smol.gguf --device cuda -o runs/smol --export-difference
    smol.safetensors`.

    convert_memory, convert_long and convert_sft as one run of 90M tokens: low rank, at the full rate for what came from
    the source too. 72M tokens of it took 18 minutes of one H200: 75% of facts recalled at 4,096 tokens, RULER's single
    needles at 1M, few questions about passages, and a language that is weaker (docs/own-memory.md).
    """
    # rows of questions do not fit into the shortest stage
    stages = [*convert_memory().stages, _long(), _sft("sft")]
    tokens = (14_000_000, 10_000_000, 10_000_000, 16_000_000, 16_000_000, 24_000_000)
    for stage, count in zip(stages, tokens, strict=True):
        stage.tokens = count
        if stage.name in ("choose", "widen", "settle", "sft"):
            stage.batch_tokens = 32_768
    return replace(_run(stages, "chat_facts", (4096, 16_384)), lora_rank=16, old_rate=1.0)


def convert_questions() -> TrainConfig:
    """`hsa train convert_questions --data SHARDS --questions squadshifts.json --questions nq.jsonl.gz --chat
    persona.csv --chat dolly.jsonl --init-from models/smol --from-difference smol.safetensors --teacher smol.gguf
    --device cuda -o runs/questions --export-difference questions.safetensors`, after convert_smol, from the folder that
    it began with.

    Rows of passages that ask four times as many questions as those of convert_sft: of people, some with changed answers
    in the passage, and sentences with a gap. 100M tokens, 22 minutes of one H200 by plan. Measured: 33.6M tokens in 8.3
    minutes, the last stage recomputing and cut at a third. XQuAD at 64K from memory then has an F1 of .144 on 400
    questions, .087 before; 9% of held-out questions are answered at 4,096 tokens, 8% at 16,384 (docs/log.md).
    """
    stages = [
        _asking("read", 1024, 30_000_000, 1e-3, window=128, evidence=0.1, p_cloze=0.8, p_text=0.5),
        _asking("choose", 4096, 35_000_000, 5e-4, window=512, evidence=0.2, p_cloze=0.7, p_text=0.4),
        _asking("pool", 8192, 35_000_000, 5e-4, window=512, evidence=0.3, p_cloze=0.6, p_text=0.3),
    ]
    _, choose, pool = stages
    choose.chunk_topk = pool.chunk_topk = 64
    pool.schedule, pool.batch_tokens, pool.pool_memory = "linear", 65_536, "attended"
    config = _run(stages, "passage_questions", (4096, 16_384))
    # its pool fits without recomputation, by plan (docs/log.md); the other recipes are as they were measured
    config.parallel.checkpointing_tokens = 2 * _CHECKPOINTING_TOKENS
    return replace(config, lora_rank=16, old_rate=1.0, probe_families=("chat_facts",))


def convert_answers() -> TrainConfig:
    """`hsa train convert_answers --data SHARDS --questions squadshifts.json --questions nq.jsonl.gz --questions
    own-questions.json --sentences sentences.jsonl --chat own-chat.jsonl --init-from models/smol --from-difference
    questions.safetensors --teacher smol.gguf --device cuda -o runs/answers --export-difference answers.safetensors`,
    after convert_smol or convert_questions, with what `hsa write` made of the source.

    Nearly half of the rows are text and the source's own conversations, at a third of the rate that convert_smol begins
    with and four times the weight of the divergence, to bring language back; half of the questions that are asked as
    chat are answered in a sentence, the others say "Answer in a few words.". 22M tokens, by plan 5 minutes of one H200.
    Measured after half of convert_smol's change and 15M tokens at 1e-3: the perplexity of books 27.0 for 36.3, XQuAD
    from memory .144 for .079, as many facts mentioned at 64K (docs/own-memory.md).
    """
    mixture = {
        "text": 0.35, "chat": 0.1, "passage_questions": 0.2, "passage_chat": 0.05, "chat_facts": 0.25, "span_copy": 0.05
    }  # fmt: skip
    stages = [
        _stage("answer", 4096, 12_000_000, 7e-4, mixture, window=512),
        _stage("pool", 8192, 10_000_000, 7e-4, mixture, window=512, schedule="linear"),
    ]
    for stage in stages:
        stage.batch_tokens, stage.evidence_loss, stage.chunk_topk, stage.divergence = 32_768, 0.2, 64, 4.0
        stage.data_options |= {"questions_per_passage": 6, "p_changed": 0.5, "p_cloze": 0.5, "p_text": 0.3}
        stage.data_options["p_sentence"] = 0.5
    stages[1].batch_tokens, stages[1].pool_memory = 65_536, "attended"
    config = _run(stages, "passage_questions", (4096, 16_384))
    config.parallel.checkpointing_tokens = 2 * _CHECKPOINTING_TOKENS
    return replace(config, lora_rank=16, old_rate=1.0, probe_families=("chat_facts",))


def _asking(
    name: str, seq_len: int, tokens: int, rate: float, *, window: int, evidence: float, p_cloze: float, p_text: float
) -> StageConfig:
    mixture = {
        "text": 0.25, "passage_questions": 0.5, "chat_facts": 0.1, "passage_chat": 0.05, "chat": 0.05, "span_copy": 0.05
    }  # fmt: skip
    stage = _stage(name, seq_len, tokens, rate, mixture, window=window)
    stage.batch_tokens, stage.evidence_loss = 32_768, evidence
    # few questions are there, so that they come often: with other answers, and among others made of text
    stage.data_options |= {"questions_per_passage": 6, "p_changed": 0.75, "p_cloze": p_cloze, "p_text": p_text}
    return stage


def _long() -> StageConfig:
    mixture = {"text": 0.5, "span_copy": 0.125, "chat_facts": 0.375}
    stage = _stage("long", 8192, 20_000_000, 5e-4, mixture, window=512, schedule="linear")
    stage.batch_tokens, stage.pool_memory, stage.chunk_topk = 65_536, "attended", 64
    return stage


def _sft(name: str) -> StageConfig:
    mixture = {
        "text": 0.2, "chat": 0.1, "passage_questions": 0.35, "passage_chat": 0.15, "chat_facts": 0.15, "span_copy": 0.05
    }  # fmt: skip
    stage = _stage(name, 4096, 16_000_000, 5e-4, mixture, window=512, schedule="linear")
    stage.chunk_topk = 64
    return stage


def _run(stages: list[StageConfig], probe_kind: str, probe_lengths: tuple[int, ...]) -> TrainConfig:
    config = TrainConfig(
        preset="smol_135m",
        stages=stages,
        weight_decay=0.0,
        old_rate=0.25,
        probe_kind=probe_kind,
        probe_lengths=probe_lengths,
        mfu=0.08,
    )
    # rows of such a stage are a pool of 65,536 tokens
    if any(stage.pool_memory for stage in stages):
        config.parallel = ParallelConfig(
            activation_checkpointing="selective", checkpointing_tokens=_CHECKPOINTING_TOKENS
        )
    return config


def _stage(
    name: str,
    seq_len: int,
    tokens: int,
    rate: float,
    mixture: dict[str, float],
    *,
    window: int,
    warmup_steps: int = 20,
    schedule: str = "constant",
    advance_below: float = 0.0,
) -> StageConfig:
    """A stage beside the source, with windows alike in all layers and all chunks kept."""
    return StageConfig(
        name=name,
        seq_len=seq_len,
        tokens=tokens,
        batch_tokens=16_384,
        learning_rate=rate,
        mixture=dict(mixture),
        warmup_steps=warmup_steps,
        schedule=schedule,
        chunk_topk=FULL_COVERAGE,
        sliding_window=window,
        hsa_sliding_window=window,
        divergence=1.0,
        evidence_loss=_EVIDENCE,
        evidence_chunks=_CHUNKS,
        advance_below=advance_below,
        data_options=dict(_HARD),
    )
