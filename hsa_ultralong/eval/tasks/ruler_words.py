"""RULER's variable tracking, common words and frequent words (NVIDIA/RULER at c3f5e3b, Apache-2.0; see README.md)."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from operator import getitem

import numpy as np

from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import Form, filled, finish, make_form, write_in
from hsa_ultralong.eval.tasks.fragments import Fragments, first_distinct
from hsa_ultralong.eval.tasks.material import Material, word_list
from hsa_ultralong.eval.tasks.ruler_needles import NOISE, noise_lines, word_pairs
from hsa_ultralong.eval.tasks.sample import Sample, Tokens, TooShort

_VT_BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
_VT_QUESTION = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
_VT_PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, {number} variables are assigned the "
    "value {value}, they are: "
)
_CWE_BEFORE = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
_CWE_QUESTION = "\nQuestion: What are the 10 most common words in the above list?"
_CWE_PREFIX = " Answer: The top 10 words that appear most often in the list are:"
# words of the example and how often the common and the other ones stand in it, then both counts of the list itself
CWE_SHORT, CWE_LONG, CWE_LONG_FROM = ((20, 3, 1), 6, 1), ((40, 10, 3), 30, 3), 4096
_FWE_BEFORE = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
_FWE_QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
_FWE_PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def _letters(rng: np.random.Generator, size: int, alphabet: str) -> str:
    return "".join(alphabet[i] for i in rng.integers(len(alphabet), size=size))


def _names(rng: np.random.Generator, number: int, size: int, alphabet: str) -> list[str]:
    """Different random names, in the order drawn."""
    found: dict[str, None] = {}
    while len(found) < number:
        found[_letters(rng, size, alphabet)] = None
    return list(found)


@dataclass(frozen=True)
class VariableTracking:
    """A chain of assignments in noise; all names that hold the value are asked for. One solved example stands first."""

    name: str = "vt"
    hops: int = 4
    metric: str = "all"
    max_new_tokens: int = 30
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        example = self._example(namespaced_rng("eval/vt/example", seed, length))
        for index in range(number):
            rng = namespaced_rng("eval/vt", seed, length, index)
            names = _names(rng, self.hops + 1, 5, string.ascii_uppercase)
            value = str(rng.integers(10000, 99999))
            form = make_form(material, self, length, example + _VT_BEFORE, *self._asked(value))
            form.require(256, self.name)
            context, starts = noise_lines(material, form.room)
            lines = [material.encode(line + "\n") for line in self._chain(names, value)]
            depths = np.sort(rng.random(len(lines))).tolist()
            spans = write_in(context, starts, lines, depths, self.name)
            if spans != sorted(spans):  # crowded short contexts: in order, each behind the one before
                context, starts = noise_lines(material, form.room)
                spans = write_in(context, starts, lines, [i / len(lines) for i in range(len(lines))], self.name)
            yield finish(self, form, context, index, names, value, None, spans)

    def _chain(self, names: Sequence[str], value: str) -> list[str]:
        return [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]

    def _asked(self, value: str) -> tuple[str, str]:
        return _VT_QUESTION.format(value=value), _VT_PREFIX.format(value=value, number=self.hops + 1)

    def _example(self, rng: np.random.Generator) -> str:
        """A solved example of about 500 tokens, names of three capitals."""
        names, value = _names(rng, self.hops + 1, 3, string.ascii_uppercase), str(rng.integers(10000, 99999))
        lines = [NOISE] * 10
        places = np.sort(rng.choice(len(lines), size=self.hops + 1, replace=False))
        for shift, (place, line) in enumerate(zip(places, self._chain(names, value), strict=True)):
            lines.insert(int(place) + shift, line)
        question, prefix = self._asked(value)
        return _VT_BEFORE + "\n".join(lines) + question + prefix + " " + " ".join(names) + "\n\n"


# steps of a search for the length of a list by what its items foretell
_FORETOLD = 12


@dataclass(frozen=True)
class CommonWords:
    """A numbered list in which 10 words stand 30 times and the others 3 times (6 and 1 below 4,096 tokens)."""

    name: str = "cwe"
    common: int = 10
    metric: str = "all"
    max_new_tokens: int = 120
    is_editable: bool = False

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        sizes, often, seldom = CWE_SHORT if length < CWE_LONG_FROM else CWE_LONG
        words, is_paired = 2 * self.common, False
        for index in range(number):
            rng = namespaced_rng("eval/cwe", seed, length, index)
            fragments, order, common = self._list(material, rng, *sizes)
            example = _CWE_BEFORE + fragments.text(order) + _CWE_QUESTION + _CWE_PREFIX
            example += " " + " ".join(f"{i + 1}. {word}" for i, word in enumerate(common)) + "\n"
            form = make_form(material, self, length, example + _CWE_BEFORE, _CWE_QUESTION, _CWE_PREFIX)

            def listed(words: int, is_paired: bool, index: int = index) -> tuple[Tokens, list[str]]:
                rng = namespaced_rng("eval/cwe/list", seed, length, index)
                fragments, order, common = self._list(material, rng, words, often, seldom, is_paired)
                return fragments.encode(order), common

            if not is_paired:
                words, tokens, common = self._longest(listed, form, words, often, seldom)
                # all single words are too few, and as many pairs and one too long: fewer pairs
                is_paired = words == len(_single_words()) and form.room - len(tokens) > words
            if is_paired:
                words, tokens, common = self._longest(listed, form, words, often, seldom, is_paired=True)
            context = filled(tokens, form.room, material.encode("\n"))
            yield finish(self, form, context, index, common, "the 10 most common words")

    def _longest(
        self,
        listed: Callable[[int, bool], tuple[Tokens, list[str]]],
        form: Form,
        words: int,
        often: int,
        seldom: int,
        is_paired: bool = False,
    ) -> tuple[int, Tokens, list[str]]:
        """How many different words fill the room but for two of them at most, the tokens of their list, and the common
        words; words: where the search begins. Between a number that fits and one that does not it goes on at the
        number that the tokens of an item so far foretell, or in the middle where that leads nowhere: pairs of words
        are longer than the single words of a shorter list."""
        least = self.common + 1
        low, high, steps = least - 1, form.room, 0
        found: tuple[int, Tokens, list[str]] | None = None
        while high - low > 1:
            words = min(max(words, low + 1), high - 1) if steps < _FORETOLD else (low + high) // 2
            steps += 1
            tokens, common = listed(words, is_paired)
            rest = form.room - len(tokens)
            per_word = seldom * len(tokens) / (self.common * often + (words - self.common) * seldom)
            if rest < 0 and words == least:
                form.require(len(tokens), self.name)
            if rest < 0:
                high = words
            else:
                low, found = words, (words, tokens, common)
                if rest <= 2 * per_word:
                    break
            words += math.floor(rest / per_word)
        if found is None:
            raise TooShort(f"{self.name} needs room for a list of words, got {form.size} tokens; use a greater length")
        return found

    def _list(
        self, material: Material, rng: np.random.Generator, words: int, often: int, seldom: int, is_paired: bool = False
    ) -> tuple[Fragments, np.ndarray, list[str]]:
        """Fragments, which of them a list of `words` different words is made of, and the common words; the words of a
        shorter list are the first ones of a longer one's. is_paired: pairs of words where single ones would do."""
        parts: Sequence[Sequence[str]] = (_single_words(),)
        if words <= len(parts[0]) and not is_paired:
            chosen = rng.permutation(len(parts[0]))[:words, None]  # (words, 1)
        else:  # RULER goes on with another list of English words; here pairs of words
            parts = word_pairs()
            sizes = np.array([len(part) for part in parts])
            chosen = first_distinct(
                rng, lambda n: rng.integers(np.tile(sizes, n)).reshape(n, 2), lambda pairs: pairs @ [sizes[1], 1], words
            )  # (words, 2)  # fmt: skip
        order = np.concatenate([np.tile(np.arange(self.common), often), np.tile(np.arange(self.common, words), seldom)])
        rng.shuffle(order)
        names = ["-".join(map(getitem, parts, word)) for word in chosen[[*range(self.common), order[-1]]].tolist()]
        return *_numbered(material, parts, chosen[order], names.pop()), names


