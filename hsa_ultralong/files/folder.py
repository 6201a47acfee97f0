"""Files of a memory's folder, opened so that nothing outside it can be meant: no link is followed, no device opened.

The folder itself may be reached by links, it is the user's own word. Names are relative to it, with `/`. What is no
plain file is an OSError that says so. Used by every module here that touches files; tests/memory/test_files_links.py.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
# a FIFO must not block, a name that became a link must not be followed
FILE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@contextmanager
def parent_of(folder: Path, name: str) -> Iterator[tuple[int, str]]:
    """The descriptor of the folder that holds `name`, and the last part of `name`.

    Raises:
        OSError: a folder on the way is missing, or a link or no folder at all.
    """
    *parents, leaf = name.split("/")
    descriptor = os.open(folder, FOLDER_FLAGS)
    try:
        for part in parents:
            _require_kind(descriptor, part, stat.S_IFDIR)
            inner = os.open(part, FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = inner
        yield descriptor, leaf
    finally:
        os.close(descriptor)


def open_file(parent: int, leaf: str, flags: int) -> int:
    """A descriptor of a plain file; with O_CREAT it is made if it is missing.

    Raises:
        OSError: it is missing, or a link, folder, pipe, socket or device.
    """
    try:
        _require_kind(parent, leaf, stat.S_IFREG)
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(leaf, flags | FILE_FLAGS, 0o644, dir_fd=parent)
    try:
        _require(os.fstat(descriptor), leaf, stat.S_IFREG)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_to_read(folder: Path, name: str) -> int:
    """A descriptor of a plain file of the memory.

    Raises:
        OSError: it is missing, or no plain file.
    """
    with parent_of(folder, name) as (parent, leaf):
        return open_file(parent, leaf, os.O_RDONLY)


def read_file(folder: Path, name: str, largest: int) -> bytes:
    """All bytes of a plain file of the memory, at most `largest`; longer ones are cut there, one byte more is given.

    Raises:
        OSError: it is missing, no plain file, or cannot be read.
    """
    descriptor = open_to_read(folder, name)
    try:
        return read_bytes(descriptor, 0, min(os.fstat(descriptor).st_size, largest + 1))
    finally:
        os.close(descriptor)


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


def is_same_file(descriptor: int, folder: Path, name: str) -> bool:
    """Whether the name still stands for the open file."""
    try:
        with parent_of(folder, name) as (parent, leaf):
            now = os.stat(leaf, dir_fd=parent, follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(os.fstat(descriptor), now)


def _require_kind(parent: int, leaf: str, kind: int) -> None:
    _require(os.stat(leaf, dir_fd=parent, follow_symlinks=False), leaf, kind)


def _require(status: os.stat_result, leaf: str, kind: int) -> None:
    if stat.S_IFMT(status.st_mode) != kind:
        wanted = "a folder" if kind == stat.S_IFDIR else "a plain file"
        got = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.ELOOP, f"is {got}, not {wanted} of the memory's own", leaf)
