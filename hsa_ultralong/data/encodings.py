"""Which encoding a text has, and any of them as a stream of UTF-8.

Only what is certain is taken without being told: UTF-8, a byte order mark, and UTF-16 or UTF-32 whose code units show
it. Everything else is refused with the option that reads it. Called by ``text.py``; ``tests/data/test_encodings.py``.
"""

from __future__ import annotations

import codecs
import io
import re
from typing import Any, BinaryIO, cast

import numpy as np

AUTO = "auto"
HEAD_BYTES = 1 << 16
# the longer marks first: that of UTF-32 begins like that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# what no text holds, NUL apart: escape, backspace and separators do occur
_CONTROLS = re.compile("[\x01-\x07\x0e-\x1a\x7f]")
_WIDE_ADVICE = "if it is text in UTF-16, give --encoding utf-16-le or utf-16-be"


def check_encoding(name: str) -> str:
    """The encoding's name; "auto" finds it out.

    Raises:
        ValueError: Python knows no text encoding of that name.
    """
    try:
        if name != AUTO:
            "a".encode(name)
    except (LookupError, UnicodeError) as error:
        raise ValueError(
            f"--encoding {name!r} is unknown; give auto, or a name such as cp1252, latin-1, cp1251, shift_jis or "
            "utf-16-le"
        ) from error
    return name


def marked_encoding(head: bytes) -> str:
    """The encoding that a byte order mark states, "" without one."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), "")


def choose_encoding(head: bytes, wanted: str, name: str) -> str:
    """The encoding of a text that begins with `head` (the first HEAD_BYTES), as asked for or found out.

    Raises:
        ValueError: the byte order mark contradicts `wanted`, or the bytes are no text of an encoding that shows.
    """
    marked = marked_encoding(head)
    if wanted == AUTO:
        return marked or _detect(head, name)
    family = codecs.lookup(wanted).name
    if marked and not family.startswith(marked):
        raise ValueError(
            f"{name} begins with the byte order mark of {marked}, so it is not {wanted}; leave --encoding away for it"
        )
    # a decoder that is told the order of bytes takes the mark for text
    return marked or wanted


def is_utf8_beyond_ascii(head: bytes) -> bool:
    """True for bytes that are UTF-8 and not plain ASCII: hardly by chance."""
    try:
        return not codecs.getincrementaldecoder("utf-8")().decode(head).isascii()
    except UnicodeDecodeError:
        return False


def _detect(head: bytes, name: str) -> str:
    num_nul = head.count(0)
    sample = head.decode("latin-1")
    if num_nul or 20 * len(_CONTROLS.findall(sample)) > len(head):
        wide = _wide_encoding(head)
        if wide:
            return wide
        if 64 * num_nul > len(head) or 20 * len(_CONTROLS.findall(sample)) > len(head):
            raise ValueError(f"{name} holds control characters as no UTF-8 text does: binary; {_WIDE_ADVICE}")
    if "\x1b$B" in sample or "\x1b$@" in sample:
        raise ValueError(f"{name} holds the escapes of ISO-2022-JP; give --encoding iso2022_jp")
    # where it is none, decoding a document says so, with the place
    return "utf-8"


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32 if the code units leave no doubt, "" otherwise."""
    for encoding in ("utf-32-le", "utf-32-be"):
        if len(head) >= 4 and _is_text(head, encoding, 4):
            return encoding
    units = np.frombuffer(head[: len(head) // 2 * 2], dtype="<u2")
    orders = {"utf-16-le": units, "utf-16-be": units.byteswap()}
    shown = [encoding for encoding, order in orders.items() if _shows_ascii(order) and _is_text(head, encoding, 2)]
    return shown[0] if len(shown) == 1 else ""


def _shows_ascii(units: np.ndarray) -> bool:
    """True for blanks and line breaks, or nothing but ASCII; in the wrong order of bytes blanks and line breaks are
    signs that hardly occur, while letters are common Chinese ones."""
    if np.isin(units, (0x20, 9, 10, 13)).any():
        return True
    return bool(((units > 0x20) & (units < 0x7F)).all()) and len(np.unique(units)) > 1


def _is_text(head: bytes, encoding: str, width: int) -> bool:
    if len(head) < HEAD_BYTES and len(head) % width:
        return False
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError:
        return False
    return "\0" not in text and not _CONTROLS.search(text)


def transcoded(file: BinaryIO, encoding: str, name: str) -> BinaryIO:
    """The text of a file as a stream of UTF-8 bytes, without byte order mark; `file` is closed with it.

    Raises:
        ValueError: while reading, where bytes are not of that encoding.
    """
    return cast(BinaryIO, io.BufferedReader(_Transcoded(file, encoding, name), HEAD_BYTES))


class _Transcoded(io.RawIOBase):
    def __init__(self, file: BinaryIO, encoding: str, name: str) -> None:
        self._file, self._encoding, self._name = file, encoding, name
        self._decoder = codecs.getincrementaldecoder(encoding)("strict")
        self._ready = b""
        self._done = 0
        self._is_first, self._is_end = True, False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and not self._is_end:
            self._ready = self._next()
        part = self._ready[: len(buffer)]
        self._ready = self._ready[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def _next(self) -> bytes:
        data = self._file.read(HEAD_BYTES)
        self._is_end = not data
        try:
            text = self._decoder.decode(data, final=self._is_end)
        except UnicodeError as error:
            place = self._done + getattr(error, "start", 0)
            raise ValueError(
                f"{self._name} is not {self._encoding} text near byte {place:,} ({error}); give its encoding with "
                "--encoding"
            ) from error
        self._done += len(data)
        if text and self._is_first:
            text, self._is_first = text.removeprefix("\ufeff"), False
        return text.encode("utf-8", "surrogatepass")

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
