"""Named documents out of files, folders, tables, standard input and hub datasets, one in memory at a time.

What paths stand for is in inputs.py; text files in text.py, tables in tables.py, pages and books in documents.py.
Called by the commands that read text and, through build.py, by `hsa data`; tests/data/test_sources.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from hsa_ultralong.data import kinds
from hsa_ultralong.data.documents import document_text
from hsa_ultralong.data.encodings import AUTO
from hsa_ultralong.data.input_file import InputFile
from hsa_ultralong.data.inputs import Input, Spool, inputs_of, source_files
from hsa_ultralong.data.tables import EmptyRecord, OnBad, Record, hub_rows, pass_over, table_rows
from hsa_ultralong.data.text import raw_documents

logger = logging.getLogger(__name__)

Parsed = TypeVar("Parsed")


class Source(NamedTuple):
    """A document: its name, which says where it comes from, and its text."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


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


def read_sources(file: InputFile, *, text_field: str = "text", on_bad: OnBad | None = None) -> Iterator[Source]:
    """The documents of one file.

    A text file of several documents (separated by a U+001E line) names them file, file#2, ...; rows of a table are
    file:line or file:row, white space only is left out; a page or book is one document. `on_bad` is told of what cannot
    be read, and reading goes on with the next document, row or file.

    Raises:
        ValueError: a file of a kind that cannot be read, not UTF-8, a row that is no object or lacks `text_field`
            (names file and line), or no text; without `on_bad`. ImportError: a library is missing.
    """
    for record, text in read_parsed(file, parse_text, field=text_field, on_bad=on_bad):
        yield Source(record.name, text)


def iter_texts(
    paths: Sequence[str | Path | Input],
    *,
    text_field: str = "text",
    encoding: str = AUTO,
    on_bad: OnBad | None = None,
) -> Iterator[str]:
    """The documents of files, folders, tables, standard input and hub datasets, in the order given.

    Args:
        paths: as `inputs_of` takes them.

    Raises:
        ValueError: see inputs_of and read_sources. ImportError: a hub dataset or a kind of file without its library.
    """
    with Spool() as spool:
        for one in inputs_of(paths, spool=spool, field=text_field, encoding=encoding):
            yield from (text for _, text in read_parsed(one, parse_text, field=text_field, on_bad=on_bad))


def read_text(path: str | Path, *, encoding: str = AUTO) -> str:
    """The whole text of one text file, page or book, or of standard input ("-").

    Raises:
        ValueError: missing, a folder, a table, empty, or not readable as `read_sources` says.
    """
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder; pass one text file")
    with Spool() as spool:
        (file,) = source_files([path], spool=spool, encoding=encoding)
        kind = file.kind()
        if kind in kinds.TABLES:
            raise ValueError(f"{file.name} is a table ({kind}), not one text; pass a text file")
        if kind in kinds.DOCUMENTS:
            text = document_text(file, kind)
        else:
            # a separator that no line is
            text = "".join(raw.decode(file) for raw in raw_documents(file, b"\n"))
    if not text.strip():
        raise ValueError(f"{file.name} is empty: it holds no text")
    return text


def read_parsed(
    one: Input,
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
                pass_over(error, told)
                continue
            is_empty = False
            yield record, value
    except TooManyBadRecords:
        raise
    except ValueError as error:
        # the input itself is damaged from here on
        pass_over(error, told)
    if is_empty and not has_bad:
        name = one if isinstance(one, str) else one.name
        if on_bad is None and isinstance(one, InputFile) and one.is_found:
            logger.warning("passed over: %s is empty: it holds no text", name)
        else:
            pass_over(ValueError(f"{name} is empty: it holds no text"), on_bad)


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
    if field in row:
        return "null in it" if row[field] is None else f"{type(row[field]).__name__} in it"
    return f"fields {', '.join(map(str, row))}; give --text-field"


def _rows(one: Input, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    if isinstance(one, str):
        return hub_rows(one, first)
    kind = one.kind()
    if kind in kinds.TABLES:
        return table_rows(one, kind, field, on_bad, first)
    return _document_row(one, kind, field, first) if kind in kinds.DOCUMENTS else _text_rows(one, field, on_bad, first)


def _document_row(file: InputFile, kind: str, field: str, first: int) -> Iterator[Record]:
    if first == 1:
        yield Record(1, file.name, file.name, {field: document_text(file, kind)})


def _text_rows(file: InputFile, field: str, on_bad: OnBad | None, first: int) -> Iterator[Record]:
    for number, raw in enumerate(raw_documents(file), start=1):
        if number < first:
            continue
        try:
            text = raw.decode(file)
        except ValueError as error:
            pass_over(error, on_bad)
            continue
        name = file.name if number == 1 else f"{file.name}#{number}"
        yield Record(number, name, f"{file.name}, line {raw.line:,}", {field: text})
