"""Tiny configurations, models and tensors with seeds: what a test needs before it can claim something.

Models come in fp64 with weights of standard deviation 0.2, so that every part moves the output and equalities can be
asserted to 1e-10. Called by tests/ only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from hsa_ultralong.memory.chunk_memory import ChunkMemory
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.nn.views import ChunkTensors
from hsa_ultralong.ops import ChunkVisibility

# one entry per option that changes the computation: decoding must equal the parallel forward for all of them
MODEL_OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "hsa_only_layer": {"hsa_sliding_window": 0},
    "wide_hsa_window": {"hsa_sliding_window": 7},
    "bypass": {"hsa_residual": "bypass"},
    "stick_breaking": {"fusion": "stick_breaking"},
    "two_memory_heads": {"num_memory_heads": 2},
    "two_retrieval_heads": {"num_memory_heads": 2, "num_retrieval_heads": 2},
    "mean_landmark": {"landmark_source": "mean"},
    "position_decay": {"position_decay": True},
    "temperature_by_chunks": {"temperature_chunks": 2},
    "rotary_memory": {"memory_positions": "rope"},
    "joint_softmax": {"memory_softmax": "joint"},
    "chosen_only": {"memory_softmax": "joint", "fusion": "none", "memory_positions": "rope", "num_memory_heads": 2},
    "equal_weights": {"fusion": "none"},
    "mixture_of_experts": {"num_experts": 4, "num_experts_per_token": 2, "moe_intermediate_size": 8},
    "no_shared_expert": {"num_experts": 4, "num_experts_per_token": 1, "num_shared_experts": 0, "num_dense_layers": 0},
    "unnormalized": {"normalize_retrieval": False, "use_qk_norm": False, "learned_temperature": False},
    "qkv_bias_llama3": {
        "use_qkv_bias": True, "use_qk_norm": False, "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "yarn_rope": {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000},
    },
    "two_encoder_layers": {"num_encoder_layers": 2},
    "embedding_skip": {"embedding_skip": 2},
    "one_group_of_one": {"num_upper_groups": 1, "num_layers_per_group": 1, "num_lower_layers": 1},
    "full_coverage": {"chunk_topk": 100},
    "one_chunk": {"chunk_topk": 1},
    "window_of_one": {"sliding_window": 1, "hsa_sliding_window": 1},
    "all_at_once": {
        "hsa_sliding_window": 0, "hsa_residual": "bypass", "fusion": "stick_breaking", "position_decay": True,
        "num_memory_heads": 2, "num_retrieval_heads": 2, "landmark_source": "mean", "num_experts": 3,
        "num_encoder_layers": 2,
    },
}  # fmt: skip


class AttentionInputs(NamedTuple):
    """Operands of hsa_attention; shapes as there."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    chunk_lengths: torch.Tensor | None


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_config(**overrides: Any) -> HSAConfig:
    """About 10,000 parameters, chunks of 4 tokens, windows of 5 and 3, 3 chunks per token."""
    fields: dict[str, Any] = {
        "vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_lower_layers": 2, "num_upper_groups": 2,
        "num_layers_per_group": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
        "sliding_window": 5, "hsa_sliding_window": 3, "chunk_size": 4, "chunk_topk": 3, "retrieval_dim": 8,
    }  # fmt: skip
    return HSAConfig(**{**fields, **overrides})


