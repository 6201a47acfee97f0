"""What a memory file holds: columns, documents, extents, and the error that every refusal raises.

Pure data, no files. docs/memory-format.md is the documented format; used by every module of this folder;
tests/memory/test_files_format.py.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any, NamedTuple

import torch

from hsa_ultralong.files.fields import flag, free_object, mapping, one_of, require, rows, table, text, whole
from hsa_ultralong.files.messages import shown
from hsa_ultralong.files.strict_json import parse_json

# The names of the safetensors format.
DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.int8: "I8",
    torch.uint8: "U8",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
NAMES_IN_A_MESSAGE = 3
# characters of each
_LABELS = Repr()
_LABELS.maxstring = 160
# of one chunk in all columns
LARGEST_ROW = 2**40
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _column_name(value: Any) -> str | None:
    # safetensors keeps `__metadata__` for itself
    is_name = type(value) is str and value.isidentifier() and len(value) <= 100 and value != "__metadata__"
    return None if is_name else f" must be an identifier of at most 100 characters, got {shown(value)}"


SPEC = table(
    {
        "chunk_size": whole(1, 2**31 - 1),
        "columns": mapping(
            _column_name,
            table({"shape": rows(whole(1, LARGEST_ROW), 0, 16), "dtype": one_of(DTYPES), "resident": flag}),
            1,
            100,
        ),
        "fingerprint": text(),
        "tokenizer": text(),
        "is_composable": flag,
        "metadata": free_object,
    }
)


class MemoryFileError(ValueError):
    """A memory folder is missing, damaged, foreign, locked or could not be written; one line says which and where."""


@contextmanager
def clear_errors(path: Path, doing: str) -> Iterator[None]:
    """Turn an operating system's refusal into one MemoryFileError."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise MemoryFileError(
                f"{path}: no space left while {doing}; the memory is as after its last commit; "
                "free some space and try again"
            ) from error
        if error.errno == errno.EMFILE:
            raise MemoryFileError(
                f"{path}: too many open files while {doing}; raise the limit (ulimit -n) or compact the memory"
            ) from error
        name = f"{error.filename} " if isinstance(error.filename, str) and error.filename != str(path) else ""
        raise MemoryFileError(f"{path}: failed while {doing}: {name}{error.strerror or error}") from error


class Extent(NamedTuple):
    """Consecutive rows of one shard that hold consecutive chunks of a document."""

    shard: int
    first: int
    num_chunks: int


