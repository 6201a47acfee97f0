"""RULER's eight needle tasks (NVIDIA/RULER at c3f5e3b, Apache-2.0: templates and parameters; see README.md)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import DEPTHS, filled, finish, make_form, middle_depth, write_in
from hsa_ultralong.eval.tasks.material import Material, word_list
from hsa_ultralong.eval.tasks.sample import Sample, Tokens

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
_BEFORE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
_QUESTION = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
_PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"


@lru_cache(maxsize=1)
def word_pairs() -> tuple[list[str], list[str]]:
    """Adjectives and nouns, of which keys and values are made."""
    return word_list("adjective"), word_list("noun")


def draw(kind: str, rng: np.random.Generator) -> str:
    """A key or value: "words" (adjective-noun), "numbers" (7 digits) or "uuids" (version 4)."""
    if kind == "words":
        adjectives, nouns = word_pairs()
        return f"{adjectives[rng.integers(len(adjectives))]}-{nouns[rng.integers(len(nouns))]}"
    if kind == "numbers":
        return str(rng.integers(10**6, 10**7))
    if kind == "uuids":
        return str(uuid.UUID(bytes=rng.bytes(16), version=4))
    raise ValueError(f"unknown kind {kind!r}; there are words, numbers and uuids")


def noise_lines(material: Material, room: int) -> tuple[Tokens, np.ndarray]:
    """(room,) tokens of the noise haystack and the starts of its lines."""
    line = np.asarray(material.encode(NOISE + "\n"), dtype=np.int32)
    return np.tile(line, -(-room // len(line)))[:room], np.arange(0, room, len(line))


@dataclass(frozen=True)
class Needles:
    """Facts with a key and values in a haystack ("noise", "essay" or "needle"), asked for by key.

    keys, values, asked: number of keys, of values a key, and of keys in the question.
    """

    name: str
    haystack: str
    key: str
    value: str
    keys: int = 1
    values: int = 1
    asked: int = 1
    metric: str = "all"
    max_new_tokens: int = 128
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        lines = _NeedleLines(self, material, length, seed) if self.haystack == "needle" else None
        for index in range(number):
            rng = namespaced_rng(f"eval/{self.name}", seed, length, index)
            depth = middle_depth(index, number)
            yield (
                self._in_text(material, length, index, depth, rng)
                if lines is None
                else self._in_lines(lines, material, length, index, depth)
            )

    def _texts(self, query: str) -> tuple[str, str, str]:
        """Before, question and prefix; of one expected value in the singular, as RULER rewrites them."""
        texts, kind = [_BEFORE, _QUESTION, _PREFIX], self.value
        if self.asked * self.values == 1:
            texts = [text.replace("Some", "A").replace("are all", "is").replace("are", "is") for text in texts]
            kind = kind[:-1]
        before, question, prefix = (text.format(kind=kind, query=query) for text in texts)
        return before, question, prefix

    def _in_text(
        self, material: Material, length: int, index: int, depth: float, rng: np.random.Generator
    ) -> Sample:  # fmt: skip
        keys: list[str] = []
        while len(keys) < self.keys:
            key = draw(self.key, rng)
            if key not in keys:
                keys.append(key)
        values = [[draw(self.value, rng) for _ in range(self.values)] for _ in keys]
        asked = list(range(self.asked))
        query = _listed([keys[i] for i in asked])
        form = make_form(material, self, length, *self._texts(query))
        form.require(64, self.name)
        if self.haystack == "noise":
            context, starts = noise_lines(material, form.room)
            around = ("", "\n")
        else:
            (context, starts), around = material.haystack(length, form.room), (" ", "")
        facts = [(i, around[0] + NEEDLE.format(kind=self.value, key=keys[i], value=v) + around[1])
                 for i in range(self.keys) for v in values[i]]  # fmt: skip
        depths = rng.choice(DEPTHS, size=len(facts), replace=False).tolist()
        if self.asked * self.values == 1:
            depths[0] = depth
        spans = write_in(context, starts, [material.encode(text) for _, text in facts], depths, self.name)
        answers = [value for i in asked for value in values[i]]
        evidence = [span for span, (i, _) in zip(spans, facts, strict=True) if i in asked]
        single = depth if len(answers) == 1 else None
        return finish(self, form, context, index, answers, query, single, evidence)

    def _in_lines(self, lines: _NeedleLines, material: Material, length: int, index: int, depth: float) -> Sample:
        chosen = lines.at(depth)
        key, value = lines.facts[chosen]
        form = make_form(material, self, length, *self._texts(key))
        context = filled(lines.tokens, form.room, material.encode("\n"))
        return finish(self, form, context, index, [value], key, depth, [lines.span(chosen)])


def _listed(names: list[str]) -> str:
    return ", ".join(names[:-1]) + ", and " + names[-1] if len(names) > 1 else names[0]


class _NeedleLines:
    """A haystack whose every line is a needle: one for all samples of a length, each of which asks for another line."""

    def __init__(self, task: Needles, material: Material, length: int, seed: int) -> None:
        rng = namespaced_rng(f"eval/{task.name}/lines", seed, length)
        self.facts: list[tuple[str, str]] = []
        parts: list[list[int]] = []
        size, seen = 0, set()
        # the room of the longest question is not known yet; more lines than fit are cut off
        while size < length:
            new = []
            for _ in range(1 + min(65536, (length - size) // 16)):
                key = draw(task.key, rng)
                if key not in seen:
                    seen.add(key)
                    new.append((key, draw(task.value, rng)))
            texts = [NEEDLE.format(kind=task.value, key=key, value=value) + "\n" for key, value in new]
            encoded = material.tokenizer(texts, add_special_tokens=False)["input_ids"]
            for fact, tokens in zip(new, encoded, strict=True):
                if size < length:
                    self.facts.append(fact)
                    parts.append(tokens)
                    size += len(tokens)
        self.ends = np.cumsum([len(part) for part in parts])
        self.tokens = np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])
        # the question and the answer take part of the length, so the last lines are never asked for
        before, question, prefix = task._texts(max((key for key, _ in self.facts), key=len))
        form = make_form(material, task, length, before, question, prefix)
        form.require(len(parts[0]) + 8, task.name)
        self.usable = int(np.searchsorted(self.ends, form.room - 8, side="right"))

    def at(self, depth: float) -> int:
        """The line nearest to a depth."""
        return min(self.usable - 1, int(depth * self.usable))

    def span(self, line: int) -> tuple[int, int]:
        return (int(self.ends[line - 1]) if line else 0), int(self.ends[line])


RULER_NEEDLES = (
    Needles("niah_single_1", "noise", "words", "numbers"),
    Needles("niah_single_2", "essay", "words", "numbers"),
    Needles("niah_single_3", "essay", "words", "uuids"),
    Needles("niah_multikey_1", "essay", "words", "numbers", keys=4),
    Needles("niah_multikey_2", "needle", "words", "numbers"),
    Needles("niah_multikey_3", "needle", "uuids", "uuids"),
    Needles("niah_multivalue", "essay", "words", "numbers", values=4),
    Needles("niah_multiquery", "essay", "words", "numbers", keys=4, asked=4),
)
