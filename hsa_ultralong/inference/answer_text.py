"""Text of an answer as its tokens come, held back where a token to come may change it or a stop string may begin.

Called by ask.py and serve/worker.py; tests/inference/test_answer_text.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class AnswerText:
    """The text of tokens put one by one, up to the first stop string.

    Attributes:
        text: all that is settled, stop strings cut off. is_stopped: one was found; no more tokens are wanted.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, [one for one in stop if one]
        self.tokens: list[int] = []
        self.text, self.is_stopped = "", False
        # tokens before `_settled` are in the text; decoding begins at `_first`, as a token's text depends on those
        # just before it
        self._first = self._settled = self._shown = 0
        self._before = ""  # the text of tokens _first.._settled

    def _decode(self, start: int, stop: int) -> str:
        return str(self.tokenizer.decode(self.tokens[start:stop], skip_special_tokens=True))

    def put(self, token: int) -> str:
        """The next piece of text to pass on, often empty."""
        self.tokens.append(token)
        self._settle(is_end=False)
        return self._pass_on(is_end=False)

    def end(self) -> str:
        """The rest, when no token follows."""
        if not self.is_stopped:
            self._settle(is_end=True)
        return self._pass_on(is_end=True)

    def _settle(self, *, is_end: bool) -> None:
        count = len(self.tokens)
        before, after = self._before, self._decode(self._first, count)
        # half a character is shown as U+FFFD until its other half has come
        if len(after) > len(before) and (is_end or not after.endswith("\ufffd")):
            self.text += after[len(before) :]
            self._first, self._settled = self._settled, count
            self._before = self._decode(self._first, count)
        found = [place for place in (self.text.find(one, self._reach()) for one in self.stop) if place >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True

    def _reach(self) -> int:
        """Where a stop string that is not found yet may begin."""
        return max(0, self._shown - max(map(len, self.stop)))

    def _pass_on(self, *, is_end: bool) -> str:
        stop = len(self.text) if is_end or self.is_stopped else len(self.text) - self._held()
        piece, self._shown = self.text[self._shown : stop], max(self._shown, stop)
        return piece

    def _held(self) -> int:
        """Characters at the end that may begin a stop string."""
        lengths = (n for one in self.stop for n in range(min(len(one) - 1, len(self.text)), 0, -1)
                   if self.text.endswith(one[:n]))  # fmt: skip
        return max(lengths, default=0)
