"""`hsa chat`: a conversation over memories, with a model in this process or a running `hsa serve`."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.ask import (
    LongestAnswer,
    RereadNumber,
    RereadTokens,
    System,
    UnsureBelow,
    Writer,
    filled,
    open_library,
    require_reread,
    show_passages,
    show_reread,
)
from hsa_ultralong.cli.common import load_model
from hsa_ultralong.cli.memorize import open_or_create
from hsa_ultralong.cli.memory_common import require_tokenizer
from hsa_ultralong.cli.numbers import parse_size
from hsa_ultralong.cli.outputs import require_output
from hsa_ultralong.cli.terminal import echo, echo_json, one_line

_HELP = """\
/sources   the passages that the last answer was read from
/history   what was said so far
/new       a new conversation; memories stay
/help      this
/quit      the end; so does Ctrl-D. Ctrl-C stops an answer."""


def register(app: typer.Typer) -> None:
    app.command("chat")(chat)


def chat(
    memory: Annotated[
        list[str] | None,
        typer.Option("--memory", "-m", help="Memory made by hsa memorize (of a server: its id); repeat for more."),
    ] = None,
    remember: Annotated[
        str | None,
        typer.Option(help="Memory of what is said, made if it does not exist; the next conversation knows it."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    server: Annotated[str | None, typer.Option(help="Address of hsa serve, in place of a model folder.")] = None,
    key: Annotated[str | None, typer.Option(help="API key of the server; else HSA_API_KEY.")] = None,
    system: System = None,
    reread: RereadNumber = 0,
    reread_tokens: RereadTokens = None,
    max_new_tokens: LongestAnswer = None,
    context: Annotated[
        str | None, typer.Option(help="Tokens of what was said, message and answer.", show_default="8K")
    ] = None,
    unsure_below: UnsureBelow = None,
    lookup: Annotated[
        str | None, typer.Option(help="exact; sketch or lists: faster in large memories.", show_default="exact")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(help="Where keys and values of one memory lie: file, host, device.", show_default="file"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or auto.", show_default="auto")] = None,
    dtype: Annotated[str | None, typer.Option(help="bf16, fp32 or auto.", show_default="auto")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A line of JSON for every line of input, which are no commands then.")
    ] = False,
) -> None:
    """Talk to a model over one or several memories; answers are streamed, /help names the commands.

    A model with a chat template knows what was said before; one without, such as nano, is asked every line by itself.
    With --remember each turn becomes a document of a memory, on disk before the next line is read.

    Examples:

      hsa chat -m lib.hsa

      hsa chat -m lib.hsa -m notes.hsa --remember talk.hsa --reread 4

      hsa chat --model smol --remember talk.hsa

      hsa chat --server http://localhost:8000 -m lib --key KEY

      cat questions.txt | hsa chat -m lib.hsa --json
    """
    memories = memory or []
    options: dict[str, Any] = {
        "reread": reread,
        "reread_tokens": reread_tokens,
        "unsure_below": unsure_below,
        "system": system,
    }
    here = {
        "model": model, "context": context, "lookup": lookup, "store": store, "device": device, "dtype": dtype,
    }  # fmt: skip
    _require_sense(memories, remember, server, key, options, here)
    if server is None:
        with _here(memories, remember, max_new_tokens, options, here) as partner:
            _talk(partner, as_json)
        return
    from hsa_ultralong.cli.chat_partners import There

    key, options["reread"] = key or os.environ.get("HSA_API_KEY"), reread or None
    _talk(There(server, key, memories, remember=remember, max_tokens=max_new_tokens, **options), as_json)


def _require_sense(
    memories: list[str],
    remember: str | None,
    server: str | None,
    key: str | None,
    options: dict[str, Any],
    here: dict[str, Any],
) -> None:
    """Refuse options that say nothing where they stand, before anything is loaded."""
    require_reread(options["reread"], options["reread_tokens"])
    if len({*memories, remember}) < len(memories) + 1:
        raise ValueError("a memory is named twice; what --remember names is read without -m")
    if (options["reread"] or options["unsure_below"] is not None) and not (memories or remember):
        raise ValueError("--reread and --unsure-below are of a memory; name one: -m lib.hsa")
    given = [f"--{name}" for name, value in here.items() if value is not None]
    if server is not None and given:
        raise ValueError(f"{', '.join(given)}: a server has its own; leave it out, or leave --server out")
    if server is None and key is not None:
        raise ValueError("--key goes with --server URL")
    several = len(memories) + (remember is not None) > 1
    if several and (here["store"] not in (None, "device") or here["lookup"] not in (None, "exact")):
        raise ValueError("several memories are put together in the model's own: leave out --store and --lookup")


@contextmanager
def _here(
    memories: list[str],
    remember: str | None,
    max_new_tokens: int | None,
    options: dict[str, Any],
    here: dict[str, Any],
) -> Iterator[Any]:
    """The model in this process, with its memories."""
    files = [filled(Path(path)) for path in memories]
    if remember is not None:
        require_output(Path(remember), may_exist=True)
    network, tokenizer = load_model(here["model"], here["device"] or "auto", here["dtype"] or "auto", answers=True)
    from hsa_ultralong.cli.chat_partners import MOST_SOURCES, Here
    from hsa_ultralong.inference.conversation import Conversation
    from hsa_ultralong.inference.prompts import has_chat_template
    from hsa_ultralong.memory import ChunkMemory

    several = len(memories) + (remember is not None) > 1
    store = "device" if several else here["store"] or "file"
    opened = [open_library(network, tokenizer, file, store, here["lookup"] or "exact") for file in files]
    library = nullcontext() if remember is None else _remembering(network, tokenizer, Path(remember))
    with library as talk:
        conversation = Conversation(
            network, tokenizer, ChunkMemory.concat(opened) if len(opened) > 1 else next(iter(opened), None),
            library=talk, max_new_tokens=max_new_tokens or (256 if has_chat_template(tokenizer) else 24),
            context_tokens=parse_size(here["context"] or "8K", "--context"), num_sources=MOST_SOURCES, **options,
        )  # fmt: skip
        yield Here(conversation)


@contextmanager
def _remembering(network: Any, tokenizer: Any, path: Path) -> Iterator[Any]:
    """The memory file of what is said, held against other writers."""
    with open_or_create(network, tokenizer, path, "bf16", "bf16") as library:
        require_tokenizer(library.writer.spec, tokenizer)
        if library.half_read is not None or library.writer.open_document is not None:
            raise ValueError(f"{path} holds a document that is still open; close it: hsa memory close {path}")
        yield library


# the conversation -----------------------------------------------------------------------------------------------------


def _talk(partner: Any, as_json: bool) -> None:
    """Answer line by line, up to the end of the input or /quit."""
    is_terminal = sys.stdin.isatty() and not as_json
    if is_terminal:
        echo("/help names the commands, /quit ends.")
    turn = failures = 0
    last: dict[str, Any] = {}
    for line in _typed() if is_terminal else sys.stdin:
        text = line.strip()
        if not text:
            continue
        if text.startswith("/") and not as_json:
            if text == "/quit":
                return
            _command(text, partner, last)
            continue
        turn += 1
        try:
            last = _turn(partner, text, None if as_json else Writer(), is_terminal)
        except (ValueError, OSError) as error:
            failures += 1
            last = {"error": one_line(" ".join(str(error).split()))}
            if not as_json:
                echo(f"error: {last['error']}", err=True)
        if as_json:
            echo_json({"turn": turn, "message": text, **last}, indent=None)
        elif "error" not in last:
            _show(partner, last)
    if failures and not is_terminal:
        raise typer.Exit(2)


def _typed() -> Iterator[str]:
    """Lines of a terminal, with editing and earlier lines where Python has them."""
    with suppress(ImportError):
        import_module("readline")
    while True:
        try:
            yield input("> ")
        except EOFError:
            echo()
            return
        except KeyboardInterrupt:
            echo("\n(/quit ends)")


def _turn(partner: Any, text: str, show: Any, is_terminal: bool) -> dict[str, Any]:
    """One message and its answer, which Ctrl-C on a terminal ends where it is."""
    is_stopped = False
    pieces = partner.pieces(text)
    try:
        for piece in pieces:
            if show is not None:
                show(piece)
    except KeyboardInterrupt:
        if not is_terminal:
            raise
        is_stopped = True
    pieces.close()
    found: dict[str, Any] = partner.found()
    with _uninterrupted():
        name = partner.keep(text, found["answer"])
    return {**found, "is_stopped": is_stopped, "remembered": name}


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C waits for the end of the block, so that a turn is remembered or not, and never half asked for."""
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _show(partner: Any, found: dict[str, Any]) -> None:
    """What stands below an answer that was shown while it came."""
    echo(" (stopped)" if found["is_stopped"] else "" if found["answer"] else "(no answer)")
    if found["is_uncertain"]:
        echo(f"(unsure: no passage stood out, best weight {found['weight']:.2f} < {found['unsure_below']:.2f})")
    if partner.num_left_out:
        echo(f"(the prompt has no room for the oldest {partner.num_left_out // 2} turns; they were left out)")


def _command(text: str, partner: Any, last: dict[str, Any]) -> None:
    if text == "/help":
        echo(_HELP)
    elif text == "/new":
        partner.clear()
        echo("(a new conversation)")
    elif text == "/history":
        for message in partner.messages:
            echo(f"{message['role']}: {message['content']}")
    elif text == "/sources":
        show_passages(last.get("sources", []))
        show_reread(last.get("reread", []))
        if not last.get("sources"):
            echo("(no passages)")
    else:
        echo(f"error: no command {one_line(text.split()[0])}; /help names them", err=True)
