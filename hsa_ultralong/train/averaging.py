"""Weighted means of models that began as one: what each learnt apart, without training again.

Weights of fine-tuned copies can be averaged where training did not carry them far apart (Wortsman et al., "Robust
fine-tuning of zero-shot models", 2022, arXiv 2109.01903). Called by `hsa average`; tests/train/test_averaging.py;
docs/pooled-memory.md has what it brought. And a mean along a stage, for loop.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.checkpoint import model_tensors

_MEAN = "mean/"


def average_models(models: Sequence[HSAForCausalLM], weights: Sequence[float]) -> HSAForCausalLM:
    """The first model with every weight and running statistic replaced by the weighted mean, taken in fp32.

    Args:
        weights: one a model, of any sign; they must add up to 1 (to 1e-6).

    Raises:
        ValueError: for fewer than two models, another number of weights or another sum, or models of other shapes.
    """
    if len(models) < 2 or len(models) != len(weights):
        raise ValueError(f"need two models or more and a weight for each, got {len(models)} and {len(weights)}")
    if abs(sum(weights) - 1) > 1e-6:
        raise ValueError(f"weights must add up to 1, got {' + '.join(map(str, weights))} = {sum(weights):g}")
    tables = [model.state_dict() for model in models]
    shapes = [{name: tensor.shape for name, tensor in table.items()} for table in tables]
    for number, other in enumerate(shapes[1:], 2):
        differing = sorted(name for name in shapes[0].keys() | other.keys() if shapes[0].get(name) != other.get(name))
        if differing:
            raise ValueError(f"model {number} has other weights than the first ({differing[0]}): nothing to average")
    means = {}
    for name, first in tables[0].items():
        parts = [table[name] for table in tables]
        if first.is_floating_point():
            mean = torch.zeros_like(first, dtype=torch.float32)
            for weight, part in zip(weights, parts, strict=True):
                mean += weight * part.float()
            means[name] = mean
        elif any(not torch.equal(part, first) for part in parts):
            raise ValueError(f"{name} holds whole numbers that differ: nothing to average")
    # all at once: tied weights have two names
    models[0].load_state_dict(means, strict=False)
    # measured for other weights
    models[0].config.unsure_below = None
    return models[0]


class RunningMean:
    """Exponential mean of a model's weights along a stage, in fp32, from those it begins with.

    After n steps the beginning has the share decay**n, so that what an earlier stage learnt is kept in part.
    """

    def __init__(self, model: Any) -> None:
        self._means = {
            name: tensor.detach().float().clone()
            for name, tensor in model_tensors(model).items()
            if tensor.is_floating_point()
        }

    @torch.no_grad()
    def add(self, model: Any, decay: float) -> None:
        """mean = decay * mean + (1 - decay) * weights."""
        own = model_tensors(model)
        for name, mean in self._means.items():
            mean.lerp_(own[name].float(), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: Any) -> None:
        """Give the model the mean in place of its weights."""
        own = model_tensors(model)
        for name, mean in self._means.items():
            own[name].copy_(mean)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The means by names of their own, for a checkpoint."""
        return {_MEAN + name: mean for name, mean in self._means.items()}
