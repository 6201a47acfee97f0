"""Rows of facts in any sentence form, and short prompts: what is asked, where it stands, which token repeats which.

A row holds facts of many forms or many of one form, facts of one subject, facts that change, and questions about what
was never said. They stand over a text one at a time or in paragraphs, at the borders of chunks, or are documents.
Called by ``mixture.py``; tested in ``tests/data/test_fact_rows.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hsa_ultralong.data.fact_forms import FAMILIES, FactForm, StatedFact, change, sample_fact, sample_form
from hsa_ultralong.data.fact_values import Draw, subject_of
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, haystack, round_up, too_short
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tasks import ordered_places
from hsa_ultralong.data.tokenizer import PieceTokenizer

# what a model says of what it was never told
UNKNOWN = " unknown"
# what the facts of a row have in common, and how often
_SCENES = {"mixed": 0.4, "similar": 0.35, "one_subject": 0.1, "changed": 0.15}
_PLACEMENTS = {"single": 0.45, "paragraph": 0.2, "border": 0.15, "documents": 0.2}
_ABSENT = 0.06
_MOST_SIMILAR = 256
# a statement of a row takes about so many tokens
_STATEMENT_TOKENS = 28
FACT_FAMILIES = (*FAMILIES, *_SCENES, "absent", *_PLACEMENTS)
# share of questions | how they are put
_PROMPTS = (
    (0.4, "Question: {q}\nAnswer:"), (0.07, "Q: {q}\nA:"), (0.08, "{q}"), (0.05, "User: {q}\nAssistant:"),
    (0.04, "Please answer from the text: {q}\nAnswer:"), (0.04, "{q}\nThe answer is"),
    (0.1, "Question: {q}\nAnswer: {stem}"), (0.22, "{stem}"), (0.12, "{q} {restated}"), (0.06, "{restated}"),
    # the blank before the answer is said already
    (0.06, "{q} Answer: "), (0.05, "Question: {q}\nAnswer: "),
)  # fmt: skip
# what a question and the beginning of its answer may say of where the fact stands
_TAILS = (
    " named above",
    " in this text",
    " from the document",
    " said earlier",
    " that was given",
    " of which we read",
)
_BOUNDS = np.cumsum([share for share, _ in _PROMPTS]).tolist()


class ToldFact(NamedTuple):
    """A statement as tokens, and where its value lies in them."""

    tokens: list[int]
    value: tuple[int, int]

    @staticmethod
    def of(fact: StatedFact, tokenizer: PieceTokenizer) -> ToldFact:
        left, value = tokenizer.encode(fact.left), tokenizer.encode(fact.value)
        return ToldFact([*left, *value, *tokenizer.encode(fact.right)], (len(left), len(left) + len(value)))


class AskedFact(NamedTuple):
    """A question with its answer as tokens, and the statement that answers it, -1 for none."""

    tokens: list[int]
    answer: tuple[int, int]
    statement: int


def ask(
    draw: Draw,
    fact: StatedFact,
    tokenizer: PieceTokenizer,
    statement: int,
    answer: str,
    is_inline: bool,
    prompt: str = "",
) -> AskedFact:
    """Put a question in one of many ways; `prompt` names one."""
    if not prompt:
        place = draw.random() * _BOUNDS[-1]
        prompt = next(text for bound, (_, text) in zip(_BOUNDS, _PROMPTS, strict=True) if place <= bound)
    if ("{stem}" in prompt and (not fact.stem or answer == UNKNOWN)) or ("{restated}" in prompt and not fact.restated):
        prompt = _PROMPTS[0][1]
    start = (" " if draw.chance(0.3) else "\n") if is_inline else "\n" if draw.chance(0.5) else ""
    # the sentence is begun again, then its own end follows the value
    end = fact.right if "{stem}" in prompt else "." if "{restated}" in prompt else ""
    question, restated = fact.question, fact.restated
    if "{restated}" in prompt and restated.endswith(" is") and draw.chance(0.4):
        tail = draw.pick(_TAILS)
        restated = f"{restated.removesuffix(' is')}{tail} is"
        question = f"{question[:-1]}{tail}{question[-1]}"
    slots = (("{q}", question), ("{stem}", fact.stem), ("{restated}", restated))
    text = prompt
    for slot, said in slots:
        text = text.replace(slot, said)
    head = tokenizer.encode(start + text)
    told = tokenizer.encode(answer.lstrip() if prompt.endswith(" ") else answer)
    return AskedFact([*head, *told, *tokenizer.encode(end)], (len(head), len(head) + len(told)), statement)


def copied(begin: int, end: int, count: int) -> np.ndarray:
    """Which of the tokens begin..end each of `count` that say the same repeats: cut otherwise at most at the start."""
    return np.clip(end - count + np.arange(count), begin, end - 1)


def pick(draw: Draw, shares: dict[str, float], wanted: str) -> str:
    """A key by its share, or the one that is wanted."""
    if wanted in shares:
        return wanted
    place = draw.random() * sum(shares.values())
    for name, share in shares.items():
        place -= share
        if place < 0:
            return name
    return name


def _facts(
    draw: Draw, scene: str, count: int, words: Sequence[str], p_hard: float, split: int, family: str
) -> list[tuple[StatedFact, FactForm]]:
    """Facts with different subjects, or of one subject with different attributes."""
    family = family if family in FAMILIES else ""
    found: dict[tuple[str, str], tuple[StatedFact, FactForm]] = {}
    form = sample_form(draw, split, "attributes" if scene == "one_subject" else family)
    first = sample_fact(draw, form, words)
    found[first.subject, form.core] = first, form
    for _ in range(4 * count):
        if len(found) == count:
            break
        subject = first.subject if scene == "one_subject" else ""
        if scene == "one_subject":
            form = sample_form(draw, split, "attributes")
        elif scene != "similar":
            form = sample_form(draw, split, family)
        fact = sample_fact(draw, form, words, subject)
        if scene == "similar" and draw.chance(p_hard):
            # a subject that shares a word with an earlier one
            mixed = crossed(draw, fact.subject, list(found)[draw.below(len(found))][0])
            fact = sample_fact(draw, form, words, mixed)
        key = (fact.subject, form.questions[0] if scene == "one_subject" else "")
        found.setdefault(key, (fact, form))
    return list(found.values())


def crossed(draw: Draw, one: str, other: str) -> str:
    """A subject with half of its words from either, where both have as many."""
    first, second = one.split(" "), other.split(" ")
    if len(first) != len(second) or len(first) < 2:
        return one
    return " ".join([*first[:-1], second[-1]] if draw.chance(0.5) else [*second[:-1], first[-1]])


def facts_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
    *,
    split: int = 0,
    family: str = "",
) -> Row:
    """Facts of one of the scenes, placed in one of the ways, then questions about some of them.

    Args:
        split: 0 training, 1 validation, whose verbs, attributes, word orders and frames training never has.
        family: one of FACT_FAMILIES, for probes: facts of this family, or rows of this scene or placement alone.

    Raises:
        ValueError: not one fact and its question fit.
    """
    draw = Draw(rng)
    scene, placement = pick(draw, _SCENES, family), pick(draw, _PLACEMENTS, family)
    is_inline = placement != "documents" and draw.chance(options.inline_fraction)
    most = max(1, layout.seq_len // (2 * _STATEMENT_TOKENS))
    most = min(most, _MOST_SIMILAR) if scene == "similar" else min(most, options.max_needles)
    # of every order of magnitude, larger ones more often: every fact is one more question
    count = min(most, int(math.exp(draw.random() ** 0.6 * math.log(most + 1))))
    pairs = _facts(draw, scene, count, words, options.p_hard, split, family)
    statements, current = [fact for fact, _ in pairs], list(range(len(pairs)))
    if scene == "changed":
        for number, (fact, form) in enumerate(pairs):
            if number == 0 or draw.chance(0.4):
                current[number] = len(statements)
                statements.append(change(fact, form, draw, words))
    told = [ToldFact.of(fact, tokenizer) for fact in statements]
    # what is asked of each, or of what was not said
    unsaid = [
        _unsaid(draw, number, pairs, words, options.p_hard, split)
        if family == "absent" or draw.chance(_ABSENT)
        else None
        for number in range(min(len(pairs), options.max_questions))
    ]
    questions = [
        ask(draw, other, tokenizer, -1, UNKNOWN, is_inline)
        if other is not None
        else ask(draw, statements[last], tokenizer, last, statements[last].answer, is_inline)
        for other, last in zip(unsaid, current, strict=False)
    ]
    order = [one.statement for one in questions if one.statement >= 0]
    order += [number for number in range(len(told)) if number not in set(order)]
    room = layout.seq_len - sum(_cost(layout, one.tokens, is_inline) for one in questions)
    while questions and room < layout.seq_len // 2:
        room += _cost(layout, questions.pop().tokens, is_inline)
    kept = _fitting(layout, told, order, room, placement)
    asked = [one for one in questions if one.statement in kept or one.statement < 0]
    if not asked or not kept:
        raise ValueError(too_short(layout, "fact and its question do not fit"))
    shuffled = [kept[i] for i in rng.permutation(len(kept)).tolist()]
    for first, last in enumerate(current):
        # what has changed is said later
        if first != last and first in kept and last in kept:
            here, there = sorted((shuffled.index(first), shuffled.index(last)))
            shuffled[here], shuffled[there] = first, last
    rest = layout.seq_len - sum(_cost(layout, one.tokens, is_inline) for one in asked) - is_inline
    writer = RowWriter(layout)
    if placement == "documents":
        starts = _write_documents(rng, draw, layout, sampler, writer, told, shuffled, rest)
        tail: list[int] = []
    else:
        starts, tail = _write_texts(rng, draw, layout, sampler, writer, told, shuffled, rest, placement, is_inline)
    _write_questions(rng, writer, asked, told, starts, tail, is_inline)
    return writer.row("facts")


def _unsaid(
    draw: Draw,
    number: int,
    pairs: Sequence[tuple[StatedFact, FactForm]],
    words: Sequence[str],
    p_hard: float,
    split: int,
) -> StatedFact:
    """A fact like number `number` that none of `pairs` says: of another subject, which may share a word with the one
    that was named, or another attribute of that one."""
    fact, form = pairs[number]
    said = {(one.subject, form.questions) for one, form in pairs}
    if draw.chance(p_hard):
        near = form, crossed(draw, subject_of(form.subject, draw, words), fact.subject)
        if "\t" not in fact.subject and draw.chance(0.4):
            near = sample_form(draw, split, "attributes"), fact.subject
        if (near[1], near[0].questions) not in said:
            return sample_fact(draw, near[0], words, near[1])
    return sample_fact(draw, form, words)


def _cost(layout: RowLayout, tokens: Sequence[int], is_inline: bool) -> int:
    return len(tokens) if is_inline else round_up(len(tokens) + 2, layout.chunk_size)


def _fitting(layout: RowLayout, told: Sequence[ToldFact], order: Sequence[int], room: int, placement: str) -> list[int]:
    """Statements, the first ones of `order`, that fit into about half of the room."""
    extra = layout.chunk_size if placement == "border" else 0
    budget = room // 2
    kept: list[int] = []
    for number in order:
        budget -= _cost(layout, told[number].tokens, placement != "documents") + extra
        if budget < 0:
            break
        kept.append(number)
    return kept


def _write_documents(
    rng: np.random.Generator,
    draw: Draw,
    layout: RowLayout,
    sampler: DocumentSampler,
    writer: RowWriter,
    told: Sequence[ToldFact],
    order: Sequence[int],
    room: int,
) -> dict[int, int]:
    """Every fact, or two of them, as a document of its own among texts; returns where each begins in the row."""
    groups: list[list[int]] = []
    for number in order:
        if groups and len(groups[-1]) < 2 and draw.chance(0.25):
            groups[-1].append(number)
        else:
            groups.append([number])
    documents = [[token for number in group for token in told[number].tokens] for group in groups]
    room -= sum(_cost(layout, document, False) for document in documents)
    texts = haystack(rng, layout, sampler, room, 8) if room >= layout.chunk_size else []
    # texts anywhere, facts in their order
    places = sorted(range(len(documents) + len(texts)), key=lambda _: draw.random())
    is_text = set(places[: len(texts)])
    left, facts = list(texts), list(zip(groups, documents, strict=True))
    starts: dict[int, int] = {}
    for place in range(len(places)):
        if place in is_text:
            writer.add(left.pop())
            continue
        group, document = facts.pop(0)
        start = writer.add(document, is_whole=True)
        for number in group:
            starts[number] = start
            start += len(told[number].tokens)
    return starts


def _write_texts(
    rng: np.random.Generator,
    draw: Draw,
    layout: RowLayout,
    sampler: DocumentSampler,
    writer: RowWriter,
    told: Sequence[ToldFact],
    order: Sequence[int],
    room: int,
    placement: str,
    is_inline: bool,
) -> tuple[dict[int, int], list[int]]:
    """Facts over texts; returns where each begins in the row, and the last text where questions continue it."""
    groups: list[list[int]] = []
    for number in order:
        if placement == "paragraph" and groups and len(groups[-1]) < 5 and draw.chance(0.7):
            groups[-1].append(number)
        else:
            groups.append([number])
    extra = layout.chunk_size if placement == "border" else 0
    sizes = [extra + sum(len(told[number].tokens) for number in group) for group in groups]
    texts = haystack(rng, layout, sampler, room, 4)
    if sum(sizes) + len(texts) * max(sizes) > sum(map(len, texts)):
        texts = haystack(rng, layout, sampler, room, 1)
    # every text but the last takes whole chunks
    firsts = [writer.end + 1 + sum(len(text) + 1 for text in texts[:i]) for i in range(len(texts))]
    starts: dict[int, int] = {}
    for group, (document, place) in zip(groups, ordered_places(rng, list(map(len, texts)), sizes), strict=True):
        if extra:
            one = told[group[0]]
            # a token of the value, or what precedes it, is the last one of a chunk
            border = firsts[document] + place + one.value[0] + draw.below(one.value[1] - one.value[0])
            place += -border % layout.chunk_size
        for number in group:
            tokens = told[number].tokens
            texts[document][place : place + len(tokens)] = tokens
            starts[number] = firsts[document] + place
            place += len(tokens)
    for text in texts[: len(texts) - is_inline]:
        writer.add(text)
    return starts, texts[-1].tolist() if is_inline else []


def _write_questions(
    rng: np.random.Generator,
    writer: RowWriter,
    asked: Sequence[AskedFact],
    told: Sequence[ToldFact],
    starts: dict[int, int],
    tail: list[int],
    is_inline: bool,
) -> None:
    """As documents of their own, or behind the last text."""
    tokens = list(tail)
    answers: list[tuple[int, int]] = []
    for i in rng.permutation(len(asked)).tolist():
        one = asked[i]
        first, stop = len(tokens) + one.answer[0], len(tokens) + one.answer[1]
        tokens += one.tokens
        answers.append((first, stop))
        if one.statement >= 0:
            begin, end = (starts[one.statement] + place for place in told[one.statement].value)
            # the tokens of the next document begin behind its bos
            writer.cite_copy(writer.end + 1 + first, copied(begin, end, stop - first))
        if not is_inline:
            writer.add(tokens, answers, is_whole=True)
            tokens, answers = [], []
    if is_inline:
        writer.add(tokens, answers, is_whole=True)


def prompts_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
    *,
    split: int = 0,
    family: str = "",
) -> Row:
    """Short prompts, each a document that reads nothing but itself: one to three facts, filler, and one asked again.

    From a dozen tokens on to four chunks, as people first try a model.
    """
    draw, writer = Draw(rng), RowWriter(layout)
    family = family if family in FAMILIES else ""
    while writer.room > layout.chunk_size // 2:
        # short ones as often as long ones
        most = min(writer.room - 2, int(16 * (layout.chunk_size / 4) ** draw.random()))
        form = sample_form(draw, split, family)
        facts = [sample_fact(draw, form, words) for _ in range(1 + draw.below(3))]
        told = [ToldFact.of(fact, tokenizer) for fact in facts]
        chosen = draw.below(len(facts))
        question = ask(
            draw, facts[chosen], tokenizer, chosen, facts[chosen].answer, True, "{stem}" if draw.chance(0.6) else ""
        )
        if len(told[chosen].tokens) + len(question.tokens) > writer.room - 2:
            break
        tokens: list[int] = []
        start = 0
        for number, one in enumerate(told):
            if number == chosen:
                start = len(tokens)
            elif len(tokens) + len(one.tokens) + len(told[chosen].tokens) + len(question.tokens) > most:
                continue
            tokens += one.tokens
        room = min(most, writer.room - 2) - len(tokens) - len(question.tokens)
        filler = sampler.fill(rng, draw.below(room)).tolist() if room > 1 else []
        before = filler[: draw.below(len(filler) + 1)] if draw.chance(0.5) else []
        tokens = [*before, *tokens, *filler[len(before) :]]
        first, stop = len(tokens) + question.answer[0], len(tokens) + question.answer[1]
        begin, end = (1 + writer.end + len(before) + start + place for place in told[chosen].value)
        writer.cite_copy(writer.end + 1 + first, copied(begin, end, stop - first))
        writer.add([*tokens, *question.tokens], [(first, stop)], is_whole=True)
    return writer.row("prompts", isolated=True)
