"""The unit of the upper decoder: retrieve once, read the chunks in the HSA layer, then window layers (sec. 3.1)."""

from __future__ import annotations

import torch
from torch import nn

from hsa_ultralong.nn.chunk_memory import MemoryView
from hsa_ultralong.nn.chunk_retriever import ChunkRetriever
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.hierarchical_sparse_attention import HSALayer
from hsa_ultralong.nn.rotary import RotaryTable
from hsa_ultralong.nn.window_attention import WindowState


class UpperGroup(nn.Module):
    """One retrieval, one HSA layer, and the group's other sliding-window layers (steps 5 to 7)."""

    def __init__(self, retriever: ChunkRetriever, hsa_layer: HSALayer, layers: list[DecoderLayer]) -> None:
        super().__init__()
        self.retriever, self.hsa_layer, self.layers = retriever, hsa_layer, nn.ModuleList(layers)

    def forward(
        self,
        x: torch.Tensor,
        views: list[MemoryView],
        rotary: RotaryTable,
        segments: torch.Tensor | None,
        states: list[WindowState] | None,
        topk: int,
        noise_seed: int | None,
        noise_start: int,
        collect: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """(B, T, M) -> (B, T, M); with `collect`, the outputs of all its layers."""
        empty: list[WindowState | None] = [None] * (1 + len(self.layers))
        first, *rest = states or empty
        retrieval = None
        if views:
            retrieval = self.retriever(x, views, topk=topk, noise_seed=noise_seed, noise_start=noise_start)
        x = self.hsa_layer(x, retrieval, views, rotary, segments, first)
        outputs = [x]
        for layer, state in zip(self.layers, rest, strict=True):
            x = layer(x, rotary, segments, state)
            outputs = [*outputs, x] if collect else [x]
        return tuple(outputs) if collect else x