@lru_cache(maxsize=1)
def _single_words() -> list[str]:
    return word_list("noun", "adjective", "verb")


# no fragment, whatever is added to it
_NOTHING = -(10**9)


def _numbered(
    material: Material, parts: Sequence[Sequence[str]], words: np.ndarray, last: str
) -> tuple[Fragments, np.ndarray]:
    """Fragments of the list "1. WORD 2. WORD ...", and which of them it is made of; words: (items, 1) of words or
    (items, 2) of pairs, last: the last one."""
    high, low = np.divmod(np.arange(1, len(words) + 1), 1000)
    below = min(1000, len(words) + 1)
    if len(parts) == 1:
        used, inverse = np.unique(words, return_inverse=True)
        texts, places = [("1", [f". {parts[0][i]} " for i in used.tolist()], "1")], inverse.reshape(-1, 1)
    else:
        # a blank at the end of a word belongs to the hyphen behind it: such pairs are fragments as a whole
        is_odd = np.array([word != word.strip() for word in parts[0]])[words[:, 0]]
        odd, inverse = np.unique(words[is_odd], axis=0, return_inverse=True)
        places = words + np.array([0, len(parts[0])])
        places[is_odd, 0] = len(parts[0]) + len(parts[1]) + inverse.reshape(-1)
        places[is_odd, 1] = _NOTHING
        texts = [
            ("1", [f". {word.strip()}" for word in parts[0]], "-"), ("a", [f"-{word} " for word in parts[1]], "1"),
            ("1", [f". {'-'.join(map(getitem, parts, pair))} " for pair in odd.tolist()], "1"),
        ]  # fmt: skip
    groups = [
        ("", ["1"], "."), ("1", [f". {last}"], ""), ("a ", [str(i) for i in range(below)], "."),
        ("1", [f"{i:03d}" for i in range(1000 if high.any() else 0)], "."),
        ("a ", [str(i) for i in range(1, int(high[-1]) + 1)], "0"), *texts,
    ]  # fmt: skip
    starts = np.cumsum([0, *(len(group) for _, group, _ in groups)])
    # thousands, the rest of the number, the word; -1 for what is not there
    rows = np.concatenate([np.full((len(words), 2), -1), places + starts[5]], axis=1)
    rows[:, 1] = np.where(high > 0, starts[3] + low, starts[2] + low)
    rows[high > 0, 0] = starts[4] + high[high > 0] - 1
    rows[0, 1] = 0
    rows[-1, 2:] = -1
    rows[-1, 2] = 1
    return Fragments(material, *groups), rows[rows >= 0]


