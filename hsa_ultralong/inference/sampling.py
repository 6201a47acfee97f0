"""The next token from logits, without waiting for the device. Called by engine.py; tests/inference/test_engine.py."""

from __future__ import annotations

from typing import Any

import torch


def sample(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, generator: Any = None
) -> torch.Tensor:
    """Tokens (B,) from logits (B, V): the best where temperature is 0, else drawn from the `top_k` best (0: all) that
    hold the first `top_p` of the probability; no answer of the device is waited for."""
    if temperature == 0:
        return logits.argmax(-1)
    # below the best, so that no temperature, however small, makes all of them infinite
    below = logits.float() - logits.float().amax(-1, keepdim=True)
    ordered, order = (below / max(temperature, torch.finfo(torch.float32).tiny)).sort(-1, descending=True)
    probabilities = ordered.softmax(-1)
    # a token stays if those before it hold less than top_p
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    if top_k:
        dropped[:, top_k:] = True
    probabilities = probabilities.masked_fill(dropped, 0.0)
    # the smallest of exponential times with these rates is a draw
    times = torch.empty_like(probabilities).exponential_(generator=generator)
    return order.gather(-1, (probabilities / times).argmax(-1, keepdim=True))[:, 0]
