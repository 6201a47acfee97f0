"""The paper's findings at nano size: a run of a few minutes, and the settings that tell the runs of a finding apart.

scripts/findings.py trains and measures them, scripts/report.py writes docs/report.md; tests/train/test_findings.py.
"""

from __future__ import annotations

import json
from typing import NamedTuple

from hsa_ultralong.train import FULL_COVERAGE, ParallelConfig, StageConfig, TrainConfig

# rows that ask, and their share
_ASKED = {"needles": 0.3, "facts": 0.1, "multi_query": 0.1, "variable_tracking": 0.1}
# where the curve by length is the claim
_FAR = "4K,16K,64K,256K,1M,4M,16M"


def findings() -> TrainConfig:
    """`python scripts/findings.py run NAME --data SHARDS --seed 0`, which is `hsa train findings --set ...` for each
    variant of a finding, and its measurements.

    One GPU with 80 GiB, 72M tokens, by CUDA graphs (one run beside others on an H200: 2 minutes). SHARDS:
    `hsa data corpus.txt --tokenizer checkpoints/nano -o SHARDS`. Three stages of the paper (sec. 3.2) in small: dense
    at 2K, sparse at 4K, dense at 32K on long documents. Muon, because retrieval emerges with fewer tokens
    (results/training-muon).

    Rows teach what is measured in sentences of their own: one fact (needles), facts of any form, several at once and
    chains of variables, as the authors train on the tasks that they test.
    """
    mixture = {"text": 0.2, "self_copy": 0.2, **_ASKED}
    return TrainConfig(
        preset="nano",
        optimizer="muon",
        stages=[
            StageConfig(
                name="warmup",
                seq_len=2048,
                tokens=39_321_600,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture=mixture,
                warmup_steps=100,
                chunk_topk=FULL_COVERAGE,
            ),
            StageConfig(
                name="pretrain",
                seq_len=4096,
                tokens=16_384_000,
                batch_tokens=65_536,
                learning_rate=2e-3,
                mixture=mixture,
                warmup_steps=10,
                chunk_topk=32,
            ),
            StageConfig(
                name="long",
                seq_len=32_768,
                tokens=16_777_216,
                batch_tokens=131_072,
                micro_batch_rows=2,
                learning_rate=1e-3,
                mixture={"text": 0.25, "self_copy": 0.15, **_ASKED},
                warmup_steps=10,
                schedule="linear",
                long_documents=True,
                chunk_topk=FULL_COVERAGE,
            ),
        ],
        parallel=ParallelConfig(cuda_graphs=True),
        num_workers=3,
        probe_every=200,
        probe_lengths=(2048, 8192, 32_768),
        mfu=0.08,
    )


class Finding(NamedTuple):
    """A claim and the runs that test it.

    Attributes:
        question, claim: what is asked, and what the paper says, with its section.
        variants: name -> settings of `hsa train findings --set` by which a run differs; none: the recipe as it is,
            which all findings share.
        common: settings of all runs.
        measures: what is measured of each: "needles" (hidden sentences by length), "paper" (S-NIAH, MQ and VT in the
            authors' protocol, answers forced), "ruler" (its one, several and chained facts, answers written),
            "perplexity", "short" (short tasks, where their files are given).
        lengths: of hidden sentences and tests.
        setting: of tests, that of `hsa eval`: "rebuild" where the memories of a variant cannot be laid together.
        note: what small scale changes.
    """

    question: str
    claim: str
    variants: dict[str, tuple[str, ...]]
    common: tuple[str, ...] = ()
    measures: tuple[str, ...] = ("needles", "paper", "perplexity")
    lengths: str = "4K,16K,64K,256K,1M"
    setting: str = "memory"
    note: str = ""

    def folder(self, measure: str) -> str:
        """Where a measure lies beside a run, which another finding may measure elsewise."""
        is_far = self.lengths == _FAR and measure in ("needles", "paper", "ruler")
        is_rebuilt = self.setting == "rebuild" and measure in ("paper", "ruler")
        return measure + "-far" * is_far + "-rebuild" * is_rebuilt

    def settings(self, variant: str) -> list[str]:
        """All settings of a variant, in the form of `--set`."""
        return [*self.common, *self.variants[variant]]


_NO_COPY = json.dumps({"text": 0.4, **_ASKED})
_WIDE_WARMUP = ("warmup.sliding_window=512", "warmup.hsa_sliding_window=512", "warmup.chunk_topk=16")
_FUSION_CLAIM = (
    "Yes: chunk-wise attention and fusion by retrieval score are two of three ingredients, and NSA's selection learns "
    "nothing from what is read (sec. 1, 2.1)."
)
_FUSION_ROWS = ("long.seq_len=8192", "long.micro_batch_rows=8")
_TAUGHT = ("warmup.evidence_loss=0.1", "pretrain.evidence_loss=0.1", "long.evidence_loss=0.1")

