"""Named documents out of files, folders, tables and standard input, one in memory at a time.

.txt and .md (also .xz) as in text.py; .jsonl and .parquet with one document per row; for training also datasets of the
Hugging Face hub. Called by `hsa memorize` and, through build.py, by `hsa data`; tests/data/test_sources.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hsa_ultralong.data.text import TEXT_SUFFIXES, _iter_lines, iter_documents

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
OnBad = Callable[[str], None]
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


class BadRecords:
    """Counts records that cannot be used; each is logged, and more than `limit` of them end the work.

    Attributes:
        messages: the first ones, for the manifest.
    """

    _KEPT = 20

    def __init__(self, limit: int) -> None:
        self.limit, self.count = limit, 0
        self.messages: list[str] = []

    def __call__(self, message: str) -> None:
        self.count += 1
        logger.warning("passed over: %s", message)
        if len(self.messages) < self._KEPT:
            self.messages.append(message)
        if self.count > self.limit:
            raise ValueError(
                f"more than {self.limit} bad records, the last one: {message}; mend them, or allow more (--max-bad)"
            )


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


def read_sources(file: Path | None, *, text_field: str = "text", on_bad: OnBad | None = None) -> Iterator[Source]:
    """The documents of one file (None: all of standard input is one document).

    A text file of several documents (separated by a U+001E line) names them file, file#2, ...; rows of a table are
    file:line or file:row, white space only is left out. `on_bad` is told of what cannot be read, and reading goes on
    with the next row or file.

    Raises:
        ValueError: not UTF-8, a row that is no JSON object or lacks `text_field` (names file and line), or no text;
            without `on_bad`.
    """
    if file is None:
        text = sys.stdin.read()
        if not text.strip():
            raise ValueError("standard input is empty: nothing to memorise")
        yield Source("standard input", text)
        return
    is_empty = True
    rows = _json_rows if file.name.endswith((".jsonl", ".jsonl.xz")) else _text_rows
    try:
        for name, text in (_parquet_rows if file.suffix == ".parquet" else rows)(file, text_field, on_bad):
            if text.strip():
                is_empty = False
                yield Source(name, text)
    except ValueError as error:
        if on_bad is None:
            raise
        on_bad(str(error))
        return
    if is_empty:
        _pass_over(ValueError(f"{file} is empty: it holds no text"), on_bad)


def iter_texts(paths: Sequence[str | Path], *, text_field: str = "text", on_bad: OnBad | None = None) -> Iterator[str]:
    """The documents of files, folders, tables, standard input and hub datasets, in the order given.

    Args:
        paths: also "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT" (an empty CONFIG is the default one; SPLIT
            is "train" if not given), streamed through the `datasets` library.

    Raises:
        ValueError: see source_files and read_sources. ImportError: a hub dataset without the library.
    """
    for path in paths:
        if str(path).startswith(HUB_PREFIX):
            yield from _hub_rows(str(path), text_field, on_bad)
            continue
        for file in source_files([path]):
            yield from (source.text for source in read_sources(file, text_field=text_field, on_bad=on_bad))


def sample_text(
    paths: Sequence[str | Path], num_characters: int, text_field: str = "text", piece: int = 20_000
) -> Iterator[str]:
    """Pieces of text spread evenly over all documents, about ``num_characters`` in all (two passes over the files);
    from hub datasets, the first characters. What cannot be read is passed over."""
    ignore: OnBad = lambda message: None  # noqa: E731
    if any(str(path).startswith(HUB_PREFIX) for path in paths):
        for document in iter_texts(paths, text_field=text_field, on_bad=ignore):
            yield document[:num_characters]
            num_characters -= len(document)
            if num_characters <= 0:
                return
        return
    total = sum(len(document) for document in iter_texts(paths, text_field=text_field, on_bad=ignore))
    share = min(1.0, num_characters / max(1, total))
    owed = 0.0
    for document in iter_texts(paths, text_field=text_field, on_bad=ignore):
        for start in range(0, len(document), piece):
            part = document[start : start + piece]
            owed += share * len(part)
            if owed >= len(part):
                owed -= len(part)
                yield part


def _hub_rows(path: str, text_field: str, on_bad: OnBad | None) -> Iterator[str]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(f'{path} needs the datasets library: pip install "hsa-ultralong[eval]"') from error
    name, config, split = [*path.removeprefix(HUB_PREFIX).split(":"), "", ""][:3]
    rows = load_dataset(name, config or None, split=split or "train", streaming=True)
    for number, row in enumerate(rows, start=1):
        try:
            text = _field(row, text_field, f"{path}, row {number}")
        except ValueError as error:
            _pass_over(error, on_bad)
            continue
        if text.strip():
            yield text


def _pass_over(error: ValueError, on_bad: OnBad | None) -> None:
    if on_bad is None:
        raise error
    on_bad(str(error))


def _text_rows(file: Path, text_field: str, on_bad: OnBad | None) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(iter_documents(file), start=1):
        yield (str(file) if number == 1 else f"{file}#{number}"), text


def _json_rows(file: Path, text_field: str, on_bad: OnBad | None) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_iter_lines(file), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            text = _field(_json(line, where), text_field, where)
        except ValueError as error:
            _pass_over(error, on_bad)
            continue
        yield f"{file}:{number}", text


def _json(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: no JSON ({error}); mend or remove the line") from error


def _parquet_rows(file: Path, text_field: str, on_bad: OnBad | None) -> Iterator[tuple[str, str]]:
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
            try:
                text = _field({text_field: value}, text_field, f"{file}, row {number}")
            except ValueError as error:
                _pass_over(error, on_bad)
                continue
            yield f"{file}:{number}", text


def _field(row: object, text_field: str, where: str) -> str:
    value = row.get(text_field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        got = f"fields {', '.join(row)}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: required an object with a text in {text_field!r}, got {got}; give --text-field")
    return value
