"""One shard: a safetensors file of columns that never changes, and the CRC-32 of each of its 1 MiB pages.

Rows are read with pread, not through a map: a truncated file or a bad disk gives an error, where a map gives SIGBUS.
Written by writer.py, read by reader.py; tests/memory/test_files_format.py, tests/memory/test_files_damage.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from hsa_ultralong.files.durable import Buffer, remove_file, write_file
from hsa_ultralong.files.fields import one_of, require, rows, table, whole
from hsa_ultralong.files.folder import open_to_read, read_bytes, read_file
from hsa_ultralong.files.strict_json import parse_json
from hsa_ultralong.memory.files.spec import DTYPE_NAMES, MemorySpec

PAGE_BYTES = 2**20
FOLDER = "shards"


@dataclass(frozen=True)
class ShardRecord:
    """What the manifest knows of a shard; `sha256` is that of its page table file."""

    number: int
    num_chunks: int
    num_bytes: int
    sha256: str

    @property
    def file(self) -> str:
        return f"{FOLDER}/{self.number:06d}.safetensors"

    @property
    def pages_file(self) -> str:
        return f"{FOLDER}/{self.number:06d}.pages.json"

    @property
    def num_pages(self) -> int:
        return -(-self.num_bytes // PAGE_BYTES)


@dataclass(frozen=True)
class ShardLayout:
    """Where columns begin in a shard of `num_chunks` rows: the exact header, byte offsets, the file's size."""

    header: bytes
    offsets: dict[str, int]
    row_bytes: dict[str, int]
    num_bytes: int


class ShardDamage(Exception):
    """A shard that cannot be read right; the caller names the documents between the two byte offsets."""

    def __init__(self, file: str, page: int | None, what: str, first: int, stop: int) -> None:
        super().__init__(file, page, what)
        self.file, self.page, self.what, self.first, self.stop = file, page, what, first, stop


def shard_layout(spec: MemorySpec, num_chunks: int) -> ShardLayout:
    """The one layout of a shard: columns by falling element size (aligned without gaps), resident ones first."""
    columns = tuple(
        (name, column.shape, DTYPE_NAMES[column.dtype], column.row_bytes)
        for name, column in sorted(
            spec.columns.items(), key=lambda item: (-item[1].dtype.itemsize, not item[1].is_resident, item[0])
        )
    )
    return _layout(columns, num_chunks)


