"""What a command shows. Names, texts, answers and errors come from strangers: they are shown, never run.

Everything that a command prints goes through here: `echo`, `echo_json`, `console`, `progress`, and the formatter of log
records. Characters that a terminal acts on (control characters, changes of the direction of writing) appear as escapes,
on a terminal and in a pipe alike; programs take --json, which is exact. tests/cli/test_terminal.py.
"""

from __future__ import annotations

import json
import logging
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

# control characters but line feed and tab, marks and changes of direction, line separators, halves of pairs, tags
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_BREAKS = {"\n": "\\n", "\t": "\\t"}


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def shown(text: str) -> str:
    """The text as a terminal may get it: what it would act on is written as escapes, line feeds and tabs stay."""
    return _ACTIVE.sub(_escape, text.replace("\r\n", "\n"))


def one_line(text: object) -> str:
    """A name, likewise, in one line."""
    return re.sub("[\n\t]", lambda match: _BREAKS[match[0]], shown(str(text)))


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """Print text to standard output or standard error."""
    line = shown(str(text))
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    # a terminal of few letters
    typer.echo(line.encode(encoding, "backslashreplace").decode(encoding), err=err, nl=nl)


def echo_json(value: Any, indent: int | None = 1) -> None:
    """Print a value as JSON, in which every special character is escaped."""
    typer.echo(json.dumps(value, indent=indent).replace("\x7f", "\\u007f"))


def console(*, err: bool = False) -> Console:
    """A rich console that takes strings for what they are: no markup, no emoji codes, nothing active."""
    from rich.console import Console

    class Shown(Console):
        def render_str(self, text: str, **options: Any) -> Any:
            return super().render_str(shown(text), **{**options, "markup": False, "emoji": False})

    return Shown(stderr=err, markup=False, emoji=False)


def progress(*columns: str | ProgressColumn, err: bool = True, **options: Any) -> Progress:
    """A rich progress bar on `console`; columns of text are given by their format."""
    from rich.progress import Progress, TextColumn
    from rich.text import Text

    class ShownColumn(TextColumn):
        def render(self, task: Any) -> Text:
            return Text(one_line(self.text_format.format(task=task)))

    made = (ShownColumn(column) if isinstance(column, str) else column for column in columns)
    return Progress(*made, console=console(err=err), **options)


@contextmanager
def ends_by_term() -> Iterator[None]:
    """SIGTERM ends what runs within as Ctrl-C does, so that what is known by then is written."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class LogFormatter(logging.Formatter):
    """Log records in one line each; a traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))

    def formatException(self, info: Any) -> str:
        return shown(super().formatException(info))
