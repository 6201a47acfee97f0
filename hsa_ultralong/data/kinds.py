"""What kind of file a file is, by its first bytes and its name; what cannot be read is refused by its kind.

Called by ``inputs.py`` and ``sources.py``; tested in ``tests/data/test_kinds.py``.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import zipfile
from pathlib import PurePath
from typing import BinaryIO

from hsa_ultralong.data.unpacking import packing_of, strip_packing

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET = "text", "JSON lines", "JSON", "CSV", "TSV", "parquet"
HTML, EPUB, PDF, DOCX = "HTML", "EPUB", "PDF", "DOCX"
TABLES = (JSON_LINES, JSON, CSV, TSV, PARQUET)
DOCUMENTS = (HTML, EPUB, PDF, DOCX)

SUFFIXES = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), TEXT),
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".csv": CSV,
    **dict.fromkeys((".tsv", ".tab"), TSV),
    ".parquet": PARQUET,
    **dict.fromkeys((".html", ".htm", ".xhtml"), HTML),
    ".epub": EPUB,
    ".pdf": PDF,
    ".docx": DOCX,
}
READABLE = (
    "text (.txt .text .md .markdown .rst), tables (.jsonl .ndjson .json .csv .tsv .parquet) and documents (.html .epub "
    ".pdf .docx), also packed (.gz .xz .bz2 .zst)"
)

# what reads it, and the extra that brings it
_LIBRARIES = {
    HTML: ("bs4", "documents"),
    EPUB: ("bs4", "documents"),
    PDF: ("pypdf", "documents"),
    DOCX: ("docx", "documents"),
    PARQUET: ("pyarrow", "data"),
}

# first bytes of what is no text, and what to do about it
_OFFICE = "save it as .docx, .txt or .csv"
_REFUSED: tuple[tuple[int, bytes, str], ...] = (
    (0, b"\x89PNG\r\n", "an image"),
    (0, b"\xff\xd8\xff", "an image"),
    (0, b"GIF8", "an image"),
    (8, b"WEBP", "an image"),
    (0, b"II*\0", "an image"),
    (0, b"MM\0*", "an image"),
    (0, b"ID3", "audio"),
    (0, b"OggS", "audio"),
    (0, b"fLaC", "audio"),
    (8, b"WAVE", "audio"),
    (4, b"ftyp", "video or audio"),
    (0, b"\x1aE\xdf\xa3", "video"),
    (257, b"ustar", "a tar archive: unpack it and pass the folder"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it and pass the folder"),
    (0, b"Rar!\x1a", "a rar archive: unpack it and pass the folder"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", f"a file of an old office program: {_OFFICE}"),
    (0, b"{\\rtf", f"rich text: {_OFFICE}"),
    (0, b"%!PS", "PostScript: make a PDF of it, ps2pdf"),
    (0, b"\x7fELF", "a program"),
    (0, b"SQLite format 3\0", "a database: export the table as .csv"),
    (0, b"\x93NUMPY", "an array of numbers"),
    (0, b"GGUF", "the weights of a model"),
)
_LONG_LINE = 60_000
_OTHER_SUFFIXES = {
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp", ".svg", ".ico"), "images"),
    **dict.fromkeys((".mp3", ".wav", ".ogg", ".flac", ".mp4", ".mkv", ".mov", ".avi", ".webm"), "audio and video"),
    **dict.fromkeys((".zip", ".tar", ".tgz", ".7z", ".rar"), "archives (unpack them)"),
    **dict.fromkeys((".doc", ".xls", ".ppt", ".xlsx", ".pptx", ".odt", ".ods", ".rtf"), f"office files ({_OFFICE})"),
}


def kind_by_name(name: str) -> str:
    """The kind that a file's name states, "" if none."""
    return SUFFIXES.get(PurePath(strip_packing(name)).suffix, "")


