"""Facts of bAbI stories between the sentences of a book, in the form of BABILong (booydar/babilong at 7a6efee).

Facts keep their order, at places drawn evenly with return; the score is the label-exact one. The wording is ours, the
parts and their order are BABILong's: instruction, solved examples, form of the answer, context, question. README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import Form, finish, make_form
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.sample import Sample, Tokens, TooShort

FILES = {
    "qa1": "qa1_single-supporting-fact_test.txt",
    "qa2": "qa2_two-supporting-facts_test.txt",
    "qa3": "qa3_three-supporting-facts_test.txt",
    "qa4": "qa4_two-arg-relations_test.txt",
    "qa5": "qa5_three-arg-relations_test.txt",
}
_ASKED = "Somewhere in the text below, among much that has nothing to do with them, stand facts about {what}. {rule}"
_CARRIED = _ASKED.format(
    what="what people do and where", rule="What somebody carries moves along; what is put down stays."
)
_PROMPTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "qa1": (
        _ASKED.format(what="where people are", rule="If somebody was in several places, the latest one counts."),
        ("Paul went to the shop. Anna travelled to the balcony. Paul moved to the beach. Where is Paul?\n"
         "Answer: The most recent location of Paul is beach.",
         "Rose moved to the garage. Rose went back to the balcony. Where is Rose?\n"
         "Answer: The most recent location of Rose is balcony."),
        "Answer in this form and add nothing: The most recent location of PERSON is LOCATION.",
    ),
    "qa2": (
        _CARRIED,
        ("Paul went to the shop. Paul took the bottle. Paul moved to the beach. Where is the bottle?\n"
         "Answer: The bottle is in the beach.",
         "Rose took the lamp. Rose went to the garage. Rose dropped the lamp. Rose moved to the shop. "
         "Where is the lamp?\nAnswer: The lamp is in the garage."),
        "Answer in this form and add nothing: The ITEM is in LOCATION.",
    ),
    "qa3": (
        _CARRIED,
        ("Paul took the bottle. Paul went to the shop. Paul moved to the beach. "
         "Where was the bottle before the beach?\nAnswer: Before the beach the bottle was in the shop.",
         "Rose went to the garage. Rose took the lamp. Rose went to the balcony. "
         "Where was the lamp before the balcony?\nAnswer: Before the balcony the lamp was in the garage."),
        "Answer in this form and add nothing: Before LOCATION the ITEM was in LOCATION.",
    ),
    "qa4": (
        _ASKED.format(what="how rooms lie to each other", rule="Use these facts alone."),
        ("The shop is north of the beach. The garage is south of the beach. What is north of the beach?\nAnswer: shop",
         "The balcony is west of the shop. The shop is west of the garage. What is the shop west of?\nAnswer: garage"),
        "Answer by one word, a location, and add nothing.",
    ),
    "qa5": (
        _ASKED.format(what="who gives what to whom", rule="Use these facts alone."),
        ("Rose took the lamp there. Rose gave the lamp to Paul. Who did Rose give the lamp to?\nAnswer: Paul",
         "Paul got the bottle there. Paul handed the bottle to Rose. What did Paul give to Rose?\nAnswer: bottle"),
        "Answer by one word and add nothing.",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Story:
    """Facts in order, a question after them, its answer, and which facts (from 0) it rests on."""

    facts: tuple[str, ...]
    question: str
    answer: str
    support: tuple[int, ...]


@lru_cache(maxsize=8)
def read_stories(path: Path) -> list[Story]:
    """A file of bAbI: a question with all facts of its story so far.

    Raises:
        ValueError: for a file of another form.
    """
    found: list[Story] = []
    facts: dict[int, str] = {}
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if not line.strip():
                continue
            number, _, text = line.partition(" ")
            if int(number) == 1:
                facts = {}
            if "\t" not in text:
                facts[int(number)] = text.strip()
                continue
            question, answer, support = text.split("\t")
            order = list(facts)
            rests = tuple(order.index(int(each)) for each in support.split())
            found.append(Story(tuple(facts.values()), question.strip(), answer.strip(), rests))
    except (ValueError, UnicodeDecodeError):
        raise ValueError(f"{path} is no file of bAbI: numbered facts, questions with tabs") from None
    if not found:
        raise ValueError(f"{path} holds no question")
    return found


@dataclass(frozen=True)
class Babilong:
    """One task of bAbI, "qa1" to "qa5"; its test files lie in the folder `Material.files["babi"]`."""

    name: str
    kind: str
    metric: str = "places"
    max_new_tokens: int = 25
    is_editable: bool = True

    def stories(self, material: Material, number: int) -> list[Story]:
        """All stories of the test file.

        Raises:
            ValueError: if the folder is not given, lacks the file, or has fewer questions than `number`.
        """
        if "babi" not in material.files:
            raise ValueError(f"{self.name} needs the test stories of bAbI: give --data babi=FOLDER")
        path = material.files["babi"] / FILES[self.kind]
        if not path.is_file():
            raise ValueError(f"{self.name} reads {path.name}, which {path.parent} does not hold")
        found = read_stories(path)
        if number > len(found):
            raise ValueError(f"{self.name}: {number} samples of {len(found)} questions")
        return found

    def require(self, material: Material, number: int) -> None:
        """Refuse what is missing before any work."""
        self.stories(material, number)

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        stories = self.stories(material, number)
        # as in BABILong, no story with so many facts that little else is left; of facts alone all stories
        usable = [story for story in stories if length == 0 or len(story.facts) <= length / 8]
        order = namespaced_rng(f"eval/{self.name}", seed).permutation(len(usable))
        if number > len(usable):
            raise TooShort(f"{self.name} needs at least {8 * max(len(s.facts) for s in stories)} tokens, got {length}")
        for index in range(number):
            rng = namespaced_rng(f"eval/{self.name}", seed, length, index)
            yield self._sample(material, usable[order[index]], length, index, rng)

    def _sample(
        self, material: Material, story: Story, length: int, index: int, rng: np.random.Generator
    ) -> Sample:  # fmt: skip
        instruction, examples, answers = _PROMPTS[self.kind]
        solved = "\n".join(f"<example>\n{example}\n</example>" for example in examples)
        before = f"{instruction}\n{solved}\n{answers}\n<context>\n"
        form = make_form(material, self, length, before, f"\n</context>\nQuestion: {story.question}\n", "Answer:")
        pieces = [material.encode(f" {fact}") for fact in story.facts]
        if length == 0:
            return self._alone(form, pieces, story, index)
        form.require(2 * sum(map(len, pieces)), self.name)
        context, starts = material.haystack(length, form.room)
        spans = _in_order(context, starts, pieces, rng)
        evidence = [spans[fact] for fact in story.support]
        return finish(self, form, context, index, [story.answer], story.question, None, evidence)

    def _alone(self, form: Form, pieces: list[list[int]], story: Story, index: int) -> Sample:
        """BABILong's 0k: the facts and nothing between them."""
        stops = np.cumsum([len(piece) for piece in pieces]).tolist()
        context = np.array([token for piece in pieces for token in piece], dtype=np.int32)
        evidence = [(stops[fact] - len(pieces[fact]), stops[fact]) for fact in story.support]
        whole = replace(form, size=form.size - form.room + len(context))
        sample = finish(self, whole, context, index, [story.answer], story.question, None, evidence)
        return replace(sample, length=0)


def _in_order(
    context: Tokens, starts: np.ndarray, pieces: list[list[int]], rng: np.random.Generator
) -> list[tuple[int, int]]:
    """Write pieces over the context in their order, each at a start drawn with return, or straight behind the one
    before where they would overlap."""
    places = np.sort(rng.choice(starts if len(starts) else np.arange(len(context)), size=len(pieces)))
    spans: list[tuple[int, int]] = []
    # the last token at which each can begin, so that all after it find room
    latest = len(context) - np.cumsum([len(piece) for piece in pieces[::-1]])[::-1]
    end = 0
    for piece, place, last in zip(pieces, places.tolist(), latest.tolist(), strict=True):
        start = min(max(place, end), last)
        end = start + len(piece)
        context[start:end] = piece
        spans.append((start, end))
    return spans


BABILONG = tuple(Babilong(f"babilong_{kind}", kind, "givers" if kind == "qa5" else "places") for kind in FILES)
