"""The pieces in which a decoding step and a compiled reading run, each compiled on its own.

Called by inference/engine.py and reading.py; tests/inference/test_engine.py, tests/models/test_stack.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch

from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.nn.chunk_retriever import Retrieval
from hsa_ultralong.nn.ring_window import RingWindow
from hsa_ultralong.nn.rotary import RotaryTable, rotary_at
from hsa_ultralong.nn.upper_group import GroupOutput, Parts, UpperGroup


def run_start(
    inner: Any, tokens: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, RotaryTable]:
    """The stream (B, 1, M) of tokens (B,), and the angles of their places in the windows."""
    return inner.embed_tokens(tokens[:, None]), rotary_of(inner.config, seen, dtype)


def rotary_of(config: HSAConfig, places: torch.Tensor, dtype: torch.dtype) -> RotaryTable:
    """Angles of places (n,) as the model's layers take them."""
    assert config.head_dim is not None
    return rotary_at(places, config.head_dim, config.rope_theta, dtype, config.rope_scaling)


def run_layer(layer: torch.nn.Module, x: torch.Tensor, rotary: RotaryTable, state: Any) -> torch.Tensor:
    """One window layer; compiled, one graph serves all layers."""
    return layer(x, rotary, None, state)


def run_queries(retriever: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What retrieval of a group asks for: queries, and what products are multiplied by."""
    return retriever.queries(x), retriever.factor()


def run_window(
    layer: Any, x: torch.Tensor, rotary: RotaryTable, ring: RingWindow | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The first part of an HSA layer, before it reads the memory: the stream, and its queries."""
    x = layer.attend_window(x, rotary, None, ring)
    return x, layer.hsa.queries(layer.hsa_norm(x))


def run_feed_forward(layer: Any, x: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
    """The last part of an HSA layer, from what its queries read (B, 1, Hq, D)."""
    return layer.feed_forward(x, layer.hsa.output(read, x.dtype))


def run_head(norm: torch.nn.Module, head: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, V) and the best tokens (B,) of x (B, 1, M)."""
    logits = head(norm(x))[:, 0]
    return logits, logits.argmax(-1)


def run_encoder(encoder: torch.nn.Module, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return encoder(chunks)


@lru_cache(maxsize=16)
def compiled(function: Callable[..., Any], tune: bool = False) -> Callable[..., Any]:
    """torch.compile for one shape; tests replace it. tune: measure tiles, and turn products of one row into sums."""
    return torch.compile(function, dynamic=False, options={"coordinate_descent_tuning": True} if tune else None)


class SplitParts(Parts):
    """Runs the parts of a decoder in pieces between which a memory is read, for tokens of one document a row."""

    def __init__(self, prepare: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda piece: piece) -> None:
        """prepare: makes of a function what runs in its place, torch.compile for example."""
        self.run_start, self.run_layer, self.run_queries = prepare(run_start), prepare(run_layer), prepare(run_queries)
        self.run_window, self.run_feed_forward = prepare(run_window), prepare(run_feed_forward)
        self.run_head = prepare(run_head)

    def layer(self, layer: Any, x: torch.Tensor, rotary: RotaryTable, segments: None, state: Any) -> torch.Tensor:
        return self.run_layer(layer, x, rotary, state)

    def retrieve(self, retriever: Any, x: torch.Tensor, views: Any, *, topk: int, **_: Any) -> Retrieval:
        queries, factor = self.run_queries(retriever, x)
        return retriever.select(queries, factor, views, topk=topk)

    def read(
        self, layer: Any, x: torch.Tensor, retrieval: Retrieval, views: Any, rotary: RotaryTable, _: None, state: Any
    ) -> torch.Tensor:
        x, queries = self.run_window(layer, x, rotary, state)
        return self.run_feed_forward(layer, x, layer.hsa.read(queries, retrieval, views))

    def group(self, group: UpperGroup, *args: Any, **options: Any) -> GroupOutput:
        # past the module, whose hooks are refused
        return UpperGroup.forward(group, *args, **{**options, "parts": self})
