"""Resumable checkpoints: weights and optimiser state in safetensors, the rest in JSON; written whole or not at all.

A checkpoint is a folder `step-<n>` with model.safetensors, optimizer.safetensors, state.json (format version, position
in the run, random state, size and SHA-256 of the tensor files). It is written beside its final name and renamed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

FORMAT_VERSION = 1
_TENSOR_FILES = ("model.safetensors", "optimizer.safetensors")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def model_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers on the host, tied ones once."""
    seen: set[int] = set()
    tensors = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimiser state by parameter name: "exp_avg/<name>" and so on."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = torch.as_tensor(value).detach().cpu().contiguous()
    return tensors


def save_checkpoint(
    run: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], keep: int
) -> Path:
    """Write `run/checkpoints/step-<n>` and delete all but the newest `keep`."""
    folder = run / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{state['global_step']:08d}"
    partial = folder / f".partial-{final.name}"
    # what an interrupted save left behind would keep its room on a full disk
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
    partial.mkdir()
    for name, tensors in zip(_TENSOR_FILES, (model_tensors(model), optimizer_tensors(model, optimizer)), strict=True):
        save_file(tensors, partial / name)
    files = {
        name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)} for name in _TENSOR_FILES
    }
    (partial / "state.json").write_text(json.dumps({"format": FORMAT_VERSION, "files": files, **state}, indent=1))
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file()) if folder.is_dir() else []


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]]:
    """Model tensors, optimiser tensors, state.

    Raises:
        ValueError: if the checkpoint is of another format, truncated or corrupt.
    """
    try:
        state = json.loads((path / "state.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {path} has no readable state.json ({error}); use an older checkpoint") from error
    if state.get("format") != FORMAT_VERSION:
        raise ValueError(f"checkpoint {path} has format {state.get('format')}, this version reads {FORMAT_VERSION}")
    for name, expected in state["files"].items():
        file = path / name
        if not file.is_file() or file.stat().st_size != expected["bytes"] or _digest(file) != expected["sha256"]:
            raise ValueError(
                f"checkpoint file {file} is missing, truncated or corrupt; delete {path} to use an older one"
            )
    model, optimizer = (load_file(path / name) for name in _TENSOR_FILES)
    return model, optimizer, state


def restore(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer | None,
    model_state: dict[str, torch.Tensor],
    optimizer_state: dict[str, torch.Tensor],
) -> None:
    """Load tensors back into a model and, by parameter name, into its optimiser."""
    own = model.state_dict()
    for name, tensor in model_state.items():
        if name in own and own[name].shape != tensor.shape:
            shapes = f"{tuple(tensor.shape)} there, {tuple(own[name].shape)} here"
            raise ValueError(f"checkpoint does not fit the model: {name} is {shapes}")
    missing, unexpected = model.load_state_dict(model_state, strict=False)
    tied = {"lm_head.weight", "model.embed_tokens.weight"}
    if unexpected or set(missing) - tied:
        raise ValueError(f"checkpoint does not fit the model: missing {missing[:3]}, unexpected {unexpected[:3]}")
    if optimizer is None:
        return
    parameters = dict(model.named_parameters())
    for key, tensor in optimizer_state.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        device = "cpu" if kind == "step" and not optimizer.defaults.get("fused") else parameter.device
        optimizer.state[parameter][kind] = tensor.to(device)
