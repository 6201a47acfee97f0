"""The pieces of a decoding step, each compiled on its own: the stream's start, queries, layers, head, and sampling.

Called by engine.py; tests/inference/test_engine.py.
"""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.models import HSAConfig
from hsa_ultralong.nn.ring_window import RingWindow
from hsa_ultralong.nn.rotary import RotaryTable, rotary_at


def sample(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: Any = None
) -> torch.Tensor:
    """Tokens (B,) from logits (B, V): the best where temperature is 0, else drawn from the `top_k` best (0: all) that
    hold the first `top_p` of the probability; no answer of the device is waited for."""
    if temperature == 0:
        return logits.argmax(-1)
    ordered, order = (logits.float() / temperature).sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    # a token stays if those before it hold less than top_p
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    if top_k:
        dropped[:, top_k:] = True
    probabilities = probabilities.masked_fill(dropped, 0.0)
    # the smallest of exponential times with these rates is a draw
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return order.gather(-1, (probabilities / times).argmax(-1, keepdim=True))[:, 0]


def run_start(
    inner: Any, tokens: torch.Tensor, seen: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, RotaryTable]:
    """The stream (B, 1, M) of tokens (B,), and the angles of their places in the windows."""
    return inner.embed_tokens(tokens[:, None]), rotary_of(inner.config, seen, dtype)


def rotary_of(config: HSAConfig, places: torch.Tensor, dtype: torch.dtype) -> RotaryTable:
    """Angles of places (n,) as the model's layers take them."""
    assert config.head_dim is not None
    return rotary_at(places, config.head_dim, config.rope_theta, dtype, config.rope_scaling)


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
