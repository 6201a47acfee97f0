"""Questions and answers as tokens: in the form of a tokenizer's chat template, or plain, as evaluation asks.

A tokenizer without a template asks by that of chat.py. Called by facts.py, questions.py and conversations.py;
tests/data/test_facts.py, test_conversations.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from transformers import PreTrainedTokenizerFast

from hsa_ultralong.data.tokenizer import PieceTokenizer

# what a question in the form of chat says where answers in a sentence are taught and this one is a short one
IN_A_FEW_WORDS = "Answer in a few words."
_MARK, _SYSTEM_MARK = "QUESTIONMARKER", "SYSTEMMARKER"


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
    document the row has its own bos, so `opening` and `first` come without one. system: what stands before a system
    message of the conversation's own and between it and the first question; None if the template takes none.
    """

    before: list[int]
    between: list[int]
    after: list[int]
    blank: str
    opening: list[int]
    first: list[int]
    system: tuple[list[int], list[int]] | None = None

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerFast) -> ChatForm:
        """That of a turn in the middle of a conversation, by the tokenizer's chat template if it has one."""
        before, between, after, blank, opening = "\nUser: ", "\nAssistant:", "\n", " ", "User: "
        system: tuple[str, str] | None = ("", "\nUser: ")
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
            blank, opening, system = "", begun[: begun.rindex(_MARK)], _around_system(tokenizer)
        # special tokens of the template are special
        parts = before, between, after, opening, before.removeprefix("\n"), *(system or ())
        options = {"add_special_tokens": False, "split_special_tokens": False}
        ids = [list(tokenizer(part, **options)["input_ids"]) for part in parts]
        own = [part[1:] if part[:1] == [tokenizer.bos_token_id] else part for part in ids[3:6]]
        told = (own[2], ids[6]) if system else None
        return ChatForm(ids[0], ids[1], ids[2], blank, own[0], own[1], told)

    def turn(self, tokenizer: PieceTokenizer, question: list[int], answer: str, before: list[int]) -> Turn:
        """A turn of chat; before: `before`, or at the start of a document `opening` or `first`."""
        answered = tokenizer.encode_text(self.blank + answer)
        return Turn([*before, *question, *self.between], [*answered, *self.after[:1]], self.after[1:])

    def conversation(
        self, tokenizer: PieceTokenizer, messages: Sequence[Mapping[str, str]], *, is_bare: bool
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a document that is a conversation, and the spans [start, stop) of its answers, each with the token
        that ends it; nothing stands behind the last.

        Args:
            messages: user and assistant in turn, after a system message or not.
            is_bare: a conversation without a system message begins without that of the template.

        Raises:
            ValueError: a system message, and the template takes none.
        """
        tokens, answers = list(self.first if is_bare else self.opening), list[tuple[int, int]]()
        if messages[0]["role"] == "system":
            if self.system is None:
                raise ValueError("the tokenizer's chat template takes no system message")
            tokens = [*self.system[0], *tokenizer.encode_text(messages[0]["content"]), *self.system[1]]
            messages = messages[1:]
        before: list[int] = []
        for asked, answered in zip(messages[::2], messages[1::2], strict=True):
            question = tokenizer.encode_text(asked["content"])
            turn = self.turn(tokenizer, question, answered["content"], before)
            start = len(tokens) + len(turn.head)
            answers.append((start, start + len(turn.answer)))
            tokens += [*turn.head, *turn.answer]
            before = [*turn.tail, *self.before]
        return tokens, answers


def _around_system(tokenizer: PreTrainedTokenizerFast) -> tuple[str, str] | None:
    """What a chat template puts before a system message, and between it and the first question; None without one."""
    messages = [{"role": "system", "content": _SYSTEM_MARK}, {"role": "user", "content": _MARK}]
    try:
        begun = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:
        if not type(error).__module__.startswith("jinja2"):
            raise
        return None
    before, found, rest = begun.partition(_SYSTEM_MARK)
    between, asked, _ = rest.partition(_MARK)
    return (before, between) if found and asked else None


def plain_turn(tokenizer: PieceTokenizer, question: str, answer: str) -> Turn:
    """`Question: ...`, a line break, `Answer: ...`; a line break ends the answer."""
    head = tokenizer.encode_text(f"Question: {question}\nAnswer:")
    return Turn(head, tokenizer.encode_text(f" {answer}\n"), [])


def asked_as(
    rng: np.random.Generator, question: str, answer: str, sentence: str, p_sentence: float, says_short: bool
) -> tuple[str, str]:
    """A question in the form of chat with its answer: the sentence, if there is one, with this probability; else the
    short one, which is asked for where sentences are taught."""
    if sentence and p_sentence and rng.random() < p_sentence:
        return question, sentence
    return (f"{question} {IN_A_FEW_WORDS}" if says_short or p_sentence else question), answer


class Asker:
    """Makes the turns of one row, all in one form: plain with this probability, or as chat, half of these begun with
    the template's system message.

    p_sentence: of questions in the form of chat that have a sentence, it is the answer with this probability. All
    others then ask for a few words, as they do with `says_short`.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        tokenizer: PieceTokenizer,
        form: ChatForm,
        plain_fraction: float,
        p_sentence: float = 0.0,
        says_short: bool = False,
    ) -> None:
        self._tokenizer, self._form = tokenizer, form
        self._rng, self._p_sentence, self._says_short = rng, p_sentence, says_short
        self._is_plain = bool(rng.random() < plain_fraction)
        self._begin = (form.opening, form.first)[int(rng.integers(2))]

    def choose(self, question: str, answer: str, sentence: str) -> tuple[str, str]:
        """A question as the row asks it, and what is answered: `answer` or the sentence."""
        if self._is_plain:
            return question, answer
        return asked_as(self._rng, question, answer, sentence, self._p_sentence, self._says_short)

    def __call__(self, question: str, answer: str, *, begins: bool, follows_text: bool = False) -> Turn:
        """begins: the turn is the first of its document. follows_text: it follows a text, without a line break."""
        tokenizer = self._tokenizer
        if self._is_plain:
            turn = plain_turn(tokenizer, question, answer)
            return replace(turn, head=[*tokenizer.encode_text("\n"), *turn.head]) if follows_text else turn
        before = self._begin if begins else self._form.before
        return self._form.turn(tokenizer, tokenizer.encode_text(question), answer, before)
