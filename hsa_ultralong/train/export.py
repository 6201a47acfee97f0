"""Write a trained model as a Hugging Face folder (config, bf16 weights, tokenizer, checksums), whole or not at all."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from hsa_ultralong.models import HSAForCausalLM


def export_model(model: HSAForCausalLM, tokenizer: Any, folder: Path, *, topk: int) -> None:
    """Save `model` in bf16 with `chunk_topk = topk` and its tokenizer; other files of an existing folder stay.

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
    config = copy.deepcopy(model.config)
    config.chunk_topk = topk
    plain = HSAForCausalLM(config)
    plain.load_state_dict(weights)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    plain.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    table = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(partial.iterdir())}
    (partial / "checksums.json").write_text(json.dumps(table, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for file in partial.iterdir():
        file.replace(folder / file.name)
    partial.rmdir()
