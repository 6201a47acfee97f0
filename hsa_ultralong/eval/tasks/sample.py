"""One question about a context of exactly known length, and what a task is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from hsa_ultralong.eval.tasks.material import Material

Tokens: TypeAlias = "npt.NDArray[np.int32]"


class TooShort(ValueError):
    """A length that a task cannot have; says the shortest where it is known."""


@dataclass(frozen=True)
class Sample:
    """A context, a question about it, and the answers that count.

    Attributes:
        context: (n,) int32, all that stands before the question; what a memory is made of. Its first tokens are those
            that the tokenizer, and the chat template, put before a text.
        question: tokens of the question and of the beginning of the answer that the task gives.
        length: tokens of context, question and answer (`max_new_tokens`) together; 0: the facts alone, without a text,
            however many tokens they have.
        answers: references; none where the context does not hold the answer. metric: how they are compared
            (`scoring.py`).
        depth: 0..1, where the asked fact stands; None for tasks whose facts stand in many places.
        evidence: token spans [start, stop) of the context that hold what is asked for, in order.
        query: what is asked, as text, for records.
        notes: documents of their own behind the context, token ids each; facts of a library rather than of one text.
        also: further metrics that the answer gets.
        forced: the whole right answer as text, where the score is whether it is the likeliest token by token, and what
            is generated is scored beside it (the authors' tests).
        gold_notes: numbers of the notes that hold the answer, where the evidence stands in notes.
    """

    task: str
    index: int
    length: int
    context: Tokens
    question: list[int]
    answers: tuple[str, ...]
    max_new_tokens: int
    metric: str
    depth: float | None
    evidence: tuple[tuple[int, int], ...]
    query: str
    notes: tuple[tuple[int, ...], ...] = ()
    also: tuple[str, ...] = ()
    forced: str | None = None
    gold_notes: tuple[int, ...] = ()

    def prompt(self) -> Tokens:
        """(n,) int32, context, notes and question."""
        parts = [self.context, *self.notes, self.question]
        return np.concatenate([np.asarray(part, dtype=np.int32) for part in parts])


class Task(Protocol):
    """Makes samples of one kind.

    Attributes:
        name: RULER's name where it is a task of RULER. metric: how its answers are scored. max_new_tokens: the most
            that an answer may have. is_editable: whether the contexts of one length differ in a few spans only, so that
            a memory of one becomes that of the next by exact edits.
    """

    @property
    def name(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def max_new_tokens(self) -> int: ...
    @property
    def is_editable(self) -> bool: ...

    def samples(self, material: Material, length: int, number: int, seed: int) -> Iterator[Sample]:
        """`number` samples of exactly `length` tokens, at uniform depths where the task has one.

        Raises:
            TooShort: if the length is too short for the task. ValueError: without the files that it needs.
        """
        ...
