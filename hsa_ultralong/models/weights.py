"""What modules compute with, by name: weights, active adapters, quantised tensors, and whatever else stands there.

Ordinary modules give their state dictionary. Wrappers that change nothing disappear, disabled and merged adapters too,
so that equal computations have equal entries. Used by fingerprint.py and engine.py; tests/models/test_weights.py.
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from hsa_ultralong.models.wrapped import TRAINING_WRAPPERS_THAT_CUT, cut_weights

# (label, tensor), or (label, None) where the label itself says what is computed
Entry = tuple[str, torch.Tensor | None]
_PLAIN = (nn.Embedding, nn.Identity, nn.Linear, nn.ModuleList, nn.RMSNorm)
_TENSORS = (torch.Tensor, nn.Parameter)
# what compiles, recomputes or shards a module without changing it keeps it there
_SAME = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
# hooks of these packages move, watch or reparametrise tensors that are entries
_KNOWN_HOOKS = ("accelerate.", "hsa_ultralong.", "torch.", "transformers.")
# modes, and notes of bitsandbytes
_NO_SETTINGS = ("training", "compute_dtype", "compute_type_is_set", "support_avx512bf16_for_cpu")
# tensors up to this size are checked together
_SMALL_BYTES = 1 << 20
# and so many bytes at once
_JOINED_BYTES = 64 << 20
_SCALARS = (bool, int, float, str, type(None), torch.dtype)


def weights_of(name: str, module: Any) -> Iterator[Entry]:
    """All that the module computes with, its parts included; an ordinary module's are those of its state dictionary.

    Raises:
        ValueError: weights that are cut over processes or offloaded, or an adapter that acts from certain tokens on.
    """
    module = _effective(module)
    if isinstance(module, _peft("peft.tuners.tuners_utils", "BaseTunerLayer")):
        yield from _adapted(name, module)
        return
    if hasattr(getattr(module, "weight", None), "quant_state") and module.weight.device.type == "cpu":
        raise ValueError(
            f"{name} has 4-bit weights of bitsandbytes, which change in use on a CPU, so that a memory could not be "
            "recognised; load the model in 8 bits, or on a GPU"
        )
    tensors: dict[str, Any] = {}
    module._save_to_state_dict(tensors, "", True)
    if not _is_plain_class(module):
        yield f"{name}:{_kind(module)}:{_settings(module)}", None
        tensors.update((key, buffer) for key, buffer in module._buffers.items() if buffer is not None)
    for key, value in tensors.items():
        yield from _value(f"{name}.{key}", value)
    for key, child in module.named_children():
        yield from weights_of(f"{name}.{key}", child)


def is_plain(module: nn.Module) -> bool:
    """True if nothing but this library's modules with ordinary weights computes here: no adapter, no hook."""
    for part in module.modules():
        if not _is_plain_class(part) or any(key in part.__dict__ for key in ("forward", "_hf_hook")):
            return False
        tensors = [*part._parameters.values(), *part._buffers.values()]
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        if not all(tensor is None or type(tensor) in _TENSORS for tensor in tensors) or not all(map(_is_known, hooks)):
            return False
    return True


def refuse_hooks(name: str, modules: Iterable[nn.Module], why: str) -> None:
    """Refuse functions of others that stand on these modules and may change what they compute.

    Raises:
        ValueError: naming the function.
    """
    for part in modules:
        hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
        if "forward" in part.__dict__ and "_hf_hook" not in part.__dict__:
            hooks.append(part.__dict__["forward"])
        if "_hf_hook" in part.__dict__:
            hooks.append(part.__dict__["_hf_hook"])
        for hook in hooks:
            if not _is_known(hook):
                called = getattr(hook, "__qualname__", type(hook).__qualname__)
                raise ValueError(f"the hook {called} stands on {type(part).__name__} in {name}: {why}")


def _is_known(hook: Any) -> bool:
    while isinstance(hook, (partial, MethodType)):
        hook = hook.func if isinstance(hook, partial) else hook.__func__
    home = getattr(hook, "__module__", None) or type(hook).__module__
    # peft's and transformers' hook for gradient checkpointing of frozen embeddings
    return home.startswith(_KNOWN_HOOKS) or getattr(hook, "__name__", "") == "make_inputs_require_grad"


def state_key(entries: Iterable[Entry]) -> tuple[Any, ...]:
    """Labels, shapes, dtypes and checksums: equal if nothing was changed in between, however it was written."""
    labels: list[str] = []
    elsewhere: dict[torch.device, list[torch.Tensor]] = {}
    numbers: list[Any] = []
    for label, tensor in entries:
        labels.append(label if tensor is None else f"{label}{tuple(tensor.shape)}{tensor.dtype}")
        if tensor is None:
            continue
        if tensor.device.type == "cpu":
            numbers.append(zlib.crc32(_bits(tensor).numpy().data))
        else:
            elsewhere.setdefault(tensor.device, []).append(tensor)
    # one wait for a device
    numbers += [pair for tensors in elsewhere.values() for pair in checksums(tensors).tolist()]
    return (*labels, repr(numbers))


