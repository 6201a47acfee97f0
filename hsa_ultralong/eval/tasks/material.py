"""What tasks are made of: a tokenizer with its chat template, a haystack, words. tests/eval/tasks/test_samples.py."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from hsa_ultralong.eval.haystack import recombined
from hsa_ultralong.eval.tasks.sample import Tokens

_T = TypeVar("_T")
_SLOT = "\x00context\x00"
# first characters of tokens that begin a word: GPT-2's and SentencePiece's blank, line breaks
_BLANKS = ("Ġ", "▁", " ", "Ċ", "\n", "<0x0A>")
_SENTENCE_ENDS = (".", "!", "?", '."', '!"', '?"', ".'")
_BREAKS = ("Ċ", "\n", "<0x0A>")


@dataclass
class Material:
    """A tokenizer and a text, from which every task makes its samples.

    Attributes:
        tokenizer: of the model that is measured.
        text: (n,) int32 tokens of the haystack; a length beyond it goes on with its lines in new orders. Tokens that
            the tokenizer puts before a text are left out.
        chat: whether the task text is put into the tokenizer's chat template as a user's message, the given beginning
            of the answer behind it (as RULER does); refused without a template.
        answer_tokens: room for an answer where a task's own is less; 0: the task's. A model that answers in a sentence
            needs more than a number has.
        files: data of tasks that read some, by the name of the task's source ("squad", "hotpot", ...).
    """

    tokenizer: Any
    text: torch.Tensor
    chat: bool = False
    answer_tokens: int = 0
    files: dict[str, Path] = field(default_factory=dict)
    _haystack: tuple[int, Tokens, np.ndarray] | None = field(default=None, repr=False)
    _kept: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.text = without_special(self.text, self.tokenizer)
        if len(self.text) == 0:
            raise ValueError("the haystack has no tokens; give a text")

    def encode(self, text: str) -> list[int]:
        """Tokens of a piece of text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of many pieces of text, nothing added."""
        return list(self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]) if texts else []

    def kept(self, name: Hashable, make: Callable[[], _T]) -> _T:
        """What is made once for all samples of this material."""
        if name not in self._kept:
            self._kept[name] = make()
        found: _T = self._kept[name]
        return found

    @cached_property
    def first(self) -> list[int]:
        """What stands before every text: the tokenizer's own tokens, or the chat template's opening."""
        return self.encode(self._around[0]) if self.chat else list(self.tokenizer("")["input_ids"])

    @cached_property
    def turn(self) -> list[int]:
        """What stands between the task text and the answer: the chat template's change of turns."""
        return self.encode(self._around[1]) if self.chat else []

    @cached_property
    def _around(self) -> tuple[str, str]:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError("the tokenizer has no chat template; leave chat out, or give it one")
        message = [{"role": "user", "content": _SLOT}]
        whole = self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        before, slot, after = whole.partition(_SLOT)
        if not slot:
            raise ValueError("the chat template changes the message it is given; leave chat out")
        return before, after

    def haystack(self, length: int, room: int) -> tuple[Tokens, np.ndarray]:
        """(room,) int32, the beginning of the text of a length, and where its sentences start, (sentences,) int64.

        The text, then its lines recombined: the same for every task and sample of a length.
        """
        if self._haystack is None or self._haystack[0] != length:
            tokens = recombined(self.text, length, self.tokenizer).numpy()
            self._haystack = (length, tokens, self.sentence_starts(tokens))
        _, tokens, starts = self._haystack
        return tokens[:room].copy(), starts[: int(np.searchsorted(starts, room))]

    @cached_property
    def _edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Which tokens end a sentence, begin a word, end a line; (V,) bool each."""
        names = [str(name) for name in self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))]
        ends = np.array([name.endswith(_SENTENCE_ENDS) for name in names])
        begins = np.array([name.startswith(_BLANKS) for name in names])
        return ends, begins, np.array([name.endswith(_BREAKS) for name in names])

    def sentence_starts(self, tokens: Tokens) -> np.ndarray:
        """Where sentences and lines begin, (sentences,) int64 ascending, 0 left out."""
        ends, begins, breaks = self._edges
        return np.flatnonzero((ends[tokens[:-1]] & begins[tokens[1:]]) | breaks[tokens[:-1]]) + 1


def without_special(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Those of tokens (n,) that are of the text."""
    return tokens[~torch.isin(tokens, torch.tensor(tokenizer.all_special_ids, dtype=tokens.dtype))]


def word_list(*names: str) -> list[str]:
    """Sorted words of the package wonderwords: "noun", "adjective", "verb".

    Raises:
        ValueError: if the package is not installed.
    """
    try:
        package = import_module("wonderwords.assets")
    except ImportError:
        raise ValueError("RULER's words need the package wonderwords: pip install 'hsa-ultralong[eval]'") from None
    folder = Path(str(package.__file__)).parent
    found = {word for name in names for word in (folder / f"{name}list.txt").read_text(encoding="utf-8").split("\n")}
    return sorted(word for word in found if word)


def nearest_free(
    starts: np.ndarray | range, place: int, size: int, taken: Sequence[tuple[int, int]], limit: int
) -> int | None:
    """The start (ascending) nearest to `place` whose span of `size` tokens ends by `limit` and overlaps none taken;
    None if there is none."""

    def fits(start: int) -> bool:
        return start + size <= limit and all(start + size <= begin or start >= end for begin, end in taken)

    right = bisect_left(starts, place)
    left = right - 1
    while left >= 0 or right < len(starts):
        nearer_left = right == len(starts) or (left >= 0 and place - starts[left] <= starts[right] - place)
        start = int(starts[left if nearer_left else right])
        if fits(start):
            return start
        left, right = (left - 1, right) if nearer_left else (left, right + 1)
    return None
