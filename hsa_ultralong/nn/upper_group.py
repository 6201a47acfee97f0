"""The unit of the upper decoder: retrieve once, read the chunks in the HSA layer, then window layers (sec. 3.1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from hsa_ultralong.nn.chunk_retriever import ChunkRetriever, Retrieval
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.hierarchical_sparse_attention import HSALayer
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.views import MemoryView

Ask = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class GroupOutput(NamedTuple):
    """Outputs (B, T, M) of the layers of a group that were asked for, the last one at least, and what it retrieved."""

    outputs: tuple[torch.Tensor, ...]
    retrieval: Retrieval


class Parts:
    """How the parts of a decoder are run: here each as the module it is; models/pieces.py runs them in pieces."""

    def layer(self, layer: nn.Module, *args: Any, **options: Any) -> torch.Tensor:
        return layer(*args, **options)

    def retrieve(self, retriever: ChunkRetriever, *args: Any, **options: Any) -> Retrieval:
        return retriever(*args, **options)

    def read(self, layer: HSALayer, *args: Any, **options: Any) -> torch.Tensor:
        return layer(*args, **options)

    def group(self, group: UpperGroup, *args: Any, **options: Any) -> GroupOutput:
        return group(*args, **options)


MODULES = Parts()


class UpperGroup(nn.Module):
    """One retrieval, one HSA layer, and the group's other sliding-window layers (steps 5 to 7)."""

    def __init__(self, retriever: ChunkRetriever, hsa_layer: HSALayer, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.retriever, self.hsa_layer, self.layers = retriever, hsa_layer, nn.ModuleList(layers)
        # `asking` of this group where it is compiled (train/compilation.py)
        self.ask: Ask | None = None

    @property
    def num_layers(self) -> int:
        return 1 + len(self.layers)

    def forward(
        self,
        x: torch.Tensor,
        views: Sequence[MemoryView],
        rotary: RotaryTable,
        segments: torch.Tensor | None,
        states: Sequence[Any] | None,
        topk: int,
        noise_seed: int | torch.Tensor | None,
        noise_start: int,
        collect: bool = False,
        parts: Parts = MODULES,
    ) -> GroupOutput:
        """(B, T, M) -> (B, T, M). states: the windows of its layers; collect: all their outputs are wanted."""
        first, *rest = states or [None] * self.num_layers
        noise = {"noise_seed": noise_seed, "noise_start": noise_start}
        if self.ask is not None and views and parts is MODULES:
            queries, past_window, asked = self.ask(x, rotary, segments, first)
            retrieval = self.retriever(x, views, topk=topk, queries=queries, **noise)
            x = self.hsa_layer(past_window, retrieval, views, rotary, segments, first, asked)
        else:
            retrieval = parts.retrieve(self.retriever, x, views, topk=topk, **noise)
            x = parts.read(self.hsa_layer, x, retrieval, views, rotary, segments, first)
        outputs = [x]
        for layer, state in zip(self.layers, rest, strict=True):
            x = parts.layer(layer, x, rotary, segments, state)
            outputs = [*outputs, x] if collect else [x]
        return GroupOutput(tuple(outputs), retrieval)


def asking(group: UpperGroup) -> Ask:
    """All that a group does before it searches, as one function to compile: x (B, T, M) is read once, and the gradients
    that its readers give it are added where they are made.

    It keeps the parts as they are now: made before they are compiled, as a graph would end at a norm that is.

    Returns:
        A function of x and what `HSALayer.attend_window` takes, that gives queries of retrieval (B, T, Hr, R), x after
        the HSA layer's window (B, T, M), and queries of HSA (B, T, Hq, D).
    """
    layer, norm = group.hsa_layer, group.hsa_layer.hsa_norm
    attend_window, asked, queries = layer.attend_window, layer.hsa.queries, group.retriever.queries

    def ask(x: torch.Tensor, *window: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        past_window = attend_window(x, *window)
        normed = F.rms_norm(past_window, norm.normalized_shape, norm.weight, norm.eps)
        return queries(x), past_window, asked(normed)

    return ask
