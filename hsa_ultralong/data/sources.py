"""Named documents out of files, folders, tables and standard input, one in memory at a time.

.txt and .md (also .xz) as in text.py; .jsonl and .parquet with one document per row. Called by `hsa memorize`;
tests/data/test_sources.py.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hsa_ultralong.data.text import TEXT_SUFFIXES, _iter_lines, iter_documents

TABLE_SUFFIXES = (".jsonl", ".jsonl.xz", ".parquet")
STANDARD_INPUT = "-"


class Source(NamedTuple):
    """A document: its name, which says where it comes from, and its text."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def source_files(paths: Sequence[str | Path]) -> list[Path | None]:
    """Files that paths stand for, sorted within folders; None is standard input.

    Raises:
        ValueError: a path that does not exist, or a folder that holds nothing to read.
    """
    if not paths:
        raise ValueError("no paths given; pass text files, folders, tables (.jsonl, .parquet) or - for standard input")
    files: list[Path | None] = []
    for entry in paths:
        path = Path(entry)
        if str(entry) == STANDARD_INPUT:
            files.append(None)
        elif path.is_dir():
            files += _files_below(path)
        elif path.exists():
            files.append(path)
        else:
            raise ValueError(f"{path} does not exist; pass a file, a folder, or - for standard input")
    return files


def _files_below(folder: Path) -> list[Path]:
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        suffixes = ", ".join((*TEXT_SUFFIXES, *TABLE_SUFFIXES))
        raise ValueError(f"folder {folder} holds nothing to read; expected names ending in {suffixes}")
    return found


def read_sources(file: Path | None, *, text_field: str = "text") -> Iterator[Source]:
    """The documents of one file (None: all of standard input is one document).

    A text file of several documents (separated by a U+001E line) names them file, file#2, ...; rows of a table are
    file:line or file:row, white space only is left out.

    Raises:
        ValueError: not UTF-8, a row that is no JSON object or lacks `text_field` (names file and line), or no text.
    """
    if file is None:
        text = sys.stdin.read()
        if not text.strip():
            raise ValueError("standard input is empty: nothing to memorise")
        yield Source("standard input", text)
        return
    is_empty = True
    rows = _json_rows if file.name.endswith((".jsonl", ".jsonl.xz")) else _text_rows
    for name, text in (_parquet_rows if file.suffix == ".parquet" else rows)(file, text_field):
        if text.strip():
            is_empty = False
            yield Source(name, text)
    if is_empty:
        raise ValueError(f"{file} is empty: it holds no text")


def _text_rows(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(iter_documents(file), start=1):
        yield (str(file) if number == 1 else f"{file}#{number}"), text


def _json_rows(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_iter_lines(file), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{file}, line {number}: no JSON ({error}); mend or remove the line") from error
        yield f"{file}:{number}", _field(row, text_field, f"{file}, line {number}")


def _parquet_rows(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading .parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:
        raise ValueError(f"{file} is no readable parquet file: {error}") from error
    if text_field not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise ValueError(f"{file} has no column {text_field!r}, but {columns}; give --text-field")
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=[text_field]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield f"{file}:{number}", _field({text_field: value}, text_field, f"{file}, row {number}")


def _field(row: object, text_field: str, where: str) -> str:
    value = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        got = f"fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: required an object with a text in {text_field!r}, got {got}; give --text-field")
    return value
