"""Closed forms against real parameters, real memories and sums over positions."""

from __future__ import annotations

import pytest
import torch

from hsa_ultralong.models import HSAForCausalLM, HSAModel
from hsa_ultralong.models.accounting import (
    continuation_bytes,
    count_expert_parameters,
    count_parameters,
    flops_per_token,
    full_attention_cache_bytes,
    memory_bytes,
    memory_bytes_per_token,
    reading_flops_per_token,
)
from hsa_ultralong.models.presets import PRESETS, preset
from hsa_ultralong.nn.moe import MixtureOfExperts

VARIANTS = {
    "plain": {},
    "untied": {"tie_word_embeddings": False},
    "no qk norm": {"use_qk_norm": False},
    "biases": {"use_qkv_bias": True, "num_encoder_layers": 2},
    "biases, HSA only": {"use_qkv_bias": True, "hsa_sliding_window": 0, "num_memory_heads": 2},
    "HSA only, bypass": {"hsa_sliding_window": 0, "hsa_residual": "bypass"},
    "scores": {"learned_temperature": False, "position_decay": True},
    "two retrieval heads": {"num_memory_heads": 2, "num_retrieval_heads": 2},
    "deep": {"num_lower_layers": 3, "num_upper_groups": 3, "num_layers_per_group": 1, "num_encoder_layers": 2},
    "experts": {"num_experts": 8, "num_experts_per_token": 3, "moe_intermediate_size": 24},
    "experts everywhere": {"num_experts": 4, "num_dense_layers": 0, "num_shared_experts": 0},
    "experts in the upper half": {"num_experts": 4, "num_dense_layers": 3, "num_shared_experts": 2},
}