FINDINGS: dict[str, Finding] = {
    "effective_length": Finding(
        question="Does the longest effective context in training decide how far recall reaches?",
        claim="Yes: mid-training at 32K lifts S-NIAH at 16M from 5% to 97.5% (sec. 4.3, Fig. 4a and b).",
        variants={
            "rows_4k": ("long.seq_len=4096", "long.micro_batch_rows=16", "long.long_documents=false"),
            "rows_8k": ("long.seq_len=8192", "long.micro_batch_rows=8"),
            "rows_32k": (),
            "rows_128k": ("long.seq_len=131072", "long.micro_batch_rows=1"),
        },
        measures=("needles", "paper", "ruler", "perplexity"),
        lengths=_FAR,
        note="Rows of the last stage differ, their tokens do not. Needle and self-copy rows reach as far as the row.",
    ),
    "warmup": Finding(
        question="Which warm-up makes retrieval emerge?",
        claim="Self-copy extrapolates best, a short window with full coverage is better at 4K and nearly as good; "
        "without either a 4K window does not extrapolate (sec. 3.2, Table 2).",
        variants={
            "none": (f"warmup.mixture={_NO_COPY}", *_WIDE_WARMUP),
            "self_copy": ('warmup.mixture={"self_copy": 1.0}', *_WIDE_WARMUP),
            "short_window": (f"warmup.mixture={_NO_COPY}",),
            "both": (),
        },
        common=(
            f"pretrain.mixture={_NO_COPY}",
            "pretrain.sliding_window=512",
            "pretrain.hsa_sliding_window=512",
            f"long.mixture={_NO_COPY}",
        ),
        note="Windows of 512 stand for the paper's 4K, of 128 for its 512. After the warm-up all runs are alike, "
        "without self-copy; `both` is this project's own warm-up.",
    ),
    "window": Finding(
        question="Does a longer window in training cost recall at a distance?",
        claim="Yes, a seesaw: the smaller the window, the further recall reaches (sec. 4.3 and 5, Fig. 4c and d).",
        variants={
            "window_128": (),
            "window_512": ("model.sliding_window=512", "model.hsa_sliding_window=512"),
            "window_2048": ("model.sliding_window=2048", "model.hsa_sliding_window=2048"),
        },
        note="The window of all layers, in all stages. A window of 2,048 sees whole rows of the warm-up.",
    ),
    "positions": Finding(
        question="Must attention inside retrieved chunks be without positions?",
        claim="Yes, one of three ingredients; RoPE costs NSA 13 points of S-NIAH and 8 of MQ at 64K (sec. 1, Table 1).",
        variants={"nope": (), "rope": ("model.memory_positions=rope",)},
        setting="rebuild",
        note="RoPE by the distance from token to key. The memory itself is the same; windows have RoPE in both.",
    ),
    "fusion": Finding(
        question="Must every chunk have a softmax of its own, weighed by its retrieval score?",
        claim=_FUSION_CLAIM,
        variants={
            "score": (),
            "score_joint": ("model.memory_softmax=joint",),
            "chosen": ("model.memory_softmax=joint", "model.fusion=none"),
        },
        common=_FUSION_ROWS,
        setting="rebuild",
        note="`score` is HSA. `score_joint`: one softmax over all keys, with the scores as bias. `chosen`: one softmax "
        "without scores, as in the selected branch of NSA; its scores learn nothing. Rows of the last stage "
        "have 8K, as one softmax was plain torch when they were set.",
    ),
    "fusion_taught": Finding(
        question="Does fusion by score still matter where an auxiliary loss teaches retrieval?",
        claim=_FUSION_CLAIM,
        variants={
            "score_taught": (),
            "chosen_taught": ("model.memory_softmax=joint", "model.fusion=none"),
        },
        common=(*_FUSION_ROWS, *_TAUGHT),
        setting="rebuild",
        note="As `fusion`; the scores also learn from the chunks that tell a token (evidence_loss).",
    ),
    "parity": Finding(
        question="Is the model as good as full attention at lengths that both were trained on?",
        claim="Yes: perplexity at 4K to 16K and short tasks are on a par (sec. 4.1, 4.2, Tables 2 and 3).",
        variants={"hsa": (), "full_rope": ("twin=full_rope",)},
        common=("long.shapes=((32768, 0), (2048, 0), (8192, 0))",),
        measures=("perplexity", "short"),
        note="The twin has as many parameters, within 2%. Rows of the last stage have three lengths, without which "
        "full attention loses its recall in short rows (docs/log.md).",
    ),
    "heads": Finding(
        question="What do 16 query heads to one memory head cost, and do several retrieval heads help?",
        claim="The kernel's 16:1 is an information bottleneck (sec. 5).",
        variants={
            "16_to_1": (),
            "4_to_1": ("model.num_memory_heads=4",),
            "4_to_1_retrieval_4": ("model.num_memory_heads=4", "model.num_retrieval_heads=4"),
            "1_to_1": ("model.num_memory_heads=16",),
        },
        common=("model.num_attention_heads=16", "model.head_dim=32"),
        note="16 heads of 32 in all runs. The runs differ in parameters too, by 2%: more memory heads have wider "
        "projections of keys and values. A memory takes 2 * 32 numbers a token for each of its heads, beside landmarks "
        "of 256 a chunk, whose retrieval heads share them out.",
    ),
}

# sizes at which every command can be tried on a CPU in seconds; nothing is learnt
QUICK: tuple[str, ...] = (
    "preset=debug", "compile=false", "parallel.cuda_graphs=false", "num_workers=0", "probe_rows=1",
    "probe_lengths=(512,)", "log_every=1", "tensorboard=false",
    *(
        f"{stage}.{setting}"
        for stage in ("warmup", "pretrain", "long")
        for setting in ("seq_len=512", "tokens=512", "batch_tokens=512", "micro_batch_rows=0", "warmup_steps=0",
                        "shapes=()", "long_documents=false")
    ),
)  # fmt: skip