@dataclass(frozen=True)
class FrequentWords:
    """Coded words whose counts fall by a zeta law; ranks 2 to 4 are asked for, rank 1 is shown as dots."""

    name: str = "fwe"
    alpha: float = 2.0
    metric: str = "all"
    max_new_tokens: int = 50
    is_editable: bool = False

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        form = make_form(material, self, length, _FWE_BEFORE, _FWE_QUESTION, _FWE_PREFIX)
        form.require(256, self.name)
        for index in range(number):
            rng = namespaced_rng("eval/fwe", seed, length, index)
            vocabulary = _coded_words(rng, max(8, (length - self.max_new_tokens) // 50))
            yield self._sample(material, form, index, vocabulary, int(rng.integers(2**31)))

    def _sample(self, material: Material, form: Form, index: int, vocabulary: np.ndarray, order: int) -> Sample:
        """vocabulary (words, 6): the letters of each word."""
        ranks = np.arange(1, len(vocabulary) + 1) ** -self.alpha / _zeta(self.alpha)
        # the others never occur
        ranks = ranks[: max(4, int((4 * form.room * ranks >= 1).sum()))]
        letters = np.array(list(string.ascii_lowercase))
        words = ["...", *map("".join, letters[vocabulary[1 : len(ranks)]].tolist())]
        cost = np.array([len(part) for part in material.encode_all([f" {word}" for word in words])], dtype=np.float64)
        # counts are rounded down, so the room decides the number of words by bisection
        low, high = 1, 4 * form.room
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (
                (middle, high) if ((middle * ranks).astype(int) * cost).sum() <= form.room else (low, middle - 1)
            )
        fragments = Fragments(material, ("", words, " a"), ("a", [f" {word}" for word in words], " a"))
        for total in range(low, 0, -max(1, low // 256)):  # fragments next to each other may take other tokens
            counts = (total * ranks).astype(int)
            listed: np.ndarray = np.repeat(np.arange(len(words)), counts)
            np.random.default_rng(order).shuffle(listed)
            listed[1:] += len(words)
            tokens = fragments.encode(listed)
            if len(tokens) <= form.room:
                break
        context = filled(tokens, form.room, material.encode(" ..."))
        return finish(self, form, context, index, words[1:4], "the three most frequent words")


def _coded_words(rng: np.random.Generator, number: int) -> np.ndarray:
    """(number, 6): the letters of different words."""
    return first_distinct(
        rng, lambda n: rng.integers(26, size=(n, 6)), lambda words: words @ 26 ** np.arange(6), number
    )


def _zeta(alpha: float) -> float:
    """Riemann's zeta at alpha > 1: a sum with the integral of its tail."""
    n = 10**6
    return float((np.arange(1, n + 1, dtype=np.float64) ** -alpha).sum() + n ** (1 - alpha) / (alpha - 1))
