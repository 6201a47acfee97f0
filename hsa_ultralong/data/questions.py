"""Rows of questions that people asked about passages: from memory, or with the passage in the prompt.

Files of SQuAD's form and of NQ with passages (passages.py). Passages of `assets/evaluation_passages.txt` are never
among them; a seventh of the rest is the validation split. Called by mixture.py and
many_questions.py; tests/data/test_questions.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.changed_answers import is_name
from hsa_ultralong.data.chat_form import Asker, ChatForm, Turn, asked_as, plain_turn
from hsa_ultralong.data.passages import Passages, evaluation_passages, passage_id, read_nq, read_squad
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, RowWriter, round_up
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.data.tokenizer import PieceTokenizer, plain_backend, special_token_ids
from hsa_ultralong.files.strict_json import parse_lines

logger = logging.getLogger(__name__)

# evaluation asks plainly, people in the form of chat
PLAIN_FRACTION = 0.5
# several questions are one conversation in this share of rows, else each is a document
_CONVERSATION = 0.3
_MAX_MISSES = 8
_VALIDATION = 7


class Asked(NamedTuple):
    """A question with its answers, the number of its passage and those of passages of the same article; an answer in a
    sentence, "" if there is none."""

    text: str
    answers: tuple[str, ...]
    passage: int
    near: tuple[int, ...]
    sentence: str = ""


class QuestionBank:
    """Questions of one split of some files, and their passages as tokens.

    sentences: files of answers in a sentence (`hsa write sentences`). A passage that stands in several files is one.

    Attributes:
        passages: tokens (n,) int32 of each. questions: those of the split. texts: the passages. about: the questions of
            each passage that has any. names: answers that are names.

    Raises:
        ValueError: a file of another form, or no question is left.
    """

    def __init__(
        self, paths: Sequence[str], tokenizer: PreTrainedTokenizerFast, split: str, sentences: Sequence[str] = ()
    ) -> None:
        self.questions: list[Asked] = []
        kept, dropped, is_validation = evaluation_passages(), 0, split == "validation"
        answered, numbers = read_sentences(sentences), dict[str, int]()
        for path in paths:
            found = read_questions(Path(path))
            places = [numbers.setdefault(text, len(numbers)) for text in found.texts]
            names = [passage_id(text) for text in found.texts]
            own = [name not in kept and is_held_out(name) == is_validation for name in names]
            for question in found.questions:
                (gold,) = question.gold
                dropped += names[gold] in kept
                if own[gold] and question.answers:
                    near = tuple(places[other] for other in question.near if own[other])
                    sentence = answered.get((names[gold], question.text), "")
                    self.questions.append(Asked(question.text, question.answers, places[gold], near, sentence))
        self.texts = list(numbers)
        if not self.questions:
            raise ValueError(
                f"{', '.join(map(str, paths))}: no question is left for the {split} split, {dropped} are about "
                "passages that are kept for evaluation"
            )
        self._backend = plain_backend(tokenizer)
        encodings = self._backend.encode_batch(self.texts, add_special_tokens=False)
        self.passages = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
        self._offsets = [np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) for encoding in encodings]
        self.about: dict[int, list[Asked]] = {}
        for asked in self.questions:
            self.about.setdefault(asked.passage, []).append(asked)
        self.names = sorted({answer for asked in self.questions for answer in asked.answers if is_name(answer)})
        if answered and not is_validation and not any(asked.sentence for asked in self.questions):
            raise ValueError(f"{', '.join(map(str, sentences))}: no sentence answers any of these questions")
        logger.info("%d questions of the %s split; %d are kept for evaluation", len(self.questions), split, dropped)

    def told(self, question: Asked, answer: str) -> tuple[int, int]:
        """Tokens of its passage that tell the answer; the whole passage if it stands there twice or not at all."""
        return told(self.texts[question.passage], self._offsets[question.passage], answer)

    def encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (n,) int32 of a passage, and where in it each stands, (n, 2)."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, dtype=np.int32), np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)

    def decode(self, tokens: np.ndarray) -> str:
        """The text of tokens (n,), without special ones."""
        return str(self._backend.decode(tokens.tolist()))


def told(text: str, offsets: np.ndarray, answer: str) -> tuple[int, int]:
    """Tokens [start, stop) of a text that tell the answer; all if it stands there twice or not at all.

    offsets: (n, 2), where in the text each token stands.
    """
    lower, wanted = text.lower(), answer.lower()
    place = lower.find(wanted)
    if place < 0 or lower.find(wanted, place + 1) >= 0 or len(lower) != len(text):
        return 0, len(offsets)
    inside = np.flatnonzero((offsets[:, 1] > place) & (offsets[:, 0] < place + len(wanted)))
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, len(offsets))


def read_questions(path: Path) -> Passages:
    """A file of SQuAD's form (.json), or of NQ with one passage a question (.jsonl, .gz).

    Raises:
        ValueError: a file of another form.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file of questions")
    found = read_squad(path) if path.suffix == ".json" else read_nq(path)
    if any(len(question.gold) != 1 for question in found.questions):
        raise ValueError(f"{path} has questions with several passages, which are for evaluation only")
    return found


