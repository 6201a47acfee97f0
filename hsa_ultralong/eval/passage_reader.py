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

_SEARCHES: dict[str, Callable[[], PassageSearch]] = {"bm25": WordSearch, "dense": MeaningSearch}
CONTROLS = ("closed", "gold", *_SEARCHES)
# passages of a search that stand in the prompt
_FOUND = 5


class PassageReader(PromptReader):
    """closed: no passage; gold: those that hold the answer; bm25, dense: the best five of a search by words, or by the
    vectors of a small embedder, the best last."""

    def __init__(self, model: Any, material: Material, setting: str) -> None:
        """
        Raises:
            ValueError: for a setting that is none, or without the package of the search.
        """
        if setting not in CONTROLS:
            raise ValueError(f"a control must be one of {', '.join(CONTROLS)}, got {setting!r}")
        super().__init__(model, material)
        self._notes: tuple[tuple[int, ...], ...] | None = None
        # the length is that of the passages, of which the prompt holds few
        self.setting, self.positions, self.limit = setting, self.limit, None
        self._search = _SEARCHES[setting]() if setting in _SEARCHES else None

    def _rewritten(self, sample: Sample) -> Sample:
        """The sample whose context is what the control gives."""
        if not sample.notes:
            raise ValueError(f"{sample.task} has no passages; --setting {self.setting} is of the suite qa")
        texts = [self.material.tokenizer.decode(list(note), skip_special_tokens=True) for note in self._chosen(sample)]
        head = self.material.first + self.material.encode("".join(f"{text}\n\n" for text in texts))
        length = len(head) + len(sample.question) + sample.max_new_tokens
        if self.positions is not None and length > self.positions:
            raise ValueError(f"this model has positions for {self.positions:,} tokens, {length:,} wanted")
        return replace(sample, context=np.array(head, dtype=np.int32), notes=(), evidence=(), length=length)

    def _chosen(self, sample: Sample) -> list[tuple[int, ...]]:
        if self.setting == "closed":
            return []
        if self._search is None:
            return [sample.notes[number] for number in sample.gold_notes]
        if self._notes is not sample.notes:  # the index serves all samples with the same passages
            self._notes = sample.notes
            decode = self.material.tokenizer.decode
            self._search.index([decode(list(note), skip_special_tokens=True) for note in sample.notes])
        found = self._search.best(sample.query, min(_FOUND, len(sample.notes)))
        return [sample.notes[number] for number in reversed(found)]

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        return super().answer([self._rewritten(sample) for sample in samples])

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        return super().forced([self._rewritten(sample) for sample in samples])