def checksums(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """(n, 2) int64 of tensors of one device, n <= 1 + len(tensors): small ones are joined, as each would take a dozen
    launches, of which the first answer of a process waits for hundreds."""
    small: list[torch.Tensor] = []
    sums, room = [], _JOINED_BYTES
    for tensor in tensors:
        bits = _bits(tensor)
        if bits.numel() > _SMALL_BYTES:
            sums.append(checksum(tensor))
            continue
        if bits.numel() > room:
            sums.append(checksum(torch.cat(small)))
            small, room = [], _JOINED_BYTES
        # in whole words, so that the sums of all are
        small.append(pad(bits.flatten(), (0, -bits.numel() % 8)))
        room -= bits.numel()
    if small:
        sums.append(checksum(torch.cat(small)))
    return torch.stack(sums)


def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """(2,) int64 on the tensor's device, of its bits and where they stand: two sums at the speed of memory."""
    bits = _bits(tensor)
    # an offset view may not be aligned
    if bits.numel() and bits.shape[1] % 8 == 0 and bits.data_ptr() % 8 == 0:
        bits = bits.view(torch.int64)

    def total(sums: torch.Tensor) -> torch.Tensor:
        odd = 2 * torch.arange(sums.shape[0], device=sums.device) + 1
        return (sums * odd).sum()

    return torch.stack((total(bits.sum(1)), total(bits.sum(0))))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """(rows, bytes) uint8 of a tensor's values in order."""
    values = tensor.detach().contiguous()
    values = torch.view_as_real(values) if values.is_complex() else values
    rows = values.shape[0] if values.dim() > 1 and values.numel() else 1
    return values.reshape(rows, values.numel() // rows).view(torch.uint8)


def _peft(module: str, name: str) -> Any:
    """A class of peft, or nothing: without peft in the process, no module can be its."""
    loaded = sys.modules.get(module)
    return () if loaded is None else getattr(loaded, name)


def _effective(module: Any) -> Any:
    """The module that computes when this one is called."""
    while True:
        if type(module).__name__ in TRAINING_WRAPPERS_THAT_CUT:
            raise ValueError(cut_weights())
        same = next((module._modules[name] for name in _SAME if module._modules.get(name) is not None), None)
        if same is not None:
            module = same
        elif isinstance(module, _peft("peft.tuners.tuners_utils", "BaseTunerLayer")):
            if module.disable_adapters and module.merged:
                # as its forward would
                module.unmerge()
            if not (module.disable_adapters or module.merged) and _active(module):
                return module
            module = module.base_layer
        elif isinstance(module, _peft("peft.utils.other", "AuxiliaryTrainingWrapper")):
            module = _saved_module(module)
        else:
            return module


def _active(layer: Any) -> list[str]:
    return [name for name in layer.active_adapters if name in layer._get_available_adapters()]


def _saved_module(wrapper: Any) -> Any:
    """What peft's wrapper of a wholly trained module (or of trained tokens) calls."""
    active = wrapper.active_adapters
    if wrapper.disable_adapters or not active or any(name not in wrapper._adapters for name in active):
        return wrapper.original_module
    if hasattr(wrapper, "modules_to_save"):
        return wrapper.modules_to_save[active[0]]
    return wrapper.token_adapter


def _adapted(name: str, layer: Any) -> Iterator[Entry]:
    """A module with active adapters; their names do not count."""
    yield from weights_of(name, layer.base_layer)
    held = (*layer.adapter_layer_names, *layer.other_param_names)
    for place, adapter in enumerate(_active(layer)):
        variant = getattr(layer, "lora_variant", {}).get(adapter)
        if type(variant).__name__.startswith("ALora"):
            raise ValueError("an activated LoRA (alora) acts from its invocation tokens on, which a memory cannot know")
        parameter = getattr(layer, "parameter_name", "")
        yield f"{name}+{place}:{_kind(layer)}:{_kind(variant)}:{parameter}", None
        for attribute in held:
            holder: Any = getattr(layer, attribute, None)
            if "dropout" not in attribute and hasattr(holder, "keys") and adapter in holder:
                yield from _value(f"{name}+{place}.{attribute}", holder[adapter])
    for key, part in (*layer._modules.items(), *layer._parameters.items(), *layer._buffers.items()):
        if key != "base_layer" and key not in held and "dropout" not in key:
            yield from _value(f"{name}+.{key}", part)


def _value(label: str, value: Any) -> Iterator[Entry]:
    if isinstance(value, torch.Tensor):
        yield from _tensor(label, value)
    elif isinstance(value, nn.Module):
        yield from weights_of(label, value)
    elif value is not None:
        yield f"{label}={_text(value)}", None


def _tensor(label: str, tensor: Any) -> Iterator[Entry]:
    if hasattr(tensor, "full_tensor") or (hasattr(tensor, "ds_id") and tensor.numel() == 0):
        raise ValueError(cut_weights())
    if tensor.is_meta:
        raise ValueError(
            f"the weights {label} are not in memory (offloaded, or on the meta device); load the model as a whole"
        )
    if not hasattr(tensor, "__tensor_flatten__"):
        if type(tensor) not in _TENSORS:
            yield f"{label}:{_kind(tensor)}", None
        yield label, tensor.detach()
        return
    parts, context = tensor.__tensor_flatten__()
    yield f"{label}:{_kind(tensor)}:{_text(context)}", None
    for part in parts:
        yield from _value(f"{label}.{part}", getattr(tensor, part))


def _is_plain_class(module: nn.Module) -> bool:
    return type(module) in _PLAIN or type(module).__module__.startswith("hsa_ultralong.")


def _settings(module: nn.Module) -> str:
    """The numbers and names that a module of others was made with."""
    found = {key: value for key, value in module.__dict__.items() if key[0] != "_" and key not in _NO_SETTINGS}
    settings = {key: value for key, value in sorted(found.items()) if isinstance(value, _SCALARS)}
    # bitsandbytes keeps this one in an object that otherwise changes with every call
    threshold = getattr(found.get("state"), "threshold", None)
    return _text(settings if threshold is None else {**settings, "threshold": threshold})


def _kind(value: Any) -> str:
    return "" if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def _text(value: Any) -> str:
    """repr without addresses in memory and devices."""
    return re.sub(r" at 0x[0-9a-f]+|device\(.*?\)", "", repr(value))
