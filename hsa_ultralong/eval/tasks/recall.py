"""How robust recall is: sentence forms, kinds of values, similar, changed and absent facts, facts as documents.

Forms, names and cities are frozen in recall_forms.py and never trained; keys are the evaluation words. See README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hsa_ultralong.data.evaluation_words import EVALUATION_ADJECTIVES, EVALUATION_NOUNS
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.eval.tasks.assembly import Form, finish, make_form, middle_depth, write_in
from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.recall_forms import CITIES, FAMILY_NAMES, FIRST_NAMES, MONTHS, RECALL_FORMS, RecallForm
from hsa_ultralong.eval.tasks.sample import Sample

_MAIN = RecallForm("The secret code of the {key} is {value}.", "What is the secret code of the {key}?", "digits7", ())
KINDS = ("names", "cities", "times", "dates", "digits14", "words2")
# of the shortest prompts: a token each for nano, in no template of training; frozen
_SHORT_WORDS = "block index level offset position power reference result signal sum total version"
SHORT_WORDS = tuple(_SHORT_WORDS.split())
_OF_KIND = {"names": "name", "cities": "city", "times": "time", "dates": "date"}


def _value(kind: str, rng: np.random.Generator) -> str:
    def pick(words: tuple[str, ...]) -> str:
        return words[int(rng.integers(len(words)))]

    if kind.startswith("digits"):
        digits = rng.integers(10, size=int(kind[6:]))
        return str(1 + digits[0] % 9) + "".join(map(str, digits[1:]))
    if kind == "name":
        return f"{pick(FIRST_NAMES)} {pick(FAMILY_NAMES)}"
    if kind == "city":
        return pick(CITIES)
    if kind == "time":
        return f"{rng.integers(24):02d}:{rng.integers(60):02d}"
    if kind == "date":
        return f"{rng.integers(1, 29)} {pick(MONTHS)} {rng.integers(1700, 2100)}"
    return f"{pick(EVALUATION_ADJECTIVES)} {pick(EVALUATION_NOUNS)}"


def _pair(first: tuple[str, ...], second: tuple[str, ...], number: int) -> str:
    return f"{first[number // len(second)]} {second[number % len(second)]}"


@dataclass(frozen=True)
class Fact:
    statement: str
    question: str
    value: str
    key: str


def _facts(form: RecallForm, kind: str, number: int, rng: np.random.Generator) -> list[Fact]:
    """Facts of one form whose keys and persons all differ, and whose values do."""
    keys = rng.permutation(len(EVALUATION_ADJECTIVES) * len(EVALUATION_NOUNS))[:number]
    people = rng.permutation(len(FIRST_NAMES) * len(FAMILY_NAMES))[:number]
    found: list[Fact] = []
    values: set[str] = set()
    for key, person in zip(keys.tolist(), people.tolist(), strict=True):
        value = _value(kind, rng)
        for _ in range(64):  # few cities: values repeat only where there are not enough
            if value not in values:
                break
            value = _value(kind, rng)
        values.add(value)
        slots = {
            "key": _pair(EVALUATION_ADJECTIVES, EVALUATION_NOUNS, key),
            "name": _pair(FIRST_NAMES, FAMILY_NAMES, person),
        }
        statement = form.statement.format(value=value, **slots)
        found.append(Fact(statement, form.question.format(**slots), value, " / ".join(slots.values())))
    return found


@dataclass(frozen=True)
class Recall:
    """One fact among others of its form, asked for by a question.

    similar: facts of the same form with other keys; a context of them serves as many samples, each of which asks for
    another fact. stated: how often the asked fact is stated, each time with another value, of which the last counts.
    absent: of every second sample the fact is not stated at all. as_documents: the facts are documents of their own
    behind the text.
    """

    name: str
    form: RecallForm
    kind: str
    similar: int = 0
    stated: int = 1
    absent: bool = False
    as_documents: bool = False
    metric: str = "exact"
    max_new_tokens: int = 24
    is_editable: bool = True

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        contexts = -(-number // (1 + self.similar))
        for index in range(number):
            # neighbours in depth ask different contexts, so that those of each are spread over it
            context, fact = index % contexts, index // contexts
            rng = namespaced_rng(f"eval/{self.name}", seed, length, context)
            depths = [middle_depth(i, number) for i in range(context, number, contexts)]
            yield self._sample(material, length, index, fact, depths, rng)

    def _sample(
        self, material: Material, length: int, index: int, place: int, depths: list[float], rng: np.random.Generator
    ) -> Sample:
        """place: which of the context's facts is asked for. depths: of those that samples ask for."""
        facts = _facts(self.form, self.kind, 1 + self.similar, rng)
        asked, depth = facts[place], depths[place]
        for _ in range(self.stated - 1):
            value = _value(self.kind, rng)
            facts.append(Fact(asked.statement.replace(asked.value, value), asked.question, value, asked.key))
        depths = [*depths, *rng.random(len(facts) - len(depths)).tolist()]
        if self.stated > 1:
            depths = sorted(rng.random(self.stated).tolist())
        is_absent = self.absent and index % 2 == 1
        if is_absent:
            facts = []
        forms = [self._form(material, length, fact.question, facts) for fact in {asked, *facts}]
        form = self._form(material, length, asked.question, facts)
        form.require(128, self.name)
        context, starts = material.haystack(length, form.room)
        spans = []
        if not self.as_documents:
            pieces = [material.encode(f" {fact.statement}") for fact in facts]
            # the same places whichever fact is asked for
            common = min(form.room for form in forms)
            usable = starts[: int(np.searchsorted(starts, common))]
            spans = write_in(context[:common], usable, pieces, depths[: len(facts)], self.name)
        if self.stated > 1:
            place = max(range(self.stated), key=lambda i: spans[i][0])
        answers = [] if is_absent else [facts[place].value]
        evidence = [] if is_absent or self.as_documents else [spans[place]]
        single = depth if self.stated == 1 and not (is_absent or self.as_documents) else None
        return finish(self, form, context, index, answers, asked.question, single, evidence)

    def _form(self, material: Material, length: int, question: str, facts: list[Fact]) -> Form:
        notes = [fact.statement for fact in facts] if self.as_documents else []
        return make_form(material, self, length, "", f"\nQuestion: {question}\nAnswer:", "", notes)


