"""torch.compile layer by layer on a GPU: graphs stay small and the operators' own loops stay out of them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.baselines import FullAttentionLM, RivalForCausalLM
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.upper_group import asking


def compile_layers(
    model: HSAForCausalLM | RivalForCausalLM | FullAttentionLM, *, joins: bool = True, is_cut: bool = False
) -> None:
    """Compile the pointwise-heavy parts in place; attention over the memory keeps its own compiled kernels.

    joins: all that a group does before it searches is one part (`asking`). Without it nothing of an HSA layer runs
    outside the layer: for layers that run again in the backward, which so keep less. is_cut: FSDP gathers the weights
    of a layer when it is called, which no graph of several layers can hold.
    """
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    if isinstance(model, FullAttentionLM):
        for layer in model.layers:
            layer.compile(dynamic=False)
        _compile_norm(model.norm)
        return
    if isinstance(model, RivalForCausalLM):
        # what all rivals share; their attentions loop over pieces of a row
        for layer in model.model.layers:
            parts: Any = layer
            for norm in (parts.input_norm, parts.mlp_norm):
                _compile_norm(norm)
            parts.mlp.compile(dynamic=False)
        _compile_norm(model.model.norm)
        return
    for mixture in (part for part in model.modules() if isinstance(part, MixtureOfExperts)):
        # where rows travel to experts the layers' graphs end; how many arrive differs
        mixture.activate = torch.compile(mixture.activate, dynamic=True)  # type: ignore[method-assign]
        if mixture.shared is not None:
            mixture.shared.compile(dynamic=False)
    for layer in model.model.lower_layers:
        layer.compile(dynamic=False)
    encoder = model.model.chunk_encoder
    if is_cut:
        for layer in encoder.layers:
            layer.compile(dynamic=False)
    _compile_methods(encoder, *(("inputs", "outputs") if is_cut else ("run",)))
    _compile_norm(model.model.norm)
    for group in model.model.upper_groups():
        hsa_layer: Any = group.hsa_layer
        if joins:
            group.ask = torch.compile(asking(group), dynamic=False)
        _compile_norm(hsa_layer.hsa_norm)
        _compile_methods(hsa_layer, "attend_window", "feed_forward")
        _compile_methods(hsa_layer.hsa, "queries", "output")
        _compile_methods(group.retriever, "queries")
        for layer in group.layers:
            layer.compile(dynamic=False)


def _compile_methods(part: nn.Module, *names: str) -> None:
    for name in names:
        setattr(part, name, torch.compile(getattr(part, name), dynamic=False))


def _normalize(norm: nn.RMSNorm, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, norm.normalized_shape, norm.weight, norm.eps)


def _compile_norm(norm: nn.RMSNorm) -> None:
    """A norm that stands alone: torch.compile leaves out modules of torch itself, without a word."""
    # a method, so that a copy of the norm has its own weight
    norm.forward = MethodType(torch.compile(_normalize, dynamic=False), norm)  # type: ignore[method-assign]


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written meanwhile: lengths that are seen once are not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
