"""What a run changed of a converted model, as one small file: everything of the memory, norms and low-rank changes.

The file names the source by the SHA-256 of its files, and how it was converted; the rest is the source's. The next run
starts from it, and `hsa convert SOURCE --apply FILE` makes the model of it. Called by cli/train.py and cli/convert.py;
tests/train/test_difference.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch.distributed.tensor import DTensor

from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import is_whole
from hsa_ultralong.files.messages import reason, shown
from hsa_ultralong.models import HSAConfig, HSAForCausalLM
from hsa_ultralong.train.lora import is_lora, is_memory, merged
from hsa_ultralong.train.packing import pack, unpack

MAX_BYTES = 32 * 2**20
# with matrices as they are, or packed into few bits
_FORMAT, _PACKED = "hsa-difference-1", "hsa-difference-3"
_HEADER_BYTES = 2**20


def difference_tensors(model: HSAForCausalLM) -> dict[str, torch.Tensor]:
    """All that a run trains, and buffers, on the CPU: matrices bf16, vectors fp32. Every process calls it."""
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    fixed = {name for name, part in model.named_parameters(remove_duplicate=False)} - trained
    found = {}
    for name, part in model.state_dict().items():
        if name not in fixed:
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            found[name] = whole.detach().to("cpu", torch.bfloat16 if whole.dim() > 1 else torch.float32).contiguous()
    return found


def kept_tensors(tensors: Mapping[str, torch.Tensor], model: HSAForCausalLM) -> dict[str, torch.Tensor]:
    """Of the difference that a run began with, what the run does not train: matrices bf16, vectors fp32.

    A low-rank change of a matrix that trains as a whole is a part of it by then.
    """
    trained = {name for name, part in model.named_parameters() if part.requires_grad}
    buffers = model.state_dict().keys() - {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: part.to(torch.bfloat16 if part.dim() > 1 else torch.float32)
        for name, part in tensors.items()
        if name not in trained | buffers and not (is_lora(name) and _matrix(name) in trained)
    }


def fitted(weights: Mapping[str, torch.Tensor], model: HSAForCausalLM) -> dict[str, torch.Tensor]:
    """Weights in which low-rank changes that the model does not train apart are a part of their matrices."""
    own = model.state_dict().keys()
    apart = {name: part for name, part in weights.items() if is_lora(name) and name in own}
    return {**merged({name: part for name, part in weights.items() if name not in apart}), **apart}


def _matrix(name: str) -> str:
    """What half of a low-rank change belongs to."""
    return f"{name.rpartition('.')[0]}.weight"


def require_small(model: HSAForCausalLM, kept: Mapping[str, torch.Tensor]) -> None:
    """Refuse a run whose difference is no small file.

    Args:
        kept: of the difference that the run began with, what it does not train.

    Raises:
        ValueError: it would have more than 32 MiB.
    """
    parts = {name: part for name, part in model.named_parameters() if part.requires_grad} | dict(kept)
    sizes = {name: (2 if part.dim() > 1 else 4) * part.numel() for name, part in parts.items()}
    if (size := sum(sizes.values()) + _HEADER_BYTES) > MAX_BYTES:
        raise ValueError(
            f"the difference would have {size / 2**20:.1f} MiB, at most {MAX_BYTES >> 20} are written: set a (smaller) "
            "lora_rank or freeze_source, or export the whole model with --export"
        )


def write_difference(
    path: Path, tensors: Mapping[str, torch.Tensor], conversion: Mapping[str, Any], config: HSAConfig
) -> None:
    """Write the file in one step.

    Args:
        conversion: conversion.json of the folder that the run started from. config: of the trained model, whose windows
            may be others than it was converted with.
    """
    about = {name: conversion[name] for name in ("source", "source_files", "options")}
    about["windows"] = [config.sliding_window, config.hsa_sliding_window]
    write_whole(path, save(dict(tensors), metadata={"format": _FORMAT, "conversion": json.dumps(about)}))


def write_packed(path: Path, tensors: Mapping[str, torch.Tensor], conversion: Mapping[str, Any], bits: int) -> float:
    """Write a difference that was read again, its matrices in `bits` bits; returns by how much of their size (root of
    the mean square) these changed."""
    packed, about = pack(tensors, bits)
    again = unpack(packed, about)
    matrices = [name for name, part in tensors.items() if part.dim() > 1]
    change = sum(float((again[name] - tensors[name].float()).pow(2).sum()) for name in matrices)
    metadata = {"format": _PACKED, "conversion": json.dumps(conversion), "packed": about}
    write_whole(path, save(packed, metadata=metadata))
    return (change / max(1e-30, sum(float(tensors[name].float().pow(2).sum()) for name in matrices))) ** 0.5


def read_difference(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and the conversion that they belong to.

    Raises:
        ValueError: the file is none, damaged, or holds numbers that are not finite.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: a difference is what --export-difference wrote")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no difference has")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from error
    if about.get("format") not in (_FORMAT, _PACKED):
        raise ValueError(f"{path} is no difference: its format is {shown(about.get('format'))}, not {_FORMAT}")
    try:
        if about["format"] == _PACKED:
            tensors = unpack(tensors, about["packed"])
        conversion = json.loads(about["conversion"])
    except (KeyError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {reason(error)}") from error
    kinds = {"source": str, "source_files": dict, "options": dict, "windows": list}
    if (
        not isinstance(conversion, dict)
        or any(not isinstance(conversion.get(key), kind) for key, kind in kinds.items())
        or len(conversion["windows"]) != 2
        or not all(is_whole(window, number == 0, 2**31 - 1) for number, window in enumerate(conversion["windows"]))
    ):
        raise ValueError(f"{path} is damaged: it does not say what it belongs to")
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise ValueError(f"{path} holds numbers that are not finite ({shown(name)}); get it again")
    return tensors, conversion


def require_same_source(named: Mapping[str, Any], found: Mapping[str, Any], what: str) -> None:
    """Refuse files of another source, by their SHA-256; names do not count.

    Raises:
        ValueError: naming `what`.
    """
    wanted, here = (sorted(str(entry) for entry in table.values()) for table in (named, found))
    if wanted != here:
        raise ValueError(
            f"{what} is not the source of this difference ({', '.join(map(shown, named))}): its files differ"
        )


def with_difference(
    weights: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Weights of a converted model with what a difference changes in their place."""
    return {**weights, **{name: part.to(torch.float32) for name, part in tensors.items()}}


def weakened(
    tensors: Mapping[str, torch.Tensor], start: Mapping[str, torch.Tensor], strength: float
) -> dict[str, torch.Tensor]:
    """A difference with a part of what it changes of the source's own layers: 0 is the source, 1 all of it.

    The memory stays as it is. Between models fine-tuned from one source a straight line often keeps much of both
    (Wortsman et al., arXiv 2109.01903).

    Args:
        tensors: of read_difference. start: weights of the converted folder that the run began with.

    Raises:
        ValueError: the folder lacks one of them, or it has another shape there.
    """
    found = {}
    for name, part in tensors.items():
        if is_memory(f".{name}") or name.endswith(".lora_a"):
            found[name] = part
        elif name.endswith(".lora_b"):
            found[name] = strength * part
        elif name not in start or start[name].shape != part.shape:
            raise ValueError(f"the folder is not the one that this difference began with: it has no such {name}")
        else:
            found[name] = start[name].float() + strength * (part.float() - start[name].float())
    return found
