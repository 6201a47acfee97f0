"""What a run does for its mixtures of experts: spread tokens while it begins, balance the load after every step.

In the first steps all tokens have nearly one hidden state, and that state turns faster than biases can follow: one
expert is chosen by every token of a layer. So for `router_warmup_steps` steps choices are spread over the experts, less
and less, while the biases learn (docs/training.md). Called by loop.py; tests/train/test_experts.py.
"""

from __future__ import annotations

import torch
from torch import nn

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.moe import MixtureOfExperts


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
