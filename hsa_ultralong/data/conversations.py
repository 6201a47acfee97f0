"""Rows of conversations in the form of the tokenizer's own chat template.

Files are those of `hsa data --chat`, and tables whose column holds turns of two speakers (chat.py). The loss counts the
answers alone; no token is marked as an answer to be remembered, so that a run with a teacher follows the source on
them, as on text. A seventh of the conversations is the validation split. Called by mixture.py;
tests/data/test_conversations.py.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from hsa_ultralong.data.chat import ASSISTANT, SYSTEM, USER, parse_messages
from hsa_ultralong.data.chat_form import ChatForm
from hsa_ultralong.data.inputs import InputFile, Spool, inputs_of
from hsa_ultralong.data.kinds import CSV, JSON, JSON_LINES, TSV
from hsa_ultralong.data.rows import Row, RowLayout, RowWriter
from hsa_ultralong.data.sources import read_parsed
from hsa_ultralong.data.tokenizer import PieceTokenizer

logger = logging.getLogger(__name__)

Messages = list[dict[str, str]]
# the column of turns in Synthetic-Persona-Chat
_TURNS_FIELD = "Best Generated Conversation"
_MAX_MISSES, _VALIDATION = 8, 7


def read_conversations(path: Path) -> list[Messages]:
    """The conversations of a file, user and assistant in turn, after a system message or not.

    Records that are none are left out, and how many they are is logged.

    Raises:
        ValueError: a file of another form, or none is left.
    """
    bad: list[str] = []
    with Spool() as spool:
        (file,) = inputs_of([path], spool=spool) if path.is_file() else [None]
        kind = file.kind() if isinstance(file, InputFile) else "no file"
        if not isinstance(file, InputFile) or kind not in (JSON_LINES, JSON, CSV, TSV):
            raise ValueError(f"conversations are read from .jsonl, .json, .csv and .tsv; got {path} ({kind})")
        field = _TURNS_FIELD if kind in (CSV, TSV) else "messages"
        read = [messages for _, messages in read_parsed(file, parse_messages, field=field, on_bad=bad.append)]
    kept = [messages for messages in read if _is_in_turn(messages)]
    if not kept:
        raise ValueError((bad or [f"{path}: in no conversation do user and assistant speak in turn"])[0])
    if left_out := len(read) - len(kept) + len(bad):
        logger.warning(
            "%s: %d of %d records are no conversation in turns; left out", path, left_out, len(read) + len(bad)
        )
    return kept


def _is_in_turn(messages: Messages) -> bool:
    roles = [message["role"] for message in messages]
    return roles[roles[0] == SYSTEM :] == [USER, ASSISTANT] * (len(roles) // 2)


@lru_cache(maxsize=4)
def open_conversations(paths: tuple[str, ...], split: str) -> list[Messages]:
    """The conversations of one split of these files, read once in a process.

    Raises:
        ValueError: no file, one of another form, or no conversation is left.
    """
    if not paths:
        raise ValueError("rows of chat need files of conversations: --chat FILE")
    read = [messages for path in paths for messages in read_conversations(Path(path))]
    found = [messages for messages in read if _is_held_out(messages) == (split == "validation")]
    if not found:
        raise ValueError(f"{', '.join(paths)}: no conversation is left for the {split} split")
    return found


def _is_held_out(messages: Messages) -> bool:
    text = "\n".join(message["content"] for message in messages)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % _VALIDATION == 0


def chat_row(
    rng: np.random.Generator,
    layout: RowLayout,
    tokenizer: PieceTokenizer,
    conversations: Sequence[Messages],
    form: ChatForm,
) -> Row:
    """Different conversations, packed until eight drawn in turn do not fit.

    One that is longer than a row ends with the last answer that fits. In half of the rows a conversation sees the
    earlier ones, as one beside a memory does. Half of those without a system message begin with that of the template.

    Raises:
        ValueError: rows too short for a turn.
    """
    writer, misses, drawn = RowWriter(layout), 0, set[int]()
    while misses < _MAX_MISSES and writer.room > 0:
        number, is_bare = int(rng.integers(len(conversations))), bool(rng.random() < 0.5)
        tokens, answers = ([], []) if number in drawn else form.conversation(
            tokenizer, conversations[number], is_bare=is_bare
        )  # fmt: skip
        kept = [span for span in answers if span[1] < writer.room]
        if not kept or (len(kept) < len(answers) and len(tokens) < layout.seq_len):
            misses += 1
            continue
        drawn.add(number)
        writer.add(tokens[: kept[-1][1]], is_whole=len(kept) == len(answers), labelled=kept)
    if writer.end == 0:
        raise ValueError(f"no turn of a conversation fits into seq_len={layout.seq_len}; use longer rows")
    return writer.row("chat", isolated=bool(rng.random() < 0.5))
