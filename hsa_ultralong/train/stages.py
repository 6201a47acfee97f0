"""What a stage changes in the model: how many chunks a token keeps, how far windows reach, noise (paper sec. 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.train.config import FULL_COVERAGE, StageConfig


def enter_stage(model: HSAForCausalLM, stages: Sequence[StageConfig], index: int, preset: HSAConfig) -> None:
    """Give `model` the K, window and noise of stage `index`; `preset` is its configuration before any stage."""
    stage, config = stages[index], model.config
    all_chunks = stage.seq_len // config.chunk_size * stage.rows
    config.chunk_topk = all_chunks if stage.chunk_topk == FULL_COVERAGE else stage.chunk_topk
    # a stage without a window of its own keeps that of the last stage that had one, also after a resume
    windows = [earlier.sliding_window for earlier in stages[: index + 1]]
    window = next((size for size in reversed(windows) if size), preset.sliding_window)
    if window != config.sliding_window:
        set_window(model, window)
    config.gumbel_noise = preset.gumbel_noise if stage.gumbel_noise is None else stage.gumbel_noise
    for group in model.model.upper_groups():
        group.retriever.gumbel_noise = config.gumbel_noise


def set_window(model: HSAForCausalLM, window: int) -> None:
    """Change the sliding window of every layer that has the configuration's; HSA layers keep their own."""
    layers = [*model.model.lower_layers, *(layer for group in model.model.upper_groups() for layer in group.layers)]
    for layer in layers:
        layer.attention.window = window
    model.config.sliding_window = window
