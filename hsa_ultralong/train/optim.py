"""Optimisers of a run: AdamW, or Muon on the matrices of the layers and of the experts beside AdamW on the rest.

Muon (Jordan 2024; torch.optim.Muon) orthogonalises the momentum of every matrix; steps are scaled to the size of
AdamW's (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rates. torch has it for single matrices;
the stacked ones of a mixture of experts are done all at once here. Made anew at every stage by loop.py;
tests/train/test_optim.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hsa_ultralong.train.config import TrainConfig
from hsa_ultralong.train.lora import is_lora

# looked up or multiplied as tables, not as maps of hidden states
_TABLES = ("embed_tokens.weight", "lm_head.weight")
# stacks (E, M, 2 I) that hold two matrices side by side
_PAIRS = ("gate_up",)


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on parameters of two and more dimensions only: not on norms and other vectors."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


class StackedMuon(torch.optim.Optimizer):
    """torch.optim.Muon, with its numbers, for stacks of matrices (E, M, N); every matrix of a stack is one of its own.

    Args:
        stacks: parameters (E, M, N).
        pairs: parameters (E, M, 2 N) of two matrices side by side.
        weight_decay, momentum: as in torch.optim.Muon.
    """

    coefficients = (3.4445, -4.7750, 2.0315)
    iterations = 5

    def __init__(
        self,
        stacks: list[nn.Parameter],
        pairs: list[nn.Parameter],
        *,
        lr: float = 0.0,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "matrices": 1}
        groups: list[dict[str, Any]] = [{"params": stacks, "matrices": 1}, {"params": pairs, "matrices": 2}]
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; parameters without a gradient stay."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weight, grad, average = (_local(part) for part in (parameter, gradient, state["momentum_buffer"]))
        average.lerp_(grad, 1 - group["momentum"])
        update = grad.lerp(average, group["momentum"])
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        width = weight.shape[-1] // group["matrices"]
        step = 0.2 * math.sqrt(max(weight.shape[-2], width)) * group["lr"]
        for part, change in zip(weight.split(width, dim=-1), update.split(width, dim=-1), strict=True):
            part.add_(self.orthogonal(change), alpha=-step)

    @classmethod
    def orthogonal(cls, matrices: torch.Tensor) -> torch.Tensor:
        """(E, M, N) -> (E, M, N) bf16: the orthogonal factor of each, about, by Newton-Schulz iteration."""
        a, b, c = cls.coefficients
        is_tall = matrices.shape[-2] > matrices.shape[-1]
        x = (matrices.mT if is_tall else matrices).bfloat16()
        x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
        for _ in range(cls.iterations):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return x.mT if is_tall else x


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, or several that together hold every parameter once; their learning rate is set before every step.

    Raises:
        ValueError: for Muon on weights that are cut over processes, whose matrices no process holds.
    """
    is_cuda = next(model.parameters()).is_cuda

    def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            decay_groups(parameters, config.weight_decay), betas=config.betas, lr=0.0, fused=is_cuda
        )

    if config.optimizer != "muon":
        trained = {name: part for name, part in model.named_parameters() if part.requires_grad}
        if config.old_rate == 1:
            return [adamw(trained.values())]
        fresh = {name for name in trained if name in config.fresh or is_lora(name)}
        groups = []
        for rate, names in ((1.0, fresh), (config.old_rate, trained.keys() - fresh)):
            parts = decay_groups([part for name, part in trained.items() if name in names], config.weight_decay)
            groups += [{**group, "rate": rate} for group in parts]
        return [torch.optim.AdamW(groups, betas=config.betas, lr=0.0, fused=is_cuda)]
    matrices: list[nn.Parameter] = []
    stacks: list[nn.Parameter] = []
    pairs: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith(_TABLES) or parameter.dim() < 2:
            others.append(parameter)
        elif parameter.dim() == 2:
            matrices.append(parameter)
        else:
            (pairs if name.endswith(_PAIRS) else stacks).append(parameter)
    if any(_local(part).numel() < part.numel() for part in matrices):
        raise ValueError("optimizer=muon needs whole matrices on every process: set parallel.shard=1, or use adamw")
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    experts = [StackedMuon(stacks, pairs, weight_decay=config.weight_decay)] if stacks or pairs else []
    return [muon, *experts, adamw(others)]