def is_held_out(name: str) -> bool:
    """Whether the passage of this name (`passage_id`) is of the validation split."""
    return int(name, 16) % _VALIDATION == 0


def read_sentences(paths: Sequence[str]) -> dict[tuple[str, str], str]:
    """Answers in a sentence by the name of the passage and the question, of files of `hsa write sentences`.

    Raises:
        ValueError: a file of another form.
    """
    found: dict[tuple[str, str], str] = {}
    for path in paths:
        for row in parse_lines(Path(path).read_bytes(), Path(path)):
            fields = [row.get(name) for name in ("passage", "question", "sentence")]
            if not all(isinstance(field, str) and field.strip() for field in fields):
                raise ValueError(f"{path} is no file of hsa write sentences: passage, question and sentence are wanted")
            passage, question, sentence = map(str, fields)
            found[passage, question] = sentence.strip()
    return found


@lru_cache(maxsize=4)
def open_questions(
    paths: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, split: str, sentences: tuple[str, ...] = ()
) -> QuestionBank:
    """The bank of these files, read once in a process."""
    if not paths:
        raise ValueError("rows of passage_questions and passage_chat need files of questions: --questions FILE")
    return QuestionBank(paths, tokenizer, split, sentences)


def passage_questions_row(
    rng: np.random.Generator,
    layout: RowLayout,
    sampler: DocumentSampler,
    tokenizer: PieceTokenizer,
    bank: QuestionBank,
    options: NeedleOptions,
    form: ChatForm,
) -> Row:
    """Passages as documents, then questions about some of them; passages of the same articles come first among those
    that are not asked about, the rest of the row is text.

    Raises:
        ValueError: a row too short for a passage and its question.
    """
    size = layout.chunk_size

    def cost(tokens: int) -> int:
        return round_up(tokens + 2, size)

    asker = Asker(rng, tokenizer, form, PLAIN_FRACTION, options.p_sentence, options.says_short)
    is_conversation = bool(rng.random() < _CONVERSATION)
    asked: list[tuple[Asked, str, Turn]] = []
    held: dict[int, None] = {}
    room, misses, wanted = layout.seq_len, 0, int(rng.integers(1, options.max_questions + 1))
    while len(asked) < wanted and misses < _MAX_MISSES:
        question = bank.questions[int(rng.integers(len(bank.questions)))]
        answer = question.answers[int(rng.integers(len(question.answers)))]
        turn = asker(*asker.choose(question.text, answer, question.sentence), begins=not (asked and is_conversation))
        used = cost(turn.size) + (0 if question.passage in held else cost(len(bank.passages[question.passage])))
        if used > room:
            misses += 1
            continue
        room -= used
        held[question.passage] = None
        asked.append((question, answer, turn))
    if not asked:
        raise ValueError(f"a passage and its question do not fit into seq_len={layout.seq_len}; use longer rows")
    others = [other for question, _, _ in asked for other in question.near]
    others = [others[i] for i in rng.permutation(len(others)).tolist()]
    others += [bank.questions[i].passage for i in rng.integers(len(bank.questions), size=layout.seq_len // 256)]
    for other in others:
        if other not in held and cost(len(bank.passages[other])) <= room:
            room -= cost(len(bank.passages[other]))
            held[other] = None
    writer = RowWriter(layout)
    if room > size:
        writer.add(sampler.slice(rng, room - room % size - 1, min_tokens=size))
    places: dict[int, int] = {}
    for passage in rng.permutation(list(held)).tolist():
        places[passage] = writer.end + 1
        writer.add(bank.passages[passage], is_whole=True)
    _ask(writer, asked, places, bank, is_conversation)
    return writer.row("passage_questions")


def _ask(
    writer: RowWriter,
    asked: Sequence[tuple[Asked, str, Turn]],
    places: dict[int, int],
    bank: QuestionBank,
    is_conversation: bool,
) -> None:
    """Write the questions, as one conversation or each as a document of its own."""
    tokens: list[int] = []
    answers: list[tuple[int, int]] = []
    for number, (question, answer, turn) in enumerate(asked):
        first = len(tokens) + len(turn.head)
        last = first + len(turn.answer)
        start, stop = bank.told(question, answer)
        place = places[question.passage]
        writer.cite(slice(writer.end + 1 + first, writer.end + 1 + last), place + start, place + stop)
        answers.append((first, last))
        tokens += [*turn.head, *turn.answer, *turn.tail]
        if not is_conversation or number + 1 == len(asked):
            writer.add(tokens, answers, is_whole=True)
            tokens, answers = [], []


def passage_chat_row(
    rng: np.random.Generator,
    layout: RowLayout,
    tokenizer: PieceTokenizer,
    bank: QuestionBank,
    form: ChatForm,
    options: NeedleOptions | None = None,
) -> Row:
    """Passages each with a question in one document, the loss on the answers only, packed until eight in turn do not
    fit; none sees another.

    Raises:
        ValueError: rows too short for any.
    """
    p_sentence, says_short = (options.p_sentence, options.says_short) if options else (0.0, False)
    writer, misses = RowWriter(layout), 0
    gap = tokenizer.encode_text("\n\n")
    while misses < _MAX_MISSES and writer.room > 0:
        question = bank.questions[int(rng.integers(len(bank.questions)))]
        answer = question.answers[int(rng.integers(len(question.answers)))]
        passage = [*bank.passages[question.passage].tolist(), *gap]
        if rng.random() < PLAIN_FRACTION:
            turn = plain_turn(tokenizer, question.text, answer)
            head = [*passage, *turn.head]
        else:
            opening = form.opening if rng.random() < 0.5 else form.first
            text, answer = asked_as(rng, question.text, answer, question.sentence, p_sentence, says_short)
            turn = form.turn(tokenizer, tokenizer.encode_text(text), answer, [])
            head = [*opening, *passage, *turn.head]
        if len(head) + len(turn.answer) + 1 > writer.room:
            misses += 1
            continue
        answers = [(len(head), len(head) + len(turn.answer))]
        writer.add([*head, *turn.answer], answers, is_whole=True, labelled=answers)
    if writer.end == 0:
        raise ValueError(f"no passage with its question fits into seq_len={layout.seq_len}; use longer rows")
    return writer.row("passage_chat", isolated=True)


class PassageChats(Dataset[Row]):
    """Rows of passage_chat alone, which need no shards; row i is a function of the seed and i."""

    def __init__(
        self, paths: Sequence[str], tokenizer: PreTrainedTokenizerFast, seq_len: int, num_rows: int, seed: int = 0
    ) -> None:
        self._bank = open_questions(tuple(paths), tokenizer, "train")
        # chunks mean nothing to a model without a memory
        self._layout = RowLayout(seq_len, 1, *special_token_ids(tokenizer))
        self._tokenizer, self._form = PieceTokenizer(tokenizer), ChatForm.of(tokenizer)
        self._num_rows, self._seed = num_rows, seed

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Row:
        rng = namespaced_rng("passage_chats", self._seed, index)
        return passage_chat_row(rng, self._layout, self._tokenizer, self._bank, self._form)
