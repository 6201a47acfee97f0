"""RULER's two tasks of questions over documents (NVIDIA/RULER at c3f5e3b, Apache-2.0: templates; see README.md)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hsa_ultralong.data.passages import Passages, Question, read_multihop, read_squad
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import filled, finish, make_form
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.sample import Sample, Tokens, TooShort

_INSTRUCTION = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
)
_BEFORE = _INSTRUCTION + "\n\nThe following are given documents.\n\n"
_QUESTION = "\n\n" + _INSTRUCTION + "\n\nQuestion: {query}"
_PREFIX = " Answer:"
_READERS = {"squad": read_squad, "hotpot": read_multihop}


@lru_cache(maxsize=4)
def _read(source: str, path: Path) -> Passages:
    return _READERS[source](path)


@dataclass(frozen=True)
class DocumentQuestions:
    """A question whose documents stand among others of the same file, in random order.

    source: "squad" or "hotpot", the name of its file in `Material.files`.
    """

    name: str
    source: str
    metric: str = "part"
    max_new_tokens: int = 32
    is_editable: bool = False

    def passages(self, material: Material, number: int) -> Passages:
        """The file of this task.

        Raises:
            ValueError: if it is not given, is another kind of file, or has fewer questions than `number`.
        """
        if self.source not in material.files:
            raise ValueError(f"{self.name} needs a file of questions: give --data {self.source}=FILE")
        passages = _read(self.source, material.files[self.source])
        if number > len(passages.questions):
            raise ValueError(f"{self.name}: {number} samples of {len(passages.questions)} questions")
        return passages

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        passages = self.passages(material, number)
        made, refused = 0, None
        for place, question in enumerate(passages.questions):
            try:
                sample = self._sample(material, passages, question, length, place, seed)
            except TooShort as error:  # its own documents do not fit: the next question of the file
                refused = error
                continue
            yield replace(sample, index=made)
            made += 1
            if made == number:
                return
        assert refused is not None
        raise refused

    def _sample(
        self, material: Material, passages: Passages, question: Question, length: int, place: int, seed: int
    ) -> Sample:
        rng = namespaced_rng(f"eval/{self.name}", seed, length, place)
        form = make_form(material, self, length, _BEFORE, _QUESTION.format(query=question.text), _PREFIX)
        gold = [passages.texts[i] for i in question.gold]
        least = sum(len(material.encode(f"Document 9999:\n{text}\n\n")) for text in gold)
        form.require(least, self.name)
        # RULER's order of choice: the question's own passages, those of its article, then others of the file
        others = np.setdiff1d(np.arange(len(passages.texts)), [*question.gold, *question.near])
        rng.shuffle(others)
        documents = material.kept(("documents", self.source), lambda: _Documents(material, passages.texts))
        chosen, used = list(question.gold), least
        pool = [*question.near, *others.tolist()]
        turn = 0
        while used < form.room:
            # past the whole file it is repeated, the question's own passages left out
            used += documents.size(len(chosen) + 1, pool[turn % len(pool)])
            chosen.append(pool[turn % len(pool)])
            turn += 1
        last = chosen.pop() if len(chosen) > len(gold) else None
        placed = [chosen[i] for i in rng.permutation(len(chosen))]
        parts = [documents.tokens(place + 1, passage) for place, passage in enumerate(placed)]
        stops = np.cumsum([len(part) for part in parts])
        spans = [(int(stop) - len(part), int(stop)) for passage, part, stop in zip(placed, parts, stops, strict=True)
                 if passage in question.support]  # fmt: skip
        if last is not None:  # cut where the room ends
            parts.append(documents.tokens(len(placed) + 1, last))
        tokens = np.concatenate(parts)
        context = filled(tokens, form.room, material.encode("\n"))
        return finish(self, form, context, place, question.answers, question.text, None, spans)


class _Documents:
    """Tokens of passages as numbered documents; each passage and each number is encoded once."""

    def __init__(self, material: Material, texts: list[str]) -> None:
        self._material, head = material, "Document 1:\n"
        self._cut = len(material.encode(head))
        self._bodies = [self._behind(ids) for ids in material.encode_all([head + text for text in texts])]
        ended = material.encode_all([f"{head}{text}\n\n" for text in texts])
        self._sizes = [len(ids) - self._cut for ids in ended]
        # of "Document 1:", and of every later number with the line breaks before it
        self._heads = [np.asarray(material.encode(head), dtype=np.int32)]
        self._breaks = len(material.encode(f"\n\n{head}")) - self._cut

    def _behind(self, ids: list[int]) -> Tokens:
        return np.asarray(ids[self._cut :], dtype=np.int32)

    def _head(self, number: int) -> Tokens:
        while len(self._heads) < number:
            known = len(self._heads)
            heads = [f"\n\nDocument {i}:\n" for i in range(known + 1, 2 * known + 65)]
            self._heads += [np.asarray(ids, dtype=np.int32) for ids in self._material.encode_all(heads)]
        return self._heads[number - 1]

    def size(self, number: int, passage: int) -> int:
        """Tokens of a document with the line breaks behind it."""
        return len(self._head(number)) - (self._breaks if number > 1 else 0) + self._sizes[passage]

    def tokens(self, number: int, passage: int) -> Tokens:
        """(n,) int32 of a document, from the second on with the line breaks before it."""
        return np.concatenate([self._head(number), self._bodies[passage]])
