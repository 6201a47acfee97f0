"""`hsa data`: texts, tables, hub datasets and conversations to tokenizer and token shards."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.common import Encoding, TextField
from hsa_ultralong.cli.numbers import MAX_COUNT, finite
from hsa_ultralong.cli.terminal import echo, progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from hsa_ultralong.data.inputs import Input


class Format(str, Enum):
    text = "text"
    chat = "chat"


def register(app: typer.Typer) -> None:
    app.command("data")(data)


def data(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Text, tables (.jsonl, .csv ...), documents (.pdf ...), folders, - for stdin, hf:NAME:CONFIG:SPLIT."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the shards; must not exist yet.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer folder instead of training one.")] = None,
    vocab_size: Annotated[int, typer.Option(min=1, max=2**24, help="Vocabulary of a newly trained tokenizer.")] = 8192,
    sample_mb: Annotated[
        int, typer.Option(min=1, max=2**20, help="Text, in MB, that a new tokenizer is trained on.")
    ] = 30,
    validation_fraction: Annotated[
        float, typer.Option(min=0, max=0.999, callback=finite, help="Share of documents held out.")
    ] = 0.005,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    max_bad: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="Unreadable records to pass over, with a report.")
    ] = 100,
    kind: Annotated[
        Format, typer.Option("--format", help="What PATHS hold: plain text or conversations.")
    ] = Format.text,
    chat: Annotated[
        list[str] | None, typer.Option("--chat", help="Conversations to add to the text of PATHS; may be repeated.")
    ] = None,
    chat_field: Annotated[str, typer.Option(help="Field or column that holds the messages.")] = "messages",
) -> None:
    """Tokenise text into token shards for training. Documents end at a line holding only U+001E.

    Files may be packed (.gz, .xz, .bz2, .zst). What is passed over in a folder is counted, named and listed in the
    manifest.

    Interrupt it at any time: the same command goes on where it stood, and the shards come out the same.

    Examples:

      hsa data corpus.txt -o .data/shards

      hsa data books/ notes.md articles.jsonl -o .data/shards --tokenizer checkpoints/nano

      cat corpus.txt | hsa data - -o .data/shards

      hsa data old-texts/ --encoding cp1252 -o .data/shards

      hsa data hf:wikitext:wikitext-103-raw-v1:train -o .data/wiki --tokenizer checkpoints/nano

      hsa data corpus.txt --chat chat.jsonl -o .data/shards

      hsa data chat.jsonl --format chat -o .data/chat --tokenizer checkpoints/nano
    """
    from hsa_ultralong.cli.places import require_folder
    from hsa_ultralong.data import build_shards, inputs_of, spool_of
    from hsa_ultralong.data.build import chat_inputs_of

    require_folder(output, is_new=True)
    texts, chats = ([], [*paths, *(chat or [])]) if kind is Format.chat else (paths, chat or [])
    passed_over: list[Any] = []
    with spool_of(output) as spool, _Bar() as bar:
        common: dict[str, Any] = {"encoding": encoding, "spool": spool, "passed_over": passed_over}
        # once, as what comes through a pipe is read for the tokenizer and for the shards
        options: dict[str, Any] = {
            "chats": chat_inputs_of(chats, field=chat_field, **common),
            "text_field": text_field,
            "chat_field": chat_field,
        }
        inputs = inputs_of(texts, field=text_field, **common) if texts else []
        tokens = _tokenizer(inputs, output, tokenizer, vocab_size, sample_mb, bar, options)
        shards = build_shards(
            inputs,
            tokens,
            output,
            validation_fraction=validation_fraction,
            max_bad=max_bad,
            passed_over=passed_over,
            progress=bar.progress,
            **options,
        )
    bad = shards.manifest["bad_records"]
    if bad["count"]:
        echo(f"passed over {bad['count']} bad records, the first: {bad['first'][0]}", err=True)
    held_out = len(shards.documents("validation")) + len(shards.conversations("validation"))
    conversations = f", {shards.num_conversations:,} of them conversations" if shards.num_conversations else ""
    echo(
        f"{shards.num_tokens:,} tokens of {shards.num_documents:,} documents{conversations} in {output}; "
        f"held out of them for validation: {held_out:,}"
    )


def _tokenizer(
    inputs: list[Input],
    output: Path,
    folder: Path | None,
    vocab_size: int,
    sample_mb: int,
    bar: _Bar,
    options: dict[str, Any],
) -> PreTrainedTokenizerFast:
    """The tokenizer asked for, that of an interrupted build, or a new one."""
    from hsa_ultralong.data import load_tokenizer, sample_text, train_tokenizer
    from hsa_ultralong.data.partial import partial_tokenizer

    if folder := folder or partial_tokenizer(output):
        return load_tokenizer(folder)
    bar.describe("training the tokenizer")
    return train_tokenizer(sample_text(inputs, sample_mb * 1_000_000, **options), vocab_size)


class _Bar:
    """A progress bar of unknown end with amounts and speed."""

    def __enter__(self) -> _Bar:
        from rich.progress import BarColumn, TimeElapsedColumn

        self._progress = progress(
            "{task.description}", BarColumn(), "{task.fields[note]}", TimeElapsedColumn(), err=False
        )
        self._progress.start()
        self._task = self._progress.add_task("reading", total=None, note="")
        self._first: tuple[float, int] | None = None
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def describe(self, what: str) -> None:
        self._progress.update(self._task, description=what)

    def progress(self, num_bytes: int, num_tokens: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, num_tokens)
        begun, first_tokens = self._first
        speed = f", {(num_tokens - first_tokens) / (now - begun):,.0f} tokens/s" if now > begun else ""
        note = f"{num_bytes / 1e6:,.0f} MB, {num_tokens / 1e6:,.1f}M tokens{speed}"
        self._progress.update(self._task, description="tokenising", note=note)
