"""Text files as streams of UTF-8, and the documents in them, one in memory at a time.

Documents of one file are separated by a line that holds only the separator (U+001E, the record separator).
Called by ``sources.py`` and ``tables.py``; tested in ``tests/data/test_text.py``.
"""

from __future__ import annotations

import codecs
import logging
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from hsa_ultralong.data.encodings import AUTO, choose_encoding, is_utf8_beyond_ascii, transcoded
from hsa_ultralong.data.input_file import InputFile

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\x1e"


def open_text(file: InputFile) -> BinaryIO:
    """Open a text file as a stream of UTF-8 bytes, unpacked; a byte order mark stays only where the file is UTF-8.

    Raises:
        ValueError: at once or while reading: cannot be read, damaged, no text, or not of the encoding that was asked
            for (`choose_encoding`).
    """
    try:
        head = file.head()
        encoding = choose_encoding(head, file.encoding, file.name)
        is_utf8 = codecs.lookup(encoding).name == "utf-8"
        if file.encoding != AUTO and not is_utf8 and encoding == file.encoding and is_utf8_beyond_ascii(head):
            logger.warning("%s looks like UTF-8, but is read as %s, as asked (--encoding)", file.name, encoding)
        return file.open() if is_utf8 else transcoded(file.open(), encoding, file.name)
    except OSError as error:
        raise cannot_be_read(file, error) from error


def cannot_be_read(file: InputFile, error: OSError) -> ValueError:
    """The system's refusal in one line."""
    return ValueError(f"{file.name} cannot be read: {error.strerror or error}")


def iter_lines(file: InputFile) -> Iterator[bytes]:
    """Yield the lines of a text file in UTF-8, split at line feeds only.

    Raises:
        ValueError: see `open_text`.
    """
    try:
        with open_text(file) as stream:
            yield from stream
    except OSError as error:
        raise cannot_be_read(file, error) from error


class RawDocument(NamedTuple):
    """A document as it lies in its file: bytes, byte offset and number (from 1) of its first line."""

    data: bytes
    offset: int
    line: int

    def decode(self, file: InputFile) -> str:
        """The text.

        Raises:
            ValueError: not UTF-8; names byte offset and line, and what reads it.
        """
        return decode(self.data, file.name, self.offset, self.line)


def raw_documents(file: InputFile, separator: bytes = DOCUMENT_SEPARATOR.encode()) -> Iterator[RawDocument]:
    """Yield the documents of one file, those of white space only left out, without decoding them.

    Raises:
        ValueError: see `open_text`.
    """
    lines: list[bytes] = []
    offset, first_offset, first_line = 0, 0, 1
    for number, line in enumerate(iter_lines(file), start=1):
        offset += len(line)
        if line.startswith(separator) and line.rstrip(b"\r\n") == separator:
            yield from _document(lines, first_offset, first_line)
            lines, first_offset, first_line = [], offset, number + 1
        else:
            lines.append(line)
    yield from _document(lines, first_offset, first_line)


def _document(lines: list[bytes], offset: int, line: int) -> Iterator[RawDocument]:
    data = b"".join(lines)
    if data.removeprefix(codecs.BOM_UTF8).strip():
        yield RawDocument(data, offset, line)


def decode(data: bytes, name: str, start: int, line: int = 1) -> str:
    """Decode UTF-8 that begins at byte offset `start`, in line `line`, of the (unpacked) file called `name`.

    Raises:
        ValueError: it is none; names the place, and the option that reads the file.
    """
    skip = len(codecs.BOM_UTF8) if start == 0 and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = skip + error.start
        western = _western(data)
        raise ValueError(
            f"{name} is not UTF-8 text: byte 0x{data[place]:02x} at offset {start + place:,}, line "
            f"{line + data[:place].count(10):,}; give its encoding: --encoding {western} for Western European text, or "
            f"cp1251, shift_jis, gb18030, utf-16-le ...; or convert it: iconv -f {western.upper()} -t UTF-8"
        ) from error


def _western(data: bytes) -> str:
    try:
        data.decode("cp1252")
    except UnicodeDecodeError:
        return "latin-1"
    return "cp1252"
