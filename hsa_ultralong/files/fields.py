"""What JSON may hold, as small checks that are put together.

Pure data, no files. A check returns None, or what is wrong, which begins with the place: `.spec.chunk_size must be ..`.
Manifests, states and logs state their fields with these; tests/files/test_fields.py, tests/memory/test_files_fields.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from hsa_ultralong.files.messages import shown

Check = Callable[[Any], str | None]

LARGEST = 2**63 - 1
MAX_DEPTH = 64
_MODEL_DEPTH = 50


def is_whole(value: Any, least: int = 0, most: int = LARGEST) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and (type(value) is float or abs(value) <= LARGEST)


def is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


def is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def is_plain_name(value: Any) -> bool:
    """A file's name inside its folder: no path, no hidden file."""
    return isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}", value) is not None


def that(test: Callable[[Any], bool], words: str) -> Check:
    """Whatever passes a test; `words` say what."""
    return lambda value: None if test(value) else f" must be {words}, got {shown(value)}"


def whole(low: int = 0, high: int = LARGEST) -> Check:
    """An int (no bool) within low..high."""

    def check(value: Any) -> str | None:
        if is_whole(value, low, high):
            return None
        return f" must be a whole number within {low}..{high}, got {shown(value)}"

    return check


def text(pattern: str | None = None, longest: int = 2**16) -> Check:
    """A string that matches `pattern` as a whole."""
    compiled = None if pattern is None else re.compile(pattern, re.ASCII)

    def check(value: Any) -> str | None:
        if type(value) is not str or len(value) > longest:
            return f" must be a string of at most {longest:,} characters, got {shown(value)}"
        if compiled is not None and not compiled.fullmatch(value):
            return f" must match {pattern}, got {shown(value)}"
        return None

    return check


def flag(value: Any) -> str | None:
    """true or false."""
    return None if type(value) is bool else f" must be true or false, got {shown(value)}"


def one_of(values: Collection[Any]) -> Check:
    """One of a few strings or numbers."""

    def check(value: Any) -> str | None:
        if type(value) in (str, int) and value in values:
            return None
        return f" must be one of {', '.join(map(str, values))}; got {shown(value)}"

    return check


def optional(other: Check) -> Check:
    """null, or what `other` takes."""
    return lambda value: None if value is None else other(value)


def rows(item: Check, low: int = 0, high: int = LARGEST) -> Check:
    """A list of low..high items."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or not low <= len(value) <= high:
            return f" must be a list of {low}..{high} items, got {shown(value)}"
        for number, entry in enumerate(value):
            if problem := item(entry):
                return f"[{number}]{problem}"
        return None

    return check


def row(*items: Check) -> Check:
    """A list of exactly these items."""

    def check(value: Any) -> str | None:
        if not isinstance(value, list | tuple) or len(value) != len(items):
            return f" must be a list of {len(items)} items, got {shown(value)}"
        for number, item in enumerate(items):
            if problem := item(value[number]):
                return f"[{number}]{problem}"
        return None

    return check


def table(fields: Mapping[str, Check], *, may_lack: Collection[str] = (), is_open: bool = False) -> Check:
    """An object with exactly these fields; some may be missing, and if it `is_open` there may be others."""

    def check(value: Any) -> str | None:
        if type(value) is not dict:
            return f" must be a JSON object, got {shown(value)}"
        if missing := sorted(fields.keys() - value.keys() - set(may_lack)):
            return f" lacks {missing[0]!r}"
        if unknown := [] if is_open else sorted(value.keys() - fields.keys()):
            return f" has an unknown field {shown(unknown[0])}"
        for name, field in fields.items():
            if name in value and (problem := field(value[name])):
                return f".{name}{problem}"
        return None

    return check


def mapping(key: Check, item: Check, low: int = 0, high: int = LARGEST) -> Check:
    """An object of low..high entries whose keys are free within `key`."""

    def check(value: Any) -> str | None:
        if type(value) is not dict or not low <= len(value) <= high:
            return f" must be an object of {low}..{high} entries, got {shown(value)}"
        for name, entry in value.items():
            if problem := key(name):
                return f": a key{problem}"
            if problem := item(entry):
                return f".{name}{problem}"
        return None

    return check


def free_object(value: Any) -> str | None:
    """An object of any JSON, nested at most MAX_DEPTH deep."""
    if type(value) is not dict:
        return f" must be an object, got {shown(value)}"
    level: Sequence[Any] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            entry
            for holder in level
            for entry in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(entry, dict | list)
        ]
        if not level:
            return None
    return f" must not be nested more than {MAX_DEPTH} deep"


def require(check: Check, value: Any, what: str) -> None:
    """Refuse a value.

    Args:
        what: its name, which the place inside it follows; a file's ends in a colon.

    Raises:
        ValueError: `what`, the place inside it, what is needed and what was got.
    """
    if problem := check(value):
        raise ValueError(f"{what} {problem.lstrip(' .')}" if what.endswith(":") else f"{what}{problem}")


DIGEST = that(is_digest, "64 hexadecimal digits")
TEXT = that(lambda value: isinstance(value, str), "text")
NUMBER = that(is_number, "a number")
NUMBER_OR_NULL = optional(NUMBER)
OBJECT = that(lambda value: isinstance(value, dict), "a JSON object")
# size and SHA-256 of a file, as `checksum.file_record` makes them
RECORD = table({"bytes": whole(), "sha256": DIGEST})


def require_modest(content: Any, where: str, name: str = "", depth: int = 0) -> None:
    """No number of a JSON value is beyond what any model needs, and it is not nested deeper than libraries can copy.

    Raises:
        ValueError: naming `where` and the first that is.
    """
    if depth > _MODEL_DEPTH:
        raise ValueError(f"{where}: {shown(name)} is nested too deeply")
    if isinstance(content, dict | list):
        for key, value in content.items() if isinstance(content, dict) else ((name, value) for value in content):
            require_modest(value, where, name or str(key), depth + 1)
    elif (type(content) is int and abs(content) >= 2**31) or (type(content) is float and not math.isfinite(content)):
        raise ValueError(f"{where}: {shown(name)} is {shown(content)}, which is beyond any model")


def require_tokens_below(largest: int, vocab_size: int, folder: Path) -> None:
    """A tokenizer whose largest token is `largest` fits a model of `vocab_size`; ids may have gaps.

    Raises:
        ValueError: it does not.
    """
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer of {folder} has token {largest:,}, but the model's vocab_size is {vocab_size:,}: they do "
            "not belong together"
        )
