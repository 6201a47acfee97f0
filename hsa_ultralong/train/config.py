"""What a training run is: a model, its data and a list of stages. Plain dataclasses, all values in stated units."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from hsa_ultralong.data.mixture import FORM_FAMILIES, ROW_KINDS
from hsa_ultralong.distributed.mesh import ParallelConfig
from hsa_ultralong.models import HSAConfig
from hsa_ultralong.models.configuration_hsa import config_fields
from hsa_ultralong.models.presets import preset, replace_options

FULL_COVERAGE = 0
_SCHEDULES = ("constant", "linear", "cosine")
_POOLS = ("", "attended", "compete")
OPTIMIZERS = ("adamw", "muon")
_ON_SPIKE = ("stop", "warn")
_LORA_LAYERS = ("all", "upper")
PRECISIONS = ("bf16", "fp8")


@dataclass
class StageConfig:
    """One stage; the next one starts from its weights.

    Attributes:
        name: used in logs and checkpoint folders.
        seq_len: tokens per row (T), a multiple of the chunk size.
        shapes: (tokens of a row, rows per forward) of the steps in turn, the longest rows of seq_len tokens: rows of
            several lengths, pools of several sizes. 0 rows: as many as have the tokens of a forward of seq_len; () =
            seq_len in every step. A step has as many tokens whatever its shape.
        tokens: training tokens of the whole stage.
        batch_tokens: tokens per optimiser step, over all processes.
        micro_batch_rows: rows per forward of one process; 0 = its whole share of the step at once.
        learning_rate: peak. warmup_steps: linear from 0. schedule: "constant", "linear" or "cosine", the latter two
            falling to final_learning_rate * learning_rate at the end of the stage.
        chunk_topk: chunks kept per token (K); 0 = full coverage.
        sliding_window: W; 0 keeps that of the last stage that had one, or the model's. hsa_sliding_window: the same of
            the layers that read the memory.
        divergence: weight of the divergence from the source (`hsa train --teacher`) on every token that is no answer;
            above 0, only answers count in the ordinary loss. align_retrieval, align_output: weights of the alignment
            with the source's attention beyond the window (train/teaching.py).
        evidence_loss: weight of the auxiliary loss that teaches retrieval which chunks tell a token, where the row
            knows it (kinds facts, prompts, lists, self_copy, span_copy, chat_facts and those of questions; beside a
            source answers only; train/evidence.py); 0.1 is small. evidence_chunks: wrong chunks count in it as if there
            were so many; 0 = as they are.
        average_decay: at the end of the stage its weights give way to their exponential mean along it, of this decay a
            step, which begins with the weights before the stage; 0 = none.
        advance_below: end the stage once the mean loss of answers between two log lines is below; 0 = never.
        gumbel_noise: noise on the selection; None keeps the model's choice.
        mixture: weights of the data components, see data.MixtureConfig.
        long_documents: prefer documents of at least seq_len tokens.
        data_options: other fields of data.MixtureConfig, such as {"p_hard": 0.5, "length_weights": {32768: 4.0}}.
        isolate_documents: retrieval stays inside a document, also where a row holds several.
        pool_memory: rows of a micro-batch read each other's chunks: "" (no), "attended" or "compete"
            (docs/pooled-memory.md).
        piece_tokens: run rows this many tokens at a time, so that activations are those of one piece
            (train/segmented.py); 0 = whole rows.
        piece_offload: with piece_tokens on a GPU, lower outputs and their gradients wait in pinned host memory
            (4 bytes * hidden_size a token), so that only the memory grows with the row on the card.
    """

    name: str
    seq_len: int
    tokens: int
    batch_tokens: int
    learning_rate: float
    mixture: dict[str, float]
    warmup_steps: int = 100
    schedule: str = "constant"
    final_learning_rate: float = 0.0
    micro_batch_rows: int = 0
    chunk_topk: int = FULL_COVERAGE
    sliding_window: int = 0
    hsa_sliding_window: int = 0
    divergence: float = 0.0
    align_retrieval: float = 0.0
    align_output: float = 0.0
    evidence_loss: float = 0.0
    evidence_chunks: int = 0
    advance_below: float = 0.0
    average_decay: float = 0.0
    shapes: tuple[tuple[int, int], ...] = ()
    gumbel_noise: bool | None = None
    long_documents: bool = False
    isolate_documents: bool = False
    pool_memory: str | bool = ""
    piece_tokens: int = 0
    piece_offload: bool = False
    data_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.pool_memory, bool):
            self.pool_memory = "attended" if self.pool_memory else ""
        for name, choices in (("schedule", _SCHEDULES), ("pool_memory", _POOLS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"stage {self.name!r}: {name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in ("seq_len", "tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage {self.name!r}: {name} must be >= 1, got {getattr(self, name)}")
        positive = ("warmup_steps", "micro_batch_rows", "chunk_topk", "sliding_window", "piece_tokens")
        weights = ("hsa_sliding_window", "divergence", "align_retrieval", "align_output", "evidence_loss")
        for name in (*positive, *weights, "evidence_chunks", "advance_below", "learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"stage {self.name!r}: {name} must be >= 0, got {getattr(self, name)}")
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"stage {self.name!r}: batch_tokens={self.batch_tokens} must be a multiple of seq_len={self.seq_len}"
            )
        if self.micro_batch_rows and self.rows % self.micro_batch_rows:
            raise ValueError(
                f"stage {self.name!r}: {self.rows} rows a step are no multiple of "
                f"micro_batch_rows={self.micro_batch_rows}"
            )
        needing = self.align_retrieval, self.align_output, self.advance_below
        if not self.divergence and any(needing):
            raise ValueError(
                f"stage {self.name!r}: align_retrieval, align_output and advance_below go with divergence above 0"
            )
        if not 0 <= self.average_decay < 1:
            raise ValueError(f"stage {self.name!r}: average_decay must be in [0, 1), got {self.average_decay}")
        self._check_shapes()
        if self.evidence_loss and self.piece_tokens:
            raise ValueError(f"stage {self.name!r}: evidence_loss does not go with piece_tokens; leave one out")
        if self.piece_tokens and self.pool_memory:
            raise ValueError(f"stage {self.name!r}: piece_tokens does not go with pool_memory")
        if self.piece_offload and not self.piece_tokens:
            raise ValueError(f"stage {self.name!r}: piece_offload moves what pieces leave behind: set piece_tokens too")

    def _check_shapes(self) -> None:
        """Every shape shares out the tokens of a step; the longest rows have seq_len tokens."""
        if any(len(shape) != 2 or any(type(n) is not int for n in shape) for shape in self.shapes):
            raise ValueError(f"stage {self.name!r}: shapes are pairs of whole numbers, got {self.shapes}")
        self.shapes = tuple((length, rows) for length, rows in self.shapes)
        if not self.shapes:
            return
        if max(self.lengths) != self.seq_len:
            raise ValueError(
                f"stage {self.name!r}: the longest rows of shapes must be seq_len={self.seq_len}, got {self.shapes}"
            )
        if self.micro_batch_rows and all(rows for _, rows in self.shapes):
            raise ValueError(
                f"stage {self.name!r}: micro_batch_rows={self.micro_batch_rows} is for shapes of 0 rows, got "
                f"{self.shapes}; leave it out"
            )
        forward = (self.micro_batch_rows or 1) * self.seq_len
        for length, rows in self.shapes:
            if length < 1 or rows < 0 or (rows and self.batch_tokens % (length * rows)):
                raise ValueError(
                    f"stage {self.name!r}: a shape is (tokens of a row, rows per forward) whose product divides "
                    f"batch_tokens={self.batch_tokens}, got {(length, rows)}"
                )
            if not rows and forward % length:
                raise ValueError(
                    f"stage {self.name!r}: rows of shapes must divide the {forward:,} tokens of a forward, got {length}"
                )

    def shape(self, step: int) -> tuple[int, int]:
        """Tokens of a row, and rows per forward (0: those that have the tokens of a forward), of a step."""
        return self.shapes[step % len(self.shapes)] if self.shapes else (self.seq_len, 0)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of a row of the steps, in turn."""
        return tuple(length for length, _ in self.shapes) or (self.seq_len,)

    def mean_over_lengths(self, cost: Callable[[int], float]) -> float:
        """The mean over the stage's tokens of what a token costs in a row of a length."""
        return sum(cost(length) for length in self.lengths) / len(self.lengths)

    @property
    def rows(self) -> int:
        """Rows of seq_len tokens per optimiser step, over all processes."""
        return self.batch_tokens // self.seq_len

    @property
    def needs_teacher(self) -> bool:
        return self.divergence > 0

    @property
    def num_steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)

    def forward_rows(self, data_world: int, step: int = 0) -> int:
        """Rows per forward of one of `data_world` processes that share out the rows of a step.

        Raises:
            ValueError: if the rows cannot be shared out evenly.
        """
        length, rows = self.shape(step)
        all_rows = self.batch_tokens // length
        rows = rows or (self.micro_batch_rows or max(1, self.rows // data_world)) * self.seq_len // length
        if all_rows % (rows * data_world):
            raise ValueError(
                f"stage {self.name!r}: {all_rows} rows a step cannot be shared out over {data_world} processes in "
                f"forwards of {rows}; change batch_tokens or {'shapes' if self.shapes else 'micro_batch_rows'}"
            )
        return rows

    def num_forwards(self, data_world: int, step: int) -> int:
        """Forwards of one of `data_world` processes in a step."""
        return self.batch_tokens // (self.shape(step)[0] * self.forward_rows(data_world, step) * data_world)

    def first_row(self, step: int, part: int, rank: int, data_world: int) -> int:
        """Number of the first row of forward `part` of a process; none comes twice in a stage, whatever the lengths."""
        before = step * (self.batch_tokens // min(self.lengths))
        return before + (part * data_world + rank) * self.forward_rows(data_world, step)

    def forward_tokens(self, data_world: int) -> list[int]:
        """Tokens of a forward of one of `data_world` processes, of each shape."""
        steps = range(max(1, len(self.shapes)))
        return [self.forward_rows(data_world, step) * self.shape(step)[0] for step in steps]


@dataclass
class TrainConfig:
    """A run: `stages` in order on one model.

    Attributes:
        preset, model: preset name and overrides of its HSAConfig fields.
        base: the HSAConfig fields of the model folder that the run starts from, in place of the preset's.
        twin: name of a rival (baselines/twins.py) of the same size to train in the model's place; "" or "hsa" trains
            the model.
            Of a stage it takes rows, steps and rates; chunk_topk and gumbel_noise are of the model only.
        twin_options: options of the rival's RivalConfig, such as {"num_sinks": 8}.
        optimizer: "adamw", or "muon": Muon on the matrices of layers and experts, AdamW on the rest (optim.py).
        lora_rank: train the layers outside the memory as low-rank changes (train/lora.py), embedding and head not at
            all; 0 trains everything. lora_layers: "all", or "upper", which leaves the lower decoder as it was.
        old_rate: factor of the learning rate for what a converted model took over from its source. fresh: names of
            the parameters that it did not, from the folder's conversion.json.
        freeze_memory: train the upper decoder only, so that memories built before stay valid (train/freezing.py).
        freeze_source: of a converted model train only what makes and reads its memory; what stood in the source stays
            as it is, to the bit, and with it the language within the window (train/freezing.py).
        router_warmup_steps: first steps of the run, in which tokens are spread over the experts of a mixture, less and
            less, so that none gets all while hidden states are still alike; 0 = none (train/stages.py).
        precision: of products in training on a GPU: "bf16", or "fp8", which forms those of dense feed-forward blocks,
            forward and backward, by 8-bit floats (ops/swiglu); weights, checkpoints and exports are the same.
        weight_decay: on matrices only. betas, clip_norm: AdamW and gradient clipping.
        parallel: how a step is spread over processes, and what it keeps in memory.
        checkpoint_minutes: wall-clock minutes between checkpoints. keep_checkpoints: older ones are deleted; 0 writes
            none, for trying things on a large model: such a run cannot be resumed.
        log_every, probe_every: optimiser steps.
        questions: files of questions over passages, for the rows passage_questions and passage_chat. sentences: files
            of their answers in a sentence, for stages with p_sentence. chats: files of conversations, for rows chat.
        probe_rows: held-out synthetic rows per in-training needle probe.
        probe_kind: kind of these rows. probe_lengths: lengths in tokens that are probed besides the stage's own.
        probe_families: what is probed apart besides, "kind" or "kind/family" such as "facts/similar" or "lists/pairs"
            (data.mixture.FORM_FAMILIES), in sentence forms of the validation split.
        on_spike: what to do when the loss stays more than spike_threshold (nats) above the median of the last 100
            steps for spike_steps steps: "stop" or "warn". A loss or gradient that is not finite always stops the run.
        tensorboard: write curves for TensorBoard too, if it is installed. wandb: name of a Weights & Biases project.
        gpus, mfu: what `--dry-run` plans with: number of GPUs and fraction of their peak arithmetic.
    """

    preset: str
    stages: list[StageConfig]
    model: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    twin: str = ""
    twin_options: dict[str, Any] = field(default_factory=dict)
    optimizer: str = "adamw"
    lora_rank: int = 0
    lora_layers: str = "all"
    old_rate: float = 1.0
    fresh: list[str] = field(default_factory=list)
    freeze_memory: bool = False
    freeze_source: bool = False
    router_warmup_steps: int = 0
    precision: str = "bf16"
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    compile: bool = True
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    num_workers: int = 8
    checkpoint_minutes: float = 3.0
    keep_checkpoints: int = 2
    log_every: int = 20
    probe_every: int = 250
    questions: list[str] = field(default_factory=list)
    sentences: list[str] = field(default_factory=list)
    chats: list[str] = field(default_factory=list)
    probe_rows: int = 32
    probe_kind: str = "needles"
    probe_lengths: tuple[int, ...] = ()
    probe_families: tuple[str, ...] = ()
    on_spike: str = "stop"
    spike_threshold: float = 2.0
    spike_steps: int = 20
    tensorboard: bool = True
    wandb: str = ""
    gpus: int = 1
    mfu: float = 0.3

    def __post_init__(self) -> None:
        at_least_one = ("log_every", "probe_every", "probe_rows", "spike_steps", "gpus")
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        choices_of = (
            ("optimizer", OPTIMIZERS), ("on_spike", _ON_SPIKE), ("lora_layers", _LORA_LAYERS),
            ("precision", PRECISIONS),
        )  # fmt: skip
        for name, choices in choices_of:
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        if self.old_rate != 1 and self.optimizer == "muon":
            raise ValueError("old_rate goes with optimizer=adamw")
        if self.lora_layers != "all" and not self.lora_rank:
            raise ValueError(f"lora_layers={self.lora_layers} says where a low rank trains: set lora_rank too")
        if self.lora_rank and self.precision != "bf16":
            raise ValueError("lora_rank changes feed-forward blocks, whose products precision=fp8 takes: leave one out")
        if self.lora_rank and self.freeze_memory:
            raise ValueError("lora_rank trains the memory, freeze_memory does not: leave one out")
        if self.freeze_source and (self.lora_rank or self.freeze_memory):
            other = "lora_rank" if self.lora_rank else "freeze_memory"
            raise ValueError(f"freeze_source trains the memory alone, {other} the rest: leave one out")
        for name in ("seed", "keep_checkpoints", "lora_rank", "old_rate", "router_warmup_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be >= 0, got {getattr(self, name)}")
        for name in ("clip_norm", "spike_threshold", "mfu"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.probe_kind not in ROW_KINDS:
            raise ValueError(f"probe_kind must be one of {', '.join(ROW_KINDS)}, got {self.probe_kind!r}")
        for name in self.probe_families:
            kind, has_family, family = name.partition("/")
            if kind not in ROW_KINDS or (has_family and family not in FORM_FAMILIES.get(kind, ())):
                known = ", ".join(f"{one}/{part}" for one, parts in FORM_FAMILIES.items() for part in parts)
                raise ValueError(f"probe_families are kinds of rows or {known}; got {name!r}")
        if any(not isinstance(length, int) or length < 1 for length in self.probe_lengths):
            raise ValueError(f"probe_lengths must be numbers of tokens, got {self.probe_lengths}")

    def shape(self, **defaults: Any) -> HSAConfig:
        """The model's configuration before any stage; `defaults` are options that follow from a tokenizer, which the
        folder that a run starts from states itself."""
        if self.base:
            return replace_options(HSAConfig(**self.base), self.model)
        return preset(self.preset, **{**defaults, **self.model})

    @property
    def has_twin(self) -> bool:
        """Whether a rival is trained in the model's place."""
        return self.twin not in ("", "hsa")

    def start_from(self, config: HSAConfig) -> None:
        """Take the shape of a model that was saved; what was measured of its weights is not kept."""
        fields = (name for name in config_fields() if name != "unsure_below")
        self.base = {name: getattr(config, name) for name in fields}

    def stage(self, name: str) -> int:
        """Index of the stage called `name`."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ValueError(f"unknown stage {name!r}; this recipe has {', '.join(names)}")
        return names.index(name)


def apply_overrides(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """Apply `--set` assignments: "seed=3", "model.chunk_topk=16", "parallel.shard=8", "warmup.tokens=1000000" (stage
    name first).

    Raises:
        ValueError: for an unknown key or a value of the wrong type, naming what exists.
    """
    for assignment in assignments:
        path, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set needs key=value, got {assignment!r}")
        head, _, rest = path.partition(".")
        if head == "model" and rest:
            config.model[rest] = _parse(text)
            continue
        target: Any = config
        name = head
        if rest:
            name = rest
            target = config.parallel if head == "parallel" else config.stages[config.stage(head)]
        _assign(target, name, path, text)
    config.__post_init__()
    config.parallel.__post_init__()
    for stage in config.stages:
        stage.__post_init__()
    return config


def _assign(target: Any, name: str, path: str, text: str) -> None:
    """Set one field to the value that `text` spells, if it is of the field's type."""
    names = [
        f.name for f in dataclasses.fields(target) if f.name not in ("stages", "model", "base", "fresh", "parallel")
    ]
    if name not in names:
        close = get_close_matches(name, names, n=1)
        raise ValueError(
            f"unknown key {path!r}; "
            + (f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(names)}")
        )
    hint = typing.get_type_hints(type(target))[name]
    types = tuple(typing.get_origin(kind) or kind for kind in typing.get_args(hint)) or (hint,)
    if typing.get_origin(hint) in (tuple, dict):
        types = (typing.get_origin(hint),)
    value = _parse(text)
    if float in types and type(value) is int:
        value = float(value)
    if tuple in types and type(value) is list:
        value = tuple(value)
    if type(value) not in types:
        kinds = " or ".join(kind.__name__ for kind in types)
        advice = f"; write '{path}=[1, 2]'" if tuple in types else ""
        raise ValueError(f"{path} must be of type {kinds}, got {text!r}{advice}")
    setattr(target, name, value)


def _parse(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
