"""Questions made of any text: a sentence of it with a gap, shortened and without some of its words.

After the cloze questions of Lewis et al., "Unsupervised Question Answering by Cloze Translation" (2019). Called by
many_questions.py; tests/data/test_many_questions.py.
"""

from __future__ import annotations

import re

import numpy as np

_SENTENCE = re.compile(r"(?<=[.!?;])\s+|\n+")
_EDGES = " \t.,;:!?\"'()[]{}“”‘’*_-"
# what an answer neither begins nor ends with
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
    a an the of to in on at by for from with as and or but nor is are was were be been being has have had do does
    did not no it its he his him she her they them their we our you your i my me this that these those which who
    whom what when where while than then so if into over under also such will would can could may might must shall
    should
    unto upon thou thee thy thine hath shalt said saying there here all some any only very
    """,
    )
)
# in place of numbers, of words with a capital, of others
_GAPS = (("how many", "what", "when", "___"), ("who", "what", "where", "which", "___"), ("what", "which", "___"))
# share of answers that are one of the first two if the sentence holds any
_TELLING = 0.6
_LEAST_WORDS, _MOST_WORDS = 6, 60
_MOST_ANSWER_WORDS = 5
_LEAST_LEFT = 4
_DIGIT = re.compile(r"\d")
_BREAK = re.compile(r"[,;:.!?)(\]\[]\s")
_TRIALS = 12


def cloze(rng: np.random.Generator, text: str) -> tuple[str, str] | None:
    """A question and its answer, one to five words that stand once in the text; None if no sentence gave one."""
    sentences = [words for part in _SENTENCE.split(text) if _LEAST_WORDS <= len(words := part.split()) <= _MOST_WORDS]
    lower = text.lower()
    for _ in range(_TRIALS if sentences else 0):
        words = sentences[int(rng.integers(len(sentences)))]
        # most answers that people give are short
        length = 1 + min(int(rng.geometric(0.45)) - 1, _MOST_ANSWER_WORDS - 1, len(words) - 4)
        starts = [place for place in range(1, len(words) - length + 1) if _form(words[place]) < 2]
        if not starts or rng.random() > _TELLING:
            starts = list(range(len(words) - length + 1))
        start = starts[int(rng.integers(len(starts)))]
        span = words[start : start + length]
        answer = " ".join(span).strip(_EDGES)
        ends = {span[0].lower().strip(_EDGES), span[-1].lower().strip(_EDGES)}
        if len(answer) < 2 or "" in ends or ends & FUNCTION_WORDS or _BREAK.search(answer):
            continue
        question = _question(rng, words, start, start + length)
        if lower.count(answer.lower()) == 1 and question and answer.lower() not in question.lower():
            return question, answer
    return None


def _form(word: str) -> int:
    """0 for a number, 1 for a word with a capital, 2 for another."""
    return 0 if _DIGIT.search(word) else 1 if word.lstrip(_EDGES)[:1].isupper() else 2


def _question(rng: np.random.Generator, words: list[str], start: int, stop: int) -> str:
    """The words around the span, some left out, a gap in its place; "" if few are left."""
    reach, kept = int(rng.integers(5, 16)), 1 - 0.4 * rng.random()
    before, after = (
        [word for word in part if rng.random() < kept]
        for part in (words[max(0, start - reach) : start], words[stop : stop + reach])
    )
    if len(before) + len(after) < _LEAST_LEFT:
        return ""
    gaps = _GAPS[_form(words[start])]
    asked = " ".join([*before, gaps[int(rng.integers(len(gaps)))], *after]).strip(" .,;:!?-")
    return f"{asked[:1].upper()}{asked[1:]}?"