def why_unreadable(name: str) -> str:
    """For a name that states no readable kind: what the file is, in the plural, for a list."""
    suffix = PurePath(strip_packing(name)).suffix
    return _OTHER_SUFFIXES.get(suffix) or (f"of unknown kind {suffix}" if suffix else "without a suffix")


def missing_library(kind: str) -> str:
    """What must be installed to read a kind of file, "" if nothing."""
    library, _ = _LIBRARIES.get(kind, ("", ""))
    return "" if not library or importlib.util.find_spec(library) is not None else needs(kind)


def needs(kind: str) -> str:
    """The line that installs what reads a kind of file."""
    return f'reading {kind} needs more: pip install "hsa-ultralong[{_LIBRARIES[kind][1]}]"'


def kind_of(name: str, head: bytes) -> str:
    """The kind of a file that is called `name` and begins, unpacked, with `head`; "ZIP" if only its content tells.

    Raises:
        ValueError: it cannot be read, or is not what its name says.
    """
    stated = kind_by_name(name)
    if not head:
        return stated if stated in TABLES else TEXT
    for offset, magic, what in _REFUSED:
        # a text may well begin with the letters alone
        if head[offset:].startswith(magic) and (not magic.isalnum() or 0 in head[:512]):
            raise ValueError(f"{name} is {what}; what can be read: {READABLE}")
    if packing := packing_of(head):
        raise ValueError(f"{name} is packed twice ({packing} inside); unpack it once")
    if head.startswith(b"PK\x03\x04") or head.startswith(b"PK\x05\x06"):
        return "ZIP"
    if head[:1024].lstrip().startswith(b"%PDF-"):
        return PDF
    if head.startswith(b"PAR1"):
        return PARQUET
    if stated in (EPUB, PDF, DOCX, PARQUET):
        raise ValueError(f"{name} is no {stated} file: it does not begin like one")
    return stated or _kind_by_content(name, head)


def _kind_by_content(name: str, head: bytes) -> str:
    """Of a text whose name states nothing; without a suffix, as a pipe, tables and pages show themselves."""
    if PurePath(strip_packing(name)).suffix:
        return TEXT
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if re.match(rb'\[\s*\{\s*"', start):
        return JSON
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        return HTML
    if not start.startswith(b"{"):
        return TEXT
    line, has_end, _ = start.partition(b"\n")
    if not has_end and len(head) > _LONG_LINE:
        # cut off by the end of the head; what is no JSON will say so
        return JSON_LINES if re.match(rb'\{\s*"', start) else TEXT
    try:
        return JSON_LINES if isinstance(json.loads(line), dict) else TEXT
    except (ValueError, RecursionError):
        return TEXT


def kind_of_zip(name: str, file: BinaryIO) -> str:
    """EPUB or DOCX.

    Raises:
        ValueError: another archive, or a damaged one.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            names = set(archive.namelist())
            mimetype = archive.read("mimetype")[:100].strip() if "mimetype" in names else b""
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, NotImplementedError, EOFError) as error:
        raise ValueError(f"{name} is a damaged or unusual zip file ({error}); pack or save it again") from error
    if mimetype == b"application/epub+zip" or "META-INF/container.xml" in names:
        return EPUB
    if "word/document.xml" in names:
        return DOCX
    office = {
        "xl/workbook.xml": "an Excel workbook: save it as .csv",
        "ppt/presentation.xml": "a presentation: export a PDF",
    }
    what = next((text for part, text in office.items() if part in names), "")
    if not what and mimetype.startswith(b"application/vnd.oasis"):
        what = f"a file of an office program: {_OFFICE}"
    what = what or "a zip archive: unpack it and pass the folder"
    raise ValueError(f"{name} is {what}; what can be read: {READABLE}")


def as_seekable(file: BinaryIO) -> BinaryIO:
    """The file itself, or its content in memory where it was packed."""
    return file if file.seekable() else io.BytesIO(file.read())
