"""Tokens of long texts out of fragments that are each encoded once, and draws without repetition, both by numpy.

A sample of 16M tokens is put together in seconds, where encoding its text takes minutes. Called by ruler_words.py and
ruler_questions.py; tests/eval/tasks/test_fragments.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from hsa_ultralong.eval.tasks.material import Material
from hsa_ultralong.eval.tasks.sample import Tokens

# fragments that are encoded as one text, to see whether it has the tokens of its fragments
_LOOKED_AT = 600
# of these the first are a lead, whose own beginning a tokenizer may treat as that of a text
_LEAD = 8


class Fragments:
    """Fragments of text with the tokens of each; texts are made of their numbers."""

    def __init__(self, material: Material, *groups: tuple[str, Sequence[str], str]) -> None:
        """groups: fragments, with a text before and one behind that are like what stands around them."""
        self._material, self.texts = material, [text for _, texts, _ in groups for text in texts]
        self._is_split = True
        lists: list[list[int]] = []
        for before, texts, behind in groups:
            # most tokenizers split there, so that what stands around has the tokens that it has alone
            head, tail = material.encode(before), material.encode(behind)
            for ids in material.encode_all([before + text + behind for text in texts]):
                cut = len(ids) - len(tail)
                self._is_split &= ids[: len(head)] == head and ids[cut:] == tail
                lists.append(ids[len(head) : cut])
        self.sizes = np.array([len(ids) for ids in lists], dtype=np.int64)
        self._starts = np.cumsum(self.sizes) - self.sizes
        self._ids = np.array([token for ids in lists for token in ids], dtype=np.int32)

    def tokens(self, order: np.ndarray) -> Tokens:
        """(n,) int32, the tokens of the fragments of these numbers, one behind the other."""
        sizes = self.sizes[order]
        first = np.cumsum(sizes) - sizes
        return self._ids[np.arange(int(sizes.sum())) + np.repeat(self._starts[order] - first, sizes)]

    def encode(self, order: np.ndarray) -> Tokens:
        """(n,) int32 of the whole text: `tokens` where the tokenizer splits it so, seen at its beginning, middle and
        end; of the text itself where it does not."""
        places = {0, max(0, len(order) // 2 - _LOOKED_AT), max(0, len(order) - _LOOKED_AT)}
        if self._is_split and all(self._is_alike(order[start : start + _LOOKED_AT], start == 0) for start in places):
            return self.tokens(order)
        return np.asarray(self._material.encode(self.text(order)), dtype=np.int32)

    def _is_alike(self, order: np.ndarray, is_first: bool) -> bool:
        own = self.tokens(order if is_first else order[_LEAD:])
        found = np.asarray(self._material.encode(self.text(order)), dtype=np.int32)
        return np.array_equal(found if is_first else found[max(0, len(found) - len(own)) :], own)

    def text(self, order: np.ndarray) -> str:
        """The fragments of these numbers, one behind the other."""
        return "".join([self.texts[i] for i in order.tolist()])


def first_distinct(
    rng: np.random.Generator, draw: Callable[[int], np.ndarray], code: Callable[[np.ndarray], np.ndarray], number: int
) -> np.ndarray:
    """(number, k): the first different ones of a stream of draws, in their order; `rng` goes on behind the last of
    them, as if they had been drawn one by one.

    Args:
        draw: n -> (n, k), the next draws of `rng`. code: (n, k) -> (n,), which tells them apart.
    """
    state, size = rng.bit_generator.state, number + number // 8 + 16
    while True:
        drawn = draw(size)
        places = np.sort(np.unique(code(drawn), return_index=True)[1])[:number]
        rng.bit_generator.state = state
        if len(places) == number:
            draw(int(places[-1]) + 1)
            return drawn[places]
        size *= 2
