"""`hsa ask`: ask a memory file, or a text memorised now, one question; says so when the retrieval is unsure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.common import Encoding, TextField
from hsa_ultralong.cli.memory_common import Model
from hsa_ultralong.cli.numbers import MAX_COUNT, finite
from hsa_ultralong.cli.terminal import echo, echo_json

RereadNumber = Annotated[
    int,
    typer.Option(min=0, max=1024, help="Put so many of the best passages as text into the prompt as well; 0: none."),
]
RereadTokens = Annotated[
    int | None,
    typer.Option(
        min=1, max=MAX_COUNT, help="Tokens that they may take; the worst are left out.", show_default="the room left"
    ),
]
System = Annotated[str | None, typer.Option(help="System message before the question (chat templates only).")]
TextFiles = Annotated[
    list[Path] | None,
    typer.Option("--text", "-t", help="File, folder or - for stdin to memorise now; repeat for more."),
]
OneMemory = Annotated[
    Path | None, typer.Option("--memory", "-m", help="Memory made by hsa memorize, instead of --text.")
]
Lookup = Annotated[str, typer.Option(help="exact; sketch or lists: faster in large memories.")]
LongestAnswer = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_COUNT, help="Longest answer in tokens.", show_default="24; of a chat model 256"),
]
Sources = Annotated[
    int, typer.Option("--sources", "--show-sources", min=0, max=MAX_COUNT, help="Show so many retrieved passages.")
]
UnsureBelow = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        callback=finite,
        help="Retrieval weight below which an answer is called unsure.",
        show_default="the model's",
    ),
]


def register(app: typer.Typer) -> None:
    app.command("ask")(ask)


def ask(
    prompt: Annotated[str, typer.Argument(help="A question ending in '?', or the beginning of a sentence.")],
    text: TextFiles = None,
    memory: OneMemory = None,
    hide: Annotated[str | None, typer.Option(help="Hide this sentence in the first text before memorising.")] = None,
    depth: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Where to hide it, 0 = start, 1 = end.")
    ] = 0.5,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    model: Model = None,
    lookup: Lookup = "exact",
    max_new_tokens: LongestAnswer = None,
    reread: RereadNumber = 0,
    reread_tokens: RereadTokens = None,
    system: System = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Read the prompt as it stands, though the model has a chat template.")
    ] = False,
    sources: Sources = 1,
    unsure_below: UnsureBelow = None,
    store: Annotated[
        str, typer.Option(help="Where the memory's keys and values lie while asking: file, host, device.")
    ] = "file",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Answer one question from a memory file, or from text files memorised now.

    From the memory alone, or with --reread N: the N best passages, by the model's own retrieval, stand as text in the
    prompt as well, in the order of the memory. A model with a chat template is asked through it.

    The shipped nano model (9M parameters) recalls facts stated in one sentence, in forms like those it was trained on
    ("The secret code of the X Y is 1234567."); it does not summarise, reason or converse.

    Examples:

      hsa ask --text book.txt --hide "The secret code of the silver lantern is 4821937."
      "What is the secret code of the silver lantern?"

      hsa ask --text notes.md "The locker number of the old library is"

      hsa ask -m lib.hsa --show-sources 3 "What is the secret code of the silver lantern?"

      hsa ask -m smol.hsa --model smol --reread 4 "What is the secret code of the silver lantern?"
    """
    from hsa_ultralong.cli.common import MAX_PROMPT_TOKENS, encode_prompt, load_model

    if (memory is None) == (not text):
        raise ValueError("give --memory lib.hsa, or --text FILE to memorise now")
    if hide is not None and memory is not None:
        raise ValueError("--hide needs --text: a memory is changed with hsa memory edit")
    if hide is None and depth != 0.5:
        raise ValueError("--depth says where the sentence of --hide goes: give --hide SENTENCE too")
    if memory is None and (store, lookup) != ("file", "exact"):
        raise ValueError("--store and --lookup go with --memory lib.hsa: text memorised now lies in the model's memory")
    if plain and system is not None:
        raise ValueError("--system is a message of the chat template, which --plain leaves out")
    require_reread(reread, reread_tokens)
    if memory is not None and (text_field, encoding) != ("text", "auto"):
        raise ValueError("--text-field and --encoding go with --text FILE")
    # one snapshot for all that follows
    file = None if memory is None else filled(memory)
    named = _read_texts(text or [], hide, depth, text_field, encoding)
    network, tokenizer = load_model(model, device, dtype, answers=True)
    from hsa_ultralong.inference import as_question
    from hsa_ultralong.inference import ask as ask_memory

    question = prompt.strip() if plain else as_question(prompt, tokenizer, system=system)
    room = MAX_PROMPT_TOKENS - len(encode_prompt(tokenizer, question))
    if file is None:
        library = _memorize(network, tokenizer, named, as_json)
    else:
        library = open_library(network, tokenizer, file, store, lookup)
    answer = ask_memory(
        network, tokenizer, library, question,
        max_new_tokens=max_new_tokens or longest_answer(question), num_sources=max(1, sources),
        unsure_below=unsure_below, on_text=None if as_json else Writer(), reread=reread,
        reread_tokens=min(room, reread_tokens or room) if reread else None,
    )  # fmt: skip
    found = report(answer, library, tokenizer, sources)
    if as_json:
        echo_json({**found, "memorised_tokens": library.num_tokens})
        return
    # the answer itself was shown while it came
    echo("" if found["answer"] else "(no answer)")
    show_passages(found["sources"])
    show_reread(found["reread"], reread)
    show_certainty(found)


