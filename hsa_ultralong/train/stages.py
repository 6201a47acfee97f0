"""What a stage needs, and what it changes in the model: how many chunks a token keeps, how far windows reach, noise
(paper sec. 3.2); how its experts are spread while a run begins, and balanced after every step (docs/training.md)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.train.config import FULL_COVERAGE, StageConfig, TrainConfig
from hsa_ultralong.train.twins import Trained


def check_stage(config: TrainConfig, index: int, preset: HSAConfig, data_world: int) -> None:
    """Stage `index` can run with the rest of the run, on `data_world` processes that have rows of their own.

    Raises:
        ValueError: it cannot; naming the stage.
    """
    stage, parallel, size = config.stages[index], config.parallel, preset.chunk_size
    for step, length in enumerate(stage.lengths):
        stage.forward_rows(data_world, step)
        if length % (parallel.context * size):
            raise ValueError(
                f"stage {stage.name!r}: {'a shape' if stage.shapes else 'seq_len'}={length} must be a multiple of "
                f"chunk_size={size} times parallel.context={parallel.context}"
            )
    if stage.evidence_loss and parallel.context > 1:
        raise ValueError(f"stage {stage.name!r}: evidence_loss needs whole rows: parallel.context=1")
    if stage.piece_tokens and (parallel.context > 1 or stage.piece_tokens % size):
        raise ValueError(
            f"stage {stage.name!r}: piece_tokens must be a multiple of chunk_size={size}, and needs parallel.context=1"
        )
    if config.freeze_memory and stage.sliding_window not in (0, preset.sliding_window):
        raise ValueError(
            f"stage {stage.name!r}: freeze_memory keeps the window that memories were built with, "
            f"{preset.sliding_window}; leave sliding_window={stage.sliding_window} out"
        )
    if stage.hsa_sliding_window and not preset.hsa_sliding_window:
        raise ValueError(
            f"stage {stage.name!r}: the layers that read the memory have no window in this model; leave "
            f"hsa_sliding_window={stage.hsa_sliding_window} out"
        )
    if stage.piece_tokens and parallel.offload_activations:
        raise ValueError(
            f"stage {stage.name!r}: parallel.offload_activations acts on whole rows; with piece_tokens take "
            "piece_offload=true instead"
        )
    if parallel.gradient_sync == "last" and (stage.piece_tokens or stage.needs_teacher):
        name = "piece_tokens" if stage.piece_tokens else "divergence"
        raise ValueError(
            f"stage {stage.name!r}: parallel.gradient_sync=last needs one whole forward before every backward, which "
            f"{name} does not have: set parallel.gradient_sync=every"
        )


def enter_stage(model: Trained, stages: Sequence[StageConfig], index: int, preset: HSAConfig) -> None:
    """Give `model` the K, window and noise of stage `index`; `preset` is its configuration before any stage. A twin
    keeps its own."""
    if isinstance(model, RivalForCausalLM):
        return
    stage, config = stages[index], model.config
    all_chunks = stage.seq_len // config.chunk_size * stage.rows
    config.chunk_topk = all_chunks if stage.chunk_topk == FULL_COVERAGE else stage.chunk_topk
    # a stage without a window of its own keeps that of the last stage that had one, also after a resume
    windows = [earlier.sliding_window for earlier in stages[: index + 1]]
    window = next((size for size in reversed(windows) if size), preset.sliding_window)
    if window != config.sliding_window:
        set_window(model, window)
    own = [earlier.hsa_sliding_window for earlier in stages[: index + 1]]
    own_window = next((size for size in reversed(own) if size), preset.hsa_sliding_window)
    if own_window != config.hsa_sliding_window:
        set_hsa_window(model, own_window)
    config.gumbel_noise = preset.gumbel_noise if stage.gumbel_noise is None else stage.gumbel_noise
    for group in model.model.upper_groups():
        group.retriever.gumbel_noise = config.gumbel_noise


def set_hsa_window(model: HSAForCausalLM, window: int) -> None:
    """Change the window of the layers that read the memory."""
    for group in model.model.upper_groups():
        if group.hsa_layer.window_attention is not None:
            group.hsa_layer.window_attention.window = window
    model.config.hsa_sliding_window = window


def set_window(model: HSAForCausalLM, window: int) -> None:
    """Change the sliding window of every layer that has the configuration's; HSA layers keep their own."""
    layers = [*model.model.lower_layers, *(layer for group in model.model.upper_groups() for layer in group.layers)]
    for layer in layers:
        layer.attention.window = window
    model.config.sliding_window = window


def require_experts(config: TrainConfig, preset: HSAConfig) -> None:
    """Raises: ValueError: choices of experts are to be spread in a model without any."""
    if config.router_warmup_steps and (config.has_twin or not preset.num_experts):
        raise ValueError(
            f"router_warmup_steps={config.router_warmup_steps} spreads tokens over experts, and this model has none; "
            "leave it out, or set model.num_experts"
        )


def spread_strength(warmup_steps: int, step: int) -> float:
    """How much the choice of step `step` (0-based, of the run) is spread: falls from 1 to 0 over `warmup_steps`."""
    return max(0.0, 1.0 - step / warmup_steps) if warmup_steps else 0.0


def spread_experts(model: nn.Module, strength: float) -> None:
    """Set the spread of every mixture; at 0 it is off, and costs nothing."""
    shared: torch.Tensor | None = None
    for part in model.modules():
        if isinstance(part, MixtureOfExperts):
            if shared is None and strength > 0:
                shared = torch.tensor(strength, dtype=torch.float32, device=part.router_bias.device)
            part.spread = shared


def balance_experts(model: nn.Module) -> dict[str, torch.Tensor]:
    """After an optimiser step and `synchronize_buffers`: move the biases; the load of the worst layer and the mean."""
    if not isinstance(model, HSAForCausalLM):
        return {}
    balance = model.update_router_bias()
    if not balance:
        return {}
    layers = torch.stack(balance)
    return {"expert_imbalance": layers.max(), "expert_imbalance_mean": layers.mean()}
