"""A fingerprint of exactly what a memory depends on: embedding, lower decoder, encoder (fact 5)."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from hsa_ultralong.memory.chunk_memory import Memory
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.models.form import require_form
from hsa_ultralong.models.weights import refuse_hooks, state_key, weights_of
from hsa_ultralong.models.wrapped import unwrapped

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
    """SHA-256 (hex) of the configuration and of all that computes below the upper decoder; kept until that changes.

    Values count, not dtypes: a bf16 checkpoint loaded in bf16 and in fp32 has one fingerprint, so both share memories.
    Active adapters, quantised weights and modules of others count as they are; adapters that are disabled, or on the
    upper decoder and the head only, do not. The model may be wrapped (wrapped.py).

    Raises:
        ValueError: weights that are cut over processes or offloaded, or a hook below the upper decoder, whose effect
            cannot be known.
    """
    model = unwrapped(model)
    inner = model.model
    parts = inner.memory_parts().items()
    for name, module in parts:
        refuse_hooks(name, module.modules(), "what it does to a memory cannot be checked; remove it first")
    # plain models keep the fingerprint that their memories on disk have
    entries = [
        ("embed_tokens" if label == "embed_tokens.weight" else label, tensor)
        for name, module in parts
        for label, tensor in weights_of(name, module)
    ]
    options = repr([getattr(model.config, name) for name in _CONFIG_KEYS])
    if model.config.rope_scaling is not None:
        # appended, so that memories of models without it keep their fingerprint
        options += repr(sorted(model.config.rope_scaling.items()))
    own = [model.config.encoder_qk_norm, model.config.encoder_qkv_bias]
    if own != [None, None]:
        options += repr(own)
    if model.config.embedding_skip:
        # before, it was added to what the upper decoder reads as well
        options += f"memory {float(model.config.embedding_skip)!r}"
    # versions and addresses of tensors tell nothing: `.data` and kernels write past them
    key = (options, *state_key(entries))
    known = getattr(model, "_known_fingerprint", None)
    if known is not None and known[0] == key:
        return known[1]
    digest = hashlib.sha256(options.encode())
    for label, tensor in entries:
        if tensor is None:
            digest.update(label.encode())
        else:
            _add(digest, label, tensor)
    model._known_fingerprint = (key, digest.hexdigest())
    return digest.hexdigest()


def _add(digest: Any, label: str, tensor: torch.Tensor) -> None:
    exact = tensor.cpu()
    if exact.is_floating_point():
        narrow = exact.float()
        if exact.dtype != torch.float64 or torch.equal(narrow.double(), exact):
            exact = narrow
    else:
        label += str(exact.dtype)
    digest.update(f"{label}{tuple(tensor.shape)}".encode())
    digest.update(exact.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def require_same_model(model: HSAForCausalLM, memory: Memory) -> None:
    """Refuse a memory that another model built, or that says so and has another form."""
    if memory.fingerprint != memory_fingerprint(model):
        raise ValueError(
            "this memory was built by another model (or by this one before its lower half changed); memorise the text "
            "again with the model at hand, or a file by: hsa memory rebuild MEMORY --model MODEL"
        )
    require_form(unwrapped(model).config, memory)


def require_chunks(memory: Memory) -> None:
    """Refuse to ask a memory that holds nothing to read."""
    if memory.num_chunks_of_all == 0:
        way = "close the document" if memory.num_tokens else "memorise a text first"
        raise ValueError(f"the memory is empty: {nothing_to_read(memory.num_tokens)}; {way}")


def nothing_to_read(num_tokens: int) -> str:
    """Why a memory of so many tokens has no chunk that could be read."""
    if num_tokens == 0:
        return "it holds no document"
    return f"its only document is still open and has no full chunk yet ({num_tokens} tokens)"
