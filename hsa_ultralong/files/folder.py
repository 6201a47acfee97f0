"""Files of a folder, opened so that nothing outside it can be meant: no link is followed, no device opened.

The folder itself may be reached by links, it is the user's own word. Names are relative to it, with `/`. What is no
plain file is an OSError that says so. Used by all that reads and writes memories; tests/memory/test_files_links.py.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsa_ultralong.files.regular import open_plain, require_kind

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


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
            status = os.stat(part, dir_fd=descriptor, follow_symlinks=False)
            require_kind(status, part, stat.S_IFDIR, "a folder of its folder")
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
    return open_plain(leaf, flags | os.O_NOFOLLOW, parent)


def open_to_read(folder: Path, name: str) -> int:
    """A descriptor of a plain file of the folder.

    Raises:
        OSError: it is missing, or no plain file.
    """
    with parent_of(folder, name) as (parent, leaf):
        return open_file(parent, leaf, os.O_RDONLY)


def read_file(folder: Path, name: str, largest: int) -> bytes:
    """All bytes of a plain file of the folder, at most `largest`; longer ones are cut there, one byte more is given.

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
