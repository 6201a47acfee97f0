"""Optimisers of a run: AdamW, or Muon on the matrices of the layers beside AdamW on the rest.

Muon (Jordan 2024; torch.optim.Muon) orthogonalises the momentum of every matrix; steps are scaled to the size of
AdamW's (Liu et al. 2025, arXiv 2502.16982), so both take the same learning rates. Made anew at every stage by loop.py;
tests/train/test_optim.py.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from hsa_ultralong.train.config import TrainConfig

# looked up or multiplied as tables, not as maps of hidden states
_TABLES = ("embed_tokens.weight", "lm_head.weight")


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """One optimiser, or two that together hold every parameter once; their learning rate is set before every step.

    Weight decay is on parameters of two and more dimensions only.

    Raises:
        ValueError: for Muon on weights that are cut over processes, whose matrices no process holds.
    """
    use_muon = config.optimizer == "muon"
    hidden: list[nn.Parameter] = []
    matrices: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if use_muon and parameter.dim() == 2 and not name.endswith(_TABLES):
            hidden.append(parameter)
        else:
            (matrices if parameter.dim() >= 2 else vectors).append(parameter)
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    is_cuda = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(groups, betas=config.betas, lr=0.0, fused=is_cuda)
    if not use_muon:
        return [adamw]
    if any(isinstance(parameter, DTensor) and parameter.to_local().numel() < parameter.numel() for parameter in hidden):
        raise ValueError("optimizer=muon needs whole matrices on every process: set parallel.shard=1, or use adamw")
    muon = torch.optim.Muon(hidden, lr=0.0, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, adamw]
