"""Files that a crash, a mistake or a stranger may have changed: what is read is checked, what is written is whole.

Nothing but regular files is opened. JSON can carry a seal, a checksum over its own bytes, so that no flipped bit passes
for another value. Called by shards.py, partial.py, train/ and cli/; tests/files/test_regular.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import math
import os
import re
import socket
import stat
import weakref
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

LARGEST = 2**63 - 1
_JSON_BYTES = 2**28
_SEAL = "sha256"
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def open_regular(path: Path, flags: int = os.O_RDONLY) -> int:
    """A descriptor of a regular file; devices, pipes and sockets are not opened.

    Raises:
        ValueError: it is no regular file, or to be written and has more than one name. OSError: it cannot be opened.
    """
    try:
        # a pipe without a peer would wait for ever
        descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno == errno.ELOOP and flags & os.O_NOFOLLOW:
            raise ValueError(f"{path} is a symbolic link, which is not followed here; remove it") from error
        if error.errno in (errno.ENXIO, errno.EISDIR):
            raise ValueError(f"{path} is no regular file") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is no regular file")
    if flags & (os.O_WRONLY | os.O_RDWR) and status.st_nlink > 1:
        os.close(descriptor)
        raise ValueError(f"{path} has other names (hard links), under which it would change too; remove it, or copy it")
    return descriptor


def read_regular(path: Path, max_bytes: int = _JSON_BYTES, *, follow: bool = True) -> bytes:
    """Content of a regular file, or without `follow`, of one that is no symbolic link.

    Raises:
        ValueError: it is no such file, or larger than `max_bytes`. OSError: it cannot be read.
    """
    with os.fdopen(open_regular(path, os.O_RDONLY if follow else os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        data = stream.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ValueError(f"{path} has more than {max_bytes:,} bytes")
    return data


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """The JSON object in a file's content.

    Raises:
        ValueError: it is none, naming the file.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError(f"{path} is not readable JSON (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(content)}")
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; errors as in `read_regular` and `parse_json`."""
    return parse_json(read_regular(path), path)


def sealed(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """`content` as JSON whose first field is the SHA-256 of the text in which that field is empty."""
    text = json.dumps({_SEAL: "", **content}, indent=indent) + "\n"
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return text.replace(f'"{_SEAL}": ""', f'"{_SEAL}": "{digest}"', 1).encode("utf-8")


def unsealed(data: bytes, path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a file, and whether it had a seal; without one it is taken as it is.

    Raises:
        ValueError: it is no JSON object, or a byte of a sealed one has changed.
    """
    content = parse_json(data, path)
    if _SEAL not in content:
        return content, False
    del content[_SEAL]
    if sealed(content, 1 if data.startswith(b"{\n") else None) != data:
        raise ValueError(f"{path} is damaged (its SHA-256 is not that which it states)")
    return content, True


class Field(NamedTuple):
    """What a value of a JSON object must be: a test, and the words for it."""

    is_valid: Callable[[Any], bool]
    text: str


def is_whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and (type(value) is float or abs(value) <= LARGEST)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_record(value: Any) -> bool:
    """Size and SHA-256 of a file, as `checksum.file_record` makes them."""
    return (
        isinstance(value, dict)
        and value.keys() == {"bytes", "sha256"}
        and is_whole(value["bytes"])
        and is_digest(value["sha256"])
    )


def is_plain_name(value: Any) -> bool:
    """A file's name inside its folder: no path, no hidden file."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", value) is not None


def whole(least: int = 0, most: int = LARGEST) -> Field:
    return Field(lambda value: is_whole(value, least, most), f"a whole number of {least} to {most}")


DIGEST = Field(is_digest, "64 hexadecimal digits")
TEXT = Field(lambda value: isinstance(value, str), "text")
NUMBER = Field(is_number, "a number")
NUMBER_OR_NULL = Field(lambda value: value is None or is_number(value), "a number or null")


def list_of(test: Callable[[Any], bool], what: str, most: int = 2**32) -> Field:
    return Field(
        lambda value: isinstance(value, list) and len(value) <= most and all(map(test, value)), f"a list of {what}"
    )


def check_fields(
    content: Any, fields: Mapping[str, Field], where: str, *, optional: Collection[str] = (), is_open: bool = False
) -> None:
    """Every field of a JSON object is there and of its kind, and there is no other one unless `is_open`.

    Raises:
        ValueError: naming the first that is not.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where} must be a JSON object, got {shown(content)}")
    unknown = [] if is_open else sorted(content.keys() - fields.keys())
    missing = sorted(fields.keys() - content.keys() - set(optional))
    if missing or unknown:
        wrong = f"lacks {missing[0]!r}" if missing else f"has an unknown field {shown(unknown[0])}"
        raise ValueError(f"{where} {wrong}")
    for name, field in fields.items():
        if name in content and not field.is_valid(content[name]):
            raise ValueError(f"{where}: {name} must be {field.text}, got {shown(content[name])}")


def shown(value: Any, width: int = 60) -> str:
    """A value in a message: short, on one line, nothing that acts on a terminal."""
    try:
        text = ascii(value)
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= width else f"{text[:width]}..."


def reason(error: BaseException, width: int = 200) -> str:
    """What an error says, in a message: short, on one line, nothing that acts on a terminal."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error)) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width]}..."


def write_whole(path: Path, content: bytes | str) -> None:
    """Replace a file in one step by another that is complete and on disk; a link in its place is not followed."""
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content.encode("utf-8") if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def append_text(path: Path, text: str) -> None:
    """Add text to a file, made if missing.

    Raises:
        ValueError: it is a symbolic link or no regular file. OSError: it cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(open_regular(path, flags), "ab") as stream:
        stream.write(text.encode("utf-8"))


class FileLock:
    """The right of one process to write somewhere: an flock on a file, freed by the kernel when the process dies.

    The file is removed when the lock is released. A process forked meanwhile does not hold it.
    """

    _held: weakref.WeakSet[FileLock] | None = None

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor: int | None = descriptor
        if FileLock._held is None:
            FileLock._held = weakref.WeakSet()
            os.register_at_fork(after_in_child=FileLock._forget)
        FileLock._held.add(self)

    @staticmethod
    def acquire(path: Path, doing: str) -> FileLock:
        """Take the lock or refuse at once.

        Args:
            doing: what its holder does, for the refusal: "runs/nano is being trained".

        Raises:
            ValueError: another process holds it (named), or a link or no regular file is in its place.
        """
        while True:
            descriptor = open_regular(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.pread(descriptor, 200, 0).decode("ascii", "replace")
                os.close(descriptor)
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    known = re.fullmatch(r"(\d+) (\S+)\n", owner)
                    process = f"process {known[1]} on {known[2]}" if known else "another process"
                    raise ValueError(f"{doing} by {process}; wait until it is done, or stop it") from None
                if error.errno not in _NO_LOCKS:
                    raise
                logger.warning(
                    "the file system of %s has no locks (%s): take care that no second command writes there",
                    path.parent, error.strerror,
                )  # fmt: skip
                return FileLock(path, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
            # the file may have been removed between open and flock
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False)):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode("ascii", "replace"), 0)
                    return FileLock(path, descriptor)
            os.close(descriptor)

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(self.path, follow_symlinks=False)):
                self.path.unlink()
        os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    @staticmethod
    def _forget() -> None:
        """A child that kept the descriptors open would hold the locks after its parent's death."""
        for lock in list(FileLock._held or ()):
            if lock._descriptor is not None:
                os.close(lock._descriptor)
                lock._descriptor = None
