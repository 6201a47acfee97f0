"""Writing that survives a kill: new files under a temporary name, fsync, rename.

With lock.py the only module that changes the files of a memory: tests stop it at every single step.
tests/files/test_regular.py, tests/memory/test_files_crash.py, tests/memory/test_files_refusals.py.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from hsa_ultralong.files.folder import open_file, parent_of
from hsa_ultralong.files.regular import PLAIN_FLAGS

logger = logging.getLogger(__name__)
TEMPORARY = ".tmp"
_WRITE_BYTES = 2**23
# no hard links: across file systems, not supported, not allowed, too many
_NO_LINKS = (errno.EXDEV, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.EMLINK)
Buffer = bytes | bytearray | memoryview


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace a file in one step by another that is complete and on disk; a link in its place is not followed."""
    write_file(path.parent, path.name, [content.encode("utf-8") if isinstance(content, str) else content])


def write_file(folder: Path, name: str, pieces: Iterable[Buffer]) -> None:
    """Write a complete new file, on disk before its name appears; the caller syncs the folder afterwards.

    A file of that name is replaced, never changed: what is hard-linked elsewhere stays there as it was.
    """
    with parent_of(folder, name) as (parent, leaf):
        temporary = leaf + TEMPORARY
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | PLAIN_FLAGS
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
