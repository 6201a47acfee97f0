"""What a decoding step reads and writes of its rows, in place. Called by engine.py and batching.py;
tests/inference/test_engine.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa_ultralong.models import HSACache
from hsa_ultralong.nn.ring_window import RingWindows
from hsa_ultralong.nn.rotary import RotaryTable


@dataclass
class DecodingState:
    """Tensors whose first dimension are rows.

    Attributes:
        tokens: (B,) int64 to be read next. logits: (B, V) of the last step. places, seen: (B,) int64, places of the
            next token in the row's own grid of chunks, and in the numbering of its windows. positions: (B, 1) int32,
            the places that the step at hand reads at. pending: (B, S, M or 2M) lower outputs of the open chunk.
            retrieved: per upper group, indices and weights (B, Hr, K).
    """

    tokens: torch.Tensor
    logits: torch.Tensor
    places: torch.Tensor
    seen: torch.Tensor
    positions: torch.Tensor
    pending: torch.Tensor
    windows: RingWindows
    retrieved: list[tuple[torch.Tensor, torch.Tensor]]

    @staticmethod
    def make(config: Any, batch: int, slots: int, dtype: torch.dtype, device: torch.device) -> DecodingState:
        """Empty rows; slots: chunks that a token retrieves at most."""
        places = torch.zeros(batch, dtype=torch.int64, device=device)
        seen = torch.zeros_like(places)
        windows = RingWindows(
            seen, config.layer_windows, heads=config.num_key_value_heads, dim=config.head_dim, dtype=dtype,
            device=device,
        )  # fmt: skip
        shape = (batch, config.num_retrieval_heads, slots)
        return DecodingState(
            torch.zeros_like(places),
            torch.zeros((batch, config.vocab_size), dtype=dtype, device=device),
            places,
            seen,
            torch.zeros((batch, 1), dtype=torch.int32, device=device),
            torch.zeros((batch, config.chunk_size, config.lower_width), dtype=dtype, device=device),
            windows,
            [
                (torch.full(shape, -1, dtype=torch.int32, device=device), torch.zeros(shape, device=device))
                for _ in range(config.num_upper_groups)
            ],
        )

    def first(self, batch: int) -> DecodingState:
        """The first rows, as views."""
        part = slice(0, batch)
        retrieved = [(indices[part], weights[part]) for indices, weights in self.retrieved]
        return DecodingState(
            self.tokens[part], self.logits[part], self.places[part], self.seen[part], self.positions[part],
            self.pending[part], self.windows.first(batch), retrieved,
        )  # fmt: skip

    def tensors(self) -> list[torch.Tensor]:
        """All of them."""
        rings = [part for ring in self.windows.rings if ring is not None for part in (ring.keys, ring.values)]
        plain = [self.tokens, self.logits, self.places, self.seen, self.positions, self.pending]
        return [*plain, *rings, *(part for pair in self.retrieved for part in pair)]

    def load(
        self, rows: torch.Tensor, sources: torch.Tensor, cache: HSACache, lengths: Sequence[int],
        rotary: Callable[[torch.Tensor], RotaryTable],
    ) -> None:  # fmt: skip
        """Rows (n,) int64 take the state of rows `sources` of a cache, documents of `lengths` tokens from their start;
        rotary: angles of places (m,)."""
        seen = torch.tensor(lengths, device=rows.device)
        self.places[rows], self.seen[rows] = seen, seen
        tables: dict[int, RotaryTable] = {}
        for number, ring in enumerate(self.windows.rings):
            keys, values = cache.state(number).keys, cache.state(number).values
            if ring is None or keys is None or values is None:
                continue
            kept = min(keys.shape[1], ring.window)
            if kept < min(max(lengths), ring.window):
                raise ValueError(f"a window of {ring.window} needs the keys of {max(lengths)} tokens, got {kept}")
            places = seen[:, None] - kept + torch.arange(kept, device=rows.device)  # (n, kept)
            if kept not in tables:
                tables[kept] = rotary(places.clamp_min(0).flatten())
            ring.load_rows(rows, keys[sources, -kept:], values[sources, -kept:], tables[kept], places)
        if cache.pending is not None:
            size, count = self.pending.shape[1], cache.pending.shape[1]
            # the open chunk stands at the end
            index = count - (seen % size)[:, None] + torch.arange(size, device=rows.device)
            self.pending[rows] = cache.pending[sources[:, None], index.clamp(0, count - 1)].to(self.pending.dtype)

    def copy_row(self, source: int, target: int) -> None:
        for tensor in self.tensors():
            tensor[target] = tensor[source]


class StepGraphs:
    """Parts of a step as CUDA graphs; the functions have run a few times before."""

    def __init__(self, parts: Sequence[Callable[[], None]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                for part in parts:
                    part()
        torch.cuda.current_stream().wait_stream(side)
        self.graphs = [torch.cuda.CUDAGraph() for _ in parts]
        # other threads, such as the one that watches over NCCL, may meanwhile ask the device
        for graph, part in zip(self.graphs, parts, strict=True):
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                part()

    def replay(self, number: int) -> None:
        self.graphs[number].replay()
