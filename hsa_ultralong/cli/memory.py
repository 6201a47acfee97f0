"""`hsa memory`: look at a memory file, change it, check it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli import memory_mend
from hsa_ultralong.cli.common import Encoding, TextField
from hsa_ultralong.cli.memory_common import AsJson, Device, Dtype, MemoryPath, Model, bytes_bar, open_to_write
from hsa_ultralong.cli.terminal import console, echo, echo_json

memory = typer.Typer(no_args_is_help=True, help="Look at a memory file, change it, check it.")


def register(app: typer.Typer) -> None:
    memory_mend.register(memory)
    app.add_typer(memory, name="memory")


@memory.command("info")
def info(path: MemoryPath, as_json: AsJson = False) -> None:
    """Documents, tokens, bytes and form of a memory.

    Example:

      hsa memory info lib.hsa
    """
    from hsa_ultralong.inference.rebuilding import unfinished
    from hsa_ultralong.memory import MemoryFile
    from hsa_ultralong.memory.columns import require_model_columns
    from hsa_ultralong.memory.half_read import counted, half_read, way_on

    with MemoryFile.open(path) as file:
        require_model_columns(file.spec)
        half = half_read(file.manifest.open_document, file.build_state)
        value: dict[str, Any] = {
            "path": str(path),
            "generation": file.generation,
            "tokens": file.num_tokens,
            "chunks": file.num_chunks,
            "bytes": file.num_bytes,
            "dead_bytes": file.dead_bytes,
            "formats": file.spec.metadata.get("formats", {}),
            "model": file.spec.metadata.get("model", ""),
            "fingerprint": file.spec.fingerprint,
            "documents": [
                {
                    "id": document.id,
                    "name": document.name,
                    "tokens": document.num_tokens,
                    "chunks": document.num_chunks,
                    "is_open": document.is_open,
                    "half_read_of": half.whole if half is not None and half.document == document else None,
                    "closed_early_of": document.metadata.get("closed_early"),
                }
                for document in file.documents
            ],
        }
    if as_json:
        echo_json(value)
        return
    from rich.table import Table

    from hsa_ultralong.cli.plan import format_bytes

    table = Table("id", "document", "tokens", "chunks", "")
    for column in table.columns[2:4]:
        column.justify = "right"
    for row in value["documents"]:
        state = "open" if row["is_open"] else ""
        if row["half_read_of"]:
            state = f"half-read, of {counted(row['half_read_of'])} tokens"
        elif isinstance(row["closed_early_of"], int | str):
            state = f"the beginning of {counted(row['closed_early_of'])} tokens"
        table.add_row(str(row["id"]), row["name"], f"{row['tokens']:,}", f"{row['chunks']:,}", state)
    console().print(table)
    formats = value["formats"]
    echo(
        f"{value['tokens']:,} tokens in {value['chunks']:,} chunks, {format_bytes(value['bytes'])} "
        f"({format_bytes(value['dead_bytes'])} of them deleted: hsa memory compact frees them); keys and values "
        f"{formats.get('key_values')}, landmarks {formats.get('landmarks')}; model {value['fingerprint'][:12]}"
    )
    if half is not None:
        echo(f"{half}: {way_on(path)}")
    if unfinished(path).exists():
        place = unfinished(path)
        echo(f"a rebuild is unfinished in {place}: hsa memory rebuild goes on; remove that folder to give it up")


@memory.command("append")
def append(
    path: MemoryPath,
    texts: Annotated[list[str], typer.Argument(help="Files, folders, - for stdin.")],
    to_last: Annotated[bool, typer.Option("--to-last", help="Go on with the last document instead.")] = False,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Add documents, or text at the end of the last one, exactly as if it had been longer.

    Examples:

      hsa memory append lib.hsa new-book.txt

      echo "Later that day it rained." | hsa memory append lib.hsa --to-last -
    """
    from hsa_ultralong.cli.memorize import Bar, show_summary
    from hsa_ultralong.cli.updating import changed_by_hand, memorize_files
    from hsa_ultralong.data import read_sources, source_files, spool_of

    with spool_of(path) as spool:
        files = source_files(texts, spool=spool, field=text_field, encoding=encoding)
        with open_to_write(path, model, device, dtype) as (library, tokenizer):
            if to_last:
                parts = [source.text for file in files for source in read_sources(file, text_field=text_field)]
                tokens = tokenizer("".join(parts), add_special_tokens=False)["input_ids"]
                if not library.documents:
                    raise ValueError(f"{path} holds no document to go on with; leave --to-last away")
                # its text is no longer that of its file
                library.extend(tokens, close=True, metadata=changed_by_hand(library.documents[-1], "extended"))
                counts = {"added": 0, "changed": 1, "unchanged": 0, "bad": 0}
                summary = {**counts, "tokens_read": len(tokens), "seconds": 0.0}
            else:
                with Bar(files, as_json) as bar:
                    summary = memorize_files(library, tokenizer, files, bar, text_field=text_field)
    show_summary(path, library.writer.committed, summary, as_json)


