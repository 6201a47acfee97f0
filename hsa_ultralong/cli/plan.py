"""`hsa plan`: what a model size costs at a context length, before anything is built (models/accounting.py)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.numbers import finite, parse_size
from hsa_ultralong.cli.terminal import console, echo_json

if TYPE_CHECKING:
    from rich.table import Table

    from hsa_ultralong.models import HSAConfig

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)


def format_bytes(count: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}" if count < 1024 else f"{count:,.0f} {unit}"


def format_count(count: float) -> str:
    """9231938 -> "9.23M", decimal multiples."""
    for unit in ("", "K", "M", "B", "T"):
        if count < 999.5 or unit == "T":
            break
        count /= 1000
    return f"{count:.3g}{unit}" if count < 999.5 else f"{count:,.0f}{unit}"


def plan(
    name: Annotated[
        str,
        typer.Argument(metavar="PRESET", help="debug, nano, mini, smol_135m, small_345m, dense_0_5b or moe_8b_a1b."),
    ],
    context: Annotated[
        str, typer.Option(help="Tokens: 4096, 32K, 16M, 1B; binary multiples, 16M is 16,777,216.")
    ] = "16M",
    dtype: Annotated[str, typer.Option(help=f"Type of weights and memory: {', '.join(DTYPE_BYTES)}.")] = "bf16",
    key_values: Annotated[str, typer.Option(help="Form of the memory's keys and values: bf16, int8, fp8, ...")] = "",
    landmarks: Annotated[str, typer.Option(help="Form of its landmarks.")] = "",
    device_memory: Annotated[
        float, typer.Option(min=0, max=2**20, callback=finite, help="GiB of the device for a memory on tiers.")
    ] = 128.0,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one option; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """What a model costs at a context: parameters, FLOP per token, bytes of memory. Nothing is built.

    The memory holds one closed document of that many tokens.

    Full attention: as many layers and key-value heads, all cached.

    Examples:

      hsa plan nano

      hsa plan small_345m --context 1M --set chunk_topk=64 --set retrieval_dim=256

      hsa plan nano --context 1B --key-values int8 --landmarks int8 --json
    """
    from hsa_ultralong.models.presets import preset, set_options

    tokens = parse_size(context, "--context")
    if dtype not in DTYPE_BYTES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    config = set_options(preset(name), changes or [])
    costs = {"preset": name, "set": changes or [], "dtype": dtype, **plan_costs(config, tokens, DTYPE_BYTES[dtype])}
    forms = (key_values or dtype, landmarks or dtype)
    costs["stores"] = store_costs(config, tokens, *forms, DTYPE_BYTES[dtype], int(device_memory * 2**30))
    costs["least_seconds"] = least_seconds(costs)
    if as_json:
        echo_json(costs, indent=2)
        return

    console().print(_table(costs))


def plan_costs(config: HSAConfig, tokens: int, dtype_bytes: int) -> dict[str, Any]:
    """All numbers of `hsa plan` for one configuration; FLOP and bytes, as docs/results.md names units."""
    from dataclasses import asdict

    from hsa_ultralong.models import accounting

    parameters = accounting.count_parameters(config)
    memory = accounting.memory_bytes(config, tokens, dtype_bytes)
    full = accounting.full_attention_cache_bytes(config, tokens, dtype_bytes)
    return {
        "context": tokens,
        "parameters": asdict(parameters),
        "weight_bytes": parameters.total * dtype_bytes,
        "flops_per_token": {
            "forward": accounting.flops_per_token(config, tokens),
            "training": accounting.flops_per_token(config, tokens, training=True),
            "reading": accounting.reading_flops_per_token(config),
        },
        "memory": {
            "bytes_per_token": accounting.memory_bytes_per_token(config, dtype_bytes),
            **asdict(memory),
            "landmark_share": memory.landmark_share,
            "total": memory.total,
        },
        "open_document_bytes": accounting.continuation_bytes(config, dtype_bytes),
        "full_attention_cache_bytes": full,
    }


def store_costs(
    config: HSAConfig, tokens: int, key_values: str, landmarks: str, dtype_bytes: int, device_bytes: int
) -> dict[str, dict[str, int]]:
    """Bytes on every tier for each store (docs/memory.md); landmarks are always on the device, for "host" and "tiered"
    in their own form, else in the model's dtype. device_bytes: room for landmarks, keys and values of "tiered".

    Raises:
        ValueError: for an unknown form.
    """
    from hsa_ultralong.memory.quantization import bytes_per_token, row_bytes

    per_head = config.retrieval_dim // config.num_retrieval_heads
    whole = bytes_per_token(
        key_values,  # type: ignore[arg-type]
        landmarks,  # type: ignore[arg-type]
        chunk_size=config.chunk_size,
        num_memory_heads=config.num_memory_heads,
        head_dim=config.head_dim or 0,
        num_retrieval_heads=config.num_retrieval_heads,
        retrieval_dim=config.retrieval_dim,
    )
    chunks = -(-tokens // config.chunk_size)
    stored_landmarks = chunks * config.num_retrieval_heads * row_bytes(landmarks, per_head)  # type: ignore[arg-type]
    stored = round(chunks * config.chunk_size * whole) - stored_landmarks
    # lengths and token ids
    file = stored + stored_landmarks + chunks * 4 * (1 + config.chunk_size)
    ready = chunks * config.retrieval_dim * dtype_bytes
    # keys and values go to the device until it is full, chunk by chunk
    a_chunk = stored // max(1, chunks)
    above = min(stored, max(0, device_bytes - stored_landmarks) // max(1, a_chunk) * a_chunk)
    wide = chunks * config.chunk_size * 2 * config.num_memory_heads * (config.head_dim or 0) * dtype_bytes
    return {
        "device": {"device": ready + wide, "host": 0, "file": file},
        "host": {"device": stored_landmarks, "host": stored, "file": file},
        "tiered": {"device": stored_landmarks + above, "host": stored - above, "file": file},
        "file": {"device": ready, "host": 0, "file": file},
    }


# H200: dense bf16 on random data, and bytes read or written by a large copy (benchmarks/results/ops-h200.json)
_FLOP_PER_SECOND, _BYTES_PER_SECOND = 790e12, 3.9e12


def least_seconds(costs: dict[str, Any]) -> dict[str, float]:
    """What one H200 cannot beat: reading all tokens at its arithmetic rate, one scan of landmarks at its bandwidth."""
    landmarks = costs["stores"]["file"]["device"]
    return {
        "memorising": costs["context"] * costs["flops_per_token"]["reading"] / _FLOP_PER_SECOND,
        "scan_per_retrieval_layer": landmarks / _BYTES_PER_SECOND,
    }


def _table(costs: dict[str, Any]) -> Table:
    from rich.table import Table

    parameters, flops, memory = costs["parameters"], costs["flops_per_token"], costs["memory"]
    full, tokens = costs["full_attention_cache_bytes"], f"{costs['context']:,} tokens"
    title = " ".join([costs["preset"], *costs["set"]])
    table = Table(title=f"{title}: {tokens}, {costs['dtype']}", title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", style="dim")
    split = ", ".join(f"{part} {format_count(parameters[part])}" for part in ("embedding", "lower", "encoder", "upper"))
    table.add_row("parameters", format_count(parameters["total"]), split)
    table.add_row("active parameters", format_count(parameters["active"]), "used by one token, embedding included")
    table.add_row("weights", format_bytes(costs["weight_bytes"]), costs["dtype"], end_section=True)
    table.add_row("FLOP per token, forward", format_count(flops["forward"]), f"the next token after {tokens}")
    table.add_row("FLOP per token, training", format_count(flops["training"]), f"mean over a sequence of {tokens}")
    table.add_row(
        "FLOP per token, memorising", format_count(flops["reading"]), "lower half and encoder", end_section=True
    )
    table.add_row("memory per token", f"{memory['bytes_per_token']:,.5g} B", "all HSA layers together")
    note = f"keys, values {format_bytes(memory['keys_values'])}, landmarks {format_bytes(memory['landmarks'])}"
    note += f", token ids {format_bytes(memory['token_ids'])}"
    table.add_row("memory", format_bytes(memory["total"]), note)
    table.add_row("landmark share", f"{memory['landmark_share']:.1%}", "of the memory: what every token scans")
    table.add_row("open document", format_bytes(costs["open_document_bytes"]), "fixed state to go on, at most")
    for store, tiers in costs["stores"].items():
        held = ", ".join(f"{tier} {format_bytes(size)}" for tier, size in tiers.items() if size and tier != "file")
        note = f"file {format_bytes(tiers['file'])}" if store == "file" else ""
        table.add_row(f"store {store!r}", held, note)
    least = costs["least_seconds"]
    note = f"and {1e3 * least['scan_per_retrieval_layer']:.3g} ms a scan of the landmarks: floors of one H200"
    table.add_row("memorising takes at least", f"{least['memorising']:.3g} s", note, end_section=True)
    ratio = f"{full / memory['total']:.3g} times the memory"
    table.add_row("full attention's cache", format_bytes(full), ratio)
    return table
