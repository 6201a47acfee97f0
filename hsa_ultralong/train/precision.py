"""Feed-forward blocks that train by products of 8-bit floats (ops/swiglu). Called by loop.py and `hsa bench training`;
tests/train/test_precision.py."""

from __future__ import annotations

import torch
from torch import nn

from hsa_ultralong.models import HSAConfig
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.plain_linear import is_plain_linear
from hsa_ultralong.ops._triton import fp8_runs_on
from hsa_ultralong.ops.swiglu import refuse_fp8

_EXPERTS = "precision=fp8 is for dense feed-forward blocks, not for experts: use precision=bf16"


def require_blocks(precision: str, preset: HSAConfig) -> None:
    """The blocks of a model of this configuration can train in a precision; before it is built.

    Raises:
        ValueError: they cannot.
    """
    if precision != "fp8":
        return
    if preset.num_experts:
        raise ValueError(_EXPERTS)
    for size in (preset.intermediate_size, preset.encoder_intermediate_size):
        if size is not None:
            _require_widths(preset.hidden_size, size)


def _require_widths(width: int, size: int) -> None:
    if (reason := refuse_fp8(width, size)) is not None:
        raise ValueError(f"precision=fp8: {reason}; use precision=bf16")


def require_precision(precision: str, device: torch.device) -> None:
    """The device has the products of a precision.

    Raises:
        ValueError: it does not.
    """
    if precision == "fp8" and not fp8_runs_on(torch.empty(0, device=device)):
        raise ValueError(
            f"precision=fp8 needs an NVIDIA GPU of compute capability 8.9 or newer, got {device}: use precision=bf16"
        )


def set_precision(model: nn.Module, precision: str) -> None:
    """Let the feed-forward blocks of a model, or of a twin, train in a precision, in place.

    Raises:
        ValueError: it has blocks that cannot: experts, low-rank changes, widths that are no multiples of 16.
    """
    if precision != "fp8":
        return
    if any(isinstance(module, MixtureOfExperts) for module in model.modules()):
        raise ValueError(_EXPERTS)
    for module in model.modules():
        if not isinstance(module, SwiGLU):
            continue
        if not all(is_plain_linear(part) for part in (module.gate_proj, module.up_proj, module.down_proj)):
            raise ValueError("precision=fp8 takes plain layers, without adapters or hooks: use precision=bf16")
        _require_widths(*module.down_proj.weight.shape)
        module.trains_fp8 = True
