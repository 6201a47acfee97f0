"""Text to train a tokenizer on, out of anything that ``hsa data`` reads. Tested in ``tests/data/test_tokenizer.py``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hsa_ultralong.data.build import chat_inputs_of
from hsa_ultralong.data.chat import conversation_pieces, parse_messages
from hsa_ultralong.data.encodings import AUTO
from hsa_ultralong.data.inputs import Input, Spool, inputs_of
from hsa_ultralong.data.sources import parse_text, read_parsed


def sample_text(
    paths: Sequence[str | Path | Input],
    num_characters: int,
    text_field: str = "text",
    *,
    chats: Sequence[str | Path | Input] = (),
    chat_field: str = "messages",
    encoding: str = AUTO,
    piece: int = 20_000,
) -> Iterator[str]:
    """Pieces of text to train a tokenizer on, about ``num_characters`` in all, spread evenly over all documents and
    conversations (two passes over the inputs); from hub datasets, the first characters. Bad records are passed over.

    Raises:
        ValueError: there is no text; names the first bad record.
    """

    with Spool() as spool:
        options: dict[str, Any] = {"encoding": encoding, "spool": spool}
        inputs = inputs_of(paths, field=text_field, **options) if paths or not chats else []
        chat_inputs = chat_inputs_of(chats, field=chat_field, **options)
        yield from _spread(inputs, chat_inputs, text_field, chat_field, num_characters, piece)


def _spread(
    inputs: list[Input], chats: list[Input], text_field: str, chat_field: str, num_characters: int, piece: int
) -> Iterator[str]:
    bad: list[str] = []

    def note(message: str) -> None:
        if not bad:
            bad.append(message)

    def texts() -> Iterator[str]:
        for one in inputs:
            yield from (text for _, text in read_parsed(one, parse_text, field=text_field, on_bad=note))
        for one in chats:
            for _, messages in read_parsed(one, parse_messages, field=chat_field, on_bad=note):
                yield "".join(text for text, _ in conversation_pieces(messages))

    if any(isinstance(one, str) for one in (*inputs, *chats)):
        for document in texts():
            yield document[:num_characters]
            num_characters -= len(document)
            if num_characters <= 0:
                return
        return
    total = sum(len(document) for document in texts())
    if total == 0:
        raise ValueError("the inputs hold no text to train a tokenizer on" + "".join(f": {message}" for message in bad))
    share = min(1.0, num_characters / max(1, total))
    owed = 0.0
    for document in texts():
        for start in range(0, len(document), piece):
            part = document[start : start + piece]
            owed += share * len(part)
            if owed >= len(part):
                owed -= len(part)
                yield part
