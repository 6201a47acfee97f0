"""The manifest: which shards, documents and continuation make up one generation of a memory. Replaced atomically.

The file is valid JSON with a fixed frame, `{"format":..,"version":..,"sha256":..,"body":{..}}`, checked byte by byte.
Read by reader.py, written by writer.py; docs/memory-format.md; tests/memory/test_files_format.py.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hsa_ultralong.files.durable import write_file
from hsa_ultralong.files.fields import (
    LARGEST,
    Check,
    flag,
    free_object,
    optional,
    require,
    row,
    rows,
    table,
    text,
    whole,
)
from hsa_ultralong.files.folder import read_file
from hsa_ultralong.files.messages import shown
from hsa_ultralong.files.strict_json import parse_json, require_few_items
from hsa_ultralong.memory.files.shard import ShardRecord, shard_layout
from hsa_ultralong.memory.files.spec import SPEC, Extent, MemoryDocument, MemoryFileError, MemorySpec

FORMAT = "hsa-memory"
VERSION = 1
FILE = "manifest.json"
LARGEST_FILE = 2**30

_SHA256 = text("[0-9a-f]{64}")
DOCUMENT = table(
    {
        "id": whole(),
        "name": text(),
        "metadata": free_object,
        "num_tokens": whole(),
        "is_open": flag,
        # shard, first row, chunks
        "extents": rows(row(whole(1), whole(), whole(1))),
    }
)
_HEAD: dict[str, Check] = {
    "generation": whole(),
    "spec": SPEC,
    "shards": rows(
        table({"number": whole(1), "num_chunks": whole(1), "num_bytes": whole(1), "sha256": _SHA256}),
    ),
    "continuation": optional(
        table({"file": text(r"continuation-\d{6,}\.safetensors"), "num_bytes": whole(10), "sha256": _SHA256})
    ),
    "build_state": free_object,
    "next_document": whole(),
    "next_shard": whole(1),
}
BODY = table({**_HEAD, "documents": rows(DOCUMENT)})


@dataclass(frozen=True)
class ContinuationRecord:
    """The file with the state of the open document."""

    file: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """One generation of a memory; `next_document` and `next_shard` are the first numbers never used so far."""

    spec: MemorySpec
    generation: int = 0
    shards: tuple[ShardRecord, ...] = ()
    documents: tuple[MemoryDocument, ...] = ()
    continuation: ContinuationRecord | None = None
    build_state: dict[str, Any] = field(default_factory=dict)
    next_document: int = 0
    next_shard: int = 1

    @property
    def open_document(self) -> MemoryDocument | None:
        """The one document that may still grow: always the last."""
        return self.documents[-1] if self.documents and self.documents[-1].is_open else None

    @property
    def num_tokens(self) -> int:
        return sum(document.num_tokens for document in self.documents)

    @property
    def num_chunks(self) -> int:
        return sum(document.num_chunks for document in self.documents)

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards and the continuation."""
        return sum(record.num_bytes for record in self.shards) + (
            self.continuation.num_bytes if self.continuation else 0
        )

    def files(self) -> set[str]:
        """Names of all files that this generation needs beside the manifest."""
        names = {record.file for record in self.shards} | {record.pages_file for record in self.shards}
        return names | ({self.continuation.file} if self.continuation else set())

    def live_rows(self) -> dict[int, int]:
        """Rows in use of every shard, by number."""
        counts = {record.number: 0 for record in self.shards}
        for document in self.documents:
            for extent in document.extents:
                counts[extent.shard] += extent.num_chunks
        return counts

    def without_dead_shards(self) -> Manifest:
        """The same documents without the shards that none of them uses."""
        rows = self.live_rows()
        return replace(self, shards=tuple(record for record in self.shards if rows[record.number]))

    def owners_of_rows(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[MemoryDocument]:
        """The documents that own a row of `shard` in one of the ranges first..stop."""
        return [
            document
            for document in self.documents
            if any(
                extent.shard == shard and extent.first < stop and first < extent.first + extent.num_chunks
                for extent in document.extents
                for first, stop in ranges
            )
        ]


def continuation_file(generation: int) -> str:
    """The name of the continuation that the commit of a generation writes."""
    return f"continuation-{generation:06d}.safetensors"


def document_fields(document: MemoryDocument) -> dict[str, Any]:
    """A document as the manifest holds it."""
    return {
        "id": document.id,
        "name": document.name,
        "metadata": document.metadata,
        "num_tokens": document.num_tokens,
        "is_open": document.is_open,
        "extents": document.extents,
    }


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json.

    Raises:
        ValueError: a field that could not be read again; documents were checked when they were put in.
    """
    head: dict[str, Any] = {
        "generation": manifest.generation,
        "spec": manifest.spec.to_json(),
        "shards": [vars(record) for record in manifest.shards],
        "continuation": None if manifest.continuation is None else vars(manifest.continuation),
        "build_state": manifest.build_state,
        "next_document": manifest.next_document,
        "next_shard": manifest.next_shard,
    }
    require(table(_HEAD), head, "the manifest")
    body = {**head, "documents": [document_fields(document) for document in manifest.documents]}
    data = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
    if len(data) > LARGEST_FILE:
        raise ValueError(f"the manifest would have {len(data):,} bytes, at most {LARGEST_FILE:,} are allowed")
    require_few_items(data)
    return _framed(data)


def _framed(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    head = f'{{"format":"{FORMAT}","version":{VERSION},"sha256":"{digest}","body":'
    return head.encode("ascii") + body + b"}\n"


_FRAME_BYTES = len(_framed(b"")) - len(b"}\n")


def write_manifest(folder: Path, manifest: Manifest) -> bytes:
    """Replace the manifest in one step; returns what `generation_on_disk` then gives. The folder is not synced yet."""
    data = encode(manifest)
    write_file(folder, FILE, [data])
    return data[:_FRAME_BYTES]


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a memory folder.

    Raises:
        MemoryFileError: it is missing, of another format or version, damaged, or its document table contradicts itself.
    """
    return decode(_read(folder, LARGEST_FILE + _FRAME_BYTES), folder / FILE)


def generation_on_disk(folder: Path) -> bytes:
    """What tells generations apart without reading the whole manifest: its beginning, with the checksum of the rest.

    Raises:
        MemoryFileError: it is missing or cannot be read.
    """
    return _read(folder, _FRAME_BYTES - 1)


def no_memory(folder: Path) -> str:
    """What is said of a path where no memory lies."""
    if not os.path.lexists(folder):
        return f"{folder} does not exist; `hsa memorize` and `memory.save` make memories"
    return f"{folder} holds no memory ({FILE} is missing)"


def _read(folder: Path, largest: int) -> bytes:
    try:
        return read_file(folder, FILE, largest)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MemoryFileError(no_memory(folder)) from error
    except OSError as error:
        verb = "" if str(error.strerror).startswith("is ") else "cannot be read: "
        raise MemoryFileError(f"{folder / FILE} {verb}{error.strerror}") from error


def decode(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`; `path` is for messages."""
    if len(data) > LARGEST_FILE:
        raise MemoryFileError(f"{path} has more than {LARGEST_FILE:,} bytes; no memory needs that many")
    body = data[_FRAME_BYTES:-2]
    if data != _framed(body):
        raise MemoryFileError(_why_refused(data, path))
    try:
        value = parse_json(body, encoding="ascii")
        require(BODY, value, "body")
        manifest = _from_body(value)
        problem = _contradiction(manifest)
    except ValueError as error:
        problem = str(error)
    if problem:
        raise MemoryFileError(
            f"{path} contradicts itself ({problem}); restore the memory from a copy or build it again"
        )
    return manifest


def _why_refused(data: bytes, path: Path) -> str:
    damaged = f"{path} is damaged (its checksum differs); restore the memory from a copy or build it again"
    try:
        value = parse_json(data, encoding="ascii")
    except ValueError:
        return damaged
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return f"{path} is not the manifest of a memory (format {FORMAT!r} required)"
    if value.get("version") != VERSION:
        return (
            f"{path} has format version {shown(value.get('version'))}, this library reads {VERSION}; "
            "use the library version that wrote it, or build the memory again"
        )
    return damaged


def _from_body(body: dict[str, Any]) -> Manifest:
    documents = tuple(
        MemoryDocument(**{**item, "extents": tuple(Extent(*extent) for extent in item["extents"])})
        for item in body["documents"]
    )
    return Manifest(
        spec=MemorySpec.from_json(body["spec"]),
        generation=body["generation"],
        shards=tuple(ShardRecord(**item) for item in body["shards"]),
        documents=documents,
        continuation=None if body["continuation"] is None else ContinuationRecord(**body["continuation"]),
        build_state=body["build_state"],
        next_document=body["next_document"],
        next_shard=body["next_shard"],
    )


def _contradiction(manifest: Manifest) -> str | None:
    """What is inconsistent in the manifest, None if nothing."""
    spec, state = manifest.spec, manifest.continuation

    def problems() -> Iterator[tuple[bool, str]]:
        ids = [document.id for document in manifest.documents]
        yield len(set(ids)) != len(ids) or any(id >= manifest.next_document for id in ids), "document ids"
        numbers = [record.number for record in manifest.shards]
        yield len(set(numbers)) != len(numbers) or any(n >= manifest.next_shard for n in numbers), "shard numbers"
        wrong = [r.number for r in manifest.shards if r.num_bytes != shard_layout(spec, r.num_chunks).num_bytes]
        yield bool(wrong), f"the size of shard {wrong[:1]} is not that of its chunks"
        yield sum(record.num_bytes for record in manifest.shards) > LARGEST, "sizes of shards"
        yield any(document.is_open for document in manifest.documents[:-1]), "an open document that is not the last"
        yield state is not None and manifest.open_document is None, "a continuation of nothing"
        yield state is not None and not _is_named_by_a_commit(state.file, manifest.generation), "continuation's name"
        extents = [extent for document in manifest.documents for extent in document.extents]
        if extents:
            yield _extents_clash(extents, {record.number: record.num_chunks for record in manifest.shards}), "extents"
        large = [d.label for d in manifest.documents if d.num_tokens > (d.num_chunks + 1) * spec.chunk_size]
        yield bool(large), f"more tokens than chunks hold in {shown(large[:1])}"

    return next((what for is_wrong, what in problems() if is_wrong), None)


def _is_named_by_a_commit(file: str, generation: int) -> bool:
    """Whether a commit up to this generation gave the name: a later one would write over it."""
    number = int(file.removeprefix("continuation-").removesuffix(".safetensors"))
    return 1 <= number <= generation and file == continuation_file(number)


def _extents_clash(extents: Sequence[Extent], sizes: dict[int, int]) -> bool:
    """Whether an extent lies outside its shard or two share a row."""
    shard, first, count = np.array(extents, dtype=np.int64).T  # (E,) each
    size = np.array([sizes.get(number, -1) for number in shard.tolist()], dtype=np.int64)
    # no sum of two numbers that a hostile file chose: it would overflow
    if bool(((count > size) | (first > size - count)).any()):
        return True
    order = np.lexsort((first, shard))
    shard, first, count = shard[order], first[order], count[order]
    return bool(((shard[1:] == shard[:-1]) & (first[1:] < first[:-1] + count[:-1])).any())
