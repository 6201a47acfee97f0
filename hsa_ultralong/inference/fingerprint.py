"""A fingerprint of exactly the parameters that a memory depends on: embedding, lower decoder, encoder (fact 5)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.nn.chunk_memory import ChunkMemory

# what changes the memory beside the parameters themselves
_CONFIG_KEYS = (
    "chunk_size",
    "fusion",
    "head_dim",
    "landmark_source",
    "normalize_retrieval",
    "num_attention_heads",
    "num_experts_per_token",
    "num_key_value_heads",
    "num_memory_heads",
    "num_retrieval_heads",
    "position_decay",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "use_qk_norm",
)


def memory_fingerprint(model: HSAForCausalLM) -> str:
    """SHA-256 (hex) of the configuration and parameters below the upper decoder; kept until one of them changes.

    Values count, not dtypes: a bf16 checkpoint loaded in bf16 and in fp32 has one fingerprint, so both share memories.
    """
    inner = model.model
    parts: list[tuple[str, torch.Tensor]] = [("embed_tokens", inner.embed_tokens.weight)]
    for prefix, module in (("lower", inner.lower_layers), ("encoder", inner.chunk_encoder)):
        parts += [(f"{prefix}.{name}", tensor) for name, tensor in module.state_dict(keep_vars=True).items()]
    if any(hasattr(tensor, "full_tensor") for _, tensor in parts):
        raise ValueError(
            "the weights of this model are cut over processes; memorise and ask with an ordinary model, exported by "
            "`hsa train --export` or loaded from a checkpoint"
        )
    options = repr([getattr(model.config, name) for name in _CONFIG_KEYS])
    if model.config.rope_scaling is not None:
        # appended, so that memories of models without it keep their fingerprint
        options += repr(sorted(model.config.rope_scaling.items()))
    key: Any = (options, *((tensor.data_ptr(), tensor._version, tensor.dtype) for _, tensor in parts))
    known = getattr(model, "_known_fingerprint", None)
    if known is not None and known[0] == key:
        return known[1]
    digest = hashlib.sha256(options.encode())
    for name, tensor in parts:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        exact = tensor.detach().cpu()
        narrow = exact.float()
        if exact.dtype != torch.float64 or torch.equal(narrow.double(), exact):
            exact = narrow
        digest.update(exact.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    model._known_fingerprint = (key, digest.hexdigest())
    return digest.hexdigest()


def require_same_model(model: HSAForCausalLM, memory: ChunkMemory) -> None:
    """Refuse a memory that another model built."""
    if memory.fingerprint != memory_fingerprint(model):
        raise ValueError(
            "this memory was built by another model (or by this one before its lower half changed); memorise the text "
            "again with the model at hand"
        )
