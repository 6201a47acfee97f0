"""Chunks as columns of a memory file and back: keys and values side by side, 8-bit formats with their scales.

Between ChunkTensors (nn/chunk_memory.py) and MemoryFile (files/); docs/memory-format.md lists the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hsa_ultralong.memory.files import Column, MemorySpec
from hsa_ultralong.memory.quantization import KeyValueFormat, decode, encode, payload_dtype
from hsa_ultralong.nn.chunk_memory import ChunkTensors

# formats whose rows carry a scale
_SCALED = ("int8", "fp8")


def memory_spec(
    *,
    chunk_size: int,
    num_memory_heads: int,
    head_dim: int,
    num_retrieval_heads: int,
    retrieval_dim: int,
    key_values: KeyValueFormat = "bf16",
    landmarks: KeyValueFormat = "bf16",
    fingerprint: str = "",
    tokenizer: str = "",
    is_composable: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> MemorySpec:
    """The columns of a model's memory; `retrieval_dim` counts all retrieval heads.

    Raises:
        ValueError: for an unknown format.
    """
    shape = (2, chunk_size, num_memory_heads, head_dim)
    landmark = (num_retrieval_heads, retrieval_dim // num_retrieval_heads)
    columns = {"keys_values": Column(shape, payload_dtype(key_values))}
    if key_values in _SCALED:
        columns["keys_values_scale"] = Column(shape[:-1], torch.bfloat16)
    columns["landmarks"] = Column(landmark, payload_dtype(landmarks), is_resident=True)
    if landmarks in _SCALED:
        columns["landmarks_scale"] = Column(landmark[:-1], torch.bfloat16, is_resident=True)
    columns["lengths"] = Column((), torch.int32, is_resident=True)
    columns["tokens"] = Column((chunk_size,), torch.int32)
    formats = {"key_values": key_values, "landmarks": landmarks}
    return MemorySpec(
        chunk_size, columns, fingerprint, tokenizer, is_composable, {**(metadata or {}), "formats": formats}
    )


def to_columns(spec: MemorySpec, chunks: ChunkTensors, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Columns, on the host, of chunks of batch 1 and their token ids (at most n * S, the last chunk may be short)."""
    formats, size = spec.metadata["formats"], spec.chunk_size
    count = chunks.landmarks.shape[1]
    pairs = torch.stack([part[0].unflatten(0, (count, size)) for part in (chunks.k, chunks.v)], 1)  # (n, 2, S, Hkv, D)
    columns = {}
    for name, tensor, format in (
        ("keys_values", pairs, formats["key_values"]),
        ("landmarks", chunks.landmarks[0], formats["landmarks"]),
    ):
        payload, scales = encode(tensor, format)
        columns[name] = payload.cpu()
        if scales is not None:
            columns[f"{name}_scale"] = scales.cpu()
    padded = torch.zeros(count * size, dtype=torch.int32)
    padded[: len(tokens)] = tokens
    return {**columns, "lengths": chunks.lengths[0].cpu(), "tokens": padded.unflatten(0, (count, size))}


def from_payload(
    payload: torch.Tensor, scales: torch.Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers of a column on a device; 8 bits travel and become `dtype` there."""
    scales = None if scales is None else scales.to(device)
    return decode(payload.to(device, non_blocking=True), scales, dtype)
