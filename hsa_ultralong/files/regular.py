"""Files that a mistake or a stranger may have changed: nothing but regular ones is opened, none beyond a size read.

Called by folder.py and by all that reads files of users; tests/files/test_regular.py.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

JSON_BYTES = 2**28
# a pipe without a peer must not block
PLAIN_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_KINDS = {
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class WrongKind(OSError):
    """A name that stands for something else than what is to be opened; `kind` says for what."""

    def __init__(self, name: str, mode: int, wanted: str) -> None:
        self.kind = _KINDS.get(stat.S_IFMT(mode), "something else")
        super().__init__(errno.ELOOP, f"is {self.kind}, not {wanted}", name)


def require_kind(status: os.stat_result, name: str, kind: int, wanted: str) -> None:
    """Refuse what is of another kind (`stat.S_IFREG`, ...).

    Raises:
        WrongKind: it is.
    """
    if stat.S_IFMT(status.st_mode) != kind:
        raise WrongKind(name, status.st_mode, wanted)


def open_plain(name: str, flags: int, parent: int | None = None) -> int:
    """A descriptor of a regular file, in the open folder `parent`; with O_CREAT it is made if it is missing. A link is
    followed unless O_NOFOLLOW is given.

    Raises:
        WrongKind: it is a folder, pipe, socket or device, or a link that is not followed. OSError: it cannot be opened.
    """
    try:
        status = os.stat(name, dir_fd=parent, follow_symlinks=not flags & os.O_NOFOLLOW)
        require_kind(status, name, stat.S_IFREG, "a plain file of its folder")
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    descriptor = os.open(name, flags | PLAIN_FLAGS, 0o644, dir_fd=parent)
    try:
        require_kind(os.fstat(descriptor), name, stat.S_IFREG, "a plain file of its folder")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; devices, pipes and sockets are not opened.

    Raises:
        ValueError: it is no regular file, or to be written and has more than one name. OSError: it cannot be opened.
    """
    try:
        descriptor = open_plain(str(path), flags)
    except WrongKind as error:
        if error.kind == _KINDS[stat.S_IFLNK]:
            raise ValueError(f"{path} is a symbolic link, which is not followed here; remove it") from error
        raise ValueError(f"{path} is no regular file, but {error.kind}") from error
    if flags & (os.O_WRONLY | os.O_RDWR) and os.fstat(descriptor).st_nlink > 1:
        os.close(descriptor)
        raise ValueError(f"{path} has other names (hard links), under which it would change too; remove it, or copy it")
    return descriptor


def read_regular(path: Path, max_bytes: int = JSON_BYTES, *, follow: bool = True) -> bytes:
    """Content of a regular file, or without `follow`, of one that is no symbolic link.

    Raises:
        ValueError: it is no such file, or larger than `max_bytes`. OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY if follow else os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes")
    return data


def append_text(path: Path, text: str) -> None:
    """Add text to a file, made if missing.

    Raises:
        ValueError: it is a symbolic link or no regular file. OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(open_regular(path, flags), "ab") as stream:
        stream.write(text.encode("utf-8"))
