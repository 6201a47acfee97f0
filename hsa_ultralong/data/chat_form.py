"""Questions and answers as tokens: in the form of a tokenizer's chat template, or plain, as evaluation asks.

A tokenizer without a template asks by that of chat.py. Called by facts.py and questions.py; tests/data/test_facts.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.tokenizer import PieceTokenizer

_MARK = "QUESTIONMARKER"


@dataclass(frozen=True)
class Turn:
    """Tokens of a question up to its answer, of the answer with the token that ends it, and what follows a turn."""

    head: list[int]
    answer: list[int]
    tail: list[int]

    @property
    def size(self) -> int:
        return len(self.head) + len(self.answer) + len(self.tail)


@dataclass(frozen=True)
class ChatForm:
    """Token ids around a question and its answer: what stands before, between and after; the blank before an answer.

    opening: what stands before the first question of a conversation, a system message included. At the start of a
    document the row has its own bos, so `opening` and `first` come without one.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    blank: str
    opening: list[int]
    first: list[int]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> ChatForm:
        """That of a turn in the middle of a conversation, by the tokenizer's chat template if it has one."""
        before, between, after, blank, opening = "\nUser: ", "\nAssistant:", "\n", " ", "User: "
        if tokenizer.chat_template:
            first = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _MARK}]
            whole = str(tokenizer.apply_chat_template(first, tokenize=False))
            after = whole[whole.rindex(_MARK) + len(_MARK) :]
            turn = str(
                tokenizer.apply_chat_template(
                    [*first, {"role": "user", "content": _MARK}], tokenize=False, add_generation_prompt=True
                )
            )
            before, _, between = turn[len(whole) :].partition(_MARK)
            begun = str(tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False))
            blank, opening = "", begun[: begun.rindex(_MARK)]
        # special tokens of the template are special
        parts = before, between, after, opening, before.removeprefix("\n")
        ids = [list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts]
        own = [part[1:] if part[:1] == [tokenizer.bos_token_id] else part for part in ids[3:]]
        return ChatForm(ids[0], ids[1], ids[2], blank, *own)

    def turn(self, tokenizer: PieceTokenizer, question: list[int], answer: str, before: list[int]) -> Turn:
        """A turn of chat; before: `before`, or at the start of a document `opening` or `first`."""
        answered = tokenizer.encode_text(self.blank + answer)
        return Turn([*before, *question, *self.between], [*answered, *self.after[:1]], self.after[1:])


def plain_turn(tokenizer: PieceTokenizer, question: str, answer: str) -> Turn:
    """`Question: ...`, a line break, `Answer: ...`; a line break ends the answer."""
    head = tokenizer.encode_text(f"Question: {question}\nAnswer:")
    return Turn(head, tokenizer.encode_text(f" {answer}\n"), [])


class Asker:
    """Makes the turns of one row, all in one form: plain with this probability, or as chat, half of these begun with
    the template's system message."""

    def __init__(
        self, rng: np.random.Generator, tokenizer: PieceTokenizer, form: ChatForm, plain_fraction: float
    ) -> None:
        self._tokenizer, self._form = tokenizer, form
        self._is_plain = bool(rng.random() < plain_fraction)
        self._begin = (form.opening, form.first)[int(rng.integers(2))]

    def __call__(self, question: str, answer: str, *, begins: bool, follows_text: bool = False) -> Turn:
        """begins: the turn is the first of its document. follows_text: it follows a text, without a line break."""
        tokenizer = self._tokenizer
        if self._is_plain:
            turn = plain_turn(tokenizer, question, answer)
            return replace(turn, head=[*tokenizer.encode_text("\n"), *turn.head]) if follows_text else turn
        before = self._begin if begins else self._form.before
        return self._form.turn(tokenizer, tokenizer.encode_text(question), answer, before)
