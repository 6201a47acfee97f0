"""Half-read documents: what a killed reader leaves open, and the note in the build state that tells it from a document
that was left open on purpose.

Written by inference/file_reader.py; asked by inference/library.py, opening.py and the command line;
tests/inference/test_half_read.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hsa_ultralong.memory.files import MemoryDocument

_NOTE = "reading"


class HalfRead(NamedTuple):
    """A document of which only the beginning was read; `num_tokens` counts its whole text, None: a stream's."""

    document: MemoryDocument
    num_tokens: int | None

    @property
    def whole(self) -> int | str:
        """Tokens of the whole text, "unknown" of a stream."""
        return "unknown" if self.num_tokens is None else self.num_tokens

    def __str__(self) -> str:
        return f"{self.document.label} is half-read ({self.document.num_tokens:,} of {counted(self.whole)} tokens)"


def counted(tokens: int | str) -> str:
    """A number of tokens for messages, or that it is unknown."""
    return tokens if isinstance(tokens, str) else f"{tokens:,}"


def half_read(document: MemoryDocument | None, build_state: Mapping[str, Any]) -> HalfRead | None:
    """The open document with the size of its text if its reader was killed; None if it is whole or there is none."""
    note = build_state.get(_NOTE)
    if document is None or not document.is_open or not isinstance(note, dict) or note.get("name") != document.name:
        return None
    total = note.get("num_tokens")
    is_known = isinstance(total, int) and total > document.num_tokens
    return HalfRead(document, total) if is_known or ("num_tokens" in note and total is None) else None


def with_note(build_state: Mapping[str, Any], name: str, num_tokens: int | None) -> dict[str, Any]:
    """The build state while a document of so many tokens is being read."""
    return {**build_state, _NOTE: {"name": name, "num_tokens": num_tokens}}


def without_note(build_state: Mapping[str, Any]) -> dict[str, Any]:
    """The build state when no document is being read."""
    return {key: value for key, value in build_state.items() if key != _NOTE}


def way_on(path: object) -> str:
    """What to do about a half-read document, for messages."""
    return (
        f"give the same text again to finish it, or keep what was read (hsa memory close {path}), or remove it "
        f"(hsa memory close {path} --drop)"
    )
