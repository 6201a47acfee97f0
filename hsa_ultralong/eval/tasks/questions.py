"""Real questions over passages that are documents of one memory: XQuAD, SQuADShifts, NQ, HotpotQA, 2WikiMultihopQA.

Many questions share a memory: all passages with answers, further passages as distractors, and text of the haystack up
to the length. Of SQuADShifts and NQ only passages are asked about that `data/assets/evaluation_passages.txt` names; the
others may be trained on. The other three are never trained on. README.md of this folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from hsa_ultralong.data.passages import (
    Passages,
    Question,
    evaluation_passages,
    passage_id,
    read_multihop,
    read_nq,
    read_squad,
    read_wiki,
)
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import Form, finish, make_form
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.sample import Sample, TooShort

_READERS = {
    "xquad": read_squad, "squadshifts": read_squad, "nq": read_nq, "hotpot": read_multihop, "2wiki": read_multihop
}  # fmt: skip
# tokens of a context that stay text, whatever stands in documents
_LEAST_TEXT = 64


@lru_cache(maxsize=8)
def _read(source: str, path: Path) -> Passages:
    return _READERS[source](path)


def _encoded(material: Material, source: str, texts: Callable[[], Sequence[str]]) -> list[tuple[int, ...]]:
    """Passages of a source as documents, read and encoded once for all lengths and tasks."""

    def encode() -> list[tuple[int, ...]]:
        return [(*material.first, *tokens) for tokens in material.encode_all(texts())]

    return material.kept(("passages", source), encode)


@dataclass(frozen=True)
class PassageQuestions:
    """A question over passages; source: the name of its file in `Material.files`; is_split: part may be trained."""

    name: str
    source: str
    is_split: bool = False
    metric: str = "f1"
    also: tuple[str, ...] = ("em", "contains")
    max_new_tokens: int = 24
    is_editable: bool = True

    def questions(self, material: Material, number: int) -> tuple[Passages, list[Question]]:
        """The file, and its questions that may be asked.

        Raises:
            ValueError: if the file is not given, is of another form, or has fewer such questions than `number`.
        """
        if self.source not in material.files:
            raise ValueError(f"{self.name} needs a file of questions: give --data {self.source}=FILE")
        passages = _read(self.source, material.files[self.source])
        asked = passages.questions
        if self.is_split:
            kept = evaluation_passages()
            asked = [q for q in asked if all(passage_id(passages.texts[i]) in kept for i in q.gold)]
        if number > len(asked):
            raise ValueError(f"{self.name}: {number} samples of {len(asked)} questions")
        return passages, asked

    def require(self, material: Material, number: int) -> None:
        """Refuse what is missing before any work."""
        self.questions(material, number)

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        passages, asked = self.questions(material, number)
        order = namespaced_rng(f"eval/{self.name}", seed).permutation(len(asked))[:number]
        chosen = [asked[i] for i in order]
        encoded = [*_encoded(material, self.source, lambda: passages.texts), *self._distractors(material)]
        longest = max(len(self._form(material, length, question).question) for question in chosen)
        room = length - max(self.max_new_tokens, material.answer_tokens) - _LEAST_TEXT - longest
        index = 0
        while index < number:
            rng = namespaced_rng(f"eval/{self.name}", seed, length, index)
            here, held, used = [], dict[int, None](), 0
            for question in chosen[index:]:
                new = [passage for passage in question.gold if passage not in held]
                size = sum(len(encoded[passage]) for passage in new)
                if used + size > room:
                    break
                here.append(question)
                held |= dict.fromkeys(new)
                used += size
            if not here:
                least = sum(len(encoded[passage]) for passage in chosen[index].gold) + length - room
                raise TooShort(f"{self.name} needs at least {least} tokens, got {length}")
            for passage in rng.permutation(len(encoded)).tolist():
                if passage not in held and used + len(encoded[passage]) <= room:
                    held[passage] = None
                    used += len(encoded[passage])
            placed = rng.permutation(list(held)).tolist()
            notes = tuple(encoded[passage] for passage in placed)
            for question in here:
                yield self._sample(material, length, index, question, placed, notes)
                index += 1

    def _distractors(self, material: Material) -> list[tuple[int, ...]]:
        if "wiki" not in material.files:
            return []
        return _encoded(material, "wiki", lambda: read_wiki(material.files["wiki"]))

    def _form(self, material: Material, length: int, question: Question) -> Form:
        return make_form(material, self, length, "", f"\nQuestion: {question.text}\nAnswer:", "")

    def _sample(
        self, material: Material, length: int, index: int, question: Question, placed: list[int],
        notes: tuple[tuple[int, ...], ...],
    ) -> Sample:  # fmt: skip
        form = replace(self._form(material, length, question), notes=notes)
        context, _ = material.haystack(length, form.room)
        sample = finish(self, form, context, index, question.answers, question.text)
        gold = tuple(number for number, passage in enumerate(placed) if passage in question.support)
        return replace(sample, also=self.also, gold_notes=gold)


QUESTIONS = (
    PassageQuestions("qa_xquad", "xquad"),
    PassageQuestions("qa_squadshifts", "squadshifts", is_split=True),
    PassageQuestions("qa_nq", "nq", is_split=True),
    PassageQuestions("qa_hotpot", "hotpot"),
    PassageQuestions("qa_2wiki", "2wiki"),
)