@lru_cache(maxsize=1024)
def _layout(columns: tuple[tuple[str, tuple[int, ...], str, int], ...], num_chunks: int) -> ShardLayout:
    entries: dict[str, object] = {"__metadata__": {"format": "hsa-memory"}}
    offsets, position = {}, 0
    for name, shape, dtype, row_bytes in columns:
        stop = position + num_chunks * row_bytes
        entries[name] = {"dtype": dtype, "shape": [num_chunks, *shape], "data_offsets": [position, stop]}
        offsets[name], position = position, stop
    text = json.dumps(entries, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return ShardLayout(
        header,
        {name: len(header) + offset for name, offset in offsets.items()},
        {name: row_bytes for name, _, _, row_bytes in columns},
        len(header) + position,
    )


class PageSums:
    """CRC-32 of every page of a stream of bytes."""

    def __init__(self) -> None:
        self._done: list[int] = []
        self._sum, self._filled = 0, 0

    def passing(self, pieces: Iterable[Buffer]) -> Iterator[Buffer]:
        """Yield the pieces unchanged while counting them in."""
        for piece in pieces:
            rest = memoryview(piece).cast("B")
            while len(rest):
                part = rest[: PAGE_BYTES - self._filled]
                self._sum = zlib.crc32(part, self._sum)
                self._filled += len(part)
                rest = rest[len(part) :]
                if self._filled == PAGE_BYTES:
                    self._done.append(self._sum)
                    self._sum, self._filled = 0, 0
            yield piece

    def finish(self) -> list[int]:
        return [*self._done, self._sum] if self._filled else list(self._done)


def page_sums(pieces: Iterable[Buffer]) -> list[int]:
    """CRC-32 of every page of what these make together."""
    sums = PageSums()
    for _ in sums.passing(pieces):
        pass
    return sums.finish()


def write_shard(
    folder: Path, number: int, spec: MemorySpec, num_chunks: int, rows: Mapping[str, Sequence[np.ndarray]]
) -> ShardRecord:
    """Write a shard and its page table; the folder `shards` is not synced yet.

    Args:
        folder: of the memory.
        rows: per column, uint8 arrays (n * row_bytes,) whose n add up to num_chunks.
    """
    layout = shard_layout(spec, num_chunks)

    def pieces() -> Iterator[Buffer]:
        yield layout.header
        for name in layout.offsets:
            yield from (part.data for part in rows[name])

    record = ShardRecord(number, num_chunks, layout.num_bytes, "")
    # summed up while they are written
    with ThreadPoolExecutor(1) as other:
        sums = other.submit(page_sums, pieces())
        write_file(folder, record.file, pieces())
        return write_page_table(folder, record, sums.result())


def write_page_table(folder: Path, record: ShardRecord, sums: Sequence[int]) -> ShardRecord:
    """Write the page table of a shard; returns the record with its checksum."""
    body = {"crc32": list(sums), "num_bytes": record.num_bytes, "page_bytes": PAGE_BYTES}
    data = json.dumps(body, separators=(",", ":")).encode("ascii") + b"\n"
    try:
        write_file(folder, record.pages_file, [data])
    except BaseException:
        # Useless without its table.
        remove_file(folder, record.file)
        raise
    return ShardRecord(record.number, record.num_chunks, record.num_bytes, hashlib.sha256(data).hexdigest())


def read_page_table(folder: Path, record: ShardRecord) -> list[int]:
    """The CRC-32 of every page of a shard.

    Raises:
        FileNotFoundError: the table is gone.
        ShardDamage: it is damaged, or not one for a file of this size.
    """
    # at most ten digits and a comma each; a larger file is not read to its end
    data = read_file(folder, record.pages_file, 11 * record.num_pages + 100)
    count = record.num_pages
    fields = {
        "crc32": rows(whole(0, 2**32 - 1), count, count),
        "num_bytes": one_of([record.num_bytes]),
        "page_bytes": one_of([PAGE_BYTES]),
    }
    if hashlib.sha256(data).hexdigest() != record.sha256:
        what = "the page table's checksum differs"
        raise ShardDamage(record.pages_file, None, what, 0, record.num_bytes)
    try:
        value = parse_json(data, encoding="ascii")
        require(table(fields), value, "table")
    except ValueError as error:
        what = f"the page table is not that of the shard: {error}"
        raise ShardDamage(record.pages_file, None, what, 0, record.num_bytes) from error
    return value["crc32"]


class Shard:
    """An open shard. It stays readable when its name is gone; the file closes with the last reference."""

    def __init__(self, record: ShardRecord, layout: ShardLayout, descriptor: int) -> None:
        """descriptor: of a file whose size was found to be `record.num_bytes`."""
        self.record, self.layout, self.descriptor = record, layout, descriptor
        self.sums: Sequence[int] = ()
        self._is_verified: np.ndarray = np.zeros(record.num_pages, dtype=bool)

    def __del__(self) -> None:
        os.close(self.descriptor)

    @staticmethod
    def open(folder: Path, record: ShardRecord, spec: MemorySpec) -> Shard:
        """Open a shard; its size, page table and header are checked now, pages when they are read.

        Raises:
            FileNotFoundError: it is gone (a newer generation does not need it, or it is lost).
            ShardDamage: it is truncated, or table or header are damaged.
        """
        descriptor = open_to_read(folder, record.file)
        # before memory is taken for what the manifest says
        size = os.fstat(descriptor).st_size
        if size != record.num_bytes:
            os.close(descriptor)
            kind = "truncated" if size < record.num_bytes else "changed"
            what = f"{kind}: it has {size:,} bytes, the manifest says {record.num_bytes:,}"
            raise ShardDamage(record.file, None, what, min(size, record.num_bytes), record.num_bytes)
        shard = Shard(record, shard_layout(spec, record.num_chunks), descriptor)
        shard.sums = read_page_table(folder, record)
        header = shard.layout.header
        if read_bytes(descriptor, 0, len(header)) != header:
            raise ShardDamage(record.file, 0, "the header differs", 0, record.num_bytes)
        return shard

    def read_rows(self, column: str, first: int, target: memoryview) -> None:
        """Fill `target` with a column's bytes from row `first` on; pages are verified at their first use.

        Raises:
            ShardDamage: a page's checksum differs or it cannot be read.
        """
        offset = self.layout.offsets[column] + first * self.layout.row_bytes[column]
        first_page, last_page = offset // PAGE_BYTES, (offset + len(target) - 1) // PAGE_BYTES
        if first_page == last_page:
            if not self._is_verified[first_page]:
                self.verify_page(first_page)
        else:
            for page in range(first_page, last_page + 1):
                if not self._is_verified[page]:
                    self.verify_page(page)
        try:
            done = os.preadv(self.descriptor, [target], offset)
            while done < len(target):
                count = os.preadv(self.descriptor, [target[done:]], offset + done)
                if count == 0:
                    raise ShardDamage(self.record.file, None, "truncated", offset + done, offset + len(target))
                done += count
        except OSError as error:
            raise self._unreadable(first_page, error) from error

    def verify_page(self, page: int) -> None:
        """Read one page and compare its checksum.

        Raises:
            ShardDamage: it differs or cannot be read.
        """
        first = page * PAGE_BYTES
        stop = min(first + PAGE_BYTES, self.record.num_bytes)
        try:
            data = read_bytes(self.descriptor, first, stop - first)
        except OSError as error:
            raise self._unreadable(page, error) from error
        if len(data) != stop - first or zlib.crc32(data) != self.sums[page]:
            raise ShardDamage(self.record.file, page, "the checksum differs", first, stop)
        self._is_verified[page] = True

    def _unreadable(self, page: int, error: OSError) -> ShardDamage:
        first = page * PAGE_BYTES
        return ShardDamage(self.record.file, page, f"cannot be read: {error.strerror}", first, first + PAGE_BYTES)