@dataclass(frozen=True)
class RecallPrompt:
    """A fact, filler and the beginning of the same sentence again, in one short prompt of plain text.

    What people type first: no memory, no question. The filler is text of the haystack. is_short: the fact is one word
    and two digits, "The level is 47.", so that 16 tokens hold it twice, and room for a digit too many.
    """

    name: str = "recall_prompt"
    metric: str = "begins"
    max_new_tokens: int = 10
    is_editable: bool = False
    is_short: bool = False

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        for index in range(number):
            rng = namespaced_rng(f"eval/{self.name}", seed, length, index)
            statement, value = self._fact(rng)
            stem = statement[: statement.index(f" {value}")]
            form = make_form(material, self, length, statement, f" {stem}", "")
            form.require(0, self.name)
            size = max(1 << 16, length)
            text, starts = material.haystack(size, size)
            usable = starts[starts + form.room <= len(text)]
            begin = int(usable[rng.integers(len(usable))])
            stated = (len(material.first) - len(form.head), 0)
            yield finish(self, form, text[begin : begin + form.room], index, [value], f"{stem} ...", None, [stated])

    def _fact(self, rng: np.random.Generator) -> tuple[str, str]:
        if not self.is_short:
            (fact,) = _facts(_MAIN, _MAIN.kind, 1, rng)
            return fact.statement, fact.value
        value = _value("digits2", rng)
        return f"The {SHORT_WORDS[int(rng.integers(len(SHORT_WORDS)))]} is {value}.", value


PROMPTS = (RecallPrompt(), RecallPrompt("recall_prompt_short", max_new_tokens=5, is_short=True))
RECALL: tuple[Recall, ...] = (
    *(Recall(f"recall_form_{n:02d}", form, form.kind) for n, form in enumerate(RECALL_FORMS, 1)),
    *(Recall(f"recall_value_{kind}", _MAIN, _OF_KIND.get(kind, kind)) for kind in KINDS),
    *(Recall(f"recall_similar_{n}", _MAIN, "digits7", similar=n) for n in (4, 16, 64, 256)),
    Recall("recall_changed", _MAIN, "digits7", stated=2),
    Recall("recall_absent", _MAIN, "digits7", absent=True),
    Recall("recall_documents", _MAIN, "digits7", similar=15, as_documents=True),
)
