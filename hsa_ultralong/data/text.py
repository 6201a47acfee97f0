"""Reading text: documents streamed out of files and folders, one document in memory at a time.

Documents of one file are separated by a line that holds only the separator (U+001E, the record separator, by default).
Called by ``build_shards`` and ``hsa ask --text``; tested in ``tests/data/test_text.py``.
"""

from __future__ import annotations

import codecs
import logging
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

logger = logging.getLogger(__name__)

DOCUMENT_SEPARATOR = "\x1e"
TEXT_SUFFIXES = (".txt", ".md", ".txt.xz", ".md.xz")

PathLike = str | Path


def iter_documents(paths: PathLike | Iterable[PathLike], separator: str = DOCUMENT_SEPARATOR) -> Iterator[str]:
    """Stream the documents of text files and folders.

    Args:
        paths: one path or several. A file is read as UTF-8 text, unpacked first if its name ends in ``.xz``. A folder
            stands for all ``.txt``, ``.md``, ``.txt.xz`` and ``.md.xz`` files in it at any depth, sorted by path;
            hidden files and folders are passed over.
        separator: content of the lines between two documents of a file.

    Returns:
        An iterator over documents (str) in the order of ``paths``; documents of white space only are left out.

    Raises:
        ValueError: at once if a path does not exist, a folder holds no text file, or ``separator`` is not one
            line; while iterating if a named file holds no text, is not UTF-8 (names the file and the byte offset in the
            unpacked text) or is damaged.
    """
    if not separator or "\n" in separator or "\r" in separator:
        raise ValueError(f"separator must be the content of one line, got {separator!r}")
    named = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not named:
        raise ValueError("no paths given; pass at least one text file or folder")
    files: list[tuple[Path, bool]] = []
    for entry in map(Path, named):
        files += [(file, entry.is_dir()) for file in text_files(entry)]
    return _iter_files(files, separator.encode("utf-8"))


def text_files(path: PathLike) -> list[Path]:
    """Return the text files that a path stands for: itself, or those below a folder, sorted.

    Raises:
        ValueError: the path does not exist, or the folder holds no text file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a text file or a folder of text files")
    if not path.is_dir():
        return [path]
    found = sorted(
        file
        for file in path.rglob("*")
        if file.name.endswith(TEXT_SUFFIXES)
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    if not found:
        raise ValueError(f"folder {path} holds no text file; expected names ending in {', '.join(TEXT_SUFFIXES)}")
    return found


def read_text(path: PathLike) -> str:
    """Read one whole text file (UTF-8, unpacked first if its name ends in ``.xz``); a byte order mark is dropped.

    Raises:
        ValueError: the file is missing, a folder, empty, not UTF-8 (names the byte offset) or damaged.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass one text file")
    if not path.exists():
        raise ValueError(f"{path} does not exist; pass a text file")
    text = _decode(b"".join(iter_lines(path)), path, 0)
    if not text.strip():
        raise ValueError(f"{path} is empty: it holds no text")
    return text


def _iter_files(files: list[tuple[Path, bool]], separator: bytes) -> Iterator[str]:
    for path, is_from_folder in files:
        is_empty = True
        for document in _iter_file(path, separator):
            is_empty = False
            yield document
        if is_empty and is_from_folder:
            logger.warning("%s holds no text, passed over", path)
        elif is_empty:
            raise ValueError(f"{path} is empty: it holds no text")


class RawDocument(NamedTuple):
    """A document as it lies in its file: bytes, byte offset and number (from 1) of its first line."""

    data: bytes
    offset: int
    line: int

    def decode(self, path: Path) -> str:
        """The text.

        Raises:
            ValueError: not UTF-8; names byte offset and line.
        """
        return _decode(self.data, path, self.offset, self.line)


def raw_documents(path: Path, separator: bytes = DOCUMENT_SEPARATOR.encode()) -> Iterator[RawDocument]:
    """Yield the documents of one file, those of white space only left out, without decoding them.

    Raises:
        ValueError: the file cannot be read or is damaged.
    """
    lines: list[bytes] = []
    offset, first_offset, first_line = 0, 0, 1
    for number, line in enumerate(iter_lines(path), start=1):
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


def _iter_file(path: Path, separator: bytes) -> Iterator[str]:
    for raw in raw_documents(path, separator):
        text = raw.decode(path)
        # white space beyond ASCII, too
        if text.strip():
            yield text


def iter_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, unpacked first if its name ends in ``.xz``.

    Raises:
        ValueError: the file cannot be read or is damaged.
    """
    try:
        with _open(path) as file:
            yield from file
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(
            f"{path} is not a whole .xz file ({error}); pack it again or pass the unpacked text"
        ) from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, lzma.open(path, "rb") if path.suffix == ".xz" else path.open("rb"))


def _decode(data: bytes, path: Path, start: int, line: int = 1) -> str:
    """Decode bytes that begin at byte offset ``start``, in line ``line``, of the (unpacked) file."""
    skip = len(codecs.BOM_UTF8) if start == 0 and data.startswith(codecs.BOM_UTF8) else 0
    try:
        return data[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        place = skip + error.start
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{data[place]:02x} at offset {start + place:,}, line "
            f"{line + data[:place].count(10):,}; convert it, for example with: iconv -f LATIN1 -t UTF-8"
        ) from error
