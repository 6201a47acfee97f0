"""FLOP per token of training of a rival in closed form, as docs/results.md counts them.

tests/baselines/test_twins.py.
"""

from __future__ import annotations

from collections.abc import Callable

from hsa_ultralong.baselines.configuration import RivalConfig
from hsa_ultralong.baselines.twins import rival_parameters


def _windowed(window: int, context: int) -> float:
    """Mean of min(W, t + 1) over t < context."""
    full = max(context - window, 0)
    start = context - full
    return (start * (start + 1) / 2 + full * window) / context


def _selected(config: RivalConfig, context: int) -> float:
    """Keys in the chosen chunks, about: the own chunk is half read on average."""
    return _windowed(config.chunk_topk * config.chunk_size, context)


# layer -> keys that a token is compared with and reads, mean over a row of `context` tokens
_KEYS: dict[str, Callable[[RivalConfig, int], float]] = {
    "full_rope": lambda config, context: (context + 1) / 2,
    "full_nope": lambda config, context: (context + 1) / 2,
    "window": lambda config, context: _windowed(config.sliding_window, context),
    "window_sinks": lambda config, context: _windowed(config.sliding_window + config.num_sinks, context),
    # a product with a mean is half of a key's products and sums
    "moba": lambda config, context: _selected(config, context) + context / (4 * config.chunk_size),
    "nsa": lambda config, context: (
        _selected(config, context)
        + _windowed(config.sliding_window, context)
        + context / (2 * config.compression_stride)
    ),
    # a state of D^2 numbers is decayed, corrected and read: 6 D^2 for every 4 D of a key, whatever the context
    "gated_delta": lambda config, context: 1.5 * config.head_dim,
    # in training landmarks read all chunks, as full attention does, and their summaries
    "landmark": lambda config, context: (context + 1) / 2 + context / (2 * config.chunk_size),
    "hils": lambda config, context: (
        _selected(config, context)
        + _windowed(config.sliding_window + config.chunk_size // 2, context)
        + context / (2 * config.chunk_size)
    ),
    "infllm_v2": lambda config, context: _selected(config, context) + context / (4 * config.compression_stride),
}


def training_flops(config: RivalConfig, context: int) -> float:
    """FLOP of training on one token: 6 * parameters (a tied embedding once, as the head; another one not at all) + 3 *
    attention, 4 * Hq * D for every key that a token reads."""
    assert config.layers is not None
    parameters = rival_parameters(config)
    if not config.tie_word_embeddings:
        parameters -= config.vocab_size * config.hidden_size
    per_key = 4 * config.num_attention_heads * config.head_dim
    return 6 * parameters + 3 * per_key * sum(_KEYS[name](config, context) for name in config.layers)
