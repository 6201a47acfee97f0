"""An answer as it grows, and when more of it cannot change the score.

Called by the readers; tests/eval/test_readers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hsa_ultralong.eval.evidence import Passage, Seen
from hsa_ultralong.eval.tasks import Material, Sample, score
from hsa_ultralong.eval.tasks.scoring import LABELS

# where the first sentence ends, which alone counts where labels are looked for; a line break does not end it
_SENTENCE_ENDS = (".", "<context>", "<example>")
# metrics that no further text can lower, so an answer that has them may stop; the others read the first line only
_SUBSTRING = ("all", "part")
# metrics of answers that may be forced: those that one text satisfies word for word
FORCED = ("exact", "begins", "all", "part", "in_order")


@dataclass(frozen=True)
class Reply:
    """What a model said, and how it found it.

    certainty: the largest fusion weight on one chunk of the memory while answering. Of the sample's evidence, when the
    answer began: found, whether one of its chunks was retrieved anywhere; rank, weight and margin (nats above the best
    other chunk) of the best of them in the head where it stands best; retrieved, the chunks of the greatest weights.
    teacher: whether every token of the right answer was the likeliest, given those before it. None where the reader
    cannot know, or was not asked.
    """

    text: str | None
    tokens: list[int]
    certainty: float | None = None
    found: bool | None = None
    rank: int | None = None
    weight: float | None = None
    margin: float | None = None
    retrieved: tuple[Passage, ...] | None = None
    teacher: bool | None = None


class StopRule:
    """The answer as it grows, and whether more of it can change the score."""

    def __init__(self, sample: Sample, tokenizer: Any) -> None:
        self.sample, self.tokenizer = sample, tokenizer
        self.tokens: list[int] = []
        self.text, self.is_done = "", False

    def put(self, token: int, ends: Sequence[int]) -> None:
        self.tokens.append(token)
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        self.is_done = self._is_enough() or token in ends or len(self.tokens) >= self.sample.max_new_tokens

    def _is_enough(self) -> bool:
        metric, answers = self.sample.metric, self.sample.answers
        if metric in LABELS:
            return any(end in self.text.lower() for end in _SENTENCE_ENDS)
        if metric in _SUBSTRING:
            return bool(answers) and score(metric, self.text, answers) == 1.0
        return "\n" in self.text.lstrip()

    def reply(self, seen: Seen) -> Reply:
        return Reply(
            self.text, self.tokens, seen.certainty, seen.found, seen.rank, seen.weight, seen.margin, seen.passages()
        )  # fmt: skip


def forced_answer(sample: Sample, material: Material) -> list[int] | None:
    """Tokens of the one right answer as they follow the question; None where there are none or several."""
    answer = sample.forced or (sample.answers[0] if len(sample.answers) == 1 else None)
    if sample.metric not in FORCED or answer is None:
        return None
    before = str(material.tokenizer.decode(sample.question[-1:]))
    return material.encode(answer if before[-1:].isspace() else f" {answer}")


def is_likeliest(logits: torch.Tensor, answer: Sequence[int]) -> bool:
    """Whether the last len(answer) + 1 of the logits (n, V), but for the last, are greatest at the answer's tokens."""
    own = logits[len(logits) - len(answer) - 1 : len(logits) - 1]
    return bool((own.argmax(-1) == torch.tensor(answer, device=own.device)).all())
