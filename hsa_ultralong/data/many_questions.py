"""Rows of passage_questions that ask many questions: several about each passage, in random order, the passages first.

Called by mixture.py where `questions_per_passage` is above 0; tests/data/test_many_questions.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hsa_ultralong.data.changed_answers import change_answers
from hsa_ultralong.data.chat_form import Asker, ChatForm
from hsa_ultralong.data.cloze import cloze
from hsa_ultralong.data.questions import PLAIN_FRACTION, QuestionBank, told
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, round_up
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer

# as evaluation asks: each question is a document of its own, in this share of rows
_ALONE = 0.3
# most questions of a document in the others
_TOGETHER = 8
_MAX_MISSES = 8
# tokens that questions about a passage may have in any row
_LEAST_ASKING = 128
# least and most tokens of a passage cut out of text
_TEXT_TOKENS = 96, 240


# a question, its answer, and this in a sentence or ""
_Pair = tuple[str, str, str]


@dataclass
class _Held:
    """A passage of the row: tokens (n,), and where each stands in the text; its questions as (question, what is
    answered, the short answer in it)."""

    text: str
    tokens: np.ndarray
    offsets: np.ndarray
    pairs: list[_Pair]


@dataclass
class _Document:
    """Some questions in turn: tokens, spans of the answers, and for each its passage and the tokens of it that tell
    the answer."""

    tokens: list[int] = field(default_factory=list)
    answers: list[tuple[int, int]] = field(default_factory=list)
    told: list[tuple[int, int, int]] = field(default_factory=list)


def many_questions_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    bank: QuestionBank,
    options: NeedleOptions,
    form: ChatForm,
) -> Row:
    """Text to fill the row, passages as documents, then questions about them, no two in turn about one passage.

    Up to `questions_per_passage` different questions of each passage, as far as `question_share` of the row goes; then
    passages of the same articles, and others, that are not asked about.

    Raises:
        ValueError: a row too short for a passage and its question.
    """
    size = layout.chunk_size
    asker = Asker(rng, tokenizer, form, PLAIN_FRACTION, options.p_sentence, options.says_short)
    together = 1 if rng.random() < _ALONE else _TOGETHER
    held = _passages(rng, layout, sampler, asker, bank, options, together)
    documents = _documents(_order(rng, held), held, asker, together)
    spare = layout.seq_len - sum(_cost(len(one.tokens), size) for one in held.values())
    costs = np.cumsum([_cost(len(one.tokens), size) for one in documents])
    documents = documents[: int(np.searchsorted(costs, spare, side="right"))]
    if not documents:
        raise ValueError(f"a passage and its question do not fit into seq_len={layout.seq_len}; use longer rows")
    spare -= int(costs[len(documents) - 1])
    beside = _beside(rng, layout, bank, held, spare)
    spare -= sum(_cost(len(bank.passages[other]), size) for other in beside)
    writer = RowWriter(layout)
    if spare > size:
        writer.add(sampler.slice(rng, spare - spare % size - 1, min_tokens=size))
    places: dict[int, int] = {}
    for passage in rng.permutation([*held, *beside]).tolist():
        places[passage] = writer.end + 1
        writer.add(held[passage].tokens if passage in held else bank.passages[passage], is_whole=True)
    for document in documents:
        for (first, last), (passage, start, stop) in zip(document.answers, document.told, strict=True):
            place, asked = places[passage], writer.end + 1
            writer.cite(slice(asked + first, asked + last), place + start, place + stop)
        writer.add(document.tokens, document.answers, is_whole=True)
    return writer.row("passage_questions")


def _cost(tokens: int, size: int) -> int:
    """Tokens of the row that a document takes, with bos and eos, to the end of its last chunk."""
    return round_up(tokens + 2, size)


def _passages(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    asker: Asker,
    bank: QuestionBank,
    options: NeedleOptions,
    together: int,
) -> dict[int, _Held]:
    """Passages with their questions by number, as many as fit; those cut out of text are -1, -2, ..."""
    size = layout.chunk_size
    held: dict[int, _Held] = {}
    room, asking, misses = layout.seq_len, int(options.question_share * layout.seq_len), 0
    # several passages are asked about, however short the row
    most = max(asking // 3, _LEAST_ASKING)
    while misses < _MAX_MISSES and min(room, asking) >= size // 2:
        passage, pairs, p_cloze = -1 - len(held), list[_Pair](), 1.0
        if rng.random() < options.p_text:
            text = bank.decode(sampler.slice(rng, int(rng.integers(*_TEXT_TOKENS))))
        else:
            passage = bank.questions[int(rng.integers(len(bank.questions)))].passage
            if passage in held:
                misses += 1
                continue
            (text, pairs), p_cloze = _asked(rng, bank, passage, options), options.p_cloze
        pairs = _with_clozes(rng, text, pairs, options.questions_per_passage, p_cloze)
        tokens, offsets = bank.encode(text)
        left = min(asking, room - _cost(len(tokens), size), most)
        fitting, used = list[_Pair](), 0
        for pair in pairs:
            # a share of the document's last, unfilled chunk comes on top
            question, said = asker.choose(*pair)
            turn = asker(question, said, begins=together == 1).size
            more = _cost(turn, size) if together == 1 else turn + (size + turn) // together
            if used + more <= left:
                used += more
                fitting.append((question, said, pair[1]))
        if not fitting:
            misses += 1
            continue
        room -= _cost(len(tokens), size) + used
        asking -= used
        held[passage] = _Held(text, tokens, offsets, fitting)
    return held


def _asked(
    rng: np.random.Generator, bank: QuestionBank, passage: int, options: NeedleOptions
) -> tuple[str, list[_Pair]]:
    """A passage, as it is or with changed answers, and different questions of people about it that it answers."""
    about, text = bank.about[passage], bank.texts[passage]
    lower = text.lower()
    told_here: dict[str, tuple[list[str], str]] = {}
    for one in (about[i] for i in rng.permutation(len(about)).tolist()):
        if answers := [answer for answer in one.answers if answer.lower() in lower]:
            told_here.setdefault(one.text, (answers, one.sentence))
    different = list(told_here.items())[: options.questions_per_passage]
    pairs = [(question, answers[int(rng.integers(len(answers)))], said) for question, (answers, said) in different]
    if options.p_changed:
        text, pairs = change_answers(rng, text, pairs, bank.names, options.p_changed)
    # a sentence that names the answer otherwise has not changed with it
    return text, [(asked, short, said if short.lower() in said.lower() else "") for asked, short, said in pairs]


def _with_clozes(rng: np.random.Generator, text: str, pairs: list[_Pair], count: int, p_cloze: float) -> list[_Pair]:
    """At most `count` different questions about a passage: each a cloze with this probability, else one of `pairs`,
    while there are any."""
    found: dict[str, _Pair] = {}
    people = list(pairs)
    for _ in range(count):
        pair: _Pair | None = None
        if rng.random() < p_cloze:
            made = cloze(rng, text)
            pair = None if made is None else (*made, "")
        elif people:
            pair = people.pop(0)
        if pair is not None:
            found.setdefault(pair[0], pair)
    return list(found.values())


def _order(rng: np.random.Generator, held: dict[int, _Held]) -> list[tuple[int, _Pair]]:
    """(passage, pair) in random order, no two of one passage in turn; what is left of the last passage is not asked."""
    left = {passage: list(one.pairs) for passage, one in held.items()}
    order: list[tuple[int, _Pair]] = []
    while True:
        others = [passage for passage, pairs in left.items() if pairs and (not order or passage != order[-1][0])]
        if not others:
            return order
        counts = np.cumsum([len(left[passage]) for passage in others])
        passage = others[int(np.searchsorted(counts, rng.integers(counts[-1]), side="right"))]
        order.append((passage, left[passage].pop()))


def _documents(order: list[tuple[int, _Pair]], held: dict[int, _Held], asker: Asker, together: int) -> list[_Document]:
    """The questions in this order, so many in a document."""
    documents: list[_Document] = []
    for number, (passage, (question, said, answer)) in enumerate(order):
        if number % together == 0:
            documents.append(_Document())
        document = documents[-1]
        turn = asker(question, said, begins=number % together == 0)
        first = len(document.tokens) + len(turn.head)
        document.answers.append((first, first + len(turn.answer)))
        document.told.append((passage, *told(held[passage].text, held[passage].offsets, answer)))
        document.tokens += [*turn.head, *turn.answer, *turn.tail]
    return documents


def _beside(
    rng: np.random.Generator, layout: RowLayout, bank: QuestionBank, held: dict[int, _Held], spare: int
) -> list[int]:
    """Passages that are not asked about and fit into `spare`: first those of the same articles."""
    near = [other for passage in held if passage >= 0 for other in bank.about[passage][0].near]
    near = [near[i] for i in rng.permutation(len(near)).tolist()]
    drawn = rng.integers(len(bank.questions), size=layout.seq_len // 256).tolist()
    beside: list[int] = []
    for other in [*near, *(bank.questions[i].passage for i in drawn)]:
        cost = _cost(len(bank.passages[other]), layout.chunk_size)
        if other not in held and other not in beside and cost <= spare:
            spare -= cost
            beside.append(other)
    return beside
