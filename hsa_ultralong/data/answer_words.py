"""Answers compared by their words, as SQuAD does. Called by eval/tasks/scoring.py and self_written.py;
tests/eval/tasks/test_scoring.py holds them against adversarial strings.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalised(text: str) -> str:
    """SQuAD's normal form: lower case, no punctuation, no articles, single blanks."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", bare).split())


def f1(answer: str, references: Sequence[str]) -> float:
    """SQuAD's F1: overlap of words in normal form, the best over the references."""
    return max(_overlap(normalised(answer).split(), normalised(reference).split()) for reference in references)


def _overlap(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    if common == 0:
        return 0.0
    precision, recall = common / len(answer), common / len(reference)
    return 2 * precision * recall / (precision + recall)


def contains(answer: str, references: Sequence[str]) -> float:
    """1 if one of the references occurs in the answer as whole words, both in normal form."""
    text = f" {normalised(answer)} "
    return float(any(f" {normalised(reference)} " in text for reference in references))
