"""More rows that need retrieval: several facts asked at once, chains of variables, facts that are short documents.

Each is a mixture component of its own, so that its share is declared; keys and values come from the word bank of the
corpus, never from evaluation's (``needles.py``). Called by ``mixture.py``; tested in ``tests/data/test_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hsa_ultralong.data.needles import MAIN_ATTRIBUTE, make_needle, sample_needles
from hsa_ultralong.data.rows import (
    NeedleOptions,
    Row,
    RowLayout,
    RowQuestion,
    RowWriter,
    haystack,
    hide,
    question_cost,
    questions_of,
    round_up,
    text_row,
    too_short,
)
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer

_MOST_ASKED_AT_ONCE = 4
_MOST_LINKS = 5
_VARIABLE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"


def documents_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """Slices of documents packed into a row in which nothing reaches from one document into another."""
    return replace(text_row(rng, layout, sampler), kind="documents", isolated=True)


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
    questions: list[RowQuestion] = []
    groups: list[tuple[int, int]] = []
    room, first = layout.seq_len // 2, 0
    while first < min(len(facts), options.max_questions):
        count = int(rng.integers(2, _MOST_ASKED_AT_ONCE + 1))
        asked = facts[first : first + count]
        if len(asked) < 2:
            break
        names = " and the".join([", the".join(f" {fact.key}" for fact in asked[:-1]), f" {asked[-1].key}"])
        head = tokenizer.encode(f"Question: What are the {MAIN_ATTRIBUTE}s of the{names}?\nAnswer:")
        answer = tokenizer.encode(f" {', '.join(fact.value for fact in asked)}")
        question = RowQuestion(head + answer, (len(head), len(head) + len(answer)))
        room -= question_cost(layout, question, False)
        if room < 0:
            break
        questions.append(question)
        groups.append((first, first + len(asked)))
        first += count
    # a question's facts are hidden before the next one's, distractors last
    statements = [[tokenizer.encode(fact.statement) for fact in facts[start:stop]] for start, stop in groups]
    distractors = [tokenizer.encode(fact.statement) for fact in facts[groups[-1][1] if groups else 0 :]]
    return _hide_and_ask(rng, layout, sampler, options, statements, distractors, questions, "multi_query")


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
    values = rng.choice(np.arange(10_000, 100_000), num_chains, replace=False).tolist()
    chains: list[list[list[int]]] = []
    questions: list[RowQuestion] = []
    room = layout.seq_len // 2
    for number, value in enumerate(values):
        links = names[number * _MOST_LINKS :][: int(rng.integers(2, _MOST_LINKS + 1))]
        head = tokenizer.encode(f"Question: Which variables hold the value {value}?\nAnswer:")
        answer = tokenizer.encode(f" {', '.join(links)}")
        question = RowQuestion(head + answer, (len(head), len(head) + len(answer)))
        room -= question_cost(layout, question, False)
        if room < 0:
            break
        sources = [str(value), *links[:-1]]
        assignments = zip(links, sources, strict=True)
        chains.append([tokenizer.encode(f" VAR {name} = {source}.") for name, source in assignments])
        questions.append(question)
    return _hide_and_ask(rng, layout, sampler, options, chains, [], questions, "variable_tracking", in_order=True)


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
    groups: list[list[list[int]]],
    distractors: list[list[int]],
    questions: list[RowQuestion],
    kind: str,
    *,
    in_order: bool = False,
) -> Row:
    """Hide the statements that each question needs, then distractors; ask, in documents of their own, what was hidden
    whole. With ``in_order`` the statements of a group stay in order, and those of different groups mix."""
    if not questions:
        raise ValueError(too_short(layout, "question does not fit into half of a row"))
    reserved = sum(question_cost(layout, question, False) for question in questions)
    texts = haystack(rng, layout, sampler, layout.seq_len - reserved, options.max_haystack_documents)
    room, longest, kept = sum(map(len, texts)), 0, 0
    for group in groups:
        room, longest = room - sum(map(len, group)), max(longest, *map(len, group))
        # at the end of each document less than one statement is lost
        if room < len(texts) * longest:
            break
        kept += 1
    if not kept:
        raise ValueError(too_short(layout, "statements do not fit into what their question leaves of a row"))
    if in_order:
        owners = rng.permutation([i for i, group in enumerate(groups[:kept]) for _ in group]).tolist()
        members = [iter(group) for group in groups[:kept]]
        _hide_in_order(rng, texts, [next(members[i]) for i in owners])
    else:
        needed = [statement for group in groups[:kept] for statement in group]
        hidden = hide(rng, texts, [*needed, *distractors])
        assert len(hidden) >= len(needed), "the statements were counted to fit"
    writer = RowWriter(layout)
    for tokens in texts:
        writer.add(tokens)
    for i in rng.permutation(kept).tolist():
        writer.add(questions[i].tokens, [questions[i].answer], is_whole=True)
    return writer.row(kind)


def _hide_in_order(rng: np.random.Generator, documents: list[np.ndarray], statements: Sequence[list[int]]) -> None:
    """Overwrite tokens of the documents, in place, with the statements in their order at random distances."""
    places = ordered_places(rng, list(map(len, documents)), list(map(len, statements)))
    for statement, (document, place) in zip(statements, places, strict=True):
        documents[document][place : place + len(statement)] = statement


def ordered_places(rng: np.random.Generator, lengths: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Document and place in it of pieces of these sizes, in their order, at random distances in documents of these
    lengths, which must have room for the largest piece each beside all of them."""
    slack = sum(lengths) - sum(sizes) - len(lengths) * max(sizes)
    gaps = np.sort(rng.integers(0, slack + 1, size=len(sizes)))
    found: list[tuple[int, int]] = []
    document = place = 0
    for size, gap in zip(sizes, np.diff(gaps, prepend=0).tolist(), strict=True):
        place += gap
        while place + size > lengths[document]:
            # the rest of the distance counts from the start of the next document
            place = max(place - lengths[document], 0)
            document += 1
        found.append((document, place))
        place += size
    return found
