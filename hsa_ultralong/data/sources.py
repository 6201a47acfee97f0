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
from typing import Any, NamedTuple, TypeVar

from hsa_ultralong.data.text import TEXT_SUFFIXES, iter_lines, raw_documents

logger = logging.getLogger(__name__)

HUB_PREFIX = "hf:"
OnBad = Callable[[str], None]
TABLE_SUFFIXES = (".jsonl", ".jsonl.xz", ".parquet")
STANDARD_INPUT = "-"
# a file, a hub dataset (a string with its prefix), or standard input (None)
Input = Path | str | None
Parsed = TypeVar("Parsed")


class Source(NamedTuple):
    """A document: its name, which says where it comes from, and its text."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


class Record(NamedTuple):
    """What lies at one place of an input: its number (from 1), a name and a place for people, and the row.

    Text files give rows of one field, as tables do.
    """

    number: int
    name: str
    where: str
    row: object


class EmptyRecord(ValueError):
    """A record of white space only; whoever asks for no report of bad records does not hear of it."""


class TooManyBadRecords(ValueError):
    """More bad records than allowed: the end of the work."""


class BadRecords:
    """Counts records that cannot be used; each is logged, and more than `limit` of them end the work.

    Attributes:
        messages: the first ones, for the manifest.
    """

    _KEPT = 20

    def __init__(self, limit: int, count: int = 0, messages: Sequence[str] = ()) -> None:
        self.limit, self.count, self.messages = limit, count, list(messages)

    def __call__(self, message: str) -> None:
        self.count += 1
        logger.warning("passed over: %s", message)
        if len(self.messages) < self._KEPT:
            self.messages.append(message)
        if self.count > self.limit:
            raise TooManyBadRecords(
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
    with the next document, row or file.

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
    for record, text in read_parsed(file, parse_text, field=text_field, on_bad=on_bad):
        yield Source(record.name, text)


def iter_texts(paths: Sequence[str | Path], *, text_field: str = "text", on_bad: OnBad | None = None) -> Iterator[str]:
    """The documents of files, folders, tables, standard input and hub datasets, in the order given.

    Args:
        paths: as `inputs_of` takes them.

    Raises:
        ValueError: see source_files and read_sources. ImportError: a hub dataset without the library.
    """
    for one in inputs_of(paths):
        if one is None:
            yield from (source.text for source in read_sources(None))
        else:
            yield from (text for _, text in read_parsed(one, parse_text, field=text_field, on_bad=on_bad))


def inputs_of(paths: Sequence[str | Path]) -> list[Input]:
    """The inputs that paths stand for: files (those below a folder sorted), hub datasets, standard input.

    Args:
        paths: files, folders, "-", and "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT": a dataset of the hub, a
            folder of data files, or one that `save_to_disk` wrote (an empty CONFIG is the default one; SPLIT is "train"
            if not given).

    Raises:
        ValueError: see source_files.
    """
    inputs: list[Input] = []
    for path in paths:
        inputs += [str(path)] if str(path).startswith(HUB_PREFIX) else source_files([path])
    # names the mistake of giving nothing
    return inputs or list(source_files([]))


def read_parsed(
    one: Path | str,
    parse: Callable[[object, str, str], Parsed],
    *,
    field: str,
    on_bad: OnBad | None = None,
    first: int = 1,
) -> Iterator[tuple[Record, Parsed]]:
    """The records of a file or hub dataset from number `first` on, each with what `parse` makes of it.

    Args:
        parse: gets the row, `field` and the record's place; raises ValueError for a bad record.
        on_bad: told of bad records, which are passed over.

    Raises:
        ValueError: a bad record, or an input without any; without `on_bad`.
    """
    is_empty, has_bad = first == 1, False

    def report(message: str) -> None:
        nonlocal has_bad
        has_bad = True
        assert on_bad is not None
        on_bad(message)

    told = report if on_bad is not None else None
    try:
        for record in _rows(one, field, told, first):
            try:
                value = parse(record.row, field, record.where)
            except ValueError as error:
                _pass_over(error, told)
                continue
            is_empty = False
            yield record, value
    except TooManyBadRecords:
        raise
    except ValueError as error:
        # the input itself is damaged from here on
        _pass_over(error, told)
    if is_empty and not has_bad:
        _pass_over(ValueError(f"{one} is empty: it holds no text"), on_bad)


def parse_text(row: object, field: str, where: str) -> str:
    """The text of a row, for `read_parsed`.

    Raises:
        ValueError: no object, no string in `field`, or one that UTF-8 cannot write. EmptyRecord: white space only.
    """
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        raise ValueError(f"{where}: required an object with a text in {field!r}, got {_what(row, field)}")
    if not value.strip():
        raise EmptyRecord(f"{where}: the text is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text holds half of a character pair at {error.start:,}: not UTF-8") from error
    return value


def _what(row: object, field: str) -> str:
    if not isinstance(row, dict):
        return type(row).__name__
    if row.get(field) is not None:
        return f"{type(row[field]).__name__} in it"
    return f"fields {', '.join(map(str, row))}; give --text-field"


def _pass_over(error: ValueError, on_bad: OnBad | None) -> None:
    if on_bad is not None:
        on_bad(str(error))
    elif not isinstance(error, EmptyRecord):
        raise error


def _rows(one: Path | str, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    if isinstance(one, str):
        return _hub_rows(one, first)
    if one.name.endswith((".jsonl", ".jsonl.xz")):
        return _json_rows(one, on_bad, first)
    return _parquet_rows(one, field, first) if one.suffix == ".parquet" else _text_rows(one, field, on_bad, first)


def _text_rows(file: Path, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    for number, raw in enumerate(raw_documents(file), start=1):
        if number < first:
            continue
        try:
            text = raw.decode(file)
        except ValueError as error:
            _pass_over(error, on_bad)
            continue
        name = str(file) if number == 1 else f"{file}#{number}"
        yield Record(number, name, f"{file}, line {raw.line:,}", {field: text})


def _json_rows(file: Path, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    for number, line in enumerate(iter_lines(file), start=1):
        if number < first or not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            row = json.loads(line)
        # a broken line, bytes that are no UTF-8, a number of thousands of digits; brackets nested without end
        except (ValueError, RecursionError) as error:
            _pass_over(ValueError(f"{where}: no JSON ({error}); mend or remove the line"), on_bad)
            continue
        yield Record(number, f"{file}:{number}", where, row)


def _parquet_rows(file: Path, field: str, first: int) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError('reading .parquet needs pyarrow: pip install "hsa-ultralong[data]"') from error
    try:
        table = parquet.ParquetFile(file)
    except Exception as error:
        raise ValueError(f"{file} is no readable parquet file: {error}") from error
    if field not in table.schema_arrow.names:
        columns = ", ".join(table.schema_arrow.names)
        raise ValueError(f"{file} has no column {field!r}, but {columns}; give --text-field")
    number = 0
    for batch in table.iter_batches(batch_size=64, columns=[field]):
        if number + len(batch) < first:
            number += len(batch)
            continue
        for value in batch.column(0).to_pylist():
            number += 1
            if number >= first:
                yield Record(number, f"{file}:{number}", f"{file}, row {number}", {field: value})


def _hub_rows(path: str, first: int) -> Iterator[Record]:
    rows = _open_dataset(path)
    if first > 1:
        rows = rows.skip(first - 1)
    for number, row in enumerate(rows, start=first):
        yield Record(number, f"{path}:{number}", f"{path}, row {number}", row)


def _open_dataset(path: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f'{path} needs the datasets library: pip install "hsa-ultralong[data]"') from error
    name, config, split = [*path.removeprefix(HUB_PREFIX).split(":"), "", ""][:3]
    split = split or "train"
    is_dict = (Path(name) / "dataset_dict.json").is_file()
    if is_dict or (Path(name) / "state.json").is_file():
        saved = datasets.load_from_disk(name)
        return saved[split] if is_dict else saved
    return datasets.load_dataset(name, config or None, split=split, streaming=True)
