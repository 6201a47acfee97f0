"""Needles: stated facts and the questions about them, one grammar for training and evaluation.

A needle says that an attribute of a two-word key has a value; the model is asked for the value later. Training keys
come from the corpus' word bank, evaluation keys from words the bank never holds (``evaluation_words.py``).
Called by ``rows.py``, ``eval/`` and ``hsa quickstart``; tested in ``tests/data/test_needles.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_ultralong.data.evaluation_words import EVALUATION_ADJECTIVES, EVALUATION_NOUNS
from hsa_ultralong.data.seeds import namespaced_rng

MIN_WORDS = 16

# {a} attribute, {k} key. Every template ends where the value begins.
_STATEMENTS: tuple[str, ...] = (
    "The {a} of the {k} is",
    "The {a} for the {k} is",
    "Remember that the {a} of the {k} is",
    "Note that the {a} for the {k} is",
    "The {k} has the {a}",
    "One more fact, the {a} of the {k} is",
    "The {a} of the {k} was changed to",
    "Please write down that the {a} for the {k} is",
)
_COMPLETIONS: tuple[str, ...] = ("The {a} of the {k} is", "The {a} for the {k} is")
_QUESTIONS: tuple[str, ...] = (
    "Question: What is the {a} of the {k}?\nAnswer:",
    "Question: What is the {a} for the {k}?\nAnswer:",
    "Question: Which {a} belongs to the {k}?\nAnswer:",
    "Question: Do you remember the {a} of the {k}?\nAnswer:",
)
_NUMBER_ATTRIBUTES = (
    "secret code",
    "access number",
    "magic number",
    "serial number",
    "locker number",
    "account number",
    "phone number",
    "lucky number",
    "safe combination",
    "security code",
)
_WORD_ATTRIBUTES = ("passphrase", "secret phrase", "code name", "password", "call sign", "nickname")
_CODE_ATTRIBUTES = ("secret code", "serial number", "access code", "booking code", "license plate", "product key")
_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_DIGITS = "0123456789"
# L letter, D digit.
_CODE_PATTERNS = ("LLDDDD", "LDLDLD", "LLLDDD", "DLLDDL")

MAIN_ATTRIBUTE = "secret code"
MAIN_NUM_DIGITS = 7
SEVEN_DIGIT_FRACTION = 0.7


@dataclass(frozen=True)
class Needle:
    """One stated fact and two ways to ask for it.

    Attributes:
        key: the two words that identify it, ``"amber falcon"``.
        value: what is asked for, ``"4821937"``.
        statement: sentence to hide in a text, ``" The secret code of the amber falcon is 4821937."`` (leading space).
        question: prompt in question style, ``"Question: What is the secret code of the amber falcon?\\nAnswer:"``
        answer: what follows either prompt, ``" 4821937"`` (leading space and value).
        completion: prompt in completion style, ``"The secret code of the amber falcon is"``
    """

    key: str
    value: str
    statement: str
    question: str
    answer: str
    completion: str


def make_needle(
    key: str, value: str, *, attribute: str = MAIN_ATTRIBUTE, statement: int = 0, question: int = 0, completion: int = 0
) -> Needle:
    """Fill the templates of these numbers (0 is the main one, used in evaluation) with a fact."""
    stem = _STATEMENTS[statement].format(a=attribute, k=key)
    return Needle(
        key=key,
        value=value,
        statement=f" {stem} {value}.",
        question=_QUESTIONS[question].format(a=attribute, k=key),
        answer=f" {value}",
        completion=_COMPLETIONS[completion].format(a=attribute, k=key),
    )


def sample_needles(rng: np.random.Generator, n: int, words: Sequence[str], *, p_hard: float = 0.25) -> list[Needle]:
    """Draw training needles whose keys and values are all different.

    Values are 7-digit numbers (70%), else numbers of 4-8 digits, two words, or letter-digit codes, a third each.

    Args:
        rng: source of all randomness.
        n: number of needles.
        words: word bank for keys and word values (``TokenShards.words``), at least 16 and free of evaluation words.
        p_hard: probability, for each needle after the first, of sharing one key word with an earlier needle.

    Raises:
        ValueError: too few words for ``n`` different keys, or ``p_hard`` is not a probability.
    """
    if not 0.0 <= p_hard <= 1.0:
        raise ValueError(f"p_hard must be between 0 and 1, got {p_hard}")
    if len(words) < MIN_WORDS or 4 * n > len(words) ** 2:
        raise ValueError(f"too few words for {n} needles, got {len(words)}; build the shards from more text")
    keys = _sample_keys(rng, n, words, p_hard)
    values = _sample_values(rng, n, words)
    choices = rng.integers(0, 1 << 30, size=(n, 4)).tolist()
    needles = []
    for key, (value, attributes), (i, j, k, m) in zip(keys, values, choices, strict=True):
        # Half of the statements use the main template, the rest spread over the others.
        statement = 0 if i % 2 else (i >> 1) % len(_STATEMENTS)
        needles.append(
            make_needle(
                key,
                value,
                attribute=attributes[j % len(attributes)],
                statement=statement,
                question=k % len(_QUESTIONS),
                completion=m % len(_COMPLETIONS),
            )
        )
    return needles


def evaluation_needles(seed: int, n: int) -> list[Needle]:
    """Draw evaluation needles: main templates, 7-digit values, keys that training never uses, all different.

    The generator's namespace is evaluation's own, so no seed gives training's stream.

    Raises:
        ValueError: ``n`` is not within 1..4096 (the number of keys), or the seed is negative.
    """
    num_keys = len(EVALUATION_ADJECTIVES) * len(EVALUATION_NOUNS)
    if not 1 <= n <= num_keys:
        raise ValueError(f"n must be within 1..{num_keys}, the number of evaluation keys, got {n}")
    rng = namespaced_rng("evaluation-needles", seed)
    keys = rng.permutation(num_keys)[:n].tolist()
    low = 10 ** (MAIN_NUM_DIGITS - 1)
    values: dict[int, None] = {}
    while len(values) < n:
        values.update(dict.fromkeys(rng.integers(low, 10 * low, size=n - len(values)).tolist()))
    return [
        make_needle(
            f"{EVALUATION_ADJECTIVES[key // len(EVALUATION_NOUNS)]} {EVALUATION_NOUNS[key % len(EVALUATION_NOUNS)]}",
            str(value),
        )
        for key, value in zip(keys, values, strict=True)
    ]


def _sample_keys(rng: np.random.Generator, n: int, words: Sequence[str], p_hard: float) -> list[str]:
    keys: list[tuple[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while len(keys) < n:
        draws = rng.integers(0, len(words), size=(2 * n, 2)).tolist()
        chances = rng.random((2 * n, 3)).tolist()
        for (i, j), (hard, earlier, side) in zip(draws, chances, strict=True):
            first, second = words[i], words[j]
            if keys and hard < p_hard:
                shared = keys[int(earlier * len(keys))]
                first, second = (shared[0], second) if side < 0.5 else (first, shared[1])
            if first != second and (first, second) not in seen and len(keys) < n:
                seen.add((first, second))
                keys.append((first, second))
    return [f"{first} {second}" for first, second in keys]


def _sample_values(rng: np.random.Generator, n: int, words: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Draw different values, each with the attributes that suit it."""
    values: dict[str, tuple[str, ...]] = {}
    while len(values) < n:
        # One block of uniform numbers per value is far cheaper than one generator call per digit.
        for draw in rng.random((n, 12)).tolist():
            value, attributes = _value(draw, words)
            if len(values) < n:
                values.setdefault(value, attributes)
    return list(values.items())


