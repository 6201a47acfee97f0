"""From HSAConfig to modules: the only place, with modeling_hsa.py, where `nn` meets the configuration."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from hsa_ultralong.models.configuration_hsa import HSAConfig
from hsa_ultralong.nn.chunk_encoder import ChunkEncoder, EncoderLayer
from hsa_ultralong.nn.chunk_retriever import ChunkRetriever
from hsa_ultralong.nn.decoder_layer import DecoderLayer
from hsa_ultralong.nn.hierarchical_sparse_attention import HierarchicalSparseAttention, HSALayer
from hsa_ultralong.nn.mlp import SwiGLU
from hsa_ultralong.nn.moe import MixtureOfExperts
from hsa_ultralong.nn.reading_variants import ReadingVariant
from hsa_ultralong.nn.upper_group import UpperGroup
from hsa_ultralong.nn.window_attention import WindowAttention


class RecomputedDecoderLayer(GradientCheckpointingLayer, DecoderLayer):
    """A DecoderLayer that runs again in the backward if gradient checkpointing is on."""


class RecomputedHSALayer(GradientCheckpointingLayer, HSALayer):
    """An HSALayer that does; retrieval before it runs once, as its cost grows with the memory."""


def _mlp(config: HSAConfig, layer_index: int) -> nn.Module:
    if config.num_experts == 0 or layer_index < config.num_dense_layers:
        return SwiGLU(hidden_size=config.hidden_size, intermediate_size=config.intermediate_size)
    assert config.moe_intermediate_size is not None
    return MixtureOfExperts(
        hidden_size=config.hidden_size,
        intermediate_size=config.moe_intermediate_size,
        num_experts=config.num_experts,
        num_experts_per_token=config.num_experts_per_token,
        num_shared_experts=config.num_shared_experts,
    )


def _heads(config: HSAConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "head_dim": config.head_dim,
        "use_qk_norm": config.use_qk_norm,
        "use_qkv_bias": config.use_qkv_bias,
        "rms_norm_eps": config.rms_norm_eps,
    }


def _window(config: HSAConfig, window: int) -> WindowAttention:
    return WindowAttention(num_key_value_heads=config.num_key_value_heads, window=window, **_heads(config))


def _decoder_layer(config: HSAConfig, layer_index: int) -> DecoderLayer:
    return RecomputedDecoderLayer(
        hidden_size=config.hidden_size,
        attention=_window(config, config.sliding_window),
        mlp=_mlp(config, layer_index),
        rms_norm_eps=config.rms_norm_eps,
    )


def build_lower_layer(config: HSAConfig, index: int) -> DecoderLayer:
    """Lower layer `index`, counted from the embedding."""
    return _decoder_layer(config, index)


def build_encoder(config: HSAConfig) -> ChunkEncoder:
    """The chunk encoder with its key, value and landmark heads."""
    assert config.head_dim is not None and config.encoder_intermediate_size is not None
    heads = _heads(config)
    for option, own in (("use_qk_norm", config.encoder_qk_norm), ("use_qkv_bias", config.encoder_qkv_bias)):
        heads[option] = heads[option] if own is None else own
    layers = [
        EncoderLayer(
            intermediate_size=config.encoder_intermediate_size,
            num_key_value_heads=config.num_key_value_heads,
            **heads,
        )
        for _ in range(config.num_encoder_layers)
    ]
    return ChunkEncoder(
        layers=layers,
        hidden_size=config.hidden_size,
        chunk_size=config.chunk_size,
        head_dim=config.head_dim,
        num_memory_heads=config.num_memory_heads,
        num_retrieval_heads=config.num_retrieval_heads,
        retrieval_dim=config.retrieval_dim,
        landmark_source=config.landmark_source,
        normalize_landmarks=config.normalize_retrieval,
        center_landmarks=config.fusion != "stick_breaking",
        use_qk_norm=config.use_qk_norm,
        rope_theta=config.rope_theta,
        rope_scaling=config.rope_scaling,
        rms_norm_eps=config.rms_norm_eps,
    )


def _variant(config: HSAConfig) -> ReadingVariant | None:
    """How chunks are read if not as in the paper."""
    is_joint, is_rotary = config.memory_softmax == "joint", config.memory_positions == "rope"
    theta = config.rope_theta if is_rotary else None
    return ReadingVariant(is_joint, theta, config.rope_scaling) if is_joint or is_rotary else None


def build_group(config: HSAConfig, index: int) -> UpperGroup:
    """Upper group `index`, counted from the memory."""
    first = config.reading_layers[index]
    retriever = ChunkRetriever(
        hidden_size=config.hidden_size,
        retrieval_dim=config.retrieval_dim,
        num_retrieval_heads=config.num_retrieval_heads,
        fusion=config.fusion,
        normalize_queries=config.normalize_retrieval,
        learned_temperature=config.learned_temperature,
        position_decay=config.position_decay,
        gumbel_noise=config.gumbel_noise,
        temperature_chunks=config.temperature_chunks,
        rms_norm_eps=config.rms_norm_eps,
    )
    hsa_layer = RecomputedHSALayer(
        hidden_size=config.hidden_size,
        window_attention=_window(config, config.hsa_sliding_window) if config.hsa_sliding_window else None,
        hsa=HierarchicalSparseAttention(chunk_size=config.chunk_size, variant=_variant(config), **_heads(config)),
        mlp=_mlp(config, first),
        residual=config.hsa_residual,
        rms_norm_eps=config.rms_norm_eps,
    )
    layers = [_decoder_layer(config, first + 1 + i) for i in range(config.group_sizes[index] - 1)]
    return UpperGroup(retriever, hsa_layer, layers)
