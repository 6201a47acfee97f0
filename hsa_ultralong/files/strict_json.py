"""JSON of files, read so that nothing passes for another value: no repeated key, no NaN, no size that harms.

JSON can carry a seal, a checksum over its own bytes, so that no flipped bit passes. Called wherever a file of JSON is
read again; tests/files/test_strict_json.py, tests/memory/test_files_fields.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from hsa_ultralong.files.messages import reason, shown
from hsa_ultralong.files.regular import read_regular

MAX_ITEMS = 2**26
_MAX_DIGITS = 1000
_SEAL = "sha256"


def parse_json(data: bytes, *, encoding: str = "utf-8", allow_nan: bool = False) -> Any:
    """The value of JSON without repeated keys, numbers of more than 1,000 digits, and (unless `allow_nan`) NaN and
    infinities.

    Raises:
        ValueError: what is wrong, in one line. At most MAX_ITEMS items are read: lists take more memory than text.
    """
    require_few_items(data)
    checks: dict[str, Any] = {} if allow_nan else {"parse_float": _finite, "parse_constant": _refused}
    try:
        return json.loads(data.decode(encoding), object_pairs_hook=_without_repeats, parse_int=_bounded, **checks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def require_few_items(data: bytes) -> None:
    """Refuse JSON of more than MAX_ITEMS items, without parsing it.

    Raises:
        ValueError: it has more.
    """
    if (count := data.count(b",") + data.count(b"[") + data.count(b"{")) > MAX_ITEMS:
        raise ValueError(f"it has about {count:,} items, at most {MAX_ITEMS:,} are allowed")


def parse_object(data: bytes, path: Path | str, *, allow_nan: bool = False) -> dict[str, Any]:
    """The JSON object in a file's content; errors as in `parse_json`, naming the file."""
    try:
        content = parse_json(data, allow_nan=allow_nan)
    except ValueError as error:
        raise ValueError(f"{path} is not readable JSON ({reason(error)})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {shown(content)}")
    return content


def parse_lines(data: bytes, path: Path) -> list[dict[str, Any]]:
    """The objects of a file that holds one a line; they may hold NaN. Errors name file and line."""
    lines = enumerate(data.split(b"\n"), 1)
    return [parse_object(line, f"{path}:{number}", allow_nan=True) for number, line in lines if line]


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; errors as in `read_regular` and `parse_object`."""
    return parse_object(read_regular(path), path)


def as_lines(value: Any) -> str:
    """`value` as JSON with a line for every field and for every item of these: a record a line, without spaces in it.

    A quarter smaller than with indentation, and a change still shows as the lines that it changes.
    """
    # what json makes of keys and tuples
    return _as_lines(json.loads(json.dumps(value)), 0) + "\n"


def _as_lines(value: Any, depth: int) -> str:
    if depth == 2 or not value or not isinstance(value, dict | list):
        return json.dumps(value, separators=(",", ":"))
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {_as_lines(one, depth + 1)}" for key, one in value.items()]
    else:
        items = [_as_lines(one, depth + 1) for one in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    line = "\n" + " " * depth
    return start + ",".join(f"{line} {item}" for item in items) + line + end


def sealed(content: Mapping[str, Any], indent: int | None = 1) -> bytes:
    """`content` as JSON whose first field is the SHA-256 of the text in which that field is empty."""
    text = json.dumps({_SEAL: "", **content}, indent=indent) + "\n"
    digest = hashlib.sha256(text.encode("utf-8")).hexdigest()
    return text.replace(f'"{_SEAL}": ""', f'"{_SEAL}": "{digest}"', 1).encode("utf-8")


def unsealed(data: bytes, path: Path) -> tuple[dict[str, Any], bool]:
    """The content of a file, and whether it had a seal; without one it is taken as it is.

    Raises:
        ValueError: it is no JSON object, or a byte of a sealed one has changed.
    """
    content = parse_object(data, path, allow_nan=True)
    if _SEAL not in content:
        return content, False
    del content[_SEAL]
    if sealed(content, 1 if data.startswith(b"{\n") else None) != data:
        raise ValueError(f"{path} is damaged (its SHA-256 is not that which it states)")
    return content, True


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
