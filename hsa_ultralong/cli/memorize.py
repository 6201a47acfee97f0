"""`hsa memorize`: read texts into a memory file; kill it at any point and run it again, it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.common import Encoding, TextField
from hsa_ultralong.cli.numbers import MAX_COUNT
from hsa_ultralong.cli.terminal import echo, echo_json, progress

if TYPE_CHECKING:
    from hsa_ultralong.data import InputFile
    from hsa_ultralong.data.inputs import PassedOver
    from hsa_ultralong.inference import Library

FORMATS = ("bf16", "int8", "fp8", "fp16", "fp32")
# characters of English text per token of the shipped tokenizer, for plans before reading
_CHARACTERS_PER_TOKEN = 3.6


def register(app: typer.Typer) -> None:
    app.command("memorize")(memorize)


def memorize(
    paths: Annotated[list[str], typer.Argument(help="Text, tables, documents (.pdf ...), folders, - for stdin.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the memory, such as lib.hsa.")],
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    key_values: Annotated[str, typer.Option(help=f"Form of keys and values: {', '.join(FORMATS)}.")] = "bf16",
    landmarks: Annotated[str, typer.Option(help="Form of landmarks: bf16, int8, fp16, fp32.")] = "bf16",
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    max_bad: Annotated[
        int, typer.Option(min=0, max=MAX_COUNT, help="Unreadable records to pass over, with a report.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable summary, no progress bar.")] = False,
) -> None:
    """Memorise texts once, into a file that can be asked, extended, edited and merged for ever.

    Run it again with the same texts after an interruption and it goes on; unchanged documents are passed over, changed
    ones are read again where they differ, new ones are added. Nothing is removed: `hsa memory edit --delete` does that.

    Examples:

      hsa memorize books/ notes.md -o lib.hsa

      hsa memorize corpus.jsonl --text-field body --max-bad 100 --key-values int8 -o lib.hsa

      cat *.txt | hsa memorize - -o lib.hsa
    """
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.cli.outputs import nothing_left, require_output
    from hsa_ultralong.cli.updating import memorize_files
    from hsa_ultralong.data import source_files, spool_of

    for name, value in (("--key-values", key_values), ("--landmarks", landmarks)):
        if value not in FORMATS:
            raise ValueError(f"{name} must be one of {', '.join(FORMATS)}, got {value!r}")
    require_output(output, may_exist=True)
    passed_over: list[PassedOver] = []
    with nothing_left(output), spool_of(output) as spool:
        files = source_files(paths, spool=spool, field=text_field, encoding=encoding, passed_over=passed_over)
        network, tokenizer = load_model(model, device, dtype)
        _require_room(network.config, files, output, key_values, landmarks)
        library = open_or_create(network, tokenizer, output, key_values, landmarks)
        with library, Bar(files, as_json) as bar:
            summary = memorize_files(library, tokenizer, files, bar, text_field=text_field, max_bad=max_bad)
            if not library.documents:
                raise ValueError(f"nothing could be read: all {summary['bad']:,} records, named above, are bad")
    summary["passed_over"] = [one._asdict() for one in passed_over]
    show_summary(output, library.writer.committed, summary, as_json)


def open_or_create(network: Any, tokenizer: Any, path: Path, key_values: str, landmarks: str) -> Library:
    """The library at `path`, made if it does not exist."""
    from hsa_ultralong.data import tokenizer_fingerprint
    from hsa_ultralong.inference import Library

    return Library.create(
        network,
        path,
        key_values=key_values,
        landmarks=landmarks,
        tokenizer=tokenizer_fingerprint(tokenizer),
        metadata={"model": str(network.config.name_or_path)},
        exist_ok=True,
    )


def _require_room(config: Any, files: list[InputFile], output: Path, key_values: str, landmarks: str) -> None:
    """Refuse, with the plan, what the disk cannot hold; the number of tokens is estimated from the texts' sizes."""
    import shutil

    from hsa_ultralong.cli.plan import format_bytes
    from hsa_ultralong.memory.quantization import bytes_per_token

    # packed text is about four times as long when unpacked
    size = sum(file.num_bytes * (4 if file.is_packed else 1) for file in files)
    tokens = size / _CHARACTERS_PER_TOKEN
    per_token = 4 + bytes_per_token(
        key_values,  # type: ignore[arg-type]
        landmarks,  # type: ignore[arg-type]
        chunk_size=config.chunk_size,
        num_memory_heads=config.num_memory_heads,
        head_dim=config.head_dim,
        num_retrieval_heads=config.num_retrieval_heads,
        retrieval_dim=config.retrieval_dim,
    )
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if tokens * per_token > free:
        raise ValueError(
            f"about {tokens:,.0f} tokens at {per_token:.0f} bytes need {format_bytes(tokens * per_token)}, but "
            f"{existing} has {format_bytes(free)} free; use --key-values int8, another disk, or fewer texts"
        )


