"""A file of numbers that is read as needed and may be damaged at any time: what comes out is checked, or an error.

Reads are copies (`pread`), not a memory map: a file that is cut short under a map kills the process with SIGBUS.
Called by shards.py; tests/data/test_damaged_shards.py.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import is_digest
from hsa_ultralong.files.regular import open_regular
from hsa_ultralong.files.strict_json import read_json

VERIFIED_FILE = ".verified.json"
_BLOCK_BYTES = 2**23
# what was found whole by this process: path, state of the file, SHA-256, limit
_verified: set[tuple[str, tuple[int, ...], str, int]] = set()


class TokenFile:
    """The numbers in a file, with the length, slices and dtype of an array; slices are read-only copies.

    Args:
        path: a regular file.
        dtype: of one number.
        limit: every number must be smaller.

    Raises:
        ValueError: it is no regular file, or its size is no multiple of a number's.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], limit: int) -> None:
        self.path, self.dtype, self.limit = path, dtype, limit
        self._descriptor = open_regular(path)
        size = os.fstat(self._descriptor).st_size
        self._length, rest = divmod(size, dtype.itemsize)
        if rest:
            raise ValueError(f"{path} has {size:,} bytes, which is no multiple of {dtype.itemsize}")

    def __reduce__(self) -> tuple[Any, ...]:
        return TokenFile, (self.path, self.dtype, self.limit)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            os.close(self._descriptor)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, place: slice) -> np.ndarray:
        """The numbers of a slice without a step, (n,).

        Raises:
            OSError: the file was cut short, or holds numbers that it may not hold, since it was opened.
        """
        start, stop, step = place.indices(self._length)
        assert step == 1
        size = self.dtype.itemsize
        numbers: np.ndarray = np.frombuffer(self._read(start * size, max(0, stop - start) * size), dtype=self.dtype)
        if len(numbers) and (largest := int(numbers.max())) >= self.limit:
            raise OSError(f"{self.path} was changed while it was in use: it {self._too_large(largest)}")
        return numbers

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:] if dtype is None else self[:].astype(dtype)

    def _read(self, offset: int, count: int) -> bytes:
        data = os.pread(self._descriptor, count, offset)
        while len(data) < count:
            part = os.pread(self._descriptor, count - len(data), offset + len(data))
            if not part:
                raise OSError(f"{self.path} was cut short while it was in use")
            data += part
        return data

    def _too_large(self, number: int) -> str:
        return f"holds {number}, but its numbers are below {self.limit:,}"

    def verify(self, digest: str) -> None:
        """Compare the file's SHA-256 and check every number, unless that was done before for the file as it is now.

        Raises:
            ValueError: they differ, or a number is too large.
        """
        state = self._state()
        known = (str(self.path), state, digest, self.limit)
        if known in _verified:
            return
        found, largest = hashlib.sha256(), 0
        for block in self._blocks():
            found.update(block)
            largest = max(largest, int(np.frombuffer(block, dtype=self.dtype).max()))
        if found.hexdigest() != digest or self._state() != state:
            raise ValueError(
                f"{self.path} is corrupt (its SHA-256 is not that of the manifest); build the shards again"
            )
        if largest >= self.limit:
            raise ValueError(f"{self.path} {self._too_large(largest)}; build the shards again")
        _verified.add(known)

    def trust(self, digest: str) -> None:
        """Take the file as it is now for one that was verified."""
        _verified.add((str(self.path), self._state(), digest, self.limit))

    def record(self) -> list[Any]:
        """The file's state as `remember` keeps it."""
        return list(self._state())

    def _blocks(self) -> Iterator[bytes]:
        total = self._length * self.dtype.itemsize
        for offset in range(0, total, _BLOCK_BYTES):
            yield self._read(offset, min(_BLOCK_BYTES, total - offset))

    def _state(self) -> tuple[int, ...]:
        """What changes when a file is written to, moved in its place, or copied."""
        status = os.fstat(self._descriptor)
        return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def recall(folder: Path, files: Mapping[str, TokenFile]) -> None:
    """Trust the files whose state is the one that `remember` kept beside them."""
    try:
        kept = read_json(folder / VERIFIED_FILE)
    except (OSError, ValueError):
        return
    for name, file in files.items():
        match kept.get(name):
            case [list() as state, digest, int() as limit] if is_digest(digest) and limit == file.limit:
                if state == file.record():
                    file.trust(digest)


def remember(folder: Path, files: Mapping[str, TokenFile], digests: Mapping[str, str]) -> None:
    """Keep beside the files, where that is permitted, that they were verified as they are now."""
    content = {name: [file.record(), digests[name], file.limit] for name, file in files.items()}
    with contextlib.suppress(OSError, ValueError):
        if read_json(folder / VERIFIED_FILE) == content:
            return
    with contextlib.suppress(OSError):
        write_whole(folder / VERIFIED_FILE, json.dumps(content))
