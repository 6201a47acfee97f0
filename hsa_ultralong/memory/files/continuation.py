"""How to go on with the open document: named tensors and JSON in one safetensors file, checked by its SHA-256.

Used by reader.py and writer.py; opening.py knows what a model's tensors must be; tests/memory/test_files_fields.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from hsa_ultralong.files.durable import write_file
from hsa_ultralong.files.fields import free_object, require
from hsa_ultralong.files.folder import read_file
from hsa_ultralong.files.strict_json import parse_json
from hsa_ultralong.memory.files.finite import WHAT, is_finite
from hsa_ultralong.memory.files.manifest import ContinuationRecord, continuation_file
from hsa_ultralong.memory.files.spec import MemoryFileError, as_json_object

StoredContinuation = tuple[dict[str, torch.Tensor], dict[str, Any]]
KEY = "hsa"


def encode_continuation(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> bytes:
    """The bytes of a continuation file.

    Raises:
        ValueError: `metadata` is no JSON.
    """
    text = json.dumps(as_json_object(metadata, "metadata"), separators=(",", ":"))
    # safetensors refuses views into one storage.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return save(copies, {KEY: text})


def write_continuation(folder: Path, generation: int, data: bytes) -> ContinuationRecord:
    """Write the continuation file of the commit that makes this generation; the folder is not synced yet."""
    name = continuation_file(generation)
    write_file(folder, name, [data])
    return ContinuationRecord(name, len(data), hashlib.sha256(data).hexdigest())


def read_continuation(folder: Path, record: ContinuationRecord) -> StoredContinuation:
    """Read and check a continuation file.

    Raises:
        OSError: it is gone, or no plain file.
        MemoryFileError: it is damaged, or no continuation.
    """
    data = read_file(folder, record.file, record.num_bytes)
    if len(data) != record.num_bytes or hashlib.sha256(data).hexdigest() != record.sha256:
        raise MemoryFileError("the checksum differs")
    try:
        header = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")], encoding="ascii")
        metadata = parse_json(header["__metadata__"][KEY].encode("ascii"))
        require(free_object, metadata, "metadata")
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MemoryFileError(f"it is no continuation: {type(error).__name__}: {error}") from error
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise MemoryFileError(f"{name} holds {WHAT}")
    return tensors, metadata
