"""`hsa memory close` and `hsa memory rebuild`: what a killed run, or a new model, leaves to be done."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.memory_common import AsJson, Device, Dtype, MemoryPath, Model, open_to_write
from hsa_ultralong.cli.terminal import echo, echo_json


def register(memory: typer.Typer) -> None:
    memory.command("close")(close)
    memory.command("rebuild")(rebuild)


def close(
    path: MemoryPath,
    drop: Annotated[bool, typer.Option("--drop", help="Remove the document instead; needs no model.")] = False,
    model: Model = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Close the open document, such as one that a killed run left half-read: keep what was read, or --drop it.

    A document that is closed early is read to its end when `hsa memorize` is given its text again.

    Examples:

      hsa memory close lib.hsa

      hsa memory close lib.hsa --drop
    """
    from hsa_ultralong.memory import MemoryFile, MemoryWriter
    from hsa_ultralong.memory.half_read import counted, half_read, without_note

    with MemoryFile.open_unverified(path) as file:
        document = file.manifest.open_document
        half = half_read(document, file.build_state)
    if document is None:
        raise ValueError(f"{path} holds no open document: nothing to close")
    if drop:
        with MemoryWriter.open(path) as writer:
            writer.delete_document(document.id)
            writer.commit(without_note(writer.build_state))
    else:
        with open_to_write(path, model, device, dtype) as (library, _):
            library.close_document()
    whole = document.num_tokens if half is None else half.whole
    value = {"document": document.name, "tokens": document.num_tokens, "of_tokens": whole, "is_dropped": drop}
    done = "removed" if drop else f"closed with {document.num_tokens:,} of {counted(whole)} tokens"
    echo_json(value, indent=None) if as_json else echo(f"{document.label} is {done}")


def rebuild(
    path: MemoryPath,
    model: Model = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder of a new memory; without it the old one's place.")
    ] = None,
    key_values: Annotated[str | None, typer.Option(help="Form of keys and values; default that of the memory.")] = None,
    landmarks: Annotated[str | None, typer.Option(help="Form of landmarks; default that of the memory.")] = None,
    old_tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the model that built it, where the new one has another tokenizer.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Read a memory again by another model, from the token ids that it stores: after training, or in another form.

    Killed and run again it goes on. The old memory stays, and can be asked, until the new one is whole; then it is
    replaced in one step. The result equals memorising the texts anew.

    Examples:

      hsa memory rebuild lib.hsa --model checkpoints/new

      hsa memory rebuild lib.hsa --model checkpoints/new -o new.hsa --key-values int8
    """
    from hsa_ultralong.cli.common import load_model
    from hsa_ultralong.cli.memorize import FORMATS
    from hsa_ultralong.cli.outputs import nothing_left, require_output
    from hsa_ultralong.data import tokenizer_fingerprint
    from hsa_ultralong.inference import rebuild as rebuild_memory
    from hsa_ultralong.memory import MemoryFile

    for name, value in (("--key-values", key_values), ("--landmarks", landmarks)):
        if value is not None and value not in FORMATS:
            raise ValueError(f"{name} must be one of {', '.join(FORMATS)}, got {value!r}")
    if output is not None:
        require_output(output)
    with MemoryFile.open_unverified(path) as file:
        known = file.spec.tokenizer
    network, tokenizer = load_model(model, device, dtype)
    own = tokenizer_fingerprint(tokenizer)
    with nullcontext() if output is None else nothing_left(output):
        result = rebuild_memory(
            network,
            path,
            output,
            tokenizer=own,
            retokenize=_retokenizer(old_tokenizer, tokenizer, known) if old_tokenizer and known != own else None,
            key_values=key_values,
            landmarks=landmarks,
            metadata={"model": str(network.config.name_or_path)},
            progress=not as_json,
        )
    if as_json:
        echo_json({**result._asdict(), "path": str(result.path)})
    else:
        echo(
            f"{result.path}: {result.num_documents:,} documents, {result.num_tokens:,} tokens, "
            f"{result.num_tokens_read:,} of them read now, the others before"
        )


def _retokenizer(folder: Path, new: Any, known: str) -> Any:
    """A function that turns token ids of the tokenizer in `folder` into those of another.

    Raises:
        ValueError: the folder's tokenizer is not the one whose fingerprint is `known`.
    """
    from hsa_ultralong.data import load_tokenizer, tokenizer_fingerprint

    old = load_tokenizer(folder)
    if known and tokenizer_fingerprint(old) != known:
        raise ValueError(f"{folder} holds another tokenizer than the one that the memory was built with")

    def retokenize(tokens: Any, label: str) -> list[int]:
        text = old.decode(tokens.tolist(), skip_special_tokens=True)
        # what is no text decodes to this sign, which no tokenizer turns back
        if "\ufffd" in text and old(text)["input_ids"] != tokens.tolist():
            raise ValueError(f"{label} is not UTF-8 text in the old tokenizer; memorise it again")
        return list(new(text)["input_ids"])

    return retokenize