def _value(draw: list[float], words: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """Make one value from 12 uniform numbers in [0, 1)."""
    kind, shape, *parts = draw
    if kind < SEVEN_DIGIT_FRACTION:
        return _number(parts, MAIN_NUM_DIGITS), _NUMBER_ATTRIBUTES
    other = int((kind - SEVEN_DIGIT_FRACTION) / (1.0 - SEVEN_DIGIT_FRACTION) * 3)
    if other == 0:
        return _number(parts, 4 + int(shape * 5)), _NUMBER_ATTRIBUTES
    if other == 1:
        return f"{words[int(parts[0] * len(words))]} {words[int(parts[1] * len(words))]}", _WORD_ATTRIBUTES
    pattern = _CODE_PATTERNS[int(shape * len(_CODE_PATTERNS))]
    return "".join(_symbol(symbol, part) for symbol, part in zip(pattern, parts, strict=False)), _CODE_ATTRIBUTES


def _number(parts: list[float], num_digits: int) -> str:
    return str(1 + int(parts[0] * 9)) + "".join(_DIGITS[int(part * 10)] for part in parts[1:num_digits])


def _symbol(symbol: str, part: float) -> str:
    alphabet = _LETTERS if symbol == "L" else _DIGITS
    return alphabet[int(part * len(alphabet))]
