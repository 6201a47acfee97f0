"""More rows that need retrieval: several facts asked at once, chains of variables, facts that are short documents.

Each is a mixture component of its own, so that its share is declared; keys and values come from the word bank of the
corpus, never from evaluation's (``needles.py``). Called by ``mixture.py``; tested in ``tests/data/test_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsa_ultralong.data.needles import MAIN_ATTRIBUTE, make_needle, sample_needles
from hsa_ultralong.data.rows import (
    NeedleOptions,
    Question,
    Row,
    RowLayout,
    RowWriter,
    haystack,
    hide,
    question_cost,
    questions_of,
    round_up,
    too_short,
)
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer

_MOST_ASKED_AT_ONCE = 4
_MOST_LINKS = 5
_VARIABLE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def documents_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """Slices of documents packed into a row in which nothing reaches from one document into another."""
    writer = RowWriter(layout)
    while writer.room > 1:
        tokens = sampler.slice(rng, writer.room - 1, min_tokens=layout.chunk_size)
        writer.add(tokens, is_whole=len(tokens) < writer.room - 1)
    return writer.row("documents", isolated=True)


def short_facts_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
) -> Row:
    """Every fact is a document of its own, of one short chunk, among the documents of a haystack; then questions.

    A library of notes looks like this. Facts beyond half of what the questions leave of the row are left out.

    Raises:
        ValueError: not one fact or question fits.
    """
    needles = sample_needles(rng, int(rng.integers(1, options.max_needles + 1)), words, p_hard=options.p_hard)
    questions = questions_of(rng, layout, tokenizer, needles[: options.max_questions], False)
    if not questions:
        raise ValueError(too_short(layout, "question does not fit into half of a row"))
    room = layout.seq_len - sum(question_cost(layout, question, False) for question in questions)
    facts: list[list[int]] = []
    budget = max(room // 2, layout.chunk_size)
    # the facts that are asked for come first, the others are distractors
    for needle in [*needles[: len(questions)], *needles[options.max_questions :]]:
        tokens = tokenizer.encode(needle.statement.strip())
        cost = round_up(len(tokens) + 2, layout.chunk_size)
        if cost > budget:
            break
        facts.append(tokens)
        budget, room = budget - cost, room - cost
    if not facts:
        raise ValueError(too_short(layout, "statement does not fit into what its question leaves of a row"))
    kept = questions[: len(facts)]
    texts = (
        haystack(rng, layout, sampler, room, 2 * options.max_haystack_documents) if room >= layout.chunk_size else []
    )
    items: list[tuple[list[int] | np.ndarray, bool]] = [(fact, True) for fact in facts]
    # the last text is cut at a multiple of the chunk size like the others, so any order fits
    items += [(text, False) for text in texts]
    writer = RowWriter(layout)
    for i in rng.permutation(len(items)).tolist():
        writer.add(items[i][0], is_whole=items[i][1])
    for i in rng.permutation(len(kept)).tolist():
        writer.add(kept[i].tokens, [kept[i].answer], is_whole=True)
    return writer.row("short_facts")


def multi_query_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
) -> Row:
    """Facts hidden in a text, asked for several at once: "What are the secret codes of the A, the B and the C?"

    Raises:
        ValueError: not one question fits.
    """
    drawn = sample_needles(rng, int(rng.integers(2, max(options.max_needles, 2) + 1)), words, p_hard=options.p_hard)
    facts = [make_needle(needle.key, needle.value) for needle in drawn]
    questions: list[Question] = []
    room, first = layout.seq_len // 2, 0
    while first < min(len(facts), options.max_questions):
        count = int(rng.integers(2, _MOST_ASKED_AT_ONCE + 1))
        asked = facts[first : first + count]
        names = " and the".join([", the".join(f" {fact.key}" for fact in asked[:-1]), f" {asked[-1].key}"])
        head = tokenizer.encode(f"Question: What are the {MAIN_ATTRIBUTE}s of the{names}?\nAnswer:")
        answer = tokenizer.encode(f" {', '.join(fact.value for fact in asked)}")
        question = Question(head + answer, (len(head), len(head) + len(answer)))
        room -= question_cost(layout, question, False)
        if room < 0:
            break
        questions.append(question)
        first += count
    statements = [[tokenizer.encode(fact.statement) for fact in facts[:first]], []]
    statements[1] = [tokenizer.encode(fact.statement) for fact in facts[first:]]
    return _hide_and_ask(rng, layout, sampler, options, statements, questions, "multi_query")


def variable_tracking_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
) -> Row:
    """Chains of assignments hidden in a text, each variable the one before it; asked: which variables hold a value?

    After RULER's variable tracking (Hsieh et al. 2024): to answer, retrieval must follow the chain.

    Raises:
        ValueError: not one chain fits.
    """
    num_chains = int(rng.integers(1, max(1, options.max_needles // _MOST_LINKS) + 1))
    names = _variable_names(rng, num_chains * _MOST_LINKS)
    statements: list[list[int]] = []
    questions: list[Question] = []
    room = layout.seq_len // 2
    for chain in range(num_chains):
        links = names[chain * _MOST_LINKS :][: int(rng.integers(2, _MOST_LINKS + 1))]
        value = str(int(rng.integers(10_000, 100_000)))
        head = tokenizer.encode(f"Question: Which variables hold the value {value}?\nAnswer:")
        answer = tokenizer.encode(f" {', '.join(links)}")
        question = Question(head + answer, (len(head), len(head) + len(answer)))
        room -= question_cost(layout, question, False)
        if room < 0:
            break
        sources = [value, *links[:-1]]
        statements += [
            tokenizer.encode(f" VAR {name} = {source}.") for name, source in zip(links, sources, strict=True)
        ]
        questions.append(question)
    return _hide_and_ask(rng, layout, sampler, options, [statements, []], questions, "variable_tracking")


def _variable_names(rng: np.random.Generator, count: int) -> list[str]:
    """Different names such as QX41."""
    names: dict[str, None] = {}
    while len(names) < count:
        for i, j, number in rng.integers(0, (len(_VARIABLE_LETTERS), len(_VARIABLE_LETTERS), 100), (count, 3)).tolist():
            if len(names) < count:
                names[f"{_VARIABLE_LETTERS[i]}{_VARIABLE_LETTERS[j]}{number:02d}"] = None
    return list(names)


def _hide_and_ask(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    options: NeedleOptions,
    statements: list[list[list[int]]],
    questions: list[Question],
    kind: str,
) -> Row:
    """Statements that must be there, statements that may, and questions as documents of their own."""
    needed, distractors = statements
    if not questions:
        raise ValueError(too_short(layout, "question does not fit into half of a row"))
    reserved = sum(question_cost(layout, question, False) for question in questions)
    texts = haystack(rng, layout, sampler, layout.seq_len - reserved, options.max_haystack_documents)
    if hide(rng, texts, [*needed, *distractors]) < len(needed):
        raise ValueError(too_short(layout, "statements do not fit into what their questions leave of a row"))
    writer = RowWriter(layout)
    for tokens in texts:
        writer.add(tokens)
    for i in rng.permutation(len(questions)).tolist():
        writer.add(questions[i].tokens, [questions[i].answer], is_whole=True)
    return writer.row(kind)
