"""What a field of a memory's JSON may hold, as small checks that are put together; and strict parsing.

Pure data, no files. A check returns None, or what is wrong, which begins with the place: `.spec.chunk_size must be ..`.
manifest.py, shard.py and reader.py state their fields with these; tests/memory/test_files_fields.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import isfinite
from reprlib import Repr
from typing import Any

Check = Callable[[Any], str | None]

LARGEST = 2**63 - 1
MAX_ITEMS = 2**26
MAX_DEPTH = 64
_MAX_DIGITS = 1000
_shown = Repr()
_shown.maxstring = _shown.maxlong = _shown.maxother = 60


def parse_json(data: bytes) -> Any:
    """The value of ASCII JSON without repeated keys, NaN, infinities or numbers of more than 1,000 digits.

    Raises:
        ValueError: what is wrong, in one line. At most MAX_ITEMS items are read: lists take more memory than text.
    """
    require_few_items(data)
    try:
        return json.loads(
            data.decode("ascii"),
            object_pairs_hook=_without_repeats,
            parse_int=_bounded,
            parse_float=_finite,
            parse_constant=_refused,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def require_few_items(data: bytes) -> None:
    """Refuse JSON of more than MAX_ITEMS items, without parsing it.

    Raises:
        ValueError: it has more.
    """
    if (count := data.count(b",") + data.count(b"[") + data.count(b"{")) > MAX_ITEMS:
        raise ValueError(f"it has about {count:,} items, at most {MAX_ITEMS:,} are allowed")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _bounded(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not isfinite(value):
        raise ValueError(f"{shown(text)} is no finite number")
    return value


def _refused(text: str) -> Any:
    raise ValueError(f"{text} is no JSON")


def shown(value: object) -> str:
    """A value for a message: short, on one line."""
    return _shown.repr(value)


def whole(low: int = 0, high: int = LARGEST) -> Check:
    """An int (no bool) within low..high."""

    def check(value: Any) -> str | None:
        if type(value) is int and low <= value <= high:
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


def table(fields: Mapping[str, Check]) -> Check:
    """An object with exactly these fields."""

    def check(value: Any) -> str | None:
        if type(value) is not dict or value.keys() != fields.keys():
            got = shown(sorted(value)) if type(value) is dict else shown(value)
            return f" must have the fields {', '.join(fields)}; got {got}"
        for name, field in fields.items():
            if problem := field(value[name]):
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

    Raises:
        ValueError: `what`, the place inside it, what is needed and what was got.
    """
    if problem := check(value):
        raise ValueError(f"{what}{problem}")
