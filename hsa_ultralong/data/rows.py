"""Training rows: documents packed into T tokens, every document starting at a multiple of the chunk size S.

A document sees its own past and the chunks of the earlier documents of the row, so a row can state a fact in one
document and ask for it in another. Letters: T tokens of a row, S chunk size (``architecture.md``).
Called by ``mixture.py``; tested in ``tests/data/test_rows.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_ultralong.data.needles import Needle, sample_needles
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.tokenizer import PieceTokenizer

IGNORE_INDEX = -100
PADDING_SEGMENT = -1


@dataclass(frozen=True)
class Row:
    """One training row.

    Attributes:
        input_ids: (T,) int32.
        labels: (T,) int32, ``labels[t]`` is the token at t (the model shifts); -100 on padding and on the first token
            of each document.
        segment_ids: (T,) int32, 0, 1, 2, ... per document, -1 on padding.
        kind: one of ``mixture.ROW_KINDS``.
        answer_mask: (T,) bool, true on the tokens of the answers to questions.
        isolated: no document of the row may read another one.
        evidence: (T, 2) int32, first and last token of the row that tell the token (for a copy the same), where that is
            known; else -1.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    segment_ids: np.ndarray
    kind: str
    answer_mask: np.ndarray
    isolated: bool
    evidence: np.ndarray


@dataclass(frozen=True)
class RowLayout:
    """What all rows share: T, S and the ids of the special tokens."""

    seq_len: int
    chunk_size: int
    bos: int
    eos: int
    pad: int


class RowWriter:
    """Fills one row document by document."""

    def __init__(self, layout: RowLayout) -> None:
        self._layout = layout
        self._input_ids: np.ndarray = np.full(layout.seq_len, layout.pad, dtype=np.int32)
        self._labels: np.ndarray = np.full(layout.seq_len, IGNORE_INDEX, dtype=np.int32)
        self._segment_ids: np.ndarray = np.full(layout.seq_len, PADDING_SEGMENT, dtype=np.int32)
        self._answer_mask: np.ndarray = np.zeros(layout.seq_len, dtype=np.bool_)
        self._evidence: np.ndarray = np.full((layout.seq_len, 2), -1, dtype=np.int32)
        self._num_documents = 0
        self.end = 0

    @property
    def room(self) -> int:
        """Number of tokens that the next document may have."""
        return self._layout.seq_len - self.end

    def add(
        self,
        tokens: np.ndarray | list[int],
        answers: Sequence[tuple[int, int]] = (),
        *,
        is_whole: bool = False,
        labelled: Sequence[tuple[int, int]] | None = None,
    ) -> int:
        """Write bos and ``tokens`` as the next document, then eos if ``is_whole`` and there is room.

        Args:
            tokens: (n,), n + 1 <= room.
            answers: spans [start, stop) of ``tokens`` that are answers.
            is_whole: the document ends here, rather than being cut.
            labelled: the only spans, with eos, that the loss counts; None: the whole document.

        Returns:
            The place of the first of ``tokens`` in the row.
        """
        start, stop = self.end, self.end + 1 + len(tokens)
        assert stop <= self._layout.seq_len, "the document does not fit into the row"
        self._input_ids[start] = self._layout.bos
        self._input_ids[start + 1 : stop] = tokens
        if is_whole and stop < self._layout.seq_len:
            self._input_ids[stop] = self._layout.eos
            stop += 1
        counted = [(0, stop - start - 1)] if labelled is None else [*labelled, (len(tokens), stop - start - 1)]
        for first, last in counted:
            self._labels[start + 1 + first : start + 1 + last] = self._input_ids[start + 1 + first : start + 1 + last]
        self._segment_ids[start:stop] = self._num_documents
        for first, last in answers:
            self._answer_mask[start + 1 + first : start + 1 + last] = True
        self._num_documents += 1
        self.end = round_up(stop, self._layout.chunk_size)
        return start + 1

    def cite(self, tokens: slice, starts: int | np.ndarray, stops: int | np.ndarray) -> None:
        """Tokens of the row are told by what stands in its tokens starts..stops, the same for all or one of each."""
        self._evidence[tokens, 0] = starts
        self._evidence[tokens, 1] = stops - 1

    def cite_copy(self, first: int, places: np.ndarray) -> None:
        """The tokens of the row from `first` on repeat those at `places`, (n,)."""
        self.cite(slice(first, first + len(places)), places, places + 1)

    def row(self, kind: str, isolated: bool = False) -> Row:
        """Return the finished row."""
        return Row(self._input_ids, self._labels, self._segment_ids, kind, self._answer_mask, isolated, self._evidence)


