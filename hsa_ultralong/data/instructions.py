"""Conversations about a passage, made from plain text: instruction data for models too small for real ones.

A conversation is a document by the template of ``chat.py``: a passage in place of a system message, then turns. The
loss counts the assistant's words alone. All of it is synthetic, and declared so (row kind ``instructions``).
Called by ``mixture.py``; tested in ``tests/data/test_tasks.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hsa_ultralong.data.chat import ASSISTANT, NAMES, USER
from hsa_ultralong.data.needles import Needle, sample_needles
from hsa_ultralong.data.rows import Row, RowLayout, RowWriter
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer

_MOST_TURNS = 3
# share of rows that are one conversation about a passage of the whole row
LONG_FRACTION = 0.25
_MIN_PASSAGE = 48
# a passage, and one turn of any task: requests have at most 3 * _MIN_PASSAGE tokens in every sane tokenizer
_SMALLEST = 5 * _MIN_PASSAGE

TokenList = list[int]


def instructions_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
) -> Row:
    """Conversations packed into a row, none seeing another; in a quarter of the rows one conversation, whose passage
    takes most of the row. Labels are on the assistant's words and the end of the document.

    Raises:
        ValueError: a row too short for a conversation.
    """
    writer = RowWriter(layout)
    is_long = bool(rng.random() < LONG_FRACTION)
    if layout.seq_len < _SMALLEST:
        raise ValueError(f"instructions need rows of at least {_SMALLEST} tokens, got seq_len={layout.seq_len}")
    while writer.room >= _SMALLEST:
        room = writer.room - 2
        most = room if is_long else min(room, max(_SMALLEST, 8 * layout.chunk_size))
        tokens, answers = _conversation(rng, most, sampler, tokenizer, words, is_long)
        writer.add(tokens, answers, is_whole=True, labelled=answers)
    return writer.row("instructions", isolated=True)


def _conversation(
    rng: np.random.Generator,
    most_tokens: int,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    is_long: bool,
) -> tuple[TokenList, list[tuple[int, int]]]:
    """Tokens and the spans of the assistant's words, at most `most_tokens`; at least one turn."""
    longest = max(_MIN_PASSAGE, most_tokens - 3 * _MIN_PASSAGE)
    length = longest if is_long else int(rng.integers(_MIN_PASSAGE, longest + 1))
    passage: TokenList = sampler.fill(rng, length).tolist()
    (needle,) = sample_needles(rng, 1, words)
    statement = tokenizer.encode(needle.statement)
    tasks = [_first, _last, _next]
    if len(statement) < length:
        place = int(rng.integers(0, length - len(statement)))
        passage[place : place + len(statement)] = statement
        tasks.append(_fact)
    tokens, answers = list(passage), []
    for turn in range(int(rng.integers(1, _MOST_TURNS + 1))):
        request, answer = tasks[int(rng.integers(len(tasks)))](rng, passage, tokenizer, needle)
        head = [*tokenizer.encode(f"\n{NAMES[USER]}"), *request, *tokenizer.encode(f"\n{NAMES[ASSISTANT]}")]
        stop = len(tokens) + len(head) + len(answer)
        if turn and stop > most_tokens:
            break
        answers.append((stop - len(answer), stop))
        tokens += [*head, *answer]
    return tokens, answers


# (request, answer) about a passage


def _first(
    rng: np.random.Generator, passage: TokenList, tokenizer: PieceTokenizer, needle: Needle
) -> tuple[TokenList, TokenList]:
    return tokenizer.encode(" Repeat the first words of the text."), passage[: int(rng.integers(6, 16))]


def _last(
    rng: np.random.Generator, passage: TokenList, tokenizer: PieceTokenizer, needle: Needle
) -> tuple[TokenList, TokenList]:
    return tokenizer.encode(" Repeat the last words of the text."), passage[-int(rng.integers(6, 16)) :]


def _next(
    rng: np.random.Generator, passage: TokenList, tokenizer: PieceTokenizer, needle: Needle
) -> tuple[TokenList, TokenList]:
    count = int(rng.integers(6, 12))
    start = int(rng.integers(0, len(passage) - 2 * count))
    quoted = passage[start : start + count]
    return [*tokenizer.encode(" What comes after these words?"), *quoted], passage[start + count : start + 2 * count]


def _fact(
    rng: np.random.Generator, passage: TokenList, tokenizer: PieceTokenizer, needle: Needle
) -> tuple[TokenList, TokenList]:
    question = needle.question.removeprefix("Question:").split("\n")[0]
    return tokenizer.encode(question), tokenizer.encode(needle.answer)
