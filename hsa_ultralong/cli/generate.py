"""`hsa generate`: plain text generation, on top of a memorised text if one is given."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.common import Encoding, TextField
from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, finite
from hsa_ultralong.cli.terminal import echo, echo_json


def register(app: typer.Typer) -> None:
    app.command("generate")(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="Text to go on from; may be empty with --continue.")] = "",
    text: Annotated[
        Path | None, typer.Option("--text", "-t", help="Memorise this file or folder first; - is stdin.")
    ] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="Continue the (last) text itself, exactly, instead of a new document.")
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, max=MAX_COUNT, help="How many tokens to generate at most.")
    ] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, max=100.0, callback=finite, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, callback=finite, help="Nucleus sampling.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the sampling.")] = 0,
    text_field: TextField = "text",
    encoding: Encoding = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Exactly what was generated, as JSON.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
) -> None:
    """Generate text. The shipped nano model writes text that looks like its training data, not sense.

    Control characters are shown as escapes, on a terminal and in a pipe; --json gives the text exactly.

    Examples:

      hsa generate "def main():" --max-new-tokens 60

      hsa generate --text book.txt --continue
    """
    if go_on and text is None:
        raise ValueError("--continue needs --text FILE: the text to continue")
    if not prompt and not go_on:
        raise ValueError("give a prompt, or --text FILE --continue to go on with a text")
    if text is None and (text_field, encoding) != ("text", "auto"):
        raise ValueError("--text-field and --encoding go with --text FILE")
    from hsa_ultralong.cli.common import encode_prompt, load_model, read_named

    contents = [part for _, part in read_named([] if text is None else [text], text_field, encoding)]
    network, tokenizer = load_model(model, device, dtype)
    import torch

    torch.manual_seed(seed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options.update(temperature=temperature, top_p=top_p, top_k=0)
    tokens = encode_prompt(tokenizer, prompt) if prompt else []
    if contents:
        tokens = _memorize(network, tokenizer, contents, tokens, go_on, options, is_quiet=as_json)
    ids = torch.tensor([tokens], device=network.device)
    out = network.generate(ids, attention_mask=torch.ones_like(ids), **options)
    written = tokenizer.decode(out[0], skip_special_tokens=True)
    if as_json:
        echo_json({"text": written, "prompt_tokens": len(tokens), "new_tokens": out.shape[1] - len(tokens)})
    else:
        echo(written)


def _memorize(
    network: Any,
    tokenizer: Any,
    contents: list[str],
    tokens: list[int],
    go_on: bool,
    options: dict[str, Any],
    is_quiet: bool,
) -> list[int]:
    """Memorise the texts into options["memory"]; returns the prompt's tokens."""
    import torch

    from hsa_ultralong.inference import memorize

    documents = [tokenizer(content)["input_ids"] for content in contents]
    if go_on:
        # a continued prompt has no bos of its own; without a prompt the text's last token is the prompt
        tokens = tokens[1:] or [documents[-1].pop()]
        options["continue_document"] = True
    ids = [torch.tensor(document, dtype=torch.int32) for document in documents]
    options["memory"] = memorize(network, ids, close=not go_on, progress=not is_quiet)
    return tokens
