"""`hsa convert`: start an HSA-UltraLong model from a pretrained transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED
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
    source: Annotated[Path, typer.Argument(help="Hugging Face folder of a Llama, Mistral, Qwen2 or Qwen3 model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New model folder.")],
    window: Annotated[
        int, typer.Option("--window", min=1, max=MAX_COUNT, help="Keys that each layer's attention keeps.")
    ] = 512,
    lower_layers: Annotated[
        int | None, typer.Option(min=1, max=MAX_COUNT, help="Layers below the memory.", show_default="half")
    ] = None,
    groups: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Layers that read the memory, one per group.")] = 2,
    changes: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Options of the memory: chunk_topk=32, retrieval_dim=256."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the new parts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Turn a transformer into a model with a memory: its layers keep their weights, their attention becomes a window.

    Until it is trained, the memory is silent: on texts no longer than the window the new model computes what the old
    one does. docs/convert.md says how to go on.

    Examples:

      hsa convert models/Qwen3-0.6B -o models/qwen3-hsa --window 512 --set retrieval_dim=256

      hsa convert models/llama -o models/llama-hsa --lower-layers 10 --groups 2 --set chunk_topk=64
    """

    import torch
    from transformers import AutoModelForCausalLM

    from hsa_ultralong.cli.model_folder import weight_files
    from hsa_ultralong.cli.places import removed_on_failure, require_folder
    from hsa_ultralong.models.convert import convert_model, converted_config
    from hsa_ultralong.models.presets import parse_options

    if not (source / "config.json").is_file():
        raise ValueError(f"{source} is no model folder: it has no config.json")
    require_folder(output, is_new=True)
    torch.manual_seed(seed)
    layout = {"sliding_window": window, "num_lower_layers": lower_layers, "num_upper_groups": groups}
    options = parse_options(changes or [])
    if clash := sorted(set(options) & set(layout)):
        raise ValueError(f"{', '.join(clash)}: use --window, --lower-layers and --groups")
    options |= layout
    # refuses what cannot be converted before the weights are read
    converted_config(_source_config(source), **options)
    weight_files(source)
    teacher = AutoModelForCausalLM.from_pretrained(source, dtype="auto", use_safetensors=True)
    found = convert_model(teacher, **options)
    report = {
        "source": source.name,
        "source_type": teacher.config.model_type,
        "window": window,
        "seed": seed,
        "reused_share": found.reused_share,
        "reused": found.reused,
        "initialised": found.initialised,
    }
    with removed_on_failure(output.with_name(f".partial-{output.name}")):
        _save(found.model, source, output, report)
    echo_json(report) if as_json else echo(_summary(found, output))


def _source_config(source: Path) -> Any:
    """The folder's configuration; of a kind that is not converted, the bare keys of its file."""
    import json
    from types import SimpleNamespace

    from transformers import AutoConfig

    from hsa_ultralong.models.convert import SOURCES

    try:
        keys = json.loads((source / "config.json").read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{source / 'config.json'} is damaged: {error}") from None
    if keys.get("model_type") in SOURCES:
        return AutoConfig.from_pretrained(source)
    return SimpleNamespace(**{"model_type": "unnamed", **keys})


def _save(model: Any, source: Path, output: Path, report: dict[str, Any]) -> None:
    """Model, tokenizer and conversion.json, all or nothing."""
    import shutil

    from hsa_ultralong.eval.metadata import write_json

    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    for file in sorted(source.iterdir()):
        if file.name.startswith(("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")):
            shutil.copy(file, partial / file.name)
    if (settings := partial / "tokenizer_config.json").is_file():
        # the length of the source's context is none of the new model's: tools would cut texts to it
        _drop(settings, "model_max_length", "max_len")
    write_json(partial / "conversion.json", report)
    if output.exists():
        output.rmdir()
    partial.rename(output)


def _drop(file: Path, *names: str) -> None:
    """Remove keys from a JSON file; one without them stays byte for byte."""
    import json

    table = json.loads(file.read_text(encoding="utf-8"))
    kept = {key: value for key, value in table.items() if key not in names}
    if kept != table:
        file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _summary(found: Any, output: Path) -> str:
    config = found.model.config
    return (
        f"{config.num_lower_layers} layers below the memory, {config.num_upper_groups} groups of "
        f"{config.num_layers_per_group} above; window {config.sliding_window}\n\n{_table(found)}\n\n"
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
