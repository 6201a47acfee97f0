"""From RivalConfig to layers, by the names that it lists."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from hsa_ultralong.baselines.attention import Rope
from hsa_ultralong.baselines.configuration import RivalConfig
from hsa_ultralong.baselines.decoding import SelectingAttention, Selection
from hsa_ultralong.baselines.full_attention import FullAttention, FullAttentionNoPE
from hsa_ultralong.baselines.gated_delta import GatedDelta
from hsa_ultralong.baselines.infllm import InfLLM
from hsa_ultralong.baselines.landmarks import HiLS, LandmarkAttention
from hsa_ultralong.baselines.moba import MeanTopK
from hsa_ultralong.baselines.nsa import NativeSparseAttention
from hsa_ultralong.baselines.window import Window, WindowAndSinks
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.mlp import SwiGLU


def _heads(config: RivalConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "use_qk_norm": config.use_qk_norm,
        "rms_norm_eps": config.rms_norm_eps,
    }


def _choice(config: RivalConfig) -> dict[str, Any]:
    return {
        "chunk_size": config.chunk_size,
        "topk": config.chunk_topk,
        "size": config.compression_size,
        "stride": config.compression_stride,
        "num_initial": config.num_initial_chunks,
        "num_local": config.num_local_chunks,
        "impl": config.sparse_impl,
    }


def _selection(config: RivalConfig) -> Selection:
    return Selection(config.decoding, config.decoding_tokens, config.decoding_tail, config.num_sinks, config.chunk_size)


def _rope(config: RivalConfig) -> Rope:
    return Rope(config.head_dim, *config.rope())


ATTENTIONS: dict[str, Callable[[RivalConfig], nn.Module]] = {
    "full_rope": lambda config: (
        FullAttention(**_heads(config))
        if config.decoding == "full"
        else SelectingAttention(selection=_selection(config), rope=_rope(config), **_heads(config))
    ),
    "full_nope": lambda config: FullAttentionNoPE(**_heads(config)),
    "window": lambda config: Window(window=config.sliding_window, **_heads(config)),
    "window_sinks": lambda config: WindowAndSinks(
        window=config.sliding_window, num_sinks=config.num_sinks, rope=_rope(config), **_heads(config)
    ),
    "moba": lambda config: MeanTopK(
        chunk_size=config.chunk_size, topk=config.chunk_topk, impl=config.sparse_impl, **_heads(config)
    ),
    "nsa": lambda config: NativeSparseAttention(
        window=config.sliding_window, rope=_rope(config), **_choice(config), **_heads(config)
    ),
    "gated_delta": lambda config: GatedDelta(impl=config.linear_impl, **_heads(config)),
    "landmark": lambda config: LandmarkAttention(
        chunk_size=config.chunk_size, topk=config.chunk_topk, **_heads(config)
    ),
    "hils": lambda config: HiLS(
        chunk_size=config.chunk_size,
        topk=config.chunk_topk,
        window=config.sliding_window,
        rank=config.calibration_rank,
        **_heads(config),
    ),
    "infllm_v2": lambda config: InfLLM(dense_tokens=config.dense_tokens, **_choice(config), **_heads(config)),
}


def build_layer(config: RivalConfig, name: str) -> DecoderLayer:
    """A layer with the attention called `name`; norms and feed-forward block are those of our own layers."""
    return DecoderLayer(
        hidden_size=config.hidden_size,
        attention=ATTENTIONS[name](config),  # type: ignore[arg-type]
        mlp=SwiGLU(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size),
        rms_norm_eps=config.rms_norm_eps,
    )