@memory.command("edit")
def edit(
    path: MemoryPath,
    document: Annotated[str, typer.Argument(help="Name or id of the document.")],
    find: Annotated[str | None, typer.Option(help="Passage to replace; it must occur once.")] = None,
    replace: Annotated[str | None, typer.Option(help="What comes in its place; empty deletes the passage.")] = None,
    text: Annotated[Path | None, typer.Option(help="File whose text replaces the whole document.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete the document.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would cost.")] = False,
    encoding: Encoding = "auto",
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Change or delete a document; says first how many chunks must be read again. The result equals memorising anew.

    Examples:

      hsa memory edit lib.hsa notes.md --find "on Monday" --replace "on Tuesday"

      hsa memory edit lib.hsa notes.md --text notes-v2.md --dry-run

      hsa memory edit lib.hsa 3 --delete
    """
    if sum((find is not None, text is not None, delete)) != 1 or (find is None) != (replace is None):
        raise ValueError("give --find with --replace, or --text FILE, or --delete")
    from hsa_ultralong.data import read_text

    if text is None and encoding != "auto":
        raise ValueError("--encoding goes with --text FILE")
    content = None if text is None else read_text(text, encoding=encoding)
    with open_to_write(path, model, device, dtype) as (library, tokenizer):
        chosen = library.document(int(document) if document.isdigit() else document)
        if delete:
            value = {"document": chosen.name, "chunks_to_read": 0, "chunks": chosen.num_chunks, "is_done": not dry_run}
            if not dry_run:
                library.delete(chosen.id)
        else:
            value = _change(library, tokenizer, chosen, find, replace, content, dry_run, as_json)
    if as_json:
        echo_json(value)
    elif dry_run:
        echo("nothing was changed (--dry-run)")
    else:
        echo("deleted; hsa memory compact frees its bytes" if delete else "done")


def _change(
    library: Any,
    tokenizer: Any,
    chosen: Any,
    find: str | None,
    replace: str | None,
    content: str | None,
    dry_run: bool,
    as_json: bool,
) -> dict[str, Any]:
    from hsa_ultralong.cli.updating import changed_by_hand
    from hsa_ultralong.inference.editor import difference, plan_edit

    old = library.tokens(chosen.id)
    if content is None:
        assert find is not None and replace is not None
        whole = tokenizer.decode(old.tolist(), skip_special_tokens=True)
        count = whole.count(find)
        if count != 1:
            raise ValueError(f"the passage occurs {count} times in {chosen.label}; it must occur once")
        content = whole.replace(find, replace)
    import torch

    new = torch.tensor(tokenizer(content)["input_ids"], dtype=torch.int32)
    start, stop, num_new = difference(old, new)
    plan = plan_edit(library.model.config, len(old), start, stop, num_new, is_open=chosen.is_open)
    value = {
        "document": chosen.name,
        "tokens_replaced": stop - start,
        "tokens_new": num_new,
        "chunks_to_read": plan.num_chunks,
        "chunks": chosen.num_chunks,
        "is_done": not dry_run,
    }
    if not as_json:
        echo(
            f"{chosen.label}: {stop - start:,} tokens become {num_new:,}; {plan.num_chunks:,} of {chosen.num_chunks:,} "
            "chunks are read again"
        )
    if not dry_run:
        digest = hashlib.sha256(content.encode()).hexdigest()
        library.replace(chosen.id, new, metadata=changed_by_hand(chosen, digest), progress=not as_json)
    return value


@memory.command("merge")
def merge(
    path: MemoryPath,
    others: Annotated[list[Path], typer.Argument(help="Memories whose documents are added.")],
    as_json: AsJson = False,
) -> None:
    """Add all documents of other memories of the same model, after checking every byte of them. Needs no model.

    Example: build parts in parallel, then join them.

      hsa memory merge lib.hsa part-2.hsa part-3.hsa
    """
    from hsa_ultralong.memory import MemoryFile, MemoryWriter

    with MemoryWriter.open(path) as writer:
        files = [MemoryFile.open(other) for other in others]
        with bytes_bar("merging", as_json) as report:
            ids = writer.merge(files, report)
            writer.commit()
    value = {"path": str(path), "added": len(ids)}
    echo_json(value, indent=None) if as_json else echo(f"{path}: {len(ids)} documents added")


@memory.command("export")
def export(
    path: MemoryPath,
    documents: Annotated[list[str], typer.Argument(help="Names or ids of the documents.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the new memory.")],
    as_json: AsJson = False,
) -> None:
    """Copy some documents into a new memory. Needs no model.

    Example:

      hsa memory export lib.hsa notes.md 3 -o small.hsa
    """
    from hsa_ultralong.cli.outputs import require_output
    from hsa_ultralong.memory import MemoryFile, export_memory

    require_output(output)
    with MemoryFile.open(path) as file:
        ids = []
        for wanted in documents:
            found = [d.id for d in file.documents if wanted in (d.name, str(d.id))]
            if len(found) != 1:
                raise ValueError(f"{len(found)} documents of {path} are named {wanted!r}; hsa memory info lists them")
            ids += found
        with bytes_bar("exporting", as_json) as report:
            export_memory(file, output, ids, progress=report)
    value = {"path": str(output), "documents": len(ids)}
    echo_json(value, indent=None) if as_json else echo(f"{output}: {len(ids)} documents")


@memory.command("verify")
def verify(path: MemoryPath, as_json: AsJson = False) -> None:
    """Read and check every byte; exit code 1 if anything is damaged, with the documents concerned. Needs no model.

    Example:

      hsa memory verify lib.hsa
    """
    from hsa_ultralong.memory import verify_memory

    with bytes_bar("verifying", as_json) as report:
        damages = verify_memory(path, report)
    if as_json:
        echo_json([{**damage.__dict__, "text": str(damage)} for damage in damages])
    else:
        for damage in damages:
            echo(str(damage))
        echo(f"{path}: {len(damages)} damaged places" if damages else f"{path}: all checksums are right")
    if damages:
        raise typer.Exit(1)


@memory.command("compact")
def compact(path: MemoryPath, as_json: AsJson = False) -> None:
    """Free the bytes of deleted and replaced text for good. Needs no model.

    Example:

      hsa memory compact lib.hsa
    """
    from hsa_ultralong.cli.plan import format_bytes
    from hsa_ultralong.memory import MemoryWriter

    with MemoryWriter.open(path) as writer, bytes_bar("compacting", as_json) as report:
        freed = writer.compact(report)
    value = {"path": str(path), "freed": freed}
    echo_json(value, indent=None) if as_json else echo(f"{path}: {format_bytes(freed)} freed")
