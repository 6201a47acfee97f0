"""`hsa data`: plain text to tokenizer and token shards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("data")(data)


def data(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Text files (.txt, .md, .xz), tables (.jsonl, .parquet), folders, or hf:NAME:CONFIG:SPLIT."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the shards; must not exist yet.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Use this tokenizer folder instead of training one.")] = None,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary of a newly trained tokenizer.")] = 8192,
    sample_mb: Annotated[int, typer.Option(help="Text, in MB, that a new tokenizer is trained on.")] = 30,
    validation_fraction: Annotated[float, typer.Option(help="Share of documents held out.")] = 0.005,
    text_field: Annotated[str, typer.Option(help="Field or column of tables that holds the text.")] = "text",
    max_bad: Annotated[int, typer.Option(min=0, help="Unreadable records to pass over, with a report.")] = 100,
) -> None:
    """Tokenise text into memory-mapped shards for training. Documents end at a line holding only U+001E.

    Examples:

      hsa data corpus.txt -o .data/shards

      hsa data books/ notes.md articles.jsonl -o .data/shards --tokenizer checkpoints/nano

      hsa data hf:wikitext:wikitext-103-raw-v1:train -o .data/wiki --tokenizer checkpoints/nano
    """
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from hsa_ultralong.data import build_shards, load_tokenizer, train_tokenizer
    from hsa_ultralong.data.sources import sample_text

    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another folder")
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn()
    ) as bar:
        task = bar.add_task("tokenising", total=None, note="")
        if tokenizer is None:
            bar.update(task, description="training the tokenizer")
            tokens = train_tokenizer(sample_text(paths, sample_mb * 1_000_000, text_field), vocab_size)
        else:
            tokens = load_tokenizer(tokenizer)
        bar.update(task, description="tokenising")

        def progress(done: int) -> None:
            bar.update(task, note=f"{done / 1e6:,.0f} MB")

        shards = build_shards(
            paths, tokens, output, validation_fraction=validation_fraction, text_field=text_field, max_bad=max_bad,
            progress=progress,
        )  # fmt: skip
    tokens.save_pretrained(output / "tokenizer")
    held_out = len(shards.documents("validation"))
    bad = shards.manifest["bad_records"]
    if bad["count"]:
        typer.echo(f"passed over {bad['count']} records, the first: {bad['first'][0]}", err=True)
    typer.echo(
        f"{shards.num_tokens:,} tokens of {shards.num_documents:,} documents in {output}; "
        f"{held_out:,} of the documents are held out for validation"
    )
