"""Learning rate by step: linear warm-up, then constant, linear or cosine to a final fraction (paper facts C.1)."""

from __future__ import annotations

import math

from hsa_ultralong.train.config import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Rate of optimiser step `step` (0-based) of the stage."""
    warmup = min(1.0, (step + 1) / max(1, stage.warmup_steps))
    progress = min(1.0, max(0.0, (step - stage.warmup_steps) / max(1, stage.num_steps - stage.warmup_steps)))
    if stage.schedule == "linear":
        decay = 1 - progress * (1 - stage.final_learning_rate)
    elif stage.schedule == "cosine":
        decay = stage.final_learning_rate + (1 - stage.final_learning_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        decay = 1.0
    return stage.learning_rate * warmup * decay
