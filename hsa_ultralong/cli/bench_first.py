"""`hsa bench first`: seconds to the first token of processes that have just started."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, parse_size
from hsa_ultralong.cli.places import require_folder
from hsa_ultralong.cli.terminal import echo, echo_json


def first(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("benchmarks/results"),
    model: Annotated[Path | None, typer.Option(help="Model folder.", show_default="checkpoints/nano")] = None,
    tokens: Annotated[str, typer.Option(help="Tokens of the memory that is asked.")] = "64K",
    prompt_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Tokens of the question.")] = 16,
    new_tokens: Annotated[int, typer.Option(min=2, max=MAX_COUNT, help="Tokens of the answer.")] = 24,
    store: Annotated[str, typer.Option(help="Where keys and values lie: file, host, device.")] = "file",
    warm: Annotated[str, typer.Option(help="no: without warming up, yes: after it, both.")] = "both",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="Name in the file.", show_default="such as h200, cpu2")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of the tokens.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of lines.")] = False,
) -> None:
    """Time the first token of new processes, from the moment their weights are loaded.

    A memory is written once. Then two processes answer from it, the first with empty caches of compiled kernels, the
    second with what the first has left there; with --warm both, two more that warm up before they open the memory.
    Kernels that were compiled, or found on disk, are counted. Writes first-HARDWARE.json.

    Examples:

      hsa bench first

      hsa bench first --device cpu --tokens 8K --warm no -o /tmp/bench
    """
    from dataclasses import asdict

    from hsa_ultralong import default_checkpoint
    from hsa_ultralong.bench.first_token import METRICS, FirstTokenSettings, measure_first_tokens
    from hsa_ultralong.cli.common import bench_results, choose_device, choose_dtype, require_model_folder
    from hsa_ultralong.eval.metadata import write_json

    ways = {"no": (False,), "yes": (True,), "both": (False, True)}
    if warm not in ways:
        raise ValueError(f"--warm must be no, yes or both, got {warm!r}")
    if store not in ("file", "host", "device"):
        raise ValueError(f"--store must be file, host or device, got {store!r}")
    require_folder(output)
    folder = model or default_checkpoint()
    require_model_folder(folder)
    place = choose_device(device)
    kind = str(choose_dtype(dtype, place)).removeprefix("torch.")
    size = parse_size(tokens, "--tokens")
    settings = FirstTokenSettings(str(folder), place, kind, store, size, prompt_tokens, new_tokens, seed)
    path, meta = bench_results(output, "first", hardware, place, seed)
    records: list[dict[str, Any]] = []
    result = {"meta": {**meta, "settings": {**asdict(settings), "model": folder.name}}, "records": records}
    with tempfile.TemporaryDirectory(prefix="hsa-bench-first-") as work:
        for found in measure_first_tokens(settings, Path(work), ways[warm]):
            records.append({**found, "preset": folder.name, "store": store, "dtype": kind, "tokens": size})
            write_json(path, result)
            name = f"{found['process']} process{', warmed up' if found['warm'] else ''}"
            parts = ", ".join(f"{metric} {found[metric]:.3g}" for metric in METRICS)
            echo(f"{name}: {parts}", err=True)
    if as_json:
        echo_json(result)
    echo(f"Written: {path}", err=as_json)