def _read_texts(
    paths: list[Path], hide: str | None, depth: float, text_field: str, encoding: str
) -> list[tuple[str, str]]:
    """Names and texts to be memorised, with the sentence to be hidden in the first."""
    from hsa_ultralong.cli.common import read_named

    named = read_named(paths, text_field, encoding)
    if hide is not None:
        named[0] = (named[0][0], _hide(named[0][1], hide, depth))
    return named


def _memorize(network: Any, tokenizer: Any, named: list[tuple[str, str]], is_quiet: bool) -> Any:
    import torch

    from hsa_ultralong.inference import memorize

    documents = [torch.tensor(tokenizer(part)["input_ids"], dtype=torch.int32) for _, part in named]
    return memorize(network, documents, names=[name for name, _ in named], progress=not is_quiet)


def require_reread(reread: int, reread_tokens: int | None) -> None:
    """Refuse room for passages without a number of them."""
    if reread_tokens is not None and not reread:
        raise ValueError("--reread-tokens goes with --reread N")


def filled(path: Path) -> Any:
    """A snapshot of a memory, opened before the model is loaded; one that holds nothing to ask for is refused."""
    from hsa_ultralong.memory import MemoryFile
    from hsa_ultralong.models.fingerprint import nothing_to_read

    file = MemoryFile.open_unverified(path)
    if file.num_chunks == 0:
        way = f"close it: hsa memory close {path}" if file.num_tokens else f"fill it: hsa memorize FILES -o {path}"
        raise ValueError(f"{path} is empty: {nothing_to_read(file.num_tokens)}; {way}")
    return file


class Writer:
    """Shows pieces of the answer as they come, without the space that it begins with."""

    def __init__(self) -> None:
        self.is_first = True

    def __call__(self, piece: str) -> None:
        piece = piece.lstrip() if self.is_first else piece
        self.is_first = self.is_first and not piece
        echo(piece, nl=False)


def open_library(network: Any, tokenizer: Any, file: Any, store: str, lookup: str = "exact") -> Any:
    """A memory for asking from a snapshot of its file, checked against model and tokenizer."""
    from hsa_ultralong.cli.memory_common import require_tokenizer
    from hsa_ultralong.inference import memory_fingerprint
    from hsa_ultralong.memory.files.reader import require_fingerprint
    from hsa_ultralong.memory.opening import open_memory

    require_fingerprint(file.path, file.spec, memory_fingerprint(network))
    require_tokenizer(file.spec, tokenizer)
    weight = network.model.embed_tokens.weight
    return open_memory(file, store=store, device=weight.device, dtype=weight.dtype, lookup=lookup)


def _hide(text: str, sentence: str, depth: float) -> str:
    """Put a sentence between two words of the text."""
    at = round(depth * len(text))
    space = text.find(" ", at)
    at = len(text) if space < 0 else space
    return f"{text[:at]} {sentence.strip()}{text[at:]}"


def longest_answer(question: Any) -> int:
    """Tokens of an answer where none are given: a chat model answers in sentences."""
    return 24 if isinstance(question, str) else 256


def report(answer: Any, memory: Any, tokenizer: Any, sources: int) -> dict[str, Any]:
    """An answer with the passages that it came from, for --json."""

    def passage(source: Any) -> dict[str, Any]:
        tokens = memory.documents[source.document].tokens[source.start : source.stop]
        return {**source.__dict__, "passage": tokenizer.decode(tokens.tolist(), skip_special_tokens=True)}

    return {
        "answer": answer.text.strip(),
        "weight": answer.weight,
        "unsure_below": answer.threshold,
        "is_uncertain": answer.is_uncertain,
        "sources": [passage(source) for source in answer.sources[:sources]],
        "reread": [passage(source) for source in answer.reread],
    }


def show_passages(passages: list[dict[str, Any]]) -> None:
    """Passages with where they stand."""
    for passage in passages:
        where = f"{passage['name']}, tokens {passage['start']:,}-{passage['stop']:,}, weight {passage['weight']:.2f}"
        echo(f"\nfrom {where}:\n  {' '.join(passage['passage'].split())}")


def show_reread(passages: list[dict[str, Any]], wanted: int = 0) -> None:
    """Passages that stood as text in the prompt."""
    if passages:
        places = "; ".join(f"{one['name']}, tokens {one['start']:,}-{one['stop']:,}" for one in passages)
        fewer = f" ({wanted} were asked for)" if len(passages) < wanted else ""
        echo(f"\nRead again in the prompt, {len(passages)} passages{fewer}: {places}")


def show_certainty(found: dict[str, Any]) -> None:
    """What the weights of an answer say."""
    weight, line = found["weight"], found["unsure_below"]
    if found["is_uncertain"]:
        echo(
            f"\nUnsure: no passage stood out (best retrieval weight {weight:.2f} < {line:.2f}), "
            "so this may be a guess. "
            "Is it stated in the text, in a form like the question?"
        )
    elif line is None:
        echo(
            f"\nBest retrieval weight {weight:.2f}; this model does not say below which an answer is unsure "
            "(unsure_below in its config.json); --unsure-below does."
        )
