"""The manifest: which shards, documents and continuation make up one generation of a memory. Replaced atomically.

The file is valid JSON with a fixed frame, `{"format":..,"version":..,"sha256":..,"body":{..}}`, checked byte by byte.
Read by reader.py, written by writer.py; docs/memory-format.md; tests/memory/test_files_format.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from hsa_ultralong.memory.files.durable import write_file
from hsa_ultralong.memory.files.shard import ShardRecord
from hsa_ultralong.memory.files.spec import Extent, MemoryDocument, MemoryFileError, MemorySpec

FORMAT = "hsa-memory"
VERSION = 1
FILE = "manifest.json"


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


def encode(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    body: dict[str, Any] = {
        "generation": manifest.generation,
        "spec": manifest.spec.to_json(),
        "shards": [
            {"number": r.number, "num_chunks": r.num_chunks, "num_bytes": r.num_bytes, "sha256": r.sha256}
            for r in manifest.shards
        ],
        "documents": [
            {
                "id": document.id,
                "name": document.name,
                "metadata": document.metadata,
                "num_tokens": document.num_tokens,
                "is_open": document.is_open,
                "extents": document.extents,
            }
            for document in manifest.documents
        ],
        "continuation": None if manifest.continuation is None else vars(manifest.continuation),
        "build_state": manifest.build_state,
        "next_document": manifest.next_document,
        "next_shard": manifest.next_shard,
    }
    return _framed(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii"))


def _framed(body: bytes) -> bytes:
    digest = hashlib.sha256(body).hexdigest()
    head = f'{{"format":"{FORMAT}","version":{VERSION},"sha256":"{digest}","body":'
    return head.encode("ascii") + body + b"}\n"


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step; the folder is not synced yet."""
    write_file(folder / FILE, [encode(manifest)])


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a memory folder.

    Raises:
        MemoryFileError: it is missing, of another format or version, damaged, or its document table contradicts itself.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MemoryFileError(f"{folder} holds no memory ({FILE} is missing)") from error
    except OSError as error:
        raise MemoryFileError(f"{path} cannot be read: {error.strerror}") from error
    return decode(data, path)


def decode(data: bytes, path: Path) -> Manifest:
    """The manifest in `data`; `path` is for messages."""
    start = len(_framed(b"")) - len(b"}\n")
    if data != _framed(data[start:-2]):
        raise MemoryFileError(_why_refused(data, path))
    body = json.loads(data[start:-2])
    try:
        manifest = _from_body(body)
        problem = _contradiction(manifest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem:
        raise MemoryFileError(
            f"{path} contradicts itself ({problem}); restore the memory from a copy or build it again"
        )
    return manifest


def _why_refused(data: bytes, path: Path) -> str:
    damaged = f"{path} is damaged (its checksum differs); restore the memory from a copy or build it again"
    try:
        value = json.loads(data)
    except ValueError:
        return damaged
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        return f"{path} is not the manifest of a memory (format {FORMAT!r} required)"
    if value.get("version") != VERSION:
        return (
            f"{path} has format version {value.get('version')}, this library reads {VERSION}; "
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
    """What is inconsistent in the document table, None if nothing."""

    def problems() -> Iterator[tuple[bool, str]]:
        ids = [document.id for document in manifest.documents]
        yield len(set(ids)) != len(ids) or any(not 0 <= id < manifest.next_document for id in ids), "document ids"
        numbers = [record.number for record in manifest.shards]
        yield len(set(numbers)) != len(numbers) or any(n >= manifest.next_shard for n in numbers), "shard numbers"
        yield any(document.is_open for document in manifest.documents[:-1]), "an open document that is not the last"
        yield manifest.continuation is not None and manifest.open_document is None, "a continuation of nothing"
        extents = [extent for document in manifest.documents for extent in document.extents]
        if extents:
            yield _extents_clash(extents, {record.number: record.num_chunks for record in manifest.shards}), "extents"

    return next((what for is_wrong, what in problems() if is_wrong), None)


def _extents_clash(extents: Sequence[Extent], sizes: dict[int, int]) -> bool:
    """Whether an extent lies outside its shard or two share a row."""
    shard, first, count = np.array(extents, dtype=np.int64).T  # (E,) each
    size = np.array([sizes.get(number, -1) for number in shard.tolist()])
    if bool(((first < 0) | (count < 1) | (first + count > size)).any()):
        return True
    order = np.lexsort((first, shard))
    shard, first, count = shard[order], first[order], count[order]
    return bool(((shard[1:] == shard[:-1]) & (first[1:] < first[:-1] + count[:-1])).any())