@dataclass(frozen=True)
class Column:
    """One tensor per chunk.

    Attributes:
        shape: of one chunk's entry; () for a number.
        dtype: one of DTYPE_NAMES.
        is_resident: read and verified when the memory is opened, and kept in RAM.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    is_resident: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.dtype not in DTYPE_NAMES:
            raise ValueError(f"a column's dtype must be one of {', '.join(map(str, DTYPE_NAMES))}; got {self.dtype}")
        if any(size < 1 for size in self.shape) or self.row_bytes > LARGEST_ROW:
            raise ValueError(
                f"a column's shape must be positive and take at most {LARGEST_ROW:,} bytes, got {self.shape}"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one chunk's entry."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MemoryDocument:
    """One document of a memory file.

    Attributes:
        id: never reused in a memory, also after the document is deleted.
        name, metadata: free; metadata is JSON.
        num_tokens: all tokens, the tail of an open document included.
        is_open: it may still grow; only the last document of a memory can be open.
        extents: where its chunks lie, in order.
    """

    id: int
    name: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    num_tokens: int = 0
    is_open: bool = False
    extents: tuple[Extent, ...] = ()

    @property
    def num_chunks(self) -> int:
        return sum(extent.num_chunks for extent in self.extents)

    @property
    def label(self) -> str:
        """The name in messages, its middle left out if it is long."""
        return _LABELS.repr(self.name) if self.name else f"document {self.id}"


@dataclass(frozen=True)
class MemorySpec:
    """What all chunks of a memory have in common; fixed when the memory is created.

    Attributes:
        chunk_size: tokens of a full chunk (S).
        columns: what is stored per chunk, by name.
        fingerprint: of the parameters that the memory depends on; only the same model can use the memory.
        tokenizer: fingerprint of the tokenizer whose ids the documents hold.
        is_composable: False if the order of chunks matters to the model (fact 4): no merging, selecting, reordering.
        metadata: free JSON (model name, dtype of the weights).

    Raises:
        ValueError: no columns, a chunk size below 1, a column name that is no identifier, metadata that is no JSON, or
            anything that SPEC does not take.
    """

    chunk_size: int
    columns: dict[str, Column]
    fingerprint: str = ""
    tokenizer: str = ""
    is_composable: bool = True
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "metadata", as_json_object(self.metadata, "metadata"))
        require(SPEC, self.to_json(), "a memory's spec")
        if self.row_bytes > LARGEST_ROW:
            raise ValueError(f"a chunk has {self.row_bytes:,} bytes, at most {LARGEST_ROW:,} are allowed")

    @property
    def row_bytes(self) -> int:
        """Bytes of one chunk in all columns."""
        return sum(column.row_bytes for column in self.columns.values())

    def to_json(self) -> dict[str, Any]:
        columns = {
            name: {"shape": list(column.shape), "dtype": DTYPE_NAMES[column.dtype], "resident": column.is_resident}
            for name, column in self.columns.items()
        }
        return {
            "chunk_size": self.chunk_size,
            "columns": columns,
            "fingerprint": self.fingerprint,
            "tokenizer": self.tokenizer,
            "is_composable": self.is_composable,
            "metadata": self.metadata,
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> MemorySpec:
        """The spec in an object that SPEC takes."""
        columns = {
            name: Column(tuple(column["shape"]), DTYPES[column["dtype"]], column["resident"])
            for name, column in value["columns"].items()
        }
        return MemorySpec(**{**value, "columns": columns})

    def require_compatible(self, other: MemorySpec, who: str) -> None:
        """Refuse chunks of `other` (called `who` in the message) in a memory of this kind; metadata may differ.

        Raises:
            MemoryFileError: another model, tokenizer, chunk size or set of columns.
        """
        if other.fingerprint != self.fingerprint:
            raise MemoryFileError(
                f"{who} was built by another model: fingerprint {other.fingerprint[:12]!r}, "
                f"required {self.fingerprint[:12]!r}; use the memory with the model that built it, or read it again by "
                "another: hsa memory rebuild MEMORY --model MODEL"
            )
        if other.tokenizer != self.tokenizer:
            raise MemoryFileError(
                f"{who} was built with another tokenizer: {other.tokenizer[:12]!r}, "
                f"required {self.tokenizer[:12]!r}; build it again with this tokenizer"
            )
        if other.chunk_size != self.chunk_size:
            raise MemoryFileError(f"{who} has chunks of {other.chunk_size} tokens, required {self.chunk_size}")
        if other.columns != self.columns or other.is_composable != self.is_composable:
            differing = sorted(
                name for name in {*self.columns, *other.columns} if self.columns.get(name) != other.columns.get(name)
            )
            raise MemoryFileError(
                f"{who} stores chunks in another form (columns {', '.join(differing) or 'in another order'}); "
                "build both with the same options"
            )

    def require_composable(self, what: str) -> None:
        """Refuse to `what` documents of a model that depends on the order of chunks.

        Raises:
            MemoryFileError: if the model is not composable.
        """
        if not self.is_composable:
            raise MemoryFileError(
                f"cannot {what} documents: this model's fusion depends on the order of chunks (stick-breaking or "
                "position decay); use a softmax-fusion model without position decay"
            )


@dataclass(frozen=True)
class Damage:
    """One damaged place of a memory.

    Attributes:
        file: relative to the memory's folder.
        page: number of the 1 MiB page; None if the whole file is concerned.
        what: what is wrong.
        documents: labels of all documents that have data there.
        document_ids: their ids.
    """

    file: str
    page: int | None
    what: str
    documents: tuple[str, ...] = ()
    document_ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        place = self.file if self.page is None else f"{self.file}, page {self.page}"
        return f"{place}: {self.what}; {concerned(self.documents)}"


def concerned(documents: Sequence[str]) -> str:
    """`documents concerned: 'a', 'b', 'c' and 12 more` for a message."""
    if not documents:
        return "no document concerned"
    more = len(documents) - NAMES_IN_A_MESSAGE
    names = ", ".join(documents[:NAMES_IN_A_MESSAGE]) + (f" and {more} more" if more > 0 else "")
    return f"document{'s' * (len(documents) > 1)} concerned: {names}"


def as_json_object(value: Mapping[str, Any], what: str) -> dict[str, Any]:
    """A copy of `value` as JSON reads it back (tuples are lists).

    Raises:
        ValueError: if it is no JSON object.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{what} must be a JSON object with string keys, got {type(value).__name__}")
    try:
        copy = dict(parse_json(json.dumps(dict(value), allow_nan=False).encode("ascii")))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{what} must be JSON: {error}") from error
    require(free_object, copy, what)
    return copy


def splice(extents: Sequence[Extent], first: int, stop: int, new: Sequence[Extent]) -> tuple[Extent, ...]:
    """Replace chunks first..stop of a document by those of `new`; neighbours in one shard are joined."""
    before: list[Extent] = []
    after: list[Extent] = []
    position = 0
    for shard, row, count in extents:
        head = min(max(first - position, 0), count)
        tail = min(max(position + count - stop, 0), count)
        before.append(Extent(shard, row, head))
        after.append(Extent(shard, row + count - tail, tail))
        position += count
    joined: list[Extent] = []
    for extent in (*before, *new, *after):
        if extent.num_chunks == 0:
            continue
        last = joined[-1] if joined else None
        if last is not None and last.shard == extent.shard and last.first + last.num_chunks == extent.first:
            joined[-1] = Extent(last.shard, last.first, last.num_chunks + extent.num_chunks)
        else:
            joined.append(extent)
    return tuple(joined)