def randomize(model: torch.nn.Module, *, std: float = 0.2, seed: int = 0) -> None:
    """Every parameter and learned buffer normal with this standard deviation; norm weights around 1."""
    source = generator(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("expert_load"):
                continue
            noise = torch.randn(tensor.shape, generator=source, dtype=torch.float64) * std
            tensor.copy_(noise + (1.0 if name.endswith("norm.weight") else 0.0))


def tiny_model(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, std: float = 0.2, **overrides: Any
) -> HSAForCausalLM:
    """A model of `tiny_config` in evaluation mode with random weights."""
    model = HSAForCausalLM(tiny_config(**overrides)).to(dtype)
    randomize(model, std=std, seed=seed)
    return model.eval()


def random_tokens(batch: int, length: int, *, vocab_size: int = 37, seed: int = 0) -> torch.Tensor:
    """(B, T) int64."""
    return torch.randint(vocab_size, (batch, length), generator=generator(seed))


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def random_visibility(
    batch: int, num_tokens: int, num_chunks: int, *, foreign: str = "past", seed: int = 0
) -> ChunkVisibility:
    """Segments -1..2, chunk segments -2..2, positions and ends in 0..num_tokens: every case of the rule occurs."""
    source = generator(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=source, dtype=torch.int32)

    return ChunkVisibility(
        draw(-1, 3, batch, num_tokens),
        draw(0, num_tokens + 1, batch, num_tokens),
        draw(-2, 3, batch, num_chunks),
        draw(0, num_tokens + 1, batch, num_chunks),
        foreign,  # type: ignore[arg-type]
    )


def random_selection(
    batch: int, num_tokens: int, heads: int, slots: int, num_chunks: int, *, seed: int = 0, empty: float = 0.3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices (B, T, Hr, K) int32, distinct and descending with empty slots last, and weights fp64 of sum <= 1."""
    source = generator(seed)
    shape = (batch, num_tokens, heads)
    chosen = torch.rand(*shape, num_chunks, generator=source).argsort(-1)[..., :slots]
    if slots > num_chunks:
        chosen = torch.nn.functional.pad(chosen, (0, slots - num_chunks), value=-1)
    chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=source) < empty, -1)
    indices = chosen.sort(-1, descending=True).values.to(torch.int32)
    weights = torch.rand(indices.shape, generator=source, dtype=torch.float64) / slots
    return indices, weights


def random_attention(
    *,
    batch: int = 2,
    num_tokens: int = 7,
    group: int = 2,
    kv_heads: int = 2,
    heads: int = 1,
    num_chunks: int = 5,
    slots: int = 3,
    chunk_size: int = 4,
    dim: int = 8,
    kv_batch: int | None = None,
    is_short: bool = False,
    empty: float = 0.3,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> AttentionInputs:
    """Operands of one hsa_attention call."""
    rows = batch if kv_batch is None else kv_batch
    indices, weights = random_selection(batch, num_tokens, heads, slots, num_chunks, seed=seed + 3, empty=empty)
    lengths = None
    if is_short:
        lengths = torch.randint(1, chunk_size + 1, (rows, num_chunks), generator=generator(seed), dtype=torch.int32)
    return AttentionInputs(
        random_tensor(batch, num_tokens, kv_heads * group, dim, seed=seed, dtype=dtype),
        random_tensor(rows, num_chunks * chunk_size, kv_heads, dim, seed=seed + 1, dtype=dtype),
        random_tensor(rows, num_chunks * chunk_size, kv_heads, dim, seed=seed + 2, dtype=dtype),
        indices,
        weights.to(torch.float64 if dtype == torch.float64 else torch.float32),
        lengths,
    )


def random_chunks(
    batch: int, num_chunks: int, *, chunk_size: int = 4, heads: int = 1, dim: int = 4, retrieval: int = 8, seed: int = 0
) -> ChunkTensors:
    """Chunks of one document per row, the last one short."""
    lengths = torch.full((batch, num_chunks), chunk_size, dtype=torch.int32)
    lengths[:, -1:] = max(1, chunk_size - 1)
    ends = (torch.arange(num_chunks, dtype=torch.int32) + 1).expand(batch, -1) * chunk_size
    return ChunkTensors(
        random_tensor(batch, num_chunks * chunk_size, heads, dim, seed=seed),
        random_tensor(batch, num_chunks * chunk_size, heads, dim, seed=seed + 1),
        random_tensor(batch, num_chunks, 1, retrieval, seed=seed + 2),
        lengths,
        torch.zeros_like(lengths),
        ends,
    )


@torch.no_grad()
def encode_documents(model: HSAForCausalLM, documents: Sequence[torch.Tensor], *, is_open: bool = False) -> ChunkMemory:
    """The memory of closed documents (n,), read one by one by the lower half; `is_open` drops unfinished chunks."""
    size = model.config.chunk_size
    memory = model.model.empty_memory(1, model.dtype, model.device)
    for number, tokens in enumerate(documents):
        x = model.model.embed_tokens(tokens[None])  # (1, n, M)
        x = model.model.read_lower(x, model.model.rotary(x, None))
        count = tokens.shape[0] // size if is_open else -(-tokens.shape[0] // size)
        if count == 0:
            continue
        kept = x[:, : count * size]
        kept = torch.nn.functional.pad(kept, (0, 0, 0, count * size - kept.shape[1]), value=3.0)
        slots = torch.arange(count, dtype=torch.int32)[None]
        lengths = (tokens.shape[0] - slots * size).clamp_max(size).to(torch.int32)
        k, v, landmarks = model.model.chunk_encoder(kept.unflatten(1, (count, size)), lengths)
        chunks = ChunkTensors(k, v, landmarks, lengths, torch.full_like(slots, number), (slots + 1) * size)
        memory.write(memory.num_chunks, chunks)
    return memory
