"""Samples of exactly known length out of head, context and question; used by every task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hsa_ultralong.eval.tasks.material import Material, nearest_free
from hsa_ultralong.eval.tasks.sample import Sample, Task, Tokens, TooShort
from hsa_ultralong.eval.tasks.scoring import BESIDE

# RULER's depths: 40 evenly spaced percentages
DEPTHS = np.round(np.linspace(0, 100, num=40)).astype(int) / 100


@dataclass(frozen=True)
class Form:
    """The tokens around a context: what stands before it, the line breaks that end it, and the question with the
    beginning of the answer.

    size: tokens of the whole sample, room for the answer included. notes: documents of their own behind the context.
    """

    head: list[int]
    end: list[int]
    question: list[int]
    size: int
    max_new_tokens: int
    notes: tuple[tuple[int, ...], ...] = ()

    @property
    def room(self) -> int:
        """Tokens left for the context."""
        around = len(self.head) + len(self.end) + len(self.question) + sum(map(len, self.notes))
        return self.size - self.max_new_tokens - around

    def require(self, least: int, task: str) -> None:
        """Refuse a length with room for less than `least` tokens of context."""
        if self.room < least:
            raise TooShort(f"{task} needs at least {self.size - self.room + least} tokens, got {self.size}")


def make_form(
    material: Material, task: Task, length: int, before: str, question: str, prefix: str, notes: Sequence[str] = ()
) -> Form:
    """before: text in front of the context. question: behind it; line breaks that it begins with belong to the context,
    so that the question can be a document of its own. prefix: the beginning of the answer. notes: further documents."""
    head = material.first + material.encode(before)
    breaks = question[: len(question) - len(question.lstrip("\n"))]
    asked = material.encode(question[len(breaks) :]) + material.turn + material.encode(prefix)
    own = tuple(tuple(material.first + material.encode(note)) for note in notes)
    end = material.encode(breaks) if breaks else []
    return Form(head, end, asked, length, max(task.max_new_tokens, material.answer_tokens), own)


def finish(
    task: Task,
    form: Form,
    context: Tokens,
    index: int,
    answers: Sequence[str],
    query: str,
    depth: float | None = None,
    spans: Sequence[tuple[int, int]] = (),
    forced: str | None = None,
) -> Sample:
    """The sample of a context (room,) int32; spans: of the evidence, counted in the context without its head."""
    if len(context) != form.room:
        raise AssertionError(f"{task.name}: {len(context)} tokens of context for {form.room}")
    shift = len(form.head)
    whole = np.concatenate([np.asarray(part, dtype=np.int32) for part in (form.head, context, form.end)])
    evidence = tuple(sorted((start + shift, stop + shift) for start, stop in spans))
    return Sample(
        task.name, index, form.size, whole, form.question, tuple(answers), form.max_new_tokens, task.metric, depth,
        evidence, query, form.notes, also=BESIDE.get(task.metric, ()), forced=forced,
    )  # fmt: skip


def write_in(
    context: Tokens, starts: np.ndarray | range, pieces: Sequence[Sequence[int]], depths: Sequence[float], task: str
) -> list[tuple[int, int]]:
    """Write pieces over tokens of the context, in place, each from the start (n,) that is nearest to its depth, or
    from the nearest token of all where no start has room.

    A piece takes the place of as many tokens, so nothing behind it moves and the next sample differs in few spans.

    Raises:
        TooShort: if there is no room for one.
    """
    spans: list[tuple[int, int]] = []
    for piece, depth in zip(pieces, depths, strict=True):
        place = round(depth * max(0, len(context) - len(piece)))
        start = nearest_free(starts, place, len(piece), spans, len(context))
        if start is None:
            start = nearest_free(range(len(context)), place, len(piece), spans, len(context))
        if start is None:
            wanted = sum(len(each) for each in pieces)
            raise TooShort(
                f"{task}: {len(context)} tokens of text have no room for {len(pieces)} facts of {wanted} tokens; "
                "use a greater length"
            )
        context[start : start + len(piece)] = piece
        spans.append((start, start + len(piece)))
    return spans


def filled(tokens: Sequence[int] | Tokens, room: int, filler: Sequence[int]) -> Tokens:
    """(room,) int32: the tokens, cut off at the room, then the filler again and again."""
    given = np.asarray(tokens, dtype=np.int32)[:room]
    missing = room - len(given)
    rest = np.tile(np.asarray(filler, dtype=np.int32), -(-missing // len(filler)))[:missing]
    return np.concatenate([given, rest])


def middle_depth(index: int, number: int) -> float:
    """The depth of sample `index` of `number`: uniform over 0..1, the same in every run."""
    return (index + 0.5) / number
