"""`hsa convert`: start an HSA-UltraLong model from a pretrained transformer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_LAYERS, MAX_SEED, parse_counts
from hsa_ultralong.cli.terminal import echo, echo_json

# what a parameter's name contains -> the part of the model that it belongs to
PARTS = {
    "lower_layers": "layers below the memory",
    "chunk_encoder": "chunk encoder",
    "retriever": "retrieval",
    ".hsa.": "attention to the memory",
    "groups": "layers above the memory",
}


def register(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="Folder (Hugging Face) or GGUF file of a Llama, Mistral, Qwen2 or Qwen3 model.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=1, max=MAX_COUNT, help="Keys that each layer's attention keeps.", show_default="512"
        ),
    ] = None,
    lower_layers: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Layers below the memory.", show_default="half")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Groups above the memory, the first layer of each reads it; or the size of each: 2,2,4.",
            show_default="2",
        ),
    ] = None,
    reading: Annotated[
        str | None, typer.Option("--read-at", help="Instead: numbers of the layers that read the memory, 16,18,22.")
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Options of the memory: chunk_topk=32, retrieval_dim=256."),
    ] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder.", show_default="the source's own")] = None,
    apply: Annotated[
        Path | None, typer.Option(help="Make the trained model: a difference that hsa train wrote for this source.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the new parts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a transformer into a model with a memory: its layers keep their weights, their attention becomes a window.

    Until it is trained, the memory is silent: on texts no longer than the window the new model computes what the old
    one does. docs/convert.md says how to go on.

    Examples:

      hsa convert models/Qwen3-0.6B -o models/qwen3-hsa --window 512 --set retrieval_dim=256

      hsa convert SmolLM2-135M-Instruct.Q4_1.gguf -o models/smol --lower-layers 16 --groups 7

      hsa convert SmolLM2-135M-Instruct.Q4_1.gguf --apply smol.safetensors -o models/smol-read

      hsa convert models/llama -o models/llama-hsa --read-at 10,12,16,24 --set chunk_topk=64
    """

    options = _options(window, lower_layers, groups, reading, changes)
    found, report = _made(source, output, options, tokenizer, apply, seed)
    echo_json(report) if as_json else echo(_summary(found, report, output))


def _made(
    source: Path, output: Path, options: dict[str, Any], tokenizer: Path | None, apply: Path | None, seed: int
) -> tuple[Any, dict[str, Any]]:
    """The conversion, written to `output`, and its report."""
    import torch

    from hsa_ultralong.cli.common import collect_as_usual, quiet_transformers
    from hsa_ultralong.cli.convert_source import open_source
    from hsa_ultralong.cli.places import removed_on_failure, require_folder
    from hsa_ultralong.files.checksum import file_record
    from hsa_ultralong.models import HSAConfig
    from hsa_ultralong.models.convert import Conversion, convert_model, converted_config

    require_folder(output, is_new=True)
    quiet_transformers()
    collect_as_usual()
    torch.manual_seed(seed)
    found_at = open_source(source, tokenizer)
    files = {file.name: file_record(file) for file in found_at.files}
    change = None if apply is None else _difference(apply, files, source, options)
    if change is not None:
        options = change[1]["options"]
    if isinstance(found_at.config, HSAConfig):
        if options:
            raise ValueError(f"{source} is a model with a memory, which says itself how it is built: leave out options")
        model = found_at.load()
        found = Conversion(model, {name: name for name, _ in model.named_parameters()}, [])
    else:
        # refuses what cannot be converted before the weights are read
        converted_config(found_at.config, **options)
        found = convert_model(found_at.load(), **options)
    if change is not None:
        _apply(found.model, change[0], change[1]["windows"], apply)
    report = {
        "source": found_at.name,
        "source_files": files,
        "difference": None if apply is None else file_record(apply),
        "options": options,
        "source_type": found_at.config.model_type,
        "window": found.model.config.sliding_window,
        "seed": seed,
        "reused_share": found.reused_share,
        "reused": found.reused,
        "initialised": found.initialised,
    }
    with removed_on_failure(output.with_name(f".partial-{output.name}")):
        _save(found.model, found_at.save_tokenizer, output, report)
    return found, report


