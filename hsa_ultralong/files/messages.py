"""Values and errors of files in messages: short, on one line, nothing that acts on a terminal."""

from __future__ import annotations

from reprlib import Repr
from typing import Any

_shown = Repr()
_shown.maxstring = _shown.maxlong = _shown.maxother = 60


def shown(value: Any, width: int = 60) -> str:
    """A value, which may be of any size and from anywhere."""
    try:
        text = _shown.repr(value).encode("ascii", "backslashreplace").decode("ascii")
    except (RecursionError, ValueError):
        text = type(value).__name__
    return text if len(text) <= width else f"{text[:width]}..."


def reason(error: BaseException, width: int = 200) -> str:
    """What an error says."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(error)) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[:width]}..."