def numel(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def check_counts(model: HSAForCausalLM) -> None:
    counts, body = count_parameters(model.config), model.model
    assert counts.total == numel(model)
    assert counts.embedding == numel(body.embed_tokens)
    assert counts.lower == numel(body.lower_layers)
    assert counts.encoder == numel(body.chunk_encoder)
    assert counts.upper == numel(body.groups)
    assert counts.norm == numel(body.norm)
    parts = (counts.embedding, counts.lower, counts.encoder, counts.upper, counts.norm, counts.head)
    assert sum(parts) == counts.total
    idle = routed = 0
    for module in model.modules():
        if isinstance(module, MixtureOfExperts):
            expert = module.gate_up[0].numel() + module.down[0].numel()
            idle += (module.num_experts - module.num_experts_per_token) * expert
            routed += module.num_experts * expert
    assert count_expert_parameters(model.config) == routed
    assert counts.active == counts.total - idle
    assert counts.per_token == counts.active - (counts.embedding if counts.head else 0)


@pytest.mark.parametrize("name", ["debug", "nano"])
def test_parameters_of_built_models(name):
    check_counts(HSAForCausalLM(preset(name)))


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in ("debug", "nano")])
def test_parameters_of_large_models_on_the_meta_device(name):
    with torch.device("meta"):
        check_counts(HSAForCausalLM(preset(name)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_of_every_option(variant):
    with torch.device("meta"):
        check_counts(HSAForCausalLM(preset("debug", **VARIANTS[variant])))


@pytest.mark.parametrize("variant", ["plain", "experts everywhere"])
def test_reading_counts_the_lower_half_and_the_encoder(variant):
    with torch.device("meta"):
        model = HSAModel(preset("debug", **VARIANTS[variant]))
    idle = 0
    for module in model.lower_layers.modules():
        if isinstance(module, MixtureOfExperts):
            idle += (module.gate_up[0].numel() + module.down[0].numel()) * 2
    counts = count_parameters(model.config)
    assert counts.reading == numel(model.lower_layers) + numel(model.chunk_encoder) - idle
    window = 4 * 4 * 16 * 16 * 2
    assert reading_flops_per_token(model.config) == 2 * counts.reading + window


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["debug", "nano", "two retrieval heads"])
def test_memory_bytes_of_real_memories(name, dtype):
    config = preset(name) if name in PRESETS else preset("debug", **VARIANTS[name])
    model, capacity = HSAModel(config), 5
    memory = model.empty_memory(1, dtype, torch.device("cpu"), capacity=capacity)
    tokens = capacity * config.chunk_size
    costs = memory_bytes(config, tokens, dtype.itemsize)
    storage = memory.storage
    assert costs.keys_values == storage.k.nbytes + storage.v.nbytes
    assert costs.landmarks == storage.landmarks.nbytes
    assert costs.bookkeeping == sum(part.nbytes for part in storage[3:])
    memory.num_chunks = capacity
    assert costs.tensors == memory.num_bytes
    assert costs.keys_values + costs.landmarks == tokens * memory_bytes_per_token(config, dtype.itemsize)
    assert costs.token_ids == torch.zeros(tokens, dtype=torch.int32).nbytes


def test_memory_per_token_of_the_published_figures():
    assert memory_bytes_per_token(preset("nano")) == 264
    assert memory_bytes_per_token(preset("small_345m")) == 288
    assert memory_bytes(preset("small_345m"), 2**24, token_id_bytes=0).tensors == pytest.approx(4.5 * 2**30, rel=1e-3)
    more_layers = preset("nano", num_upper_groups=8)
    assert memory_bytes_per_token(more_layers) == 264
    # facts E.2: 16 layers with 2 heads of 64 need 8 KiB per token
    sixteen = preset("small_345m", num_upper_groups=2, num_layers_per_group=4)
    assert full_attention_cache_bytes(sixteen, 2**24) == 128 * 2**30


def test_a_closed_tail_takes_a_chunk_and_an_open_one_a_fixed_state():
    config = preset("debug")
    closed, opened = memory_bytes(config, 33), memory_bytes(config, 33, is_open=True)
    assert closed.tensors == memory_bytes(config, 48).tensors
    assert opened.tensors == memory_bytes(config, 32).tensors
    assert (closed.continuation, opened.continuation) == (0, continuation_bytes(config))
    assert opened.total == opened.tensors + 33 * 4 + opened.continuation
    assert memory_bytes(config, 0).total == 0


def test_continuation_is_that_of_a_really_opened_document():
    for options in ({}, {"hsa_sliding_window": 0, "num_layers_per_group": 1}, {"num_key_value_heads": 1}):
        config = preset("debug", **options)
        model = HSAForCausalLM(config).eval()
        document = model.memorize(torch.arange(400) % 100, close=False).open_document
        tensors = [part for window in document.continuation.windows for part in window]
        held = sum(part.numel() for part in (*tensors, document.continuation.lower))
        assert continuation_bytes(config, 4) == 4 * held


def attention_at(config, position: int) -> int:
    """Attention FLOP of the token at one position, straight from docs/results.md."""
    visible, per_key = position // config.chunk_size, 4 * config.num_attention_heads * config.head_dim
    flops = 0
    for _ in range(config.num_lower_layers + config.num_upper_groups * (config.num_layers_per_group - 1)):
        flops += per_key * min(config.sliding_window, position + 1)
    for _ in range(config.num_upper_groups):
        flops += per_key * min(config.hsa_sliding_window, position + 1)
        flops += per_key * config.chunk_size * min(config.chunk_topk, visible)
        flops += 2 * config.retrieval_dim * visible
    return flops


@pytest.mark.parametrize("context", [1, 7, 15, 16, 17, 64, 65, 100, 333])
@pytest.mark.parametrize("variant", ["plain", "HSA only, bypass", "experts", "untied"])
def test_flops_equal_the_sum_over_positions(variant, context):
    config = preset("debug", **VARIANTS[variant])
    weights = 2 * count_parameters(config).per_token
    mean = sum(attention_at(config, position) for position in range(context)) / context
    assert flops_per_token(config, context) == weights + attention_at(config, context)
    assert flops_per_token(config, context, average=True) == pytest.approx(weights + mean)
    assert flops_per_token(config, context, training=True) == pytest.approx(3 * (weights + mean))
    last = flops_per_token(config, context, training=True, average=False)
    assert last == 3 * flops_per_token(config, context)


def test_the_landmark_scan_at_16m_is_the_published_one():
    config = preset("small_345m")
    # everything but the two scans is constant this far out
    constant = 2 * count_parameters(config).per_token + 16 * 4 * 1024 * 512 + 2 * 4 * 1024 * 32 * 64
    scan = (flops_per_token(config, 2**24) - constant) / 2
    assert scan == pytest.approx(0.54e9, rel=0.01)
    grown = flops_per_token(config, 2**25) - flops_per_token(config, 2**24)
    assert grown == config.num_upper_groups * 2 * 1024 * 2**18


def test_impossible_amounts_are_refused():
    with pytest.raises(ValueError, match="context"):
        flops_per_token(preset("debug"), 0)
    with pytest.raises(ValueError, match="tokens"):
        memory_bytes(preset("debug"), -1)