def _difference(
    path: Path, files: dict[str, Any], source: Path, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of a difference for this source, and what it says of itself."""
    from hsa_ultralong.train.difference import read_difference, require_same_source

    if options:
        raise ValueError("--apply: the difference says how its source is converted; leave other options out")
    tensors, conversion = read_difference(path)
    require_same_source(conversion["source_files"], files, str(source))
    return tensors, conversion


def _apply(model: Any, tensors: dict[str, Any], windows: list[int], path: Path | None) -> None:
    """Make of a converted model the trained one, in bf16."""
    import torch

    from hsa_ultralong.train.difference import with_difference
    from hsa_ultralong.train.lora import merged
    from hsa_ultralong.train.stages import set_hsa_window, set_window

    set_window(model, windows[0])
    set_hsa_window(model, windows[1])
    weights = merged(with_difference(model.float().state_dict(), tensors))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        from hsa_ultralong.files.messages import reason

        raise ValueError(f"{path} does not fit the model of this source: {reason(error)}") from error
    model.to(torch.bfloat16)


def _options(
    window: int | None, lower_layers: int | None, groups: str | None, reading: str | None, changes: list[str] | None
) -> dict[str, Any]:
    """What was asked for, as converted_config takes it."""
    from hsa_ultralong.models.presets import parse_options

    sizes = None if groups is None else parse_counts(groups, "--groups", MAX_LAYERS)
    layout = {
        "sliding_window": window,
        "num_lower_layers": lower_layers,
        "num_upper_groups": sizes[0] if sizes is not None and len(sizes) == 1 else sizes,
        "reading_layers": None if reading is None else parse_counts(reading, "--read-at", MAX_LAYERS),
    }
    options = parse_options(changes or [])
    if clash := sorted(set(options) & {*layout, "num_layers_per_group"}):
        raise ValueError(f"{', '.join(clash)}: use --window, --lower-layers, --groups and --read-at")
    return options | {name: value for name, value in layout.items() if value is not None}


def _save(model: Any, save_tokenizer: Callable[[Path], None], output: Path, report: dict[str, Any]) -> None:
    """Model, tokenizer and conversion.json, all or nothing."""
    import shutil

    from hsa_ultralong.cli.convert_source import complete_tokenizer
    from hsa_ultralong.eval.metadata import write_json

    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    save_tokenizer(partial)
    report["named_tokens"] = complete_tokenizer(partial)
    write_json(partial / "conversion.json", report)
    if output.exists():
        output.rmdir()
    partial.rename(output)


def _summary(found: Any, report: dict[str, Any], output: Path) -> str:
    config, named = found.model.config, report["named_tokens"]
    tokens = "".join(f"\n{name}, which the tokenizer lacks, is {token} from now on" for name, token in named.items())
    shape, reading = (", ".join(map(str, part)) for part in (sorted(set(config.group_sizes)), config.reading_layers))
    return (
        f"{config.num_lower_layers} layers below the memory, {config.num_upper_groups} groups of "
        f"{shape} above; layers {reading} read it; window {config.sliding_window}{tokens}\n\n{_table(found)}\n\n"
        f"Written: {output} (conversion.json lists every tensor)"
    )


def _table(found: Any) -> str:
    """Numbers of every part of the model, the share that the source gave, and what is new."""
    rows: dict[str, list[Any]] = {}
    for name, tensor in found.model.named_parameters():
        part = next((text for key, text in PARTS.items() if key in name), "embedding, norm, head")
        row = rows.setdefault(part, [0, 0, []])
        row[0] += tensor.numel()
        if name in found.reused:
            row[1] += tensor.numel()
        elif (short := name.removesuffix(".weight").rsplit(".", 1)[-1]) not in row[2]:
            row[2].append(short)
    rows["all"] = [sum(row[0] for row in rows.values()), sum(row[1] for row in rows.values()), []]
    lines = [f"{'part':24}{'parameters':>16}{'reused':>9}  new"]
    for part, (count, reused, fresh) in rows.items():
        lines.append(f"{part:24}{count:>16,}{reused / count:>9.1%}  {', '.join(fresh)}".rstrip())
    return "\n".join(lines)
