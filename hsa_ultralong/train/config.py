"""What a training run is: a model, its data and a list of stages. Plain dataclasses, all values in stated units."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

FULL_COVERAGE = 0
_SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class StageConfig:
    """One stage; the next one starts from its weights.

    Attributes:
        name: used in logs and checkpoint folders.
        seq_len: tokens per row (T), a multiple of the chunk size.
        tokens: training tokens of the whole stage.
        batch_tokens: tokens per optimiser step.
        micro_batch_rows: rows per forward; 0 = the whole batch at once.
        learning_rate: peak. warmup_steps: linear from 0. schedule: "constant", "linear" or "cosine", the latter two
            falling to final_learning_rate * learning_rate at the end of the stage.
        chunk_topk: chunks kept per token (K); 0 = full coverage.
        sliding_window: W, or 0 to keep the model's.
        mixture: weights of the data components, see data.MixtureConfig.
        long_documents: prefer documents of at least seq_len tokens.
        pool_memory: rows of a micro-batch read each other's chunks.
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
    long_documents: bool = False
    pool_memory: bool = False

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"stage {self.name!r}: schedule must be one of {_SCHEDULES}, got {self.schedule!r}")
        for name in ("seq_len", "tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"stage {self.name!r}: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("warmup_steps", "micro_batch_rows", "chunk_topk", "sliding_window", "learning_rate"):
            if getattr(self, name) < 0:
                raise ValueError(f"stage {self.name!r}: {name} must be >= 0, got {getattr(self, name)}")
        if self.batch_tokens % self.seq_len:
            raise ValueError(
                f"stage {self.name!r}: batch_tokens={self.batch_tokens} must be a multiple of seq_len={self.seq_len}"
            )
        rows = self.batch_tokens // self.seq_len
        if self.micro_batch_rows and rows % self.micro_batch_rows:
            raise ValueError(
                f"stage {self.name!r}: {rows} rows a step are no multiple of micro_batch_rows={self.micro_batch_rows}"
            )

    @property
    def rows(self) -> int:
        """Rows per optimiser step."""
        return self.batch_tokens // self.seq_len

    @property
    def num_steps(self) -> int:
        return -(-self.tokens // self.batch_tokens)


@dataclass
class TrainConfig:
    """A run: `stages` in order on one model.

    Attributes:
        preset, model: preset name and overrides of its HSAConfig fields.
        weight_decay: on matrices only. betas, clip_norm: AdamW and gradient clipping.
        checkpoint_minutes: wall-clock minutes between checkpoints. keep_checkpoints: older ones are deleted.
        log_every, probe_every: optimiser steps.
        probe_rows: held-out synthetic rows per in-training needle probe.
    """

    preset: str
    stages: list[StageConfig]
    model: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip_norm: float = 1.0
    compile: bool = True
    num_workers: int = 8
    checkpoint_minutes: float = 3.0
    keep_checkpoints: int = 2
    log_every: int = 20
    probe_every: int = 250
    probe_rows: int = 32

    def __post_init__(self) -> None:
        for name in ("keep_checkpoints", "log_every", "probe_every", "probe_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must be >= 0, got {self.seed}")
        if self.clip_norm <= 0:
            raise ValueError(f"clip_norm must be > 0, got {self.clip_norm}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")

    def stage(self, name: str) -> int:
        """Index of the stage called `name`."""
        names = [stage.name for stage in self.stages]
        if name not in names:
            raise ValueError(f"unknown stage {name!r}; this recipe has {', '.join(names)}")
        return names.index(name)


def apply_overrides(config: TrainConfig, assignments: Sequence[str]) -> TrainConfig:
    """Apply `--set` assignments: "seed=3", "model.chunk_topk=16", "warmup.tokens=1000000" (stage name first).

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
            target, name = config.stages[config.stage(head)], rest
        names = [f.name for f in dataclasses.fields(target) if f.name not in ("stages", "model")]
        if name not in names:
            raise ValueError(f"unknown key {path!r}; choose one of {', '.join(names)}")
        old = getattr(target, name)
        value = _parse(text)
        if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, type(old)) or isinstance(value, bool) != isinstance(old, bool):
            raise ValueError(f"{path} must be of type {type(old).__name__}, got {text!r}")
        setattr(target, name, value)
    config.__post_init__()
    for stage in config.stages:
        stage.__post_init__()
    return config


def _parse(text: str) -> Any:
    import ast

    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    return dataclasses.asdict(config)
