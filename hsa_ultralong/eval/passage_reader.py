"""Controls of questions over passages: the same question as a plain prompt without them, with the right one, or with
those that a search finds. Any causal language model. tests/eval/test_passage_reader.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from hsa_ultralong.eval.answers import Reply
from hsa_ultralong.eval.readers import PromptReader
from hsa_ultralong.eval.tasks import Material, Sample

CONTROLS = ("closed", "gold", "bm25")
# passages of a search that stand in the prompt
_FOUND = 5


class PassageReader(PromptReader):
    """closed: no passage; gold: those that hold the answer; bm25: the best five of a search by words, the best last."""

    def __init__(self, model: Any, material: Material, setting: str) -> None:
        """
        Raises:
            ValueError: for a setting that is none, or without the package of the search.
        """
        if setting not in CONTROLS:
            raise ValueError(f"a control must be one of {', '.join(CONTROLS)}, got {setting!r}")
        super().__init__(model, material)
        # the length is that of the passages, of which the prompt holds few
        self.setting, self.positions, self.limit = setting, self.limit, None
        self._search = _Search() if setting == "bm25" else None

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
        return [sample.notes[number] for number in self._search.best(sample, self.material.tokenizer)]

    def answer(self, samples: Sequence[Sample]) -> list[Reply]:
        return super().answer([self._rewritten(sample) for sample in samples])

    def forced(self, samples: Sequence[Sample]) -> list[bool | None]:
        return super().forced([self._rewritten(sample) for sample in samples])


class _Search:
    """BM25 over the passages of a sample; the index serves all samples with the same ones."""

    def __init__(self) -> None:
        try:
            self._package = import_module("bm25s")
        except ImportError:
            raise ValueError("--setting bm25 needs the package bm25s: pip install 'hsa-ultralong[eval]'") from None
        self._notes: tuple[tuple[int, ...], ...] | None = None
        self._index: Any = None

    def _words(self, texts: list[str]) -> Any:
        return self._package.tokenize(texts, stopwords="en", show_progress=False)

    def best(self, sample: Sample, tokenizer: Any) -> list[int]:
        """Numbers of the notes found, the best last, next to the question."""
        if self._notes is not sample.notes:
            texts = [tokenizer.decode(list(note), skip_special_tokens=True) for note in sample.notes]
            self._index = self._package.BM25()
            self._index.index(self._words(texts), show_progress=False)
            self._notes = sample.notes
        count = min(_FOUND, len(sample.notes))
        found, _ = self._index.retrieve(self._words([sample.query]), k=count, show_progress=False)
        return [int(number) for number in found[0][::-1]]
