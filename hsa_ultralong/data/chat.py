"""Conversations as plain text, so that any tokenizer can write them, and the training rows made of stored ones.

The template, one message a line (docs/data.md); a system message has no name in front of it:

    You answer in one word.
    User: What is the capital of France?
    Assistant: Paris

A conversation is a document, so it ends with eos, and the loss counts the assistant's words and this eos alone: a model
learns to end where an answer ends. Called by ``build.py``, ``mixture.py`` and ``instructions.py``; tested in
``tests/data/test_chat.py``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence

import numpy as np

from hsa_ultralong.data.rows import Row, RowLayout, RowWriter
from hsa_ultralong.data.shards import TokenShards

logger = logging.getLogger(__name__)

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
NAMES = {SYSTEM: "", USER: "User:", ASSISTANT: "Assistant:"}
# a row is full when so many conversations drawn in turn did not fit
_MAX_MISSES = 8

# Alpaca's frame of a prompt, and a speaker's line
_FRAME = re.compile(r"### Instruction:\n(.*?)\n+### Response:\s*\Z", re.DOTALL)
_SPEAKER = re.compile(r"([^:]{1,40}): *(\S.*)")

ChatMessage = Mapping[str, str]


def parse_messages(row: object, field: str, where: str) -> list[dict[str, str]]:
    """The messages of a row ``{field: [{"role": ..., "content": ...}, ...]}`` up to the assistant's last one.

    The field may hold the turns of two speakers as one text, ``NAME: words`` a line, of whom the first is the user.
    Without the field a row may be a prompt and a response, or an instruction (with an input) and an output.

    Raises:
        ValueError: naming ``where`` and what is wrong, if it is none of these or the assistant says nothing.
    """
    value = row.get(field, _pair(row)) if isinstance(row, dict) else None
    if isinstance(value, str):
        value = _turns(value) or value
    if not isinstance(value, list):
        got = f"fields {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
        raise ValueError(f"{where}: required an object with a list of messages in {field!r}, got {got}")
    messages: list[dict[str, str]] = []
    for number, message in enumerate(value, start=1):
        role, content = (message.get("role"), message.get("content")) if isinstance(message, dict) else (None, None)
        if role not in NAMES:
            raise ValueError(f"{where}: message {number} has role {role!r}, known are {', '.join(NAMES)}")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"{where}: message {number} has no text in 'content'")
        try:
            content.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{where}: message {number} holds half of a character pair: not UTF-8") from error
        messages.append({"role": role, "content": content.strip()})
    while messages and messages[-1]["role"] != ASSISTANT:
        messages.pop()
    if not messages:
        raise ValueError(f"{where}: the assistant says nothing, so there is nothing to learn")
    return messages


def _pair(row: Mapping[str, object]) -> list[dict[str, object]] | None:
    """The two messages of a row that is one instruction and its answer; None for any other."""
    # self-instruct's form holds several inputs and outputs
    several = row.get("instances")
    held = several[0] if isinstance(several, list) and several and isinstance(several[0], dict) else row
    asked, answered = row.get("instruction", row.get("prompt")), held.get("output", row.get("response"))
    if not isinstance(asked, str) or not isinstance(answered, str):
        return None
    # a prompt in Alpaca's frame is the instruction in it
    if framed := _FRAME.search(asked):
        asked = framed[1].strip()
    given = held.get("input")
    if isinstance(given, str) and given.strip():
        asked = f"{asked.strip()}\n\n{given.strip()}"
    return [{"role": USER, "content": asked}, {"role": ASSISTANT, "content": answered}]


def _turns(text: str) -> list[dict[str, str]] | None:
    """The messages of ``NAME: words`` lines of two speakers; None for another text."""
    names: list[str] = []
    messages: list[dict[str, str]] = []
    for line in filter(None, map(str.strip, text.split("\n"))):
        found = _SPEAKER.fullmatch(line)
        name, words = (found[1], found[2]) if found else ("", line)
        if name and name not in names and len(names) < 2:
            names.append(name)
        if name not in names:  # a line that goes on
            name, words = "", line
        role = USER if names[:1] == [name] else ASSISTANT
        if name and (not messages or messages[-1]["role"] != role):
            messages.append({"role": role, "content": words})
        elif messages:
            messages[-1]["content"] += f"\n{words}"
        else:
            return None
    return messages if len(names) == 2 else None


def conversation_pieces(messages: Sequence[ChatMessage]) -> list[tuple[str, bool]]:
    """Pieces of the conversation's text in order, each with whether the loss counts it.

    Cuts lie where every pre-tokenizer cuts, before the blank of an answer and before a line break, so the tokens of the
    pieces, joined, are those of the text.
    """
    pieces: list[tuple[str, bool]] = []
    before = ""
    for message in messages:
        content = message["content"].strip()
        name = NAMES[message["role"]]
        if message["role"] == ASSISTANT:
            pieces += [(f"{before}{name}", False), (f" {content}", True)]
            before = "\n"
        else:
            before += f"{name} {content}\n" if name else f"{content}\n"
    # what no answer follows
    return [*pieces, (before.removesuffix("\n"), False)] if before.strip() else pieces


def chat_prompt(messages: Sequence[ChatMessage]) -> str:
    """The text after which a model trained on this template gives the assistant's next answer, up to ``Assistant:``.

    Tokenised with bos in front it begins as the training document of the same conversation does.
    """
    text = "".join(piece for piece, _ in conversation_pieces(messages))
    return f"{text}\n{NAMES[ASSISTANT]}" if text else NAMES[ASSISTANT]


class ConversationSampler:
    """Draws conversations of one split, each equally likely, if they have at most ``max_tokens`` tokens.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, shards: TokenShards, split: str, max_tokens: int) -> None:
        conversations = shards.conversations(split)
        if len(conversations) == 0:
            raise ValueError(
                f"the {split} split of {shards.path} holds no conversation; build the shards with "
                "hsa data --chat FILE, or use the row kind instructions, which is made from text"
            )
        lengths = shards.offsets[conversations + 1] - shards.offsets[conversations]
        self._documents: np.ndarray = conversations[lengths <= max_tokens]
        self._shards = shards
        if len(self._documents) == 0:
            raise ValueError(
                f"no conversation of the {split} split has at most seq_len={max_tokens} tokens (the shortest has "
                f"{lengths.min():,}); use a larger seq_len"
            )
        if too_long := len(conversations) - len(self._documents):
            logger.warning(
                "%d of %d conversations have more than seq_len=%d tokens and are left out",
                too_long, len(conversations), max_tokens,
            )  # fmt: skip

    def draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, bos first and eos last, (n,) uint16 or uint32, and whether the loss counts them, (n,) bool."""
        document = int(self._documents[int(rng.integers(0, len(self._documents)))])
        return self._shards.tokens(document), self._shards.loss_mask(document)


def sft_row(rng: np.random.Generator, layout: RowLayout, sampler: ConversationSampler) -> Row:
    """Whole conversations packed into a row, none seeing another, until none of some drawn in turn fits."""
    writer = RowWriter(layout)
    misses = 0
    while misses < _MAX_MISSES and writer.room > 0:
        tokens, is_label = sampler.draw(rng)
        if len(tokens) > writer.room:
            misses += 1
            continue
        answers = runs(is_label[1:-1])
        writer.add(tokens[1:-1], answers, is_whole=True, labelled=answers)
    return writer.row("sft", isolated=True)


def runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """The spans [start, stop) where a mask is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]
