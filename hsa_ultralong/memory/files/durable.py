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

from hsa_ultralong.files.folder import FILE_FLAGS, is_same_file, open_file, parent_of
from hsa_ultralong.memory.files.spec import MemoryFileError

logger = logging.getLogger(__name__)
LOCK_FILE = "writer.lock"
TEMPORARY = ".tmp"
_WRITE_BYTES = 2**23
# no hard links: across file systems, not supported, not allowed, too many
_NO_LINKS = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EMLINK)
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
        name = f"{error.filename} " if isinstance(error.filename, str) and error.filename != str(path) else ""
        raise MemoryFileError(f"{path}: failed while {doing}: {name}{error.strerror or error}") from error


def write_file(folder: Path, name: str, pieces: Iterable[Buffer]) -> None:
    """Write a complete new file, on disk before its name appears; the caller syncs the folder afterwards.

    A file of that name is replaced, never changed: what is hard-linked elsewhere stays there as it was.
    """
    with parent_of(folder, name) as (parent, leaf):
        temporary = leaf + TEMPORARY
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | FILE_FLAGS
        try:
            descriptor = os.open(temporary, flags, 0o644, dir_fd=parent)
        except FileExistsError:
            # left by a killed writer; of a link the link goes, not what it points to
            os.unlink(temporary, dir_fd=parent)
            descriptor = os.open(temporary, flags, 0o644, dir_fd=parent)
        try:
            try:
                for piece in pieces:
                    write_all(descriptor, piece)
                _sync(descriptor)
            finally:
                os.close(descriptor)
            os.replace(temporary, leaf, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            _unlink(temporary, parent, folder)
            raise


def link_file(source: Path, name: str, folder: Path, new_name: str) -> None:
    """Give a file of another memory a name in this one too; a copy where the file system has no hard links.

    Both then hold the same bytes: shards and page tables are never changed. The caller syncs the folder afterwards.
    """
    with parent_of(source, name) as (old_parent, old), parent_of(folder, new_name) as (parent, leaf):
        descriptor = open_file(old_parent, old, os.O_RDONLY)
        try:
            try:
                os.link(old, leaf, src_dir_fd=old_parent, dst_dir_fd=parent, follow_symlinks=False)
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                write_file(folder, new_name, iter(lambda: os.read(descriptor, _WRITE_BYTES), b""))
        finally:
            os.close(descriptor)


def write_all(descriptor: int, data: Buffer) -> None:
    """Write every byte: one write call may stop short."""
    rest = memoryview(data).cast("B")
    while len(rest):
        rest = rest[os.write(descriptor, rest[:_WRITE_BYTES]) :]


def make_folder(folder: Path, name: str) -> None:
    """Make a folder inside the memory's; one that is there already stays, a link is refused."""
    with parent_of(folder, name) as (parent, leaf), suppress(FileExistsError):
        os.mkdir(leaf, dir_fd=parent)
    with parent_of(folder, f"{name}/."):
        pass


def sync_folder(folder: Path, name: str = "") -> None:
    """Make the names in a folder, or in the folder `name` of it, durable."""
    with parent_of(folder, f"{name}/." if name else ".") as (parent, _):
        os.fsync(parent)


def remove_file(folder: Path, name: str) -> None:
    """Remove a file that is no longer needed; what cannot be removed is left to the next writer."""
    try:
        with parent_of(folder, name) as (parent, leaf):
            _unlink(leaf, parent, folder)
    except OSError as error:
        logger.warning("cannot remove %s: %s", folder / name, error)


def _unlink(leaf: str, parent: int, folder: Path) -> None:
    try:
        os.unlink(leaf, dir_fd=parent)
    except FileNotFoundError:
        pass
    except OSError as error:
        logger.warning("cannot remove %s of %s: %s", leaf, folder, error)


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

    def __init__(self, folder: Path, descriptor: int) -> None:
        self._folder = folder
        self._descriptor: int | None = descriptor
        self._process = os.getpid()

    def __del__(self) -> None:
        self.release()

    @property
    def is_held(self) -> bool:
        """Whether this process, not one that it was forked from, may write."""
        return self._descriptor is not None and self._process == os.getpid()

    @property
    def is_in_place(self) -> bool:
        """Whether `writer.lock` is still the file that is locked: without it another writer can begin."""
        return self._descriptor is not None and is_same_file(self._descriptor, self._folder, LOCK_FILE)

    @staticmethod
    def acquire(folder: Path) -> WriterLock:
        """Take the lock or refuse at once.

        Raises:
            MemoryFileError: another writer has the memory open; the message names its process.
        """
        while True:
            with parent_of(folder, LOCK_FILE) as (parent, leaf):
                descriptor = open_file(parent, leaf, os.O_RDWR | os.O_CREAT)
                try:
                    lock = WriterLock(folder, descriptor)
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    is_shared = os.fstat(descriptor).st_nlink > 1
                    if is_shared and lock.is_in_place:
                        # hard-linked elsewhere, by a copy of the folder for example: it is not ours to write to
                        os.unlink(leaf, dir_fd=parent)
                except BlockingIOError as error:
                    owner = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
                    lock.release()
                    raise MemoryFileError(
                        f"{folder} is being written by process {owner if owner.isdecimal() else 'unknown'}; a memory "
                        "has one writer at a time, wait until it is done or open the memory for reading"
                    ) from error
                except BaseException:
                    lock.release()
                    raise
            # Between open and flock the folder may have been removed or renamed and made anew.
            if not is_shared and lock.is_in_place:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()}\n".encode("ascii"), 0)
                return lock
            lock.release()

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._descriptor is not None:
            # An explicit unlock also frees a lock that a forked child inherited, and so only the parent may do it.
            if self.is_held:
                fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            os.close(self._descriptor)
            self._descriptor = None
