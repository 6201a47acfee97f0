"""The HSAForCausalLM inside whatever stands around it: torch.compile, peft, DataParallel, DDP, DeepSpeed, a value head.

Reading, asking and decoding call its parts, so adapters inside them take part as they are set; what a wrapper adds
around the whole model does not, and is refused. tests/models/test_weights.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hsa_ultralong.models import HSAForCausalLM, HSAModel

# attributes under which wrappers keep the model: torch.compile; DataParallel, DDP, DeepSpeed, averaging; a value head
_INSIDE = ("_orig_mod", "module", "pretrained_model")
# adapters that act on the whole model (or on its arguments) instead of inside its layers
_AROUND_THE_MODEL = ("ADAPTION_PROMPT", "POLY", "SHADOW", "XLORA")
TRAINING_WRAPPERS_THAT_CUT = ("FullyShardedDataParallel",)


def unwrapped(model: Any) -> HSAForCausalLM:
    """The HSAForCausalLM in `model`, which computes with the adapters that are active in it.

    Raises:
        TypeError: nothing of the kind is inside. ValueError: weights cut over processes, or an adapter that acts around
            the model (prompts, prefixes, routing of whole inputs).
    """
    found = model
    while not isinstance(found, HSAForCausalLM):
        found = _inside(found, model)
    return found


def _inside(wrapper: Any, whole: Any) -> Any:
    if type(wrapper).__name__ in TRAINING_WRAPPERS_THAT_CUT:
        raise ValueError(cut_weights())
    if hasattr(wrapper, "peft_config") and hasattr(wrapper, "base_model"):
        if not getattr(wrapper, "_adapters_disabled", False):
            _refuse_adapters_around_the_model(wrapper)
        base = wrapper.base_model
        # prompts and prefixes leave the model as it is; other adapters keep it in a tuner
        return base if isinstance(base, HSAForCausalLM) else base.model
    for name in _INSIDE:
        inner = getattr(wrapper, name, None)
        if isinstance(inner, nn.Module):
            return inner
    hint = "; HSAModel has no head: load HSAForCausalLM" if isinstance(wrapper, HSAModel) else ""
    raise TypeError(
        "a memory needs an HSAForCausalLM, as it is or inside torch.compile, peft, DataParallel or "
        f"DistributedDataParallel; got {type(whole).__name__}{hint}"
    )


def _refuse_adapters_around_the_model(wrapper: Any) -> None:
    active = getattr(wrapper, "active_adapters", None) or [wrapper.active_adapter]
    for name in [active] if isinstance(active, str) else active:
        config = wrapper.peft_config.get(name)
        kind = getattr(getattr(config, "peft_type", None), "value", "")
        around = getattr(config, "is_prompt_learning", False) or kind in _AROUND_THE_MODEL
        if around or getattr(config, "alora_invocation_tokens", None):
            raise ValueError(
                f"the adapter {name!r} ({kind or type(config).__name__}) acts around the model, which memories and "
                "decoding pass by; use an adapter inside the layers (LoRA and its kin), or disable_adapter()"
            )


def cut_weights() -> str:
    """What to say about weights of which this process holds a part."""
    return (
        "the weights of this model are cut over processes; memorise and ask with an ordinary model, exported by "
        "`hsa train --export` or loaded from a checkpoint"
    )


def computing_dtype(model: HSAForCausalLM) -> torch.dtype:
    """Dtype of keys and values: that of the encoder's value projection, or where it is quantised of the embedding."""
    inner = model.model
    for module in (inner.chunk_encoder.v_proj, inner.embed_tokens, inner.norm):
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1:
            return weight.dtype
    return torch.float32


def device_of(model: HSAForCausalLM) -> torch.device:
    """Where tokens go in."""
    return model.model.embed_tokens.weight.device
