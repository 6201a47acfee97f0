"""Twins: a rival as large as one of our models, of the same width and heads, that differs by attention.

As many layers as the model has in its decoder and its encoder; the feed-forward width takes up the difference in
parameters, so that totals agree within 2%. Called by train/; tests/baselines/test_twins.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch

from hsa_ultralong.baselines.configuration import LAYERS, RivalConfig
from hsa_ultralong.models import HSAConfig
from hsa_ultralong.models.accounting import count_parameters

# attention of the layers from the embedding up, repeated as often as there are layers
TWINS: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in LAYERS},
    # the shares of Qwen3-Next, Kimi Linear and others
    "linear_hybrid": ("gated_delta", "gated_delta", "gated_delta", "full_rope"),
    "window_hybrid": ("window", "window", "window", "full_rope"),
}
# feed-forward widths are multiples of this
_STEP = 16
# options that follow from the model, or would undo what a twin is
_FIXED = ("layers", "intermediate_size", "vocab_size", "hidden_size", "bos_token_id", "eos_token_id", "pad_token_id")


def rival_parameters(config: RivalConfig) -> int:
    """Parameters of RivalForCausalLM(config), tied ones once."""
    from hsa_ultralong.baselines.modeling import RivalForCausalLM

    with torch.device("meta"):
        return sum(part.numel() for part in RivalForCausalLM(config).parameters())


def twin_config(model: HSAConfig, twin: str, options: Mapping[str, Any] | None = None) -> RivalConfig:
    """Configuration of the twin of `model` called `twin`.

    Args:
        options: other options of RivalConfig, such as {"num_sinks": 8}.

    Raises:
        ValueError: for an unknown twin, an option that is fixed, or a model that has no twin.
    """
    if twin not in TWINS:
        close = get_close_matches(twin, TWINS, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown twin {twin!r}{hint}; there are {', '.join(TWINS)}")
    if model.num_experts or model.use_qkv_bias:
        raise ValueError("a twin has dense layers without biases: set model.num_experts=0, model.use_qkv_bias=false")
    chosen = dict(options or {})
    if fixed := [name for name in _FIXED if name in chosen]:
        raise ValueError(f"twin_options cannot set {fixed[0]}: it follows from the model and the twin")
    count = model.num_hidden_layers + model.num_encoder_layers
    pattern = TWINS[twin]
    shared = {
        name: getattr(model, name)
        for name in (
            "vocab_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta",
            "rope_scaling", "use_qk_norm", "rms_norm_eps", "initializer_range", "tie_word_embeddings", "chunk_size",
            "chunk_topk", "sliding_window", "bos_token_id", "eos_token_id", "pad_token_id",
        )
    }  # fmt: skip
    fields: dict[str, Any] = {**shared, **chosen, "layers": [pattern[i % len(pattern)] for i in range(count)]}
    smallest = rival_parameters(RivalConfig(**fields, intermediate_size=_STEP))
    step = 3 * model.hidden_size * _STEP * count
    steps = 1 + max(0, round((count_parameters(model).total - smallest) / step))
    return RivalConfig(**fields, intermediate_size=_STEP * steps)
