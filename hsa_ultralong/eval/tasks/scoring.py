"""Scores of answers, 0..1. tests/eval/tasks/test_scoring.py holds them against adversarial strings.

`all` and `part` are RULER's string_match_all and string_match_part (NVIDIA/RULER at c3f5e3b, Apache-2.0), of one
sample. `exact` asks for the whole answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hsa_ultralong.data.answer_words import contains, f1, normalised

_CONTROL = re.compile(r"[\x00-\x1f]")


def match_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that occur in the answer, case ignored (RULER)."""
    text = _CONTROL.sub("\n", answer).lower()
    return sum(reference.lower() in text for reference in references) / len(references)


def match_part(answer: str, references: Sequence[str]) -> float:
    """1 if any of the references occurs in the answer, case ignored (RULER)."""
    text = _CONTROL.sub("\n", answer).lower()
    return float(any(reference.lower() in text for reference in references))


def exact(answer: str, references: Sequence[str]) -> float:
    """1 if the first line of the answer is one of the references, white space and a final full stop aside."""
    first = answer.strip().split("\n")[0].strip().rstrip(".").strip()
    return float(any(first == reference.strip().rstrip(".") for reference in references))


# what a letter or digit beside a reference makes another word of it, or another number: "12.5" is not 5 and not 12
_BEFORE, _BEHIND = r"(?<!\w)(?<!\d[.,:])", r"(?!\w|[.,:]\d)"


def begins(answer: str, references: Sequence[str]) -> float:
    """1 if the answer begins with one of the references, whatever stands behind it but a letter or further digits."""
    text = answer.strip()
    return float(any(re.match(re.escape(reference) + _BEHIND, text) for reference in references))


def mentions(answer: str, references: Sequence[str]) -> float:
    """1 if one of the references stands anywhere in the answer as it is, no letter or further digits beside it."""
    return float(any(_stands(reference, answer) for reference in references))


def mentions_all(answer: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the answer as `mentions` asks, in any order, other ones beside them."""
    return sum(_stands(reference, answer) for reference in references) / len(references)


def _stands(reference: str, answer: str) -> bool:
    return re.search(_BEFORE + re.escape(reference) + _BEHIND, answer) is not None


def exact_match(answer: str, references: Sequence[str]) -> float:
    """SQuAD's EM: equal in normal form to one of the references."""
    return float(any(normalised(answer) == normalised(reference) for reference in references))


def in_order(answer: str, references: Sequence[str]) -> float:
    """1 if all references, and no other numbers or names in capitals, stand in the answer in this order."""
    return float(_numbers_and_names(answer) == list(references))


def begins_in_order(answer: str, references: Sequence[str]) -> float:
    """1 if the first numbers or names in capitals of the answer are the references in this order, whatever follows."""
    return float(_numbers_and_names(answer)[: len(references)] == list(references))


def _numbers_and_names(answer: str) -> list[str]:
    """Words with a digit or five capitals in a row, whole; a number with its decimals."""
    return [word for word in re.findall(r"\w+(?:\.\d+)*", answer) if re.search(r"\d|[A-Z]{5}", word)]


_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
_GIVERS = ("bill", "fred", "jeff", "mary", "apple", "football", "milk")


def labels_exact(answer: str, references: Sequence[str], labels: Sequence[str], query: str) -> float:
    """1 if the labels in the first sentence of the answer, those of the question aside, are exactly the references
    (BABILong)."""
    text = answer.lower()
    for mark in (".", "<context>", "<example>"):
        text = text.split(mark)[0]
    asked = query.lower()
    return float({label for label in labels if label in text and label not in asked} == {r.lower() for r in references})


# metrics that need the question too, and the labels that they look for
LABELS = {"places": _PLACES, "givers": _GIVERS}
METRICS: dict[str, Callable[[str, Sequence[str]], float]] = {
    "all": match_all,
    "part": match_part,
    "exact": exact,
    "begins": begins,
    "mentions": mentions,
    "mentions_all": mentions_all,
    "em": exact_match,
    "f1": f1,
    "contains": contains,
    "in_order": in_order,
    "begins_in_order": begins_in_order,
}
# of answers that are one reference, or a list of them, whose main score asks for nothing else: what they get beside it
BESIDE = {"exact": ("begins", "mentions"), "begins": ("mentions",), "in_order": ("begins_in_order", "mentions_all")}


def score(metric: str, answer: str, references: Sequence[str], query: str = "") -> float:
    """The score 0..1 of one answer; query: the question, whose labels do not count where labels are looked for.

    Raises:
        ValueError: for a metric that is none, or without references.
    """
    if metric not in METRICS and metric not in LABELS:
        raise ValueError(f"unknown metric {metric!r}; there are {', '.join((*METRICS, *LABELS))}")
    if not references:
        raise ValueError("a sample needs at least one reference answer")
    if metric in LABELS:
        return labels_exact(answer, references, LABELS[metric], query)
    return METRICS[metric](answer, references)
