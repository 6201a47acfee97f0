"""A grammar of facts in plain sentences: relations x word orders x frames, clauses of an open vocabulary, questions.

A form is a statement about a subject {x} that holds a value {v}, the questions that ask for it, and where the sentence
ends in the value the stem that it continues. Called by ``fact_rows.py``; tested in ``tests/data/test_fact_rows.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hsa_ultralong.data.fact_clauses import sample_clause
from hsa_ultralong.data.fact_templates import (
    ATTRIBUTE_FRAMES,
    ATTRIBUTE_QUESTIONS,
    ATTRIBUTES,
    CHANGED_FRAMES,
    DEED_ORDERS,
    DEED_QUESTIONS,
    DEEDS,
    FRAMES,
    QUESTION_WORDS,
    RELATION_ORDERS,
    RELATIONS,
    RELATIVES,
    SCENES,
    WHAT,
)
from hsa_ultralong.data.fact_values import Draw, subject_of, value_of

# and how often each is drawn where none is named
_SHARES = {"attributes": 0.2, "deeds": 0.1, "relations": 0.13, "scenes": 0.12, "clauses": 0.45}
FAMILIES = tuple(_SHARES)


class FactForm(NamedTuple):
    """A statement with {x} and {v}, questions with {x}, the kinds of both, and the family it is of.

    core: the sentence without its frame. restated: another beginning of it that the value ends, "" if none.
    """

    family: str
    statement: str
    questions: tuple[str, ...]
    subject: str
    value: str
    core: str = ""
    restated: str = ""


class StatedFact(NamedTuple):
    """A fact as text: what stands before the value (with a blank in front), the value as it stands there, the rest;
    how it is asked, and what is answered. stem: the beginning of the sentence that the value continues, "" if none;
    restated: one in other words."""

    left: str
    value: str
    right: str
    question: str
    answer: str
    stem: str
    subject: str
    restated: str = ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def sample_form(draw: Draw, split: int = 0, family: str = "") -> FactForm:
    """One of the forms of a split (0 training, 1 validation); validation's verbs and frames are never training's."""
    form = _MAKERS[family or _family(draw)](draw, split)
    frame = draw.pick(FRAMES[split])
    sentence = form.statement.rstrip("\n")
    if sentence[0] in "*[<" or sentence != form.statement:
        return form._replace(statement=f"{sentence}\n", core=sentence)
    # {X} is the subject with a capital; a value is stated as it is answered
    start = "{X}" + sentence[3:] if sentence.startswith("{x}") else sentence
    start = start if start.startswith("{") else _capital(start)
    return form._replace(statement=frame.replace("{S}", start).replace("{s}", sentence), core=sentence)


def _family(draw: Draw) -> str:
    place = draw.random()
    for name, share in _SHARES.items():
        place -= share
        if place < 0:
            return name
    return name


def _clause_form(draw: Draw, split: int) -> FactForm:
    statement, questions, kind, subject = sample_clause(draw, split)
    if subject == "person":
        statement = statement.replace("{p}", "{x}")
        questions = tuple(question.replace("{p}", "{x}") for question in questions)
    first = questions[0]
    restated = f"{first[8:-1]} is" if first.startswith("What is the ") and first.endswith("{x}?") else ""
    return FactForm("clauses", statement, questions, subject, kind, restated=restated)


def _attribute_form(draw: Draw, split: int) -> FactForm:
    kind, *nouns = draw.pick(ATTRIBUTES[split]).split("|")
    noun = draw.pick(nouns)
    statement = draw.pick(ATTRIBUTE_FRAMES[split]).replace("{a}", noun)
    questions = tuple(question.replace("{a}", noun) for question in ATTRIBUTE_QUESTIONS[split])
    return FactForm("attributes", statement, questions, "any", kind, restated=f"the {noun} of {{x}} is")


def _deed_form(draw: Draw, split: int) -> FactForm:
    verb, before, tail, kind = draw.pick(DEEDS[split]).split("|")
    base, past, participle = verb.split()
    # the value after "number" is read as one
    slots = {"base": base, "past": past, "part": participle, "tail": tail, "x": "{x}", "v": f"{before} {{v}}".strip()}
    statement = _tidy(draw.pick(DEED_ORDERS[split]).format(**slots))
    questions = []
    for question in DEED_QUESTIONS[split]:
        wh = WHAT[kind]
        wh = wh if question.startswith("{wh}") else wh.lower()
        questions.append(_tidy(question.format(**slots, wh=wh)))
    return FactForm("deeds", statement, tuple(questions), "person", kind)


def _relation_form(draw: Draw, split: int) -> FactForm:
    subject, said, asked, kind = draw.pick(RELATIONS[split]).split("|")
    auxiliary, _, rest = asked.partition(" ")
    last = said.rsplit(" ", 1)
    has_preposition = len(last) == 2
    bare, preposition = last if has_preposition else (said, "")
    order = draw.pick(RELATION_ORDERS[split])
    if ("{prep}" in order and not has_preposition) or (kind == "percent" and "{wh}" in order):
        order = "{x} {said} {v}"
    is_adverb = kind in RELATIVES
    wh = RELATIVES.get(kind, "what" if kind != "name" else "who")
    slots = {"said": said, "bare": bare, "prep": preposition, "x": "{x}", "v": "{v}", "wh": wh}
    statement = order.format(**slots, said_wh=bare if is_adverb else said)
    core = f"{auxiliary} {{x}} {rest}"
    words = QUESTION_WORDS.get(kind, ("What {q} {prep}", "{Prep} what number {q}"))
    questions = tuple(
        _tidy(form.format(q=core, prep=preposition, Prep=_capital(preposition))) + "?"
        for form in words
        if has_preposition or "{Prep}" not in form
    )
    return FactForm("relations", statement, questions, subject, kind)


def _tidy(text: str) -> str:
    return " ".join(text.split()).replace(" ?", "?").replace(" ,", ",").replace(" .", ".")


def _scene_form(draw: Draw, split: int) -> FactForm:
    statement, question, kind = draw.pick(SCENES[split]).split("|")
    if "{x}" not in statement:
        statement, question = (text.replace("{p}", "{x}") for text in (statement, question))
        return FactForm("scenes", statement, (question,), "person", kind)
    return FactForm("scenes", statement, (question,), "both" if "{p}" in statement else "thing", kind)


_MAKERS = {"attributes": _attribute_form, "deeds": _deed_form, "relations": _relation_form}
_MAKERS |= {"scenes": _scene_form, "clauses": _clause_form}


def sample_fact(draw: Draw, form: FactForm, words: Sequence[str], subject: str = "") -> StatedFact:
    """A fact of this form about a new subject, or the one given."""
    subject = subject or subject_of(form.subject, draw, words)
    return state(form, subject, value_of(form.value, draw, words), draw.pick(form.questions))


def state(form: FactForm, subject: str, value: str, question: str) -> StatedFact:
    """Fill a form; a subject of two is "thing<tab>person"."""
    thing, _, person = subject.partition("\t")
    slots = (("{x}", thing), ("{X}", _capital(thing)), ("{p}", person), ("{{", "{"), ("}}", "}"))

    def fill(text: str) -> str:
        for slot, word in slots:
            text = text.replace(slot, word)
        return text

    left, _, right = form.statement.partition("{v}")
    # before the words are filled in, which may hold braces of their own
    left, right, asked = fill(left), fill(right), _capital(fill(question))
    blank = " " if not left or left.endswith(" ") else ""
    stem = left.rstrip() if left.endswith(" ") and right in (".", "!") else ""
    restated = _capital(fill(form.restated))
    return StatedFact(f" {left}".rstrip(" "), blank + value, right, asked, f" {value}", stem, subject, restated)


def change(fact: StatedFact, form: FactForm, draw: Draw, words: Sequence[str]) -> StatedFact:
    """The same fact with another value, said so that it is known to be the later one."""
    bare = f"the answer to the question {fact.question} is now {{v}}"
    if not form.statement.startswith(("*", "[", "<")) and draw.chance(0.7) and "{v}" in form.core:
        bare = form.core
    changed = form._replace(statement=draw.pick(CHANGED_FRAMES).replace("{s}", bare))
    value = value_of(form.value, draw, words)
    return state(changed, fact.subject, value, fact.question)
