"""Mixtures of training rows as a dataset whose item i depends on (seed, split, i) and nothing else.

So resuming is a start index, and the numbers of workers and ranks do not change the data.
Called by ``train/`` and ``recipes/``; tested in ``tests/data/test_mixture.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.chat import ConversationSampler, sft_row
from hsa_ultralong.data.chat_form import ChatForm
from hsa_ultralong.data.conversations import chat_row, open_conversations
from hsa_ultralong.data.evaluation_words import EVALUATION_WORDS
from hsa_ultralong.data.fact_rows import FACT_FAMILIES, facts_row, prompts_row
from hsa_ultralong.data.facts import chat_facts_row, span_copy_row
from hsa_ultralong.data.instructions import instructions_row
from hsa_ultralong.data.list_rows import LIST_FAMILIES, lists_row
from hsa_ultralong.data.many_questions import many_questions_row
from hsa_ultralong.data.needles import MIN_WORDS
from hsa_ultralong.data.questions import QuestionBank, open_questions, passage_chat_row, passage_questions_row
from hsa_ultralong.data.rows import NeedleOptions, Row, RowLayout, needles_row, self_copy_row, text_row
from hsa_ultralong.data.sampler import DocumentSampler
from hsa_ultralong.data.seeds import namespaced_rng
from hsa_ultralong.data.shards import SPLITS, TokenShards
from hsa_ultralong.data.tasks import documents_row, multi_query_row, short_facts_row, variable_tracking_row
from hsa_ultralong.data.tokenizer import PieceTokenizer, special_token_ids, tokenizer_fingerprint

# The smallest T, in chunks, of each kind of row.
_MIN_CHUNKS = {
    "text": 1, "self_copy": 2, "needles": 4, "documents": 1, "short_facts": 4, "multi_query": 8, "variable_tracking": 4,
    "instructions": 4, "sft": 1, "chat_facts": 4, "span_copy": 2,
    "passage_questions": 8, "passage_chat": 4, "chat": 4,
    "facts": 6, "prompts": 2, "lists": 6,
}  # fmt: skip
# Kinds that need the word bank.
_WITH_WORDS = {
    "needles",
    "short_facts",
    "multi_query",
    "variable_tracking",
    "instructions",
    "chat_facts",
    "facts",
    "prompts",
    "lists",
}
# Kinds of rows as people wrote them; all others are synthetic.
_NATURAL = {"text", "documents", "sft", "chat", "passage_questions", "passage_chat"}
# Kinds that need files of questions.
WITH_QUESTIONS = {"passage_questions", "passage_chat"}
# Kinds whose questions may be answered in a sentence.
_ANSWERED = {"chat_facts", *WITH_QUESTIONS}
# Kinds that take no text of the shards.
_WITHOUT_TEXT = {"sft", "passage_chat", "chat"}
ROW_KINDS: tuple[str, ...] = tuple(_MIN_CHUNKS)
DEFAULT_NUM_ROWS = 1 << 40


@dataclass(frozen=True)
class MixtureConfig:
    """What rows a dataset makes.

    Attributes:
        weights: relative share of each kind of row, by number of rows; kinds are text, self_copy, needles, documents,
            short_facts, multi_query, variable_tracking, instructions, sft, chat_facts, span_copy, passage_questions,
            passage_chat, chat, facts, prompts and lists (docs/data.md).
        seq_len: T, tokens of a row, a multiple of ``chunk_size``.
        chunk_size: S, tokens of a chunk.
        seed: non-negative; another seed gives other rows.
        long_documents: take text from documents of at least ``seq_len`` tokens only.
        length_weights: {tokens: weight} of documents by length, see DocumentSampler.
        max_needles: most needles of a row; default seq_len / 170, within 4..64.
        max_questions: most questions of a row; default seq_len / 256, within 4..32.
        p_hard: probability that a needle shares a key word with another one of its row.
        inline_fraction: share of needle, fact and list rows whose questions continue the haystack's document.
        questions_per_passage: above 0, rows of passage_questions ask so many different ones at most about each of their
            passages, in place of max_questions in all; question_share: questions are at most this share of such a row.
        p_changed: probability that an answer of such a row, if it is a name or holds a number, is another one there.
        p_cloze: probability that a question of such a row is a sentence of its passage with a gap.
        p_text: probability that a passage of such a row is text of the shards, asked about by such sentences only.
        p_sentence: probability that a question of passage_questions, passage_chat and chat_facts that is asked in the
            form of chat, and has an answer in a sentence, has this one; all others of that form then end with "Answer
            in a few words.". says_short: they do, without sentences.
        questions: files of questions over passages, for the kinds passage_questions and passage_chat. sentences: files
            of their answers in a sentence.
        chats: files of conversations, for the kind chat.
        family: of facts, prompts and lists: one family alone, for probes ("" = all).

    Raises:
        ValueError: a value is out of range.
    """

    weights: Mapping[str, float]
    seq_len: int
    chunk_size: int = 64
    seed: int = 0
    long_documents: bool = False
    length_weights: Mapping[int, float] | None = None
    max_needles: int | None = None
    max_questions: int | None = None
    p_hard: float = 0.25
    inline_fraction: float = 0.3
    questions_per_passage: int = 0
    question_share: float = 0.4
    p_changed: float = 0.0
    p_cloze: float = 0.0
    p_text: float = 0.0
    p_sentence: float = 0.0
    says_short: bool = False
    questions: Sequence[str] = ()
    sentences: Sequence[str] = ()
    chats: Sequence[str] = ()
    family: str = ""

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        if self.chunk_size < 2:
            raise ValueError(f"chunk_size must be at least 2, got {self.chunk_size}")
        if self.seq_len < 1 or self.seq_len % self.chunk_size:
            raise ValueError(f"seq_len must be a multiple of chunk_size={self.chunk_size}, got {self.seq_len}")
        for kind in self.weights:
            if self.seq_len < _MIN_CHUNKS[kind] * self.chunk_size:
                raise ValueError(
                    f"{kind} rows need at least {_MIN_CHUNKS[kind]} chunks: seq_len must be at least "
                    f"{_MIN_CHUNKS[kind] * self.chunk_size}, got {self.seq_len}"
                )
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        for name in ("max_needles", "max_questions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}; for no needles leave them out of weights")
        for tokens, weight in (self.length_weights or {}).items():
            if tokens < 1 or not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"length_weights need tokens >= 1 and weights >= 0, got {tokens}: {weight}")
        for kind in self.weights if self.family else ():
            known = FORM_FAMILIES.get(kind, ())
            if self.family not in known:
                raise ValueError(f"family of {kind} must be one of {', '.join(known) or 'none'}, got {self.family!r}")
        if self.questions_per_passage < 0:
            raise ValueError(f"questions_per_passage must be at least 0, got {self.questions_per_passage}")
        of_passages = ("question_share", "p_changed", "p_cloze", "p_text")
        is_default = all(getattr(self, name) == getattr(type(self), name) for name in of_passages)
        if not self.questions_per_passage and not is_default:
            raise ValueError(f"{', '.join(of_passages)} go with questions_per_passage above 0")
        if self.p_sentence and not _ANSWERED & set(self.weights):
            raise ValueError(f"p_sentence goes with rows of {', '.join(sorted(_ANSWERED))}, and there are none")
        for name in ("p_hard", "inline_fraction", "p_sentence", *of_passages):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")

    @property
    def synthetic_share(self) -> float:
        """Share of rows that are made rather than found, 0 to 1; every published number states it."""
        made = sum(weight for kind, weight in self.weights.items() if kind not in _NATURAL)
        return made / sum(self.weights.values())

    def needle_options(self) -> NeedleOptions:
        """Return the needle options with defaults that grow with ``seq_len``."""
        return NeedleOptions(
            max_needles=self.max_needles or min(max(self.seq_len // 170, 4), 64),
            max_questions=self.max_questions or min(max(self.seq_len // 256, 4), 32),
            p_hard=self.p_hard,
            inline_fraction=self.inline_fraction,
            questions_per_passage=self.questions_per_passage,
            question_share=self.question_share,
            p_changed=self.p_changed,
            p_cloze=self.p_cloze,
            p_text=self.p_text,
            p_sentence=self.p_sentence,
            says_short=self.says_short,
        )


class MixtureDataset(Dataset[Row]):
    """Map-style dataset of training rows; item i is a function of (seed, split, i).

    Args:
        shards: opened token shards.
        tokenizer: the tokenizer they were built with.
        config: the mixture.
        split: ``"train"`` or ``"validation"``.
        num_rows: its length; rows are made when asked for, so the default is as good as endless.

    Raises:
        ValueError: the tokenizer is not the shards' own, the split has no document (long enough), the word bank is too
            small or holds evaluation words, or rows are too short for needles.
    """

    def __init__(
        self,
        shards: TokenShards,
        tokenizer: PreTrainedTokenizerFast,
        config: MixtureConfig,
        *,
        split: str = "train",
        num_rows: int = DEFAULT_NUM_ROWS,
    ) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows must be at least 1, got {num_rows}")
        if tokenizer_fingerprint(tokenizer) != shards.manifest["tokenizer_fingerprint"]:
            raise ValueError(
                f"the shards in {shards.path} were built with another tokenizer; build them again with this one"
            )
        uses_words = bool(_WITH_WORDS & set(config.weights))
        if uses_words:
            _check_words(shards)
        self.config = config
        self.split = split
        self._num_rows = num_rows
        self._words = shards.words
        self._layout = RowLayout(config.seq_len, config.chunk_size, *special_token_ids(tokenizer))
        self._sampler: DocumentSampler | None = None
        self._conversations: ConversationSampler | None = None
        if not set(config.weights) <= _WITHOUT_TEXT:
            self._sampler = DocumentSampler(
                shards,
                split,
                long_tokens=config.seq_len if config.long_documents else 0,
                length_weights=config.length_weights,
            )
        if "sft" in config.weights:
            self._conversations = ConversationSampler(shards, split, config.seq_len)
        self._pieces = PieceTokenizer(tokenizer, shards.words if uses_words else ())
        self._options = config.needle_options()
        asks = bool({"chat", "chat_facts", *WITH_QUESTIONS} & set(config.weights))
        self._form = ChatForm.of(tokenizer) if asks else None
        self._chats = open_conversations(tuple(config.chats), split) if "chat" in config.weights else []
        self._bank: QuestionBank | None = None
        if WITH_QUESTIONS & set(config.weights):
            sentences = tuple(config.sentences) if config.p_sentence else ()
            self._bank = open_questions(tuple(config.questions), tokenizer, split, sentences)
        self._kinds = tuple(config.weights)
        self._bounds = np.cumsum([config.weights[kind] for kind in self._kinds])
        # One row of each kind, so that a mixture that cannot work fails here and not in a worker.
        for kind in self._kinds:
            self._row(kind, namespaced_rng("probe", config.seed))

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Row:
        if not 0 <= index < self._num_rows:
            raise IndexError(f"row index must be within 0..{self._num_rows - 1}, got {index}")
        rng = namespaced_rng("mixture", self.config.seed, SPLITS.index(self.split), index)
        kind = int(np.searchsorted(self._bounds, rng.random() * self._bounds[-1], side="right"))
        return self._row(self._kinds[min(kind, len(self._kinds) - 1)], rng)

    def _row(self, kind: str, rng: np.random.Generator) -> Row:
        if kind == "sft":
            assert self._conversations is not None
            return sft_row(rng, self._layout, self._conversations)
        if kind == "chat":
            assert self._form is not None
            return chat_row(rng, self._layout, self._pieces, self._chats, self._form)
        if kind == "passage_chat":
            assert self._bank is not None and self._form is not None
            return passage_chat_row(rng, self._layout, self._pieces, self._bank, self._form, self._options)
        assert self._sampler is not None
        if kind == "text":
            return text_row(rng, self._layout, self._sampler)
        if kind == "self_copy":
            return self_copy_row(rng, self._layout, self._sampler)
        if kind == "documents":
            return documents_row(rng, self._layout, self._sampler)
        if kind == "span_copy":
            return span_copy_row(rng, self._layout, self._sampler)
        if kind == "chat_facts":
            assert self._form is not None
            return chat_facts_row(
                rng, self._layout, self._sampler, self._pieces, self._words, self._options, self._form
            )
        if kind == "passage_questions":
            assert self._bank is not None and self._form is not None
            make = many_questions_row if self._options.questions_per_passage else passage_questions_row
            return make(rng, self._layout, self._sampler, self._pieces, self._bank, self._options, self._form)
        if kind == "instructions":
            return instructions_row(rng, self._layout, self._sampler, self._pieces, self._words)
        arguments = rng, self._layout, self._sampler, self._pieces, self._words, self._options
        if kind in _FORMS:
            return self._form_row(_FORMS[kind], arguments)
        return _TASKS[kind](*arguments)

    def _form_row(self, make: Callable[..., Row], arguments: tuple[Any, ...]) -> Row:
        """A row whose draws may fit or not: long values in a short row are drawn again."""
        for _ in range(_TRIALS - 1):
            try:
                return make(*arguments, split=SPLITS.index(self.split), family=self.config.family)
            except ValueError:
                continue
        return make(*arguments, split=SPLITS.index(self.split), family=self.config.family)


# draws of a row before it is said that none fits
_TRIALS = 32
_TASKS = {
    "needles": needles_row,
    "short_facts": short_facts_row,
    "multi_query": multi_query_row,
    "variable_tracking": variable_tracking_row,
}
# their sentences differ between the splits, and go by families
_FORMS = {"facts": facts_row, "prompts": prompts_row, "lists": lists_row}
FORM_FAMILIES: dict[str, tuple[str, ...]] = {
    "facts": FACT_FAMILIES, "prompts": FACT_FAMILIES, "lists": LIST_FAMILIES,
}  # fmt: skip


class LengthsDataset(Dataset[Row]):
    """Rows of several lengths: item (length, i) is row i of the dataset of that length."""

    def __init__(self, datasets: Mapping[int, MixtureDataset]) -> None:
        self.datasets = dict(datasets)

    def __getitem__(self, key: tuple[int, int]) -> Row:
        length, index = key
        return self.datasets[length][index]


class StepSampler(Sampler[list[int]]):
    """Batches of row indices by training step, for ``DataLoader(batch_sampler=...)``.

    Step s takes rows s * B .. s * B + B - 1, B = batch_size * world_size, of which every rank takes its own
    ``batch_size``: start again at any step, with any number of ranks of the same B, and the rows are the same.

    Args:
        batch_size: rows of a batch of one rank.
        start_step: first step.
        num_steps: number of steps from there.
        rank: this process' rank.
        world_size: number of ranks.
    """

    def __init__(
        self, batch_size: int, *, start_step: int = 0, num_steps: int, rank: int = 0, world_size: int = 1
    ) -> None:
        if batch_size < 1 or num_steps < 0 or start_step < 0:
            raise ValueError(
                f"batch_size must be at least 1, start_step and num_steps at least 0, "
                f"got {batch_size}, {start_step}, {num_steps}"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be within 0..world_size-1, got rank {rank} of {world_size}")
        self._batch_size = batch_size
        self._steps = range(start_step, start_step + num_steps)
        self._rank = rank
        self._world_size = world_size

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        for step in self._steps:
            first = (step * self._world_size + self._rank) * self._batch_size
            yield list(range(first, first + self._batch_size))


def collate(rows: Sequence[Row]) -> dict[str, Any]:
    """Stack rows into a batch.

    Returns:
        ``input_ids`` and ``labels`` int64, ``segment_ids`` int32, ``answer_mask`` bool, all (B, T); ``evidence``
        (B, T, 2) int32; ``isolated`` (B,) bool; and ``kind``, a list of B strings.
    """
    return {
        "input_ids": torch.from_numpy(np.stack([row.input_ids for row in rows]).astype(np.int64)),  # (B, T)
        "labels": torch.from_numpy(np.stack([row.labels for row in rows]).astype(np.int64)),  # (B, T)
        "segment_ids": torch.from_numpy(np.stack([row.segment_ids for row in rows])),  # (B, T)
        "answer_mask": torch.from_numpy(np.stack([row.answer_mask for row in rows])),  # (B, T)
        "evidence": torch.from_numpy(np.stack([row.evidence for row in rows])),  # (B, T, 2)
        "isolated": torch.tensor([row.isolated for row in rows]),  # (B,)
        "kind": [row.kind for row in rows],
    }


def _check_weights(weights: Mapping[str, float]) -> None:
    if not weights:
        raise ValueError(f"weights is empty; give at least one of {', '.join(ROW_KINDS)} a positive weight")
    for kind, weight in weights.items():
        if kind not in _MIN_CHUNKS:
            raise ValueError(f"unknown kind of row {kind!r} in weights; known are {', '.join(ROW_KINDS)}")
        if not (math.isfinite(weight) and weight > 0):
            raise ValueError(
                f"the weight of {kind} must be positive and finite, got {weight}; leave out a kind to have none"
            )


def _check_words(shards: TokenShards) -> None:
    if len(shards.words) < MIN_WORDS:
        raise ValueError(
            f"the word bank of {shards.path} has {len(shards.words)} words, needle rows need {MIN_WORDS}; "
            f"build the shards from more text or leave needles out of weights"
        )
    shared = sorted(EVALUATION_WORDS.intersection(shards.words))
    if shared:
        raise ValueError(
            f"the word bank of {shards.path} holds evaluation words ({shared[0]}, ...); build the shards again"
        )