def text_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """Pack slices of documents until the row is full.

    A document is chosen with probability proportional to its length and its slice starts at a random place; the slice
    runs to the end of the document (then eos) or of the row.
    """
    writer = RowWriter(layout)
    while writer.room > 1:
        tokens = sampler.slice(rng, writer.room - 1, min_tokens=layout.chunk_size)
        writer.add(tokens, is_whole=len(tokens) < writer.room - 1)
    return writer.row("text")


def self_copy_row(rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler) -> Row:
    """Write a text x of about T/2 tokens twice: in one document, or (half of the rows) in two.

    Every token of the second x must be retrieved. The second x lies at a random distance from the chunk grid of the
    first: in one document by a random length of x, in two by leaving out up to S - 2 tokens of its beginning. Needs
    T >= 2S, S >= 2.
    """
    writer = RowWriter(layout)
    slack = int(rng.integers(0, layout.chunk_size - 1))
    if rng.random() < 0.5:
        text = sampler.fill(rng, max(1, (layout.seq_len - 1 - slack) // 2))
        start = writer.add(np.concatenate([text, text]), is_whole=True)
        writer.cite_copy(start + len(text), start + np.arange(len(text)))
    else:
        # The first document takes whole chunks, half of them rounded up; the second is cut to the room that is left.
        text = sampler.fill(rng, round_up(layout.seq_len // 2, layout.chunk_size) - 1)
        first = writer.add(text) + slack
        copy = text[slack:][: writer.room - 1]
        writer.cite_copy(writer.add(copy, is_whole=True), first + np.arange(len(copy)))
    return writer.row("self_copy")


@dataclass(frozen=True)
class NeedleOptions:
    """How many needles a row holds, and how they are asked for.

    Attributes:
        max_needles: a row holds 1..max_needles needles.
        max_questions: at most so many of them are asked for.
        p_hard: see ``sample_needles``.
        inline_fraction: share of rows whose questions end the haystack's last document instead of being documents.
        max_haystack_documents: half of the haystacks are one document, the others 2..max_haystack_documents.
        questions_per_passage: above 0, rows of passage_questions ask so many at most about each passage, and at most
            question_share of the row are questions (many_questions.py). p_changed, p_cloze, p_text, p_sentence,
            says_short: see MixtureConfig.
    """

    max_needles: int
    max_questions: int
    p_hard: float = 0.25
    inline_fraction: float = 0.3
    max_haystack_documents: int = 4
    questions_per_passage: int = 0
    question_share: float = 0.4
    p_changed: float = 0.0
    p_cloze: float = 0.0
    p_text: float = 0.0
    p_sentence: float = 0.0
    says_short: bool = False


def needles_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    words: Sequence[str],
    options: NeedleOptions,
) -> Row:
    """Hide needles in a haystack of text, then ask for some of them.

    Statements overwrite as many tokens at uniform places, never each other; they may straddle chunks. Questions follow
    in random order, half in question and half in completion style, as documents of their own or inline. Questions
    beyond half of the row and statements beyond the haystack are left out.

    Raises:
        ValueError: not one question fits into half of the row, or not one statement into the haystack.
    """
    is_inline = bool(rng.random() < options.inline_fraction)
    needles = sample_needles(rng, int(rng.integers(1, options.max_needles + 1)), words, p_hard=options.p_hard)
    questions = questions_of(rng, layout, tokenizer, needles[: options.max_questions], is_inline)
    if not questions:
        raise ValueError(too_short(layout, "question does not fit into half of a row"))
    reserved = sum(question_cost(layout, question, is_inline) for question in questions)
    # Inline questions are followed by one token more, eos.
    texts = haystack(rng, layout, sampler, layout.seq_len - reserved - is_inline, options.max_haystack_documents)
    hidden = [*needles[: len(questions)], *needles[options.max_questions :]]
    statements = [tokenizer.encode(needle.statement) for needle in hidden]
    num_hidden = len(hide(rng, texts, statements))
    if num_hidden == 0:
        raise ValueError(too_short(layout, "statement does not fit into what its question leaves of a row"))
    kept = questions[:num_hidden]
    writer = RowWriter(layout)
    for tokens in texts[:-1]:
        writer.add(tokens)
    order = rng.permutation(len(kept)).tolist()
    if is_inline:
        _add_inline(writer, texts[-1], [kept[i] for i in order])
    else:
        writer.add(texts[-1])
        for i in order:
            writer.add(kept[i].tokens, [kept[i].answer], is_whole=True)
    return writer.row("needles")


@dataclass(frozen=True)
class RowQuestion:
    """A question with its answer as tokens, and where in them the answer lies."""

    tokens: list[int]
    answer: tuple[int, int]


def too_short(layout: RowLayout, what: str) -> str:
    return (
        f"a needle's {what}: seq_len={layout.seq_len} is too short for chunk_size={layout.chunk_size} "
        f"and this tokenizer; use a larger seq_len"
    )


def questions_of(
    rng: np.random.Generator, layout: RowLayout, tokenizer: PieceTokenizer, needles: Sequence[Needle], is_inline: bool
) -> list[RowQuestion]:
    """Tokenise questions for the first needles, as many as fit into half of the row, in the needles' order."""
    room = layout.seq_len // 2
    questions: list[RowQuestion] = []
    for needle, is_question in zip(needles, (rng.random(len(needles)) < 0.5).tolist(), strict=True):
        prompt = needle.question if is_question else needle.completion
        head = tokenizer.encode(f"\n{prompt}" if is_inline else prompt)
        answer = tokenizer.encode(needle.answer)
        tail = [] if is_question else tokenizer.encode(".")
        question = RowQuestion(head + answer + tail, (len(head), len(head) + len(answer)))
        room -= question_cost(layout, question, is_inline)
        if room < 0:
            break
        questions.append(question)
    return questions


def question_cost(layout: RowLayout, question: RowQuestion, is_inline: bool) -> int:
    """Number of row tokens a question takes; as a document it has bos and eos and fills its last chunk."""
    return len(question.tokens) if is_inline else round_up(len(question.tokens) + 2, layout.chunk_size)


def haystack(
    rng: np.random.Generator, layout: RowLayout, sampler: DocumentSampler, num_tokens: int, max_documents: int
) -> list[np.ndarray]:
    """Draw the texts of one or several documents that take ``num_tokens`` of a row, bos included."""
    num_chunks = num_tokens // layout.chunk_size
    num_documents = 1
    if max_documents > 1 and rng.random() < 0.5:
        num_documents = max(1, min(int(rng.integers(2, max_documents + 1)), num_chunks))
    borders = np.sort(rng.permutation(np.arange(1, num_chunks))[: num_documents - 1]).tolist()
    stops = [border * layout.chunk_size for border in borders] + [num_tokens]
    starts = [0, *stops[:-1]]
    return [sampler.fill(rng, stop - start - 1) for start, stop in zip(starts, stops, strict=True)]


def hide(
    rng: np.random.Generator, documents: list[np.ndarray], statements: Sequence[list[int]]
) -> list[tuple[int, int]]:
    """Overwrite tokens of the documents with the statements, in place; returns document and first token of those that
    fitted, counted from the first.

    A statement goes to a document with probability proportional to its length, then all statements of a document are
    shuffled and the tokens between them are divided at random, which makes their places uniform without overlap.
    """
    lengths = [len(document) for document in documents]
    bounds = np.cumsum(lengths)
    places = rng.integers(0, int(bounds[-1]), size=len(statements))
    draws = bounds.searchsorted(places, side="right").tolist()
    free = list(lengths)
    placed: list[list[int]] = [[] for _ in documents]
    found: dict[int, tuple[int, int]] = {}
    for i, statement in enumerate(statements):
        chosen = int(draws[i])
        if len(statement) > free[chosen]:
            chosen = max(range(len(free)), key=free.__getitem__)
        if len(statement) > free[chosen]:
            break
        free[chosen] -= len(statement)
        placed[chosen].append(i)
    for document, (tokens, members, gap) in enumerate(zip(documents, placed, free, strict=True)):
        gaps = np.sort(rng.integers(0, gap + 1, size=len(members))).tolist()
        shift = 0
        for member, before in zip(rng.permutation(len(members)).tolist(), gaps, strict=True):
            start, statement = before + shift, statements[members[member]]
            tokens[start : start + len(statement)] = statement
            shift += len(statement)
            found[members[member]] = document, start
    return [found[i] for i in sorted(found)]


def _add_inline(writer: RowWriter, haystack: np.ndarray, questions: Sequence[RowQuestion]) -> None:
    tokens = haystack.tolist()
    answers: list[tuple[int, int]] = []
    for question in questions:
        answers.append((len(tokens) + question.answer[0], len(tokens) + question.answer[1]))
        tokens += question.tokens
    writer.add(tokens, answers, is_whole=True)


def round_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
