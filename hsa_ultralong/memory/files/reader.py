"""MemoryFile: a snapshot of a memory on disk, for reading. Any number of readers, no locks.

It opens every shard of its generation, so it stays readable whatever a writer does afterwards. Resident columns are
verified now, pages of the others when first used. docs/memory-format.md; tests/memory/test_files_reading.py.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_ultralong.memory.files.continuation import StoredContinuation, read_continuation
from hsa_ultralong.memory.files.finite import WHAT, first_bad_row
from hsa_ultralong.memory.files.manifest import Manifest, read_manifest
from hsa_ultralong.memory.files.shard import Shard, ShardDamage, shard_layout
from hsa_ultralong.memory.files.spec import Damage, MemoryDocument, MemoryFileError, MemorySpec, clear_errors

FileProgress = Callable[[int, int], None]
_MAX_RETRIES = 20
# what is wrong with one file, not with the machine or the whole folder
_BAD_FILE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EIO, errno.ENXIO)


class MemoryFile:
    """A snapshot of a memory folder, made by `open`. A context manager; `close` gives the files back."""

    def __init__(
        self, path: Path, manifest: Manifest, shards: dict[int, Shard], state: StoredContinuation | None
    ) -> None:
        self.path, self.manifest = path, manifest
        self._shards, self._state = shards, state
        self._residents: dict[str, torch.Tensor] = {}
        # per column, the chunks whose numbers were seen to be finite
        self._finite: dict[str, np.ndarray] = {}
        extents = [extent for document in manifest.documents for extent in document.extents]
        table = np.array(extents, dtype=np.int64).reshape(-1, 3)
        self._extent_shard, self._extent_row = table[:, 0], table[:, 1]
        stops = np.cumsum(table[:, 2])
        self._extent_start = stops - table[:, 2]
        self.num_chunks = int(stops[-1]) if len(stops) else 0
        self._first_chunks: dict[int, int] = {}
        first = 0
        for document in manifest.documents:
            self._first_chunks[document.id] = first
            first += document.num_chunks
        self._documents = {document.id: document for document in manifest.documents}

    @staticmethod
    def open(path: str | Path, *, fingerprint: str | None = None) -> MemoryFile:
        """Open the last committed state; manifest, documents, continuation and resident columns are verified: bytes,
        and that numbers are finite.

        Args:
            path: the memory's folder.
            fingerprint: refuse a memory of another model.

        Raises:
            MemoryFileError: no memory, another model's, another format version, truncated or damaged.
        """
        file = MemoryFile.open_unverified(Path(path), fingerprint)
        file.read_residents()
        return file

    @staticmethod
    def open_unverified(path: Path, fingerprint: str | None = None) -> MemoryFile:
        """`open` that leaves resident columns until they are asked for (a writer needs none)."""

        def refuse(damage: Damage) -> None:
            raise MemoryFileError(f"{path}/{damage}")

        with clear_errors(path, "opening the memory"):
            manifest, shards, state = open_snapshot(path, refuse)
        require_fingerprint(path, manifest.spec, fingerprint)
        return MemoryFile(path, manifest, shards, state)

    def __enter__(self) -> MemoryFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the files back; tensors that were returned stay valid."""
        self._shards, self._residents, self._state = {}, {}, None

    @property
    def spec(self) -> MemorySpec:
        return self.manifest.spec

    @property
    def documents(self) -> tuple[MemoryDocument, ...]:
        """In order; an open one is the last."""
        return self.manifest.documents

    @property
    def generation(self) -> int:
        """Number of commits so far."""
        return self.manifest.generation

    @property
    def build_state(self) -> dict[str, Any]:
        """What the last `commit(build_state=...)` left for a builder that goes on."""
        return self.manifest.build_state

    @property
    def num_tokens(self) -> int:
        return self.manifest.num_tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of the shards and the continuation."""
        return self.manifest.num_bytes

    @property
    def dead_bytes(self) -> int:
        """Bytes of deleted or replaced chunks, which `MemoryWriter.compact` frees."""
        rows = sum(record.num_chunks for record in self.manifest.shards)
        return (rows - self.num_chunks) * self.spec.row_bytes

    def document(self, id: int) -> MemoryDocument:
        """The document with this id.

        Raises:
            ValueError: there is none.
        """
        if id not in self._documents:
            raise ValueError(f"document {id} does not exist in {self.path}")
        return self._documents[id]

    def holds(self, document: MemoryDocument) -> bool:
        """Whether this snapshot has exactly this record."""
        return self._documents.get(document.id) == document

    def chunk_range(self, id: int) -> tuple[int, int]:
        """The chunks first..stop of a document, in document order.

        Raises:
            ValueError: there is no such document.
        """
        document = self.document(id)
        first = self._first_chunks[id]
        return first, first + document.num_chunks

    def shard(self, number: int) -> Shard:
        """An open shard (for copying it whole)."""
        return self._shards[number]

    def continuation(self) -> StoredContinuation | None:
        """Tensors and metadata of the open document's continuation, None without one."""
        return self._state

    def resident(self, column: str) -> torch.Tensor:
        """A resident column of all chunks in document order, (C, *shape), in RAM; not to be written to.

        Raises:
            ValueError: unknown, or not resident.
            MemoryFileError: damaged.
        """
        if not self._column(column).is_resident:
            raise ValueError(f"column {column!r} is not resident; use read or fetch")
        if column not in self._residents:
            self._residents[column] = self._read(column, 0, self.num_chunks)
        return self._residents[column]

    def read_residents(self) -> None:
        """Read all resident columns now; errors as in `resident`."""
        for name, column in self.spec.columns.items():
            if column.is_resident:
                self.resident(name)

    def read(self, column: str, first: int, stop: int) -> torch.Tensor:
        """Chunks first..stop of a column in document order, (stop - first, *shape).

        Raises:
            ValueError: unknown column or a range outside the memory.
            MemoryFileError: a page is damaged; names file and documents.
        """
        self._column(column)
        if not 0 <= first <= stop <= self.num_chunks:
            raise ValueError(f"chunks must lie within 0..{self.num_chunks}, got {first}..{stop}")
        if column in self._residents:
            return self._residents[column][first:stop].clone()
        return self._read(column, first, stop)

    def fetch(self, column: str, chunks: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Any chunks of a column, in document order numbering.

        Args:
            chunks: (n,) integers within 0..C-1, in any order, also repeated.
            out: (n, *shape) contiguous on the host, such as pinned memory; made if not given.

        Returns:
            (n, *shape) in the column's dtype.

        Raises:
            ValueError: unknown column, chunk numbers outside the memory, or an unfit `out`.
            MemoryFileError: a page is damaged; names file and documents. Nothing of `out` may be used then.
        """
        kind = self._column(column)
        numbers: np.ndarray = chunks.detach().cpu().numpy().astype(np.int64, copy=False)
        if numbers.ndim != 1 or (len(numbers) and not 0 <= numbers.min() <= numbers.max() < self.num_chunks):
            raise ValueError(f"chunks must be (n,) numbers within 0..{self.num_chunks - 1}")
        shape = (len(numbers), *kind.shape)
        if out is None:
            out = self._room(column, len(numbers))
        elif out.shape != shape or out.dtype != kind.dtype or out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(f"out must be a contiguous host tensor {shape} {kind.dtype}, got {tuple(out.shape)}")
        if column in self._residents:
            # As bytes: torch selects rows of some dtypes only.
            source, target = (x.view(-1).view(torch.uint8) for x in (self._residents[column], out))
            rows = torch.from_numpy(numbers)
            torch.index_select(source.view(-1, kind.row_bytes), 0, rows, out=target.view(-1, kind.row_bytes))
        elif len(numbers):
            extent = np.searchsorted(self._extent_start, numbers, side="right") - 1  # (n,)
            rows = self._extent_row[extent] + numbers - self._extent_start[extent]
            self._gather(column, self._extent_shard[extent].tolist(), rows.tolist(), None, out)
            self._require_finite(column, numbers, out)
        return out

    def document_tokens(self, id: int) -> torch.Tensor:
        """All token ids of a document, (n,) int32.

        Needs the columns `tokens` (S,) and `lengths` (); the tail of an open document is the continuation's tensor
        `tail_tokens`.

        Raises:
            ValueError: unknown document, or the memory stores no tokens.
            MemoryFileError: damaged.
        """
        document = self.document(id)
        first, stop = self.chunk_range(id)
        size, columns = self.spec.chunk_size, self.spec.columns
        if self._column("tokens").shape != (size,) or self._column("lengths").shape != ():
            raise MemoryFileError(f"{self.path}: columns tokens {columns['tokens'].shape} and lengths are no token ids")
        # torch masks only some dtypes, not uint16
        tokens, lengths = self.read("tokens", first, stop).to(torch.int32), self.read("lengths", first, stop)
        is_used = torch.arange(size) < lengths[:, None]  # (n, S)
        result = tokens[is_used]
        if document.is_open and self._state is not None and "tail_tokens" in self._state[0]:
            result = torch.cat((result, self._state[0]["tail_tokens"].flatten().to(result.dtype)))
        if len(result) != document.num_tokens:
            raise MemoryFileError(
                f"{self.path}: {document.label} has {len(result)} stored token ids, {document.num_tokens} by the "
                "document table; build the memory again"
            )
        return result.to(torch.int32)

    @property
    def shards(self) -> Mapping[int, Shard]:
        """The shards that this snapshot holds open, by number."""
        return self._shards

    def _column(self, name: str) -> Any:
        if name not in self.spec.columns:
            raise ValueError(f"no column {name!r}; the memory has {', '.join(sorted(self.spec.columns))}")
        return self.spec.columns[name]

    def _read(self, column: str, first: int, stop: int) -> torch.Tensor:
        out = self._room(column, stop - first)
        if stop > first:
            low = np.searchsorted(self._extent_start, first, side="right") - 1
            high = np.searchsorted(self._extent_start, stop, side="left")
            starts = self._extent_start[low:high].copy()
            rows, shards = self._extent_row[low:high].copy(), self._extent_shard[low:high]
            rows[0] += first - starts[0]
            starts[0] = first
            self._gather(column, shards.tolist(), rows.tolist(), np.diff(starts, append=stop).tolist(), out)
            self._require_finite(column, np.arange(first, stop), out)
        return out

    def _require_finite(self, column: str, numbers: np.ndarray, rows: torch.Tensor) -> None:
        """Refuse these chunks' rows if a number is not finite; each chunk is looked at once."""
        if not rows.is_floating_point():
            return
        seen = self._finite.setdefault(column, np.zeros(self.num_chunks, dtype=bool))
        if seen[numbers].all():
            return
        bad = first_bad_row(rows)
        if bad is not None:
            chunk = int(numbers[bad])
            owner = next(d for d in reversed(self.documents) if self._first_chunks[d.id] <= chunk and d.num_chunks)
            place = chunk - self._first_chunks[owner.id]
            raise MemoryFileError(
                f"{self.path}: {owner.label} cannot be read: {column} of its chunk {place} holds {WHAT}; delete the "
                "document, or memorise it again"
            )
        seen[numbers] = True

    def _room(self, column: str, count: int) -> torch.Tensor:
        kind = self._column(column)
        try:
            return torch.empty((count, *kind.shape), dtype=kind.dtype)
        except RuntimeError as error:
            raise MemoryFileError(
                f"{self.path}: {count:,} chunks of column {column!r} need {count * kind.row_bytes:,} bytes of memory, "
                "which there are not; read fewer at a time, or use a machine with more"
            ) from error

    def _gather(
        self, column: str, shards: list[int], rows: list[int], counts: list[int] | None, out: torch.Tensor
    ) -> None:
        """Read runs of rows (counts None: one each), one after another into `out`; neighbours in one read."""
        if not self._shards:
            raise ValueError(f"{self.path} was closed; open it again")
        row_bytes = self._column(column).row_bytes
        target: memoryview = out.view(-1).view(torch.uint8).numpy().data
        # Plain lists: a dozen numpy calls would cost more than the reads of a few chunks.
        counts = counts or [1] * len(rows)
        run_shard, run_row, begin, stop = shards[0], rows[0], 0, 0
        with self._naming_documents():
            for shard, row, count in zip(shards, rows, counts, strict=True):
                if shard != run_shard or row != run_row + (stop - begin) // row_bytes:
                    self._shards[run_shard].read_rows(column, run_row, target[begin:stop])
                    run_shard, run_row, begin = shard, row, stop
                stop += count * row_bytes
            self._shards[run_shard].read_rows(column, run_row, target[begin:stop])

    @contextmanager
    def _naming_documents(self) -> Iterator[None]:
        try:
            yield
        except ShardDamage as error:
            damage = name_documents(self.manifest, error)
            raise MemoryFileError(
                f"{self.path}/{damage}; restore the file from a copy, or delete these documents and compact"
            ) from error


def require_fingerprint(path: Path, spec: MemorySpec, fingerprint: str | None) -> None:
    """Refuse the memory of another model.

    Raises:
        MemoryFileError: the fingerprints differ.
    """
    if fingerprint is not None and fingerprint != spec.fingerprint:
        raise MemoryFileError(
            f"{path} was built by another model: fingerprint {spec.fingerprint[:12]!r}, this model's is "
            f"{fingerprint[:12]!r}; use the model that built it, or: hsa memory rebuild {path} --model MODEL"
        )


def open_snapshot(
    path: Path, on_damage: Callable[[Damage], None]
) -> tuple[Manifest, dict[int, Shard], StoredContinuation | None]:
    """Read the manifest and open all that it names; again if a writer replaced it meanwhile.

    `on_damage` is told of every file that cannot be opened right, and may raise.

    Raises:
        MemoryFileError: the manifest is missing or damaged.
    """
    manifest = read_manifest(path)
    for _ in range(_MAX_RETRIES):
        found: list[Damage] = []
        shards, state = _open_files(path, manifest, found)
        newer = read_manifest(path) if any(damage.what == "is missing" for damage in found) else manifest
        if newer.generation == manifest.generation:
            break
        manifest = newer
    for damage in found:
        on_damage(damage)
    return manifest, shards, state


def _open_files(
    path: Path, manifest: Manifest, found: list[Damage]
) -> tuple[dict[int, Shard], StoredContinuation | None]:
    shards: dict[int, Shard] = {}
    for record in manifest.shards:
        try:
            shards[record.number] = Shard.open(path, record, manifest.spec)
        except OSError as error:
            name = record.pages_file if str(error.filename).endswith(".json") else record.file
            found.append(name_documents(manifest, ShardDamage(name, None, _why_not_opened(error), 0, record.num_bytes)))
        except ShardDamage as error:
            found.append(name_documents(manifest, error))
    state = None
    if manifest.continuation is not None:
        try:
            state = read_continuation(path, manifest.continuation)
        except (OSError, MemoryFileError) as error:
            what = _why_not_opened(error) if isinstance(error, OSError) else str(error)
            open_document = manifest.open_document
            assert open_document is not None
            found.append(Damage(manifest.continuation.file, None, what, (open_document.label,), (open_document.id,)))
    return shards, state


def _why_not_opened(error: OSError) -> str:
    if error.errno not in _BAD_FILE:
        raise error
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return str(error.strerror) if error.errno == errno.ELOOP else f"cannot be opened: {error.strerror}"


def name_documents(manifest: Manifest, error: ShardDamage) -> Damage:
    """The damage with the documents that have data between its two byte offsets."""
    record = next(r for r in manifest.shards if error.file in (r.file, r.pages_file))
    layout = shard_layout(manifest.spec, record.num_chunks)
    ranges: Sequence[tuple[int, int]] = [
        ((error.first - offset) // row_bytes, -((offset - error.stop) // row_bytes))
        for offset, row_bytes in ((layout.offsets[name], layout.row_bytes[name]) for name in layout.offsets)
    ]
    documents = manifest.owners_of_rows(record.number, ranges)
    labels, ids = (document.label for document in documents), (document.id for document in documents)
    return Damage(error.file, error.page, error.what, tuple(labels), tuple(ids))
