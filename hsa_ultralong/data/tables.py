"""Rows of tables: JSON lines, JSON arrays, CSV, TSV, parquet files and hub datasets, one in memory at a time.

Called by ``sources.py``; tested in ``tests/data/test_tables.py``.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hsa_ultralong.data import kinds
from hsa_ultralong.data.input_file import HUB_PREFIX, InputFile
from hsa_ultralong.data.kinds import as_seekable
from hsa_ultralong.data.text import cannot_be_read, decode, iter_lines, open_text

OnBad = Callable[[str], None]
_FIRST_READ = 1 << 16
# an error so close to the end of what was read may be the cut
_NEAR_END = 16
_DELIMITERS = {kinds.CSV: ",;\t|", kinds.TSV: "\t"}
_MAX_FIELD = 2**31 - 1


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


def pass_over(error: ValueError, on_bad: OnBad | None) -> None:
    """Tell of a bad record, or raise its error where nobody is told."""
    if on_bad is not None:
        on_bad(str(error))
    elif not isinstance(error, EmptyRecord):
        raise error


def table_rows(file: InputFile, kind: str, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    """The rows of a table from number `first` on; JSON and CSV give all fields, parquet `field` alone.

    Raises:
        ValueError: the table is damaged, or has no `field`; a bad row, without `on_bad`.
    """
    if kind == kinds.JSON_LINES:
        return _json_lines(file, on_bad, first)
    if kind == kinds.JSON:
        return _json_values(file, first)
    return _parquet_rows(file, field, first) if kind == kinds.PARQUET else _csv_rows(file, kind, field, on_bad, first)


def has_field(file: InputFile, kind: str, field: str) -> bool:
    """True if the first row of a table has the field; also if the table is damaged, which reading it will say."""
    try:
        record = next(table_rows(file, kind, field, None, 1), None)
    except MissingField:
        return False
    except (ValueError, OSError):
        return True
    return record is not None and isinstance(record.row, dict) and field in record.row


class MissingField(ValueError):
    """A table without the field that was asked for."""


def _json_lines(file: InputFile, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    offset = 0
    for number, line in enumerate(iter_lines(file), start=1):
        start, offset = offset, offset + len(line)
        if number < first or not line.strip():
            continue
        where = f"{file.name}, line {number}"
        try:
            row = json.loads(decode(line, file.name, start, number))
        # a broken line, bytes that are no UTF-8, a number of thousands of digits; brackets nested without end
        except (ValueError, RecursionError) as error:
            pass_over(ValueError(f"{where}: no JSON ({error}); mend or remove the line"), on_bad)
            continue
        yield Record(number, f"{file.name}:{number}", where, row)


def _json_values(file: InputFile, first: int) -> Iterator[Record]:
    """The elements of an array, or the values that follow one another."""
    for number, row in enumerate(_Values(file), start=1):
        if number >= first:
            yield Record(number, f"{file.name}:{number}", f"{file.name}, record {number}", row)


class _Values:
    """JSON values decoded one after another while the file is read."""

    def __init__(self, file: InputFile) -> None:
        self._file = file
        self._text, self._place, self._is_end = "", 0, False
        self._decoder = json.JSONDecoder()
        self._utf8 = codecs.getincrementaldecoder("utf-8")()

    def __iter__(self) -> Iterator[object]:
        try:
            with open_text(self._file) as self._stream:
                is_array = self._peek() == "["
                if is_array:
                    self._place += 1
                while (mark := self._peek()) and mark != "]":
                    yield self._value()
                    if self._peek() == "," and is_array:
                        self._place += 1
                        if self._peek() == "]":
                            raise self._damaged("a value is missing behind the last comma")
                    elif is_array and self._peek() != "]":
                        raise self._damaged("the array is cut off" if not self._peek() else "a comma is missing")
                if is_array and mark != "]":
                    raise self._damaged("the array is cut off")
                if mark == "]":
                    self._place += 1
                    if not is_array or self._peek():
                        raise self._damaged("something follows the end")
        except OSError as error:
            raise cannot_be_read(self._file, error) from error

    def _peek(self) -> str:
        """The next character that is no white space, "" at the end."""
        while True:
            while self._place < len(self._text):
                if self._text[self._place] not in " \t\r\n":
                    return self._text[self._place]
                self._place += 1
            if not self._read():
                return ""

    def _value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.pos >= len(self._text) - _NEAR_END or error.msg.startswith("Unterminated string")
                if not is_cut or not self._read():
                    raise self._damaged(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._damaged(str(error)) from error
            else:
                # a number may go on
                if end < len(self._text) or not self._read():
                    self._place = end
                    return value

    def _read(self) -> bool:
        """Read as much again as is held, so that a long value is not decoded too often."""
        if self._is_end:
            return False
        self._text = self._text[self._place :]
        self._place = 0
        data = self._stream.read(max(_FIRST_READ, len(self._text)))
        self._is_end = not data
        is_first = not self._text
        try:
            self._text += self._utf8.decode(data, final=self._is_end)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file.name} is not UTF-8 text ({error}); give --encoding") from error
        if is_first:
            self._text = self._text.removeprefix("\ufeff")
        return not self._is_end

    def _damaged(self, what: str) -> ValueError:
        near = self._text[self._place : self._place + 30]
        return ValueError(f"{self._file.name} is no whole JSON: {what}, near {near!r}; mend it")


def _csv_rows(file: InputFile, kind: str, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    csv.field_size_limit(_MAX_FIELD)
    delimiter, lines = _delimiter(_text_lines(file), kind, field)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        number = reader.line_num + 1
        where = f"{file.name}, line {number}"
        try:
            values = next(reader, None)
        except csv.Error as error:
            if header is None:
                raise ValueError(f"{where}: no {kind} ({error}); mend the first line") from error
            if number >= first:
                pass_over(ValueError(f"{where}: no {kind} ({error}); mend or remove the row"), on_bad)
            continue
        if values is None:
            return
        if header is None and values:
            header = values
            _require_header(file, kind, header, field)
        elif header is not None and values and number >= first:
            if len(values) != len(header):
                message = f"{where}: the row has {len(values)} fields, the header {len(header)}; quote texts"
                pass_over(ValueError(message), on_bad)
                continue
            yield Record(number, f"{file.name}:{number}", where, dict(zip(header, values, strict=True)))


def _text_lines(file: InputFile) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(iter_lines(file), start=1):
        yield decode(line, file.name, offset, number)
        offset += len(line)


def _require_header(file: InputFile, kind: str, header: list[str], field: str) -> None:
    if field not in header:
        names = ", ".join(name[:40] for name in header[:20])
        raise MissingField(
            f"{file.name} has no column {field!r} in its first line, but {names}; give --text-field, or add a header"
        )
    if len(set(header)) < len(header):
        raise ValueError(f"{file.name}: two columns of the {kind} file have one name: {', '.join(header[:20])}")


def _delimiter(lines: Iterator[str], kind: str, field: str) -> tuple[str, Iterator[str]]:
    """The delimiter that makes `field` a column of the first line, and all lines."""
    start = next(lines, "")
    choices = _DELIMITERS[kind]
    for delimiter in choices:
        if field in next(csv.reader([start.rstrip("\r\n")], delimiter=delimiter), []):
            break
    else:
        delimiter = choices[0]

    def all_lines() -> Iterator[str]:
        if start:
            yield start
        yield from lines

    return delimiter, all_lines()


def _parquet_rows(file: InputFile, field: str, first: int) -> Iterator[Record]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(f"{file.name}: {kinds.needs(kinds.PARQUET)}") from error
    with file.open() as stream:
        try:
            table = parquet.ParquetFile(as_seekable(stream))
        except Exception as error:
            raise ValueError(f"{file.name} is no readable parquet file: {error}") from error
        if field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise MissingField(f"{file.name} has no column {field!r}, but {columns}; give --text-field")
        batches, number = table.iter_batches(batch_size=64, columns=[field]), 0
        while True:
            try:
                batch = next(batches, None)
                values = [] if batch is None else batch.column(0).to_pylist()
            except Exception as error:
                raise ValueError(f"{file.name} is damaged from row {number + 1} on: {error}") from error
            if batch is None:
                return
            for value in values:
                number += 1
                if number >= first:
                    yield Record(number, f"{file.name}:{number}", f"{file.name}, row {number}", {field: value})


def hub_rows(path: str, first: int) -> Iterator[Record]:
    """The rows of a hub dataset from number `first` on.

    Raises:
        ImportError: without the datasets library.
    """
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
