"""Passages that tell other answers than they did: a model that knows the answer by heart is wrong, one that reads is
right. So few questions can be asked often.

After the substitution of entities of Longpre et al., "Entity-Based Knowledge Conflicts in Question Answering" (2021).
Called by many_questions.py; tests/data/test_many_questions.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar, cast

import numpy as np

# a question, its answer, and more that is told of it
_Asked = TypeVar("_Asked", bound=tuple[str, ...])

# small words that names hold
_SMALL = {"of", "the", "and", "de", "von", "van", "la", "le", "al", "di", "da", "&"}
_MOST_WORDS = 4


def is_name(answer: str) -> bool:
    """All its words but small ones begin with a capital, and it holds no digit."""
    words = answer.split()
    return (
        1 <= len(words) <= _MOST_WORDS
        and all(word[0].isupper() or word in _SMALL for word in words)
        and words[0] not in ("The", "A", "An")
        and not any(letter.isdigit() for letter in answer)
    )


def change_answers(
    rng: np.random.Generator, text: str, pairs: Sequence[_Asked], names: Sequence[str], probability: float
) -> tuple[str, list[_Asked]]:
    """The passage and its (question, answer, ...), each answer replaced everywhere with this probability: digits by
    digits, a name by another one of as many words.

    Answers of other forms stay, those that do not stand in the passage, and those that hold or overlap another one.
    """
    found = list(pairs)
    for number in range(len(found)):
        answer = found[number][1]
        other = _another(rng, answer, names) if rng.random() < probability else ""
        place = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)")
        inside = any(one[1] != answer and one[1].lower() in answer.lower() for one in found)
        if not other or inside or other.lower() in text.lower() or not place.search(text):
            continue
        # every other occurrence must change as well
        if len(place.findall(text)) != text.lower().count(answer.lower()):
            continue

        def swap(part: str, place: re.Pattern[str] = place, other: str = other) -> str:
            return place.sub(lambda _: other, part)

        changed = [cast(_Asked, tuple(map(swap, one))) for one in found]
        lower, after = text.lower(), swap(text).lower()
        # an answer that overlaps it would be told no longer
        if all(was[1].lower() not in lower or now[1].lower() in after for was, now in zip(found, changed, strict=True)):
            text, found = swap(text), changed
    return text, found


def _another(rng: np.random.Generator, answer: str, names: Sequence[str]) -> str:
    """Another answer of this one's form, "" if it has none."""
    if any(letter.isdigit() for letter in answer):
        return re.sub(r"\d+", lambda digits: _number(rng, digits.group()), answer)
    if not is_name(answer) or not names:
        return ""
    words = len(answer.split())
    drawn = (names[int(rng.integers(len(names)))] for _ in range(16))
    return next((name for name in drawn if len(name.split()) == words and name != answer), "")


def _number(rng: np.random.Generator, digits: str) -> str:
    """As many digits; a year stays in its century, and no number but 0 begins with 0."""
    kept = 2 if len(digits) == 4 and digits[0] in "12" else 0
    drawn = [str(rng.integers(0 if place or digits[0] == "0" else 1, 10)) for place in range(len(digits))]
    return digits[:kept] + "".join(drawn[kept:])
