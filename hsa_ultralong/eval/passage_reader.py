"""Controls of questions over passages: the same question as a plain prompt without them, with the right one, or with
those that a search finds. Any causal language model. tests/eval/test_passage_reader.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from hsa_ultralong.eval.answers import Reply
from hsa_ultralong.eval.passage_search import MeaningSearch, PassageSearch, WordSearch
from hsa_ultralong.eval.readers import PromptReader
from hsa_ultralong.eval.tasks import Material, Sample
from hsa_ultralong.inference.prompts import passages_text

_SEARCHES: dict[str, Callable[[], PassageSearch]] = {"bm25": WordSearch, "dense": MeaningSearch}
CONTROLS = ("closed", "gold", *_SEARCHES)
# passages of a search that stand in the prompt, where no number of tokens is given
_FOUND = 5


class PassageReader(PromptReader):
    """closed: no passage; gold: those that hold the answer; bm25, dense: the best of a search by words, or by the
    vectors of a small embedder, the best last: five, or as many as fill a prompt of `passage_tokens` tokens."""

    def __init__(self, model: Any, material: Material, setting: str, *, passage_tokens: int | None = None) -> None:
        """
        Args:
            passage_tokens: of the prompt with its question, without the answer; the worst passage loses its beginning.

        Raises:
            ValueError: for a setting that is none or finds no passages to fill a prompt with, or without the package of
                the search.
        """
        if setting not in CONTROLS:
            raise ValueError(f"a control must be one of {', '.join(CONTROLS)}, got {setting!r}")
        if passage_tokens is not None and setting not in _SEARCHES:
            raise ValueError(f"passage_tokens is of {' and '.join(_SEARCHES)}, {setting} has its own passages or none")
        super().__init__(model, material)
        self._notes: tuple[tuple[int, ...], ...] | None = None
        # the length is that of the passages, of which the prompt holds few
        self.setting, self.positions, self.limit = setting, self.limit, None
        self.passage_tokens = passage_tokens
        self._search = _SEARCHES[setting]() if setting in _SEARCHES else None

    def _rewritten(self, sample: Sample) -> Sample:
        """The sample whose context is what the control gives."""
        if not sample.notes:
            raise ValueError(f"{sample.task} has no passages; --setting {self.setting} is of the suite qa")
        first, room = self.material.first, None
        if self.passage_tokens is not None:
            room = self.passage_tokens - len(first) - len(sample.question)
            if room < 1:
                least = self.passage_tokens + 1 - room
                raise ValueError(
                    f"--passage-tokens must hold the question and more: at least {least} for {sample.query!r}"
                )
        decode = self.material.tokenizer.decode
        texts = [decode(list(note), skip_special_tokens=True) for note in self._chosen(sample, room)]
        passages = self.material.encode(passages_text(texts))
        head = [*first, *(passages if room is None else passages[-room:])]
        length = len(head) + len(sample.question) + sample.max_new_tokens
        if self.positions is not None and length > self.positions:
            raise ValueError(f"this model has positions for {self.positions:,} tokens, {length:,} wanted")
        return replace(sample, context=np.array(head, dtype=np.int32), notes=(), evidence=(), length=length)

    def _chosen(self, sample: Sample, room: int | None) -> list[tuple[int, ...]]:
        """The passages of a prompt, the best last; with `room` at least so many tokens of them, if there are any."""
        if self.setting == "closed":
            return []
        if self._search is None:
            return [sample.notes[number] for number in sample.gold_notes]
        if self._notes is not sample.notes:  # the index serves all samples with the same passages
            self._notes = sample.notes
            decode = self.material.tokenizer.decode
            self._search.index([decode(list(note), skip_special_tokens=True) for note in sample.notes])
        wanted = len(sample.notes) if room is not None else min(_FOUND, len(sample.notes))
        found = [sample.notes[number] for number in self._search.best(sample.query, wanted)]
        if room is not None:
            ends = np.cumsum([len(note) for note in found])
            found = found[: int(np.searchsorted(ends, room)) + 1]
        return found[::-1]

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        return super().answer([self._rewritten(sample) for sample in samples])

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        return super().forced([self._rewritten(sample) for sample in samples])
