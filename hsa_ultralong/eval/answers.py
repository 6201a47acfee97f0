"""An answer as it grows, and when more of it cannot change the score.

Called by the readers; tests/eval/test_readers.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsa_ultralong.eval.evidence import Passage, Seen
from hsa_ultralong.eval.tasks import Sample, score

# metrics that no further text can lower, so an answer that has them may stop; the others read the first line only
_SUBSTRING = ("all", "part")


@dataclass(frozen=True)
class Reply:
    """What a model said, and how it found it.

    certainty: the largest fusion weight on one chunk of the memory while answering. Of the sample's evidence, when the
    answer began: found, whether one of its chunks was retrieved anywhere; rank, weight and margin (nats above the best
    other chunk) of the best of them in the head where it stands best; retrieved, the chunks of the greatest weights.
    None where the reader cannot know.
    """

    text: str
    tokens: list[int]
    certainty: float | None = None
    found: bool | None = None
    rank: int | None = None
    weight: float | None = None
    margin: float | None = None
    retrieved: tuple[Passage, ...] | None = None


class StopRule:
    """The answer as it grows, and whether more of it can change the score."""

    def __init__(self, sample: Sample, tokenizer: Any) -> None:
        self.sample, self.tokenizer = sample, tokenizer
        self.tokens: list[int] = []
        self.text, self.is_done = "", False

    def put(self, token: int, ends: Sequence[int]) -> None:
        self.tokens.append(token)
        self.text = self.tokenizer.decode(self.tokens, skip_special_tokens=True)
        is_enough = (
            bool(self.sample.answers) and score(self.sample.metric, self.text, self.sample.answers) == 1.0
            if self.sample.metric in _SUBSTRING
            else "\n" in self.text.lstrip()
        )
        self.is_done = is_enough or token in ends or len(self.tokens) >= self.sample.max_new_tokens

    def reply(self, seen: Seen) -> Reply:
        return Reply(
            self.text, self.tokens, seen.certainty, seen.found, seen.rank, seen.weight, seen.margin, seen.passages()
        )  # fmt: skip
