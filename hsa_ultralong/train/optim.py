"""Optimisers of a run: AdamW, or Muon on the matrices of the layers beside AdamW on the rest.

Muon (Jordan 2024; torch.optim.Muon) orthogonalises the momentum of every matrix; steps are scaled to the size of
AdamW's (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rates. Made anew at every stage by loop.py;
tests/train/test_optim.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hsa_ultralong.train.config import TrainConfig

# looked up or multiplied as tables, not as maps of hidden states
_TABLES = ("embed_tokens.weight", "lm_head.weight")


def decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on parameters of two and more dimensions only: not on norms and other vectors."""
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for parameter in parameters:
        (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, or two that together hold every parameter once; their learning rate is set before every step.

    Raises:
        ValueError: for Muon on weights that are cut over processes, whose matrices no process holds.
    """
    use_muon = config.optimizer == "muon"
    hidden: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        is_hidden = use_muon and parameter.dim() == 2 and not name.endswith(_TABLES)
        (hidden if is_hidden else others).append(parameter)
    is_cuda = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(decay_groups(others, config.weight_decay), betas=config.betas, lr=0.0, fused=is_cuda)
    if not use_muon:
        return [adamw]
    if any(isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel() for parameter in hidden):
        raise ValueError("optimizer=muon needs whole matrices on every process: set parallel.shard=1, or use adamw")
    muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]
