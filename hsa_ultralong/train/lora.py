"""Low-rank change of the layers that a converted model took over, while everything of the memory trains in full.

What a run learns is then small: train/difference.py writes it into one file. peft would rename every layer below it,
which checkpoints, sharding and the pieces of long rows go by; here `weight` keeps its name. Called by loop.py;
tests/train/test_difference.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.models import HSAForCausalLM

SCALE = 2.0
_MEMORY = (".embedding_skip.", ".chunk_encoder.", ".retriever.", ".hsa_layer.hsa.", ".hsa_layer.hsa_norm.")
_DOWN, _UP = "lora_a", "lora_b"
_LOWER = ".lower_layers."


def is_memory(name: str) -> bool:
    """Whether a parameter or module makes or reads memory: encoder, retrieval, attention to chunks."""
    return any(part in f"{name}." for part in _MEMORY)


class LoRALinear(nn.Linear):
    """x -> W x + scale * B A x, with W (out, in) frozen, A (rank, in) random and B (out, rank) zero at first."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight, self.bias = layer.weight, layer.bias
        self.lora_a = nn.Parameter(layer.weight.new_empty(rank, layer.in_features).normal_(std=layer.in_features**-0.5))
        self.lora_b = nn.Parameter(layer.weight.new_zeros(layer.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + SCALE * F.linear(F.linear(x, self.lora_a), self.lora_b)


def add_lora(model: HSAForCausalLM, rank: int, layers: str = "all") -> None:
    """Give every linear layer outside the memory a low-rank change, in place; embedding and head stay, norms train.

    Args:
        layers: "all", or "upper": the lower decoder stays as it is, norms too, and no gradient passes through it.

    Raises:
        ValueError: a mixture of experts, whose matrices are stacked.
    """
    if model.config.num_experts:
        raise ValueError("lora_rank: mixtures of experts have no low-rank change here; leave it out")

    def is_changed(name: str) -> bool:
        return layers == "all" or _LOWER not in f".{name}"

    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear) and not is_memory(f".{name}") and is_changed(name):
            model.model.set_submodule(name, LoRALinear(module, rank))
    for name, parameter in model.named_parameters():
        is_trained = is_memory(name) or parameter.dim() < 2 or name.endswith((_DOWN, _UP))
        parameter.requires_grad_(is_trained and is_changed(name))


def is_lora(name: str) -> bool:
    """Whether a tensor is half of a low-rank change."""
    return name.endswith((f".{_DOWN}", f".{_UP}"))


def merged(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their plain names, every low-rank change added to its matrix."""
    found = {name: tensor for name, tensor in weights.items() if not is_lora(name)}
    for name, down in weights.items():
        if name.endswith(f".{_DOWN}"):
            stem = name.removesuffix(_DOWN)
            base, up = found[f"{stem}weight"], weights[f"{stem}{_UP}"]
            found[f"{stem}weight"] = (base.float() + SCALE * (up.float() @ down.float())).to(base.dtype)
    return found