class Bar:
    """Progress over all files in bytes, with tokens, tokens/s and the remaining time; silent where asked or piped."""

    def __init__(self, files: list[InputFile], is_quiet: bool) -> None:
        from rich.progress import BarColumn, TimeRemainingColumn

        self.bar = progress(
            "memorising {task.fields[name]}",
            BarColumn(),
            "{task.fields[tokens]:,} tokens, {task.fields[rate]:,.0f} tokens/s",
            TimeRemainingColumn(),
            disable=is_quiet,
        )
        total_bytes = sum(file.num_bytes for file in files)
        self.task = self.bar.add_task("", total=total_bytes or None, name="", tokens=0, rate=0.0)
        self.files_done = self.tokens = self.before = 0
        self.characters_per_token, self.text_done = 1.0, 0
        self.began, self.is_shown = time.monotonic(), False

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_shown:
            self.bar.stop()

    def note(self, text: str) -> None:
        echo(f"note: {text}", err=True)

    def start(self, name: str, num_tokens: int, num_characters: int, before: int) -> None:
        # what is refused shows no bar
        if not self.is_shown:
            self.bar.start()
            self.is_shown = True
        self.before, self.characters_per_token = before, num_characters / max(1, num_tokens)
        self.bar.update(self.task, name=name if len(name) < 40 else f"...{name[-36:]}")

    def report(self, done: int, _: int | None) -> None:
        self.tokens += done - self.before
        self.text_done += round((done - self.before) * self.characters_per_token)
        self.before = done
        rate = self.tokens / max(1e-9, time.monotonic() - self.began)
        self.bar.update(self.task, completed=self.files_done + self.text_done, tokens=self.tokens, rate=rate)

    def finish_file(self, size: int) -> None:
        self.files_done, self.text_done = self.files_done + size, 0
        self.bar.update(self.task, completed=self.files_done)


def show_summary(path: Path, manifest: Any, summary: dict[str, Any], as_json: bool) -> None:
    """Print what was done, and what the memory holds by its manifest."""
    from hsa_ultralong.cli.plan import format_bytes

    value = {
        "path": str(path),
        **summary,
        "documents": len(manifest.documents),
        "tokens": manifest.num_tokens,
        "chunks": manifest.num_chunks,
        "bytes": manifest.num_bytes,
    }
    if as_json:
        echo_json(value)
        return
    rate = value["tokens_read"] / max(value["seconds"], 1e-9)
    if value["bad"]:
        echo(f"passed over {value['bad']:,} bad records, named above", err=True)
    echo(
        f"{path}: {value['documents']:,} documents, {value['tokens']:,} tokens, {format_bytes(value['bytes'])}; "
        f"{value['added']} added, {value['changed']} changed, {value['unchanged']} unchanged; "
        f"{value['tokens_read']:,} tokens read in {value['seconds']:.1f} s ({rate:,.0f} tokens/s)"
    )
    echo(f'Ask it: hsa ask -m {path} "..."')
