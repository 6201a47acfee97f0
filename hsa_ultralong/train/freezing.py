"""Training the upper half alone: every memory that the model has built stays valid (fact 5). Or the memory alone: a
converted model keeps what was its source's. Called by loop.py; tests/train/test_freezing.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.config import TrainConfig
from hsa_ultralong.train.lora import add_lora, is_memory


def prepare_parameters(model: Any, config: TrainConfig) -> None:
    """Which parameters train: all, the upper half, the memory, or the memory and low-rank changes of the rest."""
    if config.freeze_memory:
        freeze_memory(model)
    if config.freeze_source:
        freeze_source(model)
    if config.lora_rank:
        add_lora(model, config.lora_rank, config.lora_layers)


def freeze_memory(model: HSAForCausalLM) -> None:
    """Freeze in place what a memory depends on (inference.memory_fingerprint): embedding, lower decoder, encoder.

    They stay in evaluation mode, also after `model.train()`, so that the landmark centre and router biases keep still.
    A head that is tied to the embedding is frozen with it.
    """
    for part in model.model.memory_parts().values():
        part.eval().requires_grad_(False)
        part.train = _stay(part)  # type: ignore[method-assign, assignment]


def freeze_source(model: HSAForCausalLM) -> None:
    """Freeze in place all that neither makes nor reads the memory: embedding, head, windows, feed-forwards, norms."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_memory(f".{name}"))


def _stay(part: nn.Module) -> Callable[[bool], nn.Module]:
    def train(mode: bool = True) -> nn.Module:
        return part

    return train
