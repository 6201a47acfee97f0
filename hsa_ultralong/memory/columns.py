"""Chunks as columns of a memory file and back: keys and values side by side, 8-bit formats with their scales.

Between ChunkTensors (nn/views.py) and MemoryFile (files/); docs/memory-format.md lists the columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from hsa_ultralong.files.messages import shown
from hsa_ultralong.memory.files import Column, MemoryFileError, MemorySpec
from hsa_ultralong.memory.files.spec import MemoryDocument
from hsa_ultralong.memory.quantization import FORMATS, KeyValueFormat, decode, encode, payload_dtype
from hsa_ultralong.nn.views import ChunkTensors

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


def require_model_columns(spec: MemorySpec) -> None:
    """Refuse a memory whose columns are not those that `memory_spec` gives.

    Raises:
        MemoryFileError: names what does not fit.
    """
    formats, keys, landmarks = (
        spec.metadata.get("formats"),
        spec.columns.get("keys_values"),
        spec.columns.get("landmarks"),
    )
    problem = None
    if not isinstance(formats, dict) or set(formats) != {"key_values", "landmarks"}:
        problem = "metadata.formats"
    elif not all(isinstance(format, str) and format in FORMATS for format in formats.values()):
        problem = f"formats {', '.join(map(shown, formats.values()))}"
    elif keys is None or len(keys.shape) != 4 or landmarks is None or len(landmarks.shape) != 2:
        problem = "keys_values or landmarks"
    else:
        expected = memory_spec(
            chunk_size=spec.chunk_size,
            num_memory_heads=keys.shape[2],
            head_dim=keys.shape[3],
            num_retrieval_heads=landmarks.shape[0],
            retrieval_dim=landmarks.shape[0] * landmarks.shape[1],
            **formats,
        ).columns
        names = sorted({*expected, *spec.columns})
        problem = ", ".join(name for name in names if expected.get(name) != spec.columns.get(name))
    if problem:
        raise MemoryFileError(
            f"this memory holds no chunks as models write them ({problem}); build it again with hsa memorize"
        )


def require_lengths(lengths: torch.Tensor, documents: Sequence[MemoryDocument], chunk_size: int) -> None:
    """Refuse lengths (C,) that do not follow from the document table: all S, but for the last of a closed document.

    Raises:
        MemoryFileError: names the first document.
    """
    expected = torch.full_like(lengths, chunk_size)
    stop, last, shorter = 0, [], []
    for document in documents:
        stop += document.num_chunks
        full = document.num_tokens // chunk_size
        rest = document.num_tokens - full * chunk_size
        if document.num_chunks != full + (rest > 0 and not document.is_open):
            raise MemoryFileError(
                f"{document.label} has {document.num_chunks} chunks for {document.num_tokens} tokens; build it again"
            )
        if rest and not document.is_open:
            last.append(stop - 1)
            shorter.append(rest)
    expected[last] = torch.tensor(shorter, dtype=lengths.dtype)
    wrong = (lengths != expected).nonzero()
    if len(wrong):
        chunk = int(wrong[0])
        raise MemoryFileError(
            f"chunk {chunk} has the length {int(lengths[chunk])}, {int(expected[chunk])} by the document table; verify "
            "the memory or build it again"
        )


def to_columns(
    spec: MemorySpec,
    chunks: ChunkTensors,
    tokens: torch.Tensor,
    kept: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]] | None = None,
) -> dict[str, torch.Tensor]:
    """Columns, where the chunks lie, of chunks of batch 1 and token ids (at most n * S, the last chunk may be short).

    kept: payload and scales of "keys_values" or "landmarks" that are in the spec's form already; those of `chunks`
    are not looked at then.
    """
    formats, size = spec.metadata["formats"], spec.chunk_size
    count = chunks.landmarks.shape[1]
    found = dict(kept or {})
    if "keys_values" not in found:
        pairs = torch.stack([part[0].unflatten(0, (count, size)) for part in (chunks.k, chunks.v)], 1)
        found["keys_values"] = encode(pairs, formats["key_values"])
    if "landmarks" not in found:
        found["landmarks"] = encode(chunks.landmarks[0], formats["landmarks"])
    columns = {}
    for name, (payload, scales) in found.items():
        columns[name] = payload
        if scales is not None:
            columns[f"{name}_scale"] = scales
    padded = torch.zeros(count * size, dtype=torch.int32)
    padded[: len(tokens)] = tokens
    return {**columns, "lengths": chunks.lengths[0], "tokens": padded.unflatten(0, (count, size))}


def on_host(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], Callable[[], object]]:
    """Copies on the host that are made without waiting for the device, and what to call before they are read."""
    # pinned, and kept so for the next of their size, by torch
    copies = {name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()}
    device = next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)
    if device is None:
        return copies, lambda: None
    return copies, torch.cuda.current_stream(device).record_event().synchronize


def from_payload(
    payload: torch.Tensor, scales: torch.Tensor | None, device: torch.device | str, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers of a column on a device; 8 bits travel and become `dtype` there."""
    scales = None if scales is None else scales.to(device)
    return decode(payload.to(device, non_blocking=True), scales, dtype)
