"""Write a trained model as a Hugging Face folder: config, bf16 weights, tokenizer, checksums.

A new folder appears whole or not at all; in an existing one files are replaced one by one, checksums.json last.
Called by cli/train.py; tests/train/test_safety.py.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hsa_ultralong.baselines import RivalForCausalLM
from hsa_ultralong.files.checksum import file_digest
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.models import HSAForCausalLM
from hsa_ultralong.train.lora import merged
from hsa_ultralong.train.twins import Trained


def export_model(model: Trained, tokenizer: Any, folder: Path, *, topk: int) -> None:
    """Save `model` in bf16, ours with `chunk_topk = topk`, and its tokenizer; of an existing folder, weights
    that were there go and other files stay.

    A model that is spread over processes is collected: all of them call this, the first one writes.
    """
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    weights = {}
    for name, tensor in model.state_dict().items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first:
            weights[name] = whole.cpu()
    if not is_first:
        return
    weights = merged(weights)
    if isinstance(model, HSAForCausalLM):
        config = copy.deepcopy(model.config)
        config.chunk_topk = topk
        plain: Trained = HSAForCausalLM(config)
    else:
        plain = RivalForCausalLM(copy.deepcopy(model.config))
    plain.load_state_dict(weights)
    if model.generation_config is not None:
        plain.generation_config = copy.deepcopy(model.generation_config)
    partial = folder.with_name(f".partial-{folder.name}")
    if partial.is_symlink():
        partial.unlink()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    plain.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    _forget_where(partial / "tokenizer_config.json")
    table = {file.name: file_digest(file) for file in sorted(partial.iterdir())}
    write_whole(partial / "checksums.json", json.dumps(table, indent=1) + "\n")
    if not folder.exists():
        partial.rename(folder)
        return
    # the old checksums.json, replaced last, makes readers refuse a mixture of old and new
    for name in table:
        (partial / name).replace(folder / name)
    for file in folder.glob("model*.safetensors*"):
        # other parts of weights, in fewer or more files, would be loaded instead
        if file.name not in table:
            file.unlink()
    (partial / "checksums.json").replace(folder / "checksums.json")
    partial.rmdir()


def check_export(folder: Path, others: Sequence[Path], *, is_twin: bool = False) -> None:
    """A model, or a twin, can be written to the folder, which is none of `others`; nothing is written.

    Raises:
        ValueError: it cannot; naming why.
    """
    exists = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not exists.is_dir():
        raise ValueError(f"the model cannot be written to {folder}: {exists} is no folder")
    for place in {exists, folder.absolute().parent if exists == folder else exists}:
        if not os.access(place, os.W_OK | os.X_OK):
            raise ValueError(f"the model cannot be written to {folder}: no permission in {place}")
    for other in others:
        if folder.resolve() == other.resolve():
            raise ValueError(
                f"the model cannot be written to {folder}, which holds something else; choose another folder"
            )
    if os.path.lexists(folder / "config.json"):
        kind = read_json(folder / "config.json").get("model_type")
        if kind != (RivalForCausalLM if is_twin else HSAForCausalLM).config_class.model_type:
            raise ValueError(f"{folder} holds something else than a model of this kind; choose another folder")
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "checksums.json"):
        if (folder / name).is_dir():
            raise ValueError(f"the model cannot be written to {folder}: {folder / name} is a folder")


def _forget_where(config: Path) -> None:
    """Drop what transformers notes of where a tokenizer was loaded from: it is no part of the tokenizer."""
    settings = read_json(config)
    for name in ("is_local", "local_files_only"):
        settings.pop(name, None)
    write_whole(config, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
