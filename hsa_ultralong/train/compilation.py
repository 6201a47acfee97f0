"""torch.compile layer by layer on a GPU: graphs stay small and the operators' own loops stay out of them."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from hsa_ultralong.baselines import FullAttentionLM, RivalForCausalLM
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.moe import MixtureOfExperts


def compile_layers(model: HSAForCausalLM | RivalForCausalLM | FullAttentionLM) -> None:
    """Compile the pointwise-heavy parts in place; attention over the memory keeps its own compiled kernels."""
    torch._dynamo.config.cache_size_limit = max(64, torch._dynamo.config.cache_size_limit)
    if isinstance(model, FullAttentionLM):
        for layer in model.layers:
            layer.compile(dynamic=False)
        return
    if isinstance(model, RivalForCausalLM):
        # what all rivals share; their attentions loop over pieces of a row
        for layer in model.model.layers:
            parts: Any = layer
            for part in (parts.input_norm, parts.mlp_norm, parts.mlp):
                part.compile(dynamic=False)
        model.model.norm.compile(dynamic=False)
        return
    for mixture in (part for part in model.modules() if isinstance(part, MixtureOfExperts)):
        # where rows travel to experts the layers' graphs end; how many arrive differs
        mixture.activate = torch.compile(mixture.activate, dynamic=True)  # type: ignore[method-assign]
        if mixture.shared is not None:
            mixture.shared.compile(dynamic=False)
    for layer in model.model.lower_layers:
        layer.compile(dynamic=False)
    for layer in model.model.chunk_encoder.layers:
        layer.compile(dynamic=False)
    model.model.norm.compile(dynamic=False)
    for group in model.model.upper_groups():
        hsa_layer: Any = group.hsa_layer
        hsa_layer.hsa_norm.compile(dynamic=False)
        for part, names in (
            (hsa_layer, ("attend_window", "feed_forward")),
            (hsa_layer.hsa, ("queries",)),
            (group.retriever, ("queries",)),
        ):
            for name in names:
                setattr(part, name, torch.compile(getattr(part, name), dynamic=False))
        for layer in group.layers:
            layer.compile(dynamic=False)


def uncompiled() -> AbstractContextManager[Any]:
    """Compiled parts run as they were written meanwhile: lengths that are seen once are not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
