"""Whether a linear layer is its weight and nothing more, so that an operator may take the weight alone."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """False for adapters, quantised or sharded weights, parametrisations, biases, hooks and replaced forwards."""
    return (
        type(layer) is nn.Linear
        and layer.bias is None
        and type(layer.weight) in (nn.Parameter, torch.Tensor)
        and type(layer.weight.data) is torch.Tensor
        and "forward" not in vars(layer)
        and not any(getattr(layer, hooks) for hooks in _HOOKS)
        and not torch.nn.modules.module._has_any_global_hook()
    )
