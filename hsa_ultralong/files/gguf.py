"""GGUF files: their fields, and tensors as numbers, whatever the quantisation. The package `gguf` decodes blocks.

The header is read here: a count or a length in it that the file cannot hold is refused before anything is made of it,
and hundreds of thousands of tokens take a second. Format: version 2 and 3, little-endian. Used by models/gguf.py;
tests/files/test_gguf.py.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hsa_ultralong.files.messages import reason, shown
from hsa_ultralong.files.regular import open_regular

INSTALL = "pip install 'hsa-ultralong[gguf]'"
_STRING, _ARRAY = 8, 9
# value type -> its little-endian form
_SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
# tensor type -> form of one number; all others are blocks
_PLAIN = {0: "<f4", 1: "<f2", 28: "<f8"}
_BF16 = 30
_MOST_DIMENSIONS = 4


class GGUFTensor(NamedTuple):
    """A tensor as stored: shape with the innermost dimension last, type number, bytes (n,) uint8."""

    shape: tuple[int, ...]
    kind: int
    data: np.ndarray

    @property
    def is_bf16(self) -> bool:
        return self.kind == _BF16

    def numbers(self) -> np.ndarray:
        """In the type that holds them exactly: fp16, fp32 or fp64; blocks and bf16 become fp32.

        Raises:
            ValueError: a quantisation that the package does not decode, or the package is missing.
        """
        if self.kind in _PLAIN:
            return self.data.view(_PLAIN[self.kind]).reshape(self.shape)
        if self.is_bf16:
            return (self.data.view("<u2").astype(np.uint32) << 16).view(np.float32).reshape(self.shape)
        package = _package()
        rows = self.data.reshape(*self.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):
                return package.dequantize(rows, package.GGMLQuantizationType(self.kind)).reshape(self.shape)
        except (NotImplementedError, ValueError) as error:
            name = package.GGMLQuantizationType(self.kind).name
            raise ValueError(f"the package gguf does not decode {name} ({reason(error)}); take another file") from error


class GGUFFile(NamedTuple):
    """Fields by key, and tensors by name, of a file that stays open as long as they are used."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf(path: Path) -> GGUFFile:
    """Raises ValueError, naming the file, if it is no whole GGUF file; OSError if it cannot be read."""
    with os.fdopen(open_regular(path), "rb") as stream:
        if not (size := os.fstat(stream.fileno()).st_size):
            raise ValueError(f"{path} is no GGUF file: it is empty")
        data = np.memmap(stream, np.uint8, "r", shape=(size,))
    if bytes(data[:4]) != b"GGUF":
        raise ValueError(f"{path} is no GGUF file: it does not begin with GGUF")
    try:
        return GGUFFile(path, *_content(_Cursor(data)))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class _Cursor:
    """Reads values one after the other, none beyond the end."""

    def __init__(self, data: np.ndarray) -> None:
        self.data, self.place, self.buffer = data, 4, data.data

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.place:
            raise ValueError(f"it ends before the {count:,} bytes that stand at byte {self.place:,}")
        self.place += count
        return self.buffer[self.place - count : self.place]

    def number(self, form: str) -> int:
        (value,) = struct.unpack(form, self.take(struct.calcsize(form)))
        return int(value)

    def text(self) -> str:
        raw = bytes(self.take(self.number("<Q")))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {self.place - len(raw):,} is not UTF-8") from None

    def value(self, kind: int, is_inner: bool = False) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and not is_inner:
            kind, count = self.number("<I"), self.number("<Q")
            if kind not in _SCALARS:
                # the smallest text takes 8 bytes
                self.require(8 * count)
                return [self.value(kind, is_inner=True) for _ in range(count)]
            return np.frombuffer(self.take(count * np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind]).tolist()
        if kind not in _SCALARS:
            raise ValueError(f"a field is of the unknown type {kind}")
        (value,) = np.frombuffer(self.take(np.dtype(_SCALARS[kind]).itemsize), _SCALARS[kind]).tolist()
        if kind == 6:
            # what was written: 1e-05, not its neighbour among fp32 numbers
            value = float(str(np.float32(value)))
        return bool(value) if kind == 7 else value

    def require(self, count: int) -> None:
        if count > len(self.data) - self.place:
            raise ValueError(f"it ends before the {count:,} bytes that stand at byte {self.place:,}")


def _content(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    version = cursor.number("<I")
    if version not in (2, 3):
        raise ValueError(f"version {version}, known are 2 and 3, little-endian")
    num_tensors, num_fields = cursor.number("<Q"), cursor.number("<Q")
    fields = dict(_unique("field", num_fields, cursor, lambda: cursor.value(cursor.number("<I"))))
    entries = dict(_unique("tensor", num_tensors, cursor, lambda: _entry(cursor)))
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment is {shown(alignment)}, not a power of two")
    start = -(-cursor.place // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in entries.items():
        size = _num_bytes(name, shape, kind)
        cursor.place = min(start + offset, len(cursor.data))
        cursor.require(size)
        tensors[name] = GGUFTensor(shape, kind, cursor.data[start + offset : start + offset + size])
    return fields, tensors


def _unique(what: str, count: int, cursor: _Cursor, read: Callable[[], Any]) -> Iterator[tuple[str, Any]]:
    """Pairs of a name and what follows it."""
    # the smallest entry takes 9 bytes
    cursor.require(9 * count)
    seen = set()
    for _ in range(count):
        name = cursor.text()
        if name in seen:
            raise ValueError(f"{what} {shown(name)} stands there twice")
        seen.add(name)
        yield name, read()


def _entry(cursor: _Cursor) -> tuple[tuple[int, ...], int, int]:
    count = cursor.number("<I")
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise ValueError(f"a tensor of {count:,} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(count))[::-1]
    return shape, cursor.number("<I"), cursor.number("<Q")


def _num_bytes(name: str, shape: tuple[int, ...], kind: int) -> int:
    count = math.prod(shape)
    if kind in _PLAIN:
        return count * np.dtype(_PLAIN[kind]).itemsize
    if kind == _BF16:
        return 2 * count
    found = _package().GGML_QUANT_SIZES.get(kind)
    if found is None:
        raise ValueError(f"tensor {shown(name)} is of the unknown type {kind}")
    block, size = found
    if shape[-1] % block:
        raise ValueError(f"rows of tensor {shown(name)} have {shape[-1]:,} numbers, no multiple of {block}")
    return count // block * size


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ModuleNotFoundError(f"quantised GGUF files need the package gguf: {INSTALL}") from error
    return gguf
