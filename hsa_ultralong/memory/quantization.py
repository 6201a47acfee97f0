"""8-bit keys, values and landmarks: int8 or fp8 payloads with one bf16 scale per row of the last dimension.

A row is one token and head of keys and values (..., S, Hkv, D), or one chunk and retrieval head of landmarks
(..., Hr, R). Rows stand alone: unused slots of a short chunk spoil nothing, and any range is encoded, rewritten or read
by itself. Landmarks are best kept in int8 whatever the keys are in: three bits of mantissa lose three times as many
chunks as int8, and bytes are the same. Called by the stores of memory/; tests/memory/test_quantization.py.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

KeyValueFormat = Literal["fp64", "fp32", "fp16", "bf16", "int8", "fp8"]
FORMATS: tuple[KeyValueFormat, ...] = get_args(KeyValueFormat)

_PAYLOADS: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
# largest payload; a cast to fp8 does not saturate, it gives NaN
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# has fp32's range in two bytes, and makes payload * scale one correctly rounded product in bf16
_SCALE_DTYPE = torch.bfloat16
# of scales: subnormal ones would be too coarse, and zero rows must not divide by zero
_SMALLEST = torch.finfo(_SCALE_DTYPE).tiny


class Encoded(NamedTuple):
    """payload of the input's shape (..., D); scales (...) bf16, one per row, or None for 16- and 32-bit formats."""

    payload: torch.Tensor
    scales: torch.Tensor | None


def payload_dtype(format: str) -> torch.dtype:
    """The dtype that a format stores its payload in.

    Raises:
        ValueError: for an unknown format.
    """
    if format not in _PAYLOADS:
        raise ValueError(f"unknown format {format!r}; choose one of {list(FORMATS)}")
    return _PAYLOADS[format]


def format_of(dtype: torch.dtype) -> KeyValueFormat:
    """The format of plain numbers; bf16 for what has none."""
    return next((format for format in FORMATS[:4] if _PAYLOADS[format] == dtype), "bf16")


def encode(tensor: torch.Tensor, format: KeyValueFormat) -> Encoded:
    """Store a tensor in a format: scale = max |row| / largest payload, payload = row / scale rounded to nearest even.

    Args:
        tensor: (..., D), any float dtype, finite, any device; computed in fp32. Any dimension but the last may be 0.
        format: "fp64", "fp32", "fp16" and "bf16" are casts (fp16 overflows beyond 65,504, the others beyond 3e38).

    Returns:
        Encoded. Error of one number: int8 at most scale / 2 (max |row| / 253 unless the row is below 2e-36); fp8 at
        most 1/16 of the number, or scale / 1024 if that is more.

    Raises:
        ValueError: for an unknown format or a tensor without dimensions.
        TypeError: for a tensor that is not of floating point.
    """
    dtype = payload_dtype(format)
    if not tensor.is_floating_point():
        raise TypeError(f"only floating-point tensors can be encoded, got {tensor.dtype}")
    if dtype not in _LARGEST:
        return Encoded(tensor.to(dtype), None)
    if tensor.dim() == 0 or tensor.shape[-1] == 0:
        raise ValueError(f"a row needs at least one number, got shape {tuple(tensor.shape)}")
    largest = _LARGEST[dtype]
    wide = tensor.float()
    scales = (wide.abs().amax(-1) / largest).clamp_min(_SMALLEST).to(_SCALE_DTYPE)  # (...)
    # rounding of the scale can push the largest number past the end, by at most a quarter of an int8 step
    scaled = (wide / scales.float()[..., None]).clamp(-largest, largest)  # (..., D)
    return Encoded(scaled.round().to(dtype) if dtype == torch.int8 else scaled.to(dtype), scales)


def decode(payload: torch.Tensor, scales: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """payload * scales, rounded once to `dtype`; the inverse of `encode` up to its error.

    Args:
        payload: (..., D) as `encode` returned it, or any part of it. scales: (...), the same part, or None.

    Returns:
        (..., D) of `dtype`. Ranking by decoded int8 landmarks keeps the same chunks in bf16 as in fp32.

    Raises:
        ValueError: if the scales are missing, superfluous or of another shape.
    """
    if payload.dtype not in _LARGEST:
        if scales is not None:
            raise ValueError(f"a {payload.dtype} payload has no scales")
        return payload.to(dtype)
    if scales is None or scales.shape != payload.shape[:-1]:
        got = None if scales is None else tuple(scales.shape)
        raise ValueError(
            f"a {payload.dtype} payload {tuple(payload.shape)} needs scales {tuple(payload.shape[:-1])}, got {got}"
        )
    # both factors are exact in bf16 (8 bits) and wider; fp16 lacks the range of the scales
    exact = torch.float32 if dtype == torch.float16 else dtype
    return (payload.to(exact) * scales.to(exact)[..., None]).to(dtype)


def row_bytes(format: KeyValueFormat, dim: int) -> int:
    """Bytes of one row of `dim` numbers, its scale included: 66 for 64 numbers in 8 bits."""
    dtype = payload_dtype(format)
    return dim * dtype.itemsize + (_SCALE_DTYPE.itemsize if dtype in _LARGEST else 0)


def bytes_per_token(
    keys: KeyValueFormat,
    landmarks: KeyValueFormat,
    *,
    chunk_size: int,
    num_memory_heads: int,
    head_dim: int,
    num_retrieval_heads: int,
    retrieval_dim: int,
) -> float:
    """Bytes of keys and values (format `keys`) and of landmarks per token; `retrieval_dim` counts all heads.

    For S = 64, Hkv * D = 64, Hr * R = 256: 264 in bf16, 136.03 with keys and landmarks in int8 or fp8.
    """
    landmark = num_retrieval_heads * row_bytes(landmarks, retrieval_dim // num_retrieval_heads)
    return 2 * num_memory_heads * row_bytes(keys, head_dim) + landmark / chunk_size
