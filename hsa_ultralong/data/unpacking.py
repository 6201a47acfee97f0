"""Packed files as streams of their content: .gz, .xz, .bz2 and .zst, told by their first bytes.

Called by ``inputs.py`` for every file that is read; tested in ``tests/data/test_unpacking.py``.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

# what a packed file begins with
_MAGIC = {
    ".gz": (b"\x1f\x8b\x08",),
    ".xz": (b"\xfd7zXZ\0",),
    # nine block sizes, then a block or the end
    ".bz2": tuple(b"BZh%d%b" % (n, mark) for n in range(1, 10) for mark in (b"1AY&SY", b"\x17rE8P\x90")),
    ".zst": (b"\x28\xb5\x2f\xfd",),
}
PACKED_SUFFIXES = tuple(_MAGIC)
_HEAD = max(len(magic) for magics in _MAGIC.values() for magic in magics)
# text packs to a tenth; what unpacks to more than this, and to more than so many times its size, is no text
_HARMLESS_BYTES = 1 << 26
_MAX_RATIO = 250
_BUFFER_BYTES = 1 << 18


def packing_of(head: bytes) -> str:
    """The suffix that goes with a file's first bytes, "" if they are not those of a packed file."""
    return next((suffix for suffix, magics in _MAGIC.items() if head.startswith(magics)), "")


def strip_packing(name: str) -> str:
    """A file name in small letters, without the suffix of its packing."""
    name = name.lower()
    return next((name.removesuffix(suffix) for suffix in PACKED_SUFFIXES if name.endswith(suffix)), name)


def open_unpacked(path: Path, name: str) -> BinaryIO:
    """Open a file for reading; a packed one gives its content, whatever it is called.

    Args:
        name: for errors, and to see that a file called .gz is one.

    Raises:
        ValueError: at once or while reading: the file is not what its name says, cut off, damaged, or unpacks to more
            than 250 times its size. ImportError: .zst without a library for it. OSError: it cannot be opened.
    """
    raw = path.open("rb")
    try:
        head = raw.read(_HEAD)
        packing = packing_of(head)
        claimed = next((suffix for suffix in PACKED_SUFFIXES if name.lower().endswith(suffix)), "")
        if head and claimed and not packing:
            raise ValueError(
                f"{name} is not a whole {claimed} file (it does not begin like one); pack it again, or rename it if it "
                "is not packed"
            )
        raw.seek(0)
        if not packing:
            return raw
        unpacker = _Unpacker(_opener(packing, name)(raw), raw, packing, name, path.stat().st_size)
    except BaseException:
        raw.close()
        raise
    return cast(BinaryIO, io.BufferedReader(unpacker, _BUFFER_BYTES))


def _opener(packing: str, name: str) -> Callable[[BinaryIO], Any]:
    known: dict[str, Callable[[Any], Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
    if packing in known:
        return known[packing]
    try:
        # part of Python from 3.14 on
        from compression import zstd
    except ImportError:
        try:
            from backports import zstd
        except ImportError as error:
            raise ImportError(
                f'{name}: reading .zst needs more: pip install "hsa-ultralong[documents]", or unpack it: zstd -d'
            ) from error
    opened: Callable[[BinaryIO], Any] = zstd.open
    return opened


class _Unpacker(io.RawIOBase):
    """The content of a packed file; damage and bombs end as ValueError."""

    def __init__(self, content: Any, raw: BinaryIO, packing: str, name: str, size: int) -> None:
        self._content, self._raw, self._packing, self._name, self._size = content, raw, packing, name, size
        self._done = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            data = self._content.read(len(buffer))
        except (OSError, EOFError, lzma.LZMAError, zlib.error, ValueError) as error:
            raise ValueError(self._damaged(error)) from error
        except Exception as error:
            # ZstdError is the library's own
            if type(error).__name__ != "ZstdError":
                raise
            raise ValueError(self._damaged(error)) from error
        self._done += len(data)
        if self._done > max(_HARMLESS_BYTES, _MAX_RATIO * self._size):
            raise ValueError(
                f"{self._name} unpacks to more than {_MAX_RATIO} times its size, which text does not; if it is meant, "
                "unpack it and pass that"
            )
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._content.close()
            self._raw.close()
        super().close()

    def _damaged(self, error: Exception) -> str:
        return f"{self._name} is not a whole {self._packing} file ({error}); pack it again or pass the unpacked text"
