"""Numbers that a user gives: sizes such as 64K, lists of them, and the bounds of what a machine can count.

Called by the commands; tests/cli/test_numbers.py.
"""

from __future__ import annotations

import math
import re

MAX_COUNT = 2**31 - 1
MAX_SEED = 2**32 - 1
MAX_TOKENS = 2**50
MAX_TOPK = 2**20
MAX_LAYERS = 1000
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "B": 2**30, "G": 2**30}
# longer ones exceed every bound, and Python refuses to convert thousands of digits
_MAX_DIGITS = 18


def parse_size(text: str, option: str = "", minimum: int = 1) -> int:
    """Number of tokens or bytes: "4096", "32K", "16M", "1B" (or "1G"), in binary multiples: 16M is 16 * 2^20.

    Raises:
        ValueError: for anything else, for fractions, and below `minimum` or above 2^50; names `option`.
    """
    where = f"{option}: " if option else ""
    match = re.fullmatch(r"(\d+(?:\.\d+)?|\d{1,3}(?:[,_]\d{3})+)([KMBG]?)", text.strip().upper(), re.ASCII)
    if match is None:
        raise ValueError(f"{where}expected a size such as 4096, 32K, 16M or 1B, got {_short(text)}")
    number, unit = match[1].replace(",", "").replace("_", ""), _UNITS[match[2]]
    whole, _, fraction = number.partition(".")
    if len(whole.lstrip("0")) > _MAX_DIGITS or len(fraction) > _MAX_DIGITS:
        raise ValueError(f"{where}at most {MAX_TOKENS:,}, got {_short(text)}")
    tokens = float(number) * unit if fraction else int(whole) * unit
    if tokens != int(tokens):
        raise ValueError(f"{where}{text!r} is not a whole number")
    if not minimum <= tokens <= MAX_TOKENS:
        raise ValueError(f"{where}from {minimum:,} to {MAX_TOKENS:,}, got {_short(text)}")
    return int(tokens)


def parse_sizes(text: str, option: str) -> list[int]:
    """Several sizes separated by commas: "4K,32K"."""
    return [parse_size(part, option) for part in text.split(",")]


def parse_counts(text: str, option: str, maximum: int = MAX_COUNT) -> list[int]:
    """Whole numbers above 0 separated by commas: "16,32".

    Raises:
        ValueError: for anything else; names `option`.
    """
    parts = [part.strip() for part in text.split(",")]
    if any(not re.fullmatch(r"\d{1,18}", part, re.ASCII) or not 1 <= int(part) <= maximum for part in parts):
        raise ValueError(f"{option} must be whole numbers from 1 to {maximum:,} such as 16,32, got {_short(text)}")
    return [int(part) for part in parts]


def finite(value: float | None) -> float | None:
    """Refuse what is no number, for options that are real numbers (`callback=finite`)."""
    if value is not None and not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {value}")
    return value


def _short(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:20]!r}... ({len(text)} characters)"
