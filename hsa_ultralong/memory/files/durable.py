"""Writing that survives a kill: new files under a temporary name, fsync, rename; one writer by a kernel lock.

The only module that changes the file system: tests stop it at every single step. Called by shard.py, manifest.py and
writer.py; tests/memory/test_files_crash.py, tests/memory/test_files_refusals.py.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hsa_ultralong.memory.files.spec import MemoryFileError

logger = logging.getLogger(__name__)
LOCK_FILE = "writer.lock"
TEMPORARY = ".tmp"
_WRITE_BYTES = 2**23
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Buffer = bytes | bytearray | memoryview


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
        raise MemoryFileError(f"{path}: failed while {doing}: {error.strerror or error}") from error


def write_file(path: Path, pieces: Iterable[Buffer]) -> None:
    """Write a complete new file, on disk before its name appears; the caller syncs the folder afterwards."""
    temporary = path.with_name(path.name + TEMPORARY)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        try:
            for piece in pieces:
                write_all(descriptor, piece)
            _sync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        remove_file(temporary)
        raise


def write_all(descriptor: int, data: Buffer) -> None:
    """Write every byte: one write call may stop short."""
    rest = memoryview(data).cast("B")
    while len(rest):
        rest = rest[os.write(descriptor, rest[:_WRITE_BYTES]) :]


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_file(path: Path) -> None:
    """Remove a file that is no longer needed; what cannot be removed is left to the next writer."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot remove %s: %s", path, error)


def read_bytes(descriptor: int, offset: int, count: int) -> bytes:
    """Up to `count` bytes at `offset`; fewer only at the end of the file."""
    parts = []
    while count:
        part = os.pread(descriptor, count, offset)
        if not part:
            break
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _sync(descriptor: int) -> None:
    # On macOS fsync leaves the data in the drive's own cache.
    full_sync = getattr(fcntl, "F_FULLFSYNC", None)
    if full_sync is not None:
        with suppress(OSError):
            fcntl.fcntl(descriptor, full_sync)
            return
    os.fsync(descriptor)


class WriterLock:
    """The right to change a memory: an flock on `writer.lock`, released by the kernel when the process dies."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor: int | None = descriptor
        self._process = os.getpid()

    def __del__(self) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether this process, not one that it was forked from, may write."""
        return self._descriptor is not None and self._process == os.getpid()

    @staticmethod
    def acquire(folder: Path) -> WriterLock:
        """Take the lock or refuse at once.

        Raises:
            MemoryFileError: another writer has the memory open; the message names its process.
        """
        path = folder / LOCK_FILE
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                os.close(descriptor)
                raise MemoryFileError(
                    f"{folder} is being written by process {owner or 'unknown'}; a memory has one writer at a time, "
                    "wait until it is done or open the memory for reading"
                ) from error
            except OSError:
                os.close(descriptor)
                raise
            # Between open and flock the folder may have been removed or renamed and made anew.
            if _is_same_file(descriptor, path):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
                return WriterLock(descriptor)
            os.close(descriptor)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            # An explicit unlock also frees a lock that a forked child inherited, and so only the parent may do it.
            if self.is_held:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None


def _is_same_file(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False
