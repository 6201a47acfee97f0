"""`hsa bench serve`: a server under load, killed while it writes, and the speed of its batches."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, parse_counts, parse_sizes
from hsa_ultralong.cli.places import require_folder
from hsa_ultralong.cli.terminal import echo, echo_json


def serve(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("benchmarks/results"),
    preset_name: Annotated[
        str | None, typer.Option("--preset", help="Preset with random weights, for --lengths.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="Model folder.", show_default="checkpoints/nano")] = None,
    requests: Annotated[int, typer.Option(min=0, max=MAX_COUNT, help="Requests of all clients; 0: leave out.")] = 200,
    clients: Annotated[int, typer.Option(min=1, max=1024, help="Clients at once.")] = 16,
    memories: Annotated[int, typer.Option(min=1, max=1024, help="Memories, in two namespaces.")] = 8,
    kills: Annotated[int, typer.Option(min=0, max=1000, help="Kills while clients write and ask; 0: leave out.")] = 20,
    supervise: Annotated[
        bool,
        typer.Option("--supervise", help="Kill the server of hsa serve --supervise, which starts again by itself."),
    ] = False,
    lengths: Annotated[str, typer.Option(help="Memories for batches, such as 8K,1M; none: leave out.")] = "none",
    batches: Annotated[str, typer.Option(help="Requests at once, for --lengths.")] = "1,2,4,8,16,32,64",
    steps: Annotated[int, typer.Option(min=2, max=MAX_COUNT, help="Tokens of an answer, for --lengths.")] = 128,
    long_prompt: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Tokens of one read beside others.")] = 4096,
    store: Annotated[str, typer.Option(help="Where these memories lie: device or host.")] = "device",
    key_values: Annotated[str | None, typer.Option(help="Their form: bf16, int8.", show_default="the model's")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="Name in the file.", show_default="such as h200, cpu2")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of tokens, weights and kills.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of lines.")] = False,
) -> None:
    """Put `hsa serve` under load, kill it while it writes, and time its batches.

    Writes serve-HARDWARE.json after every part, keeping what earlier runs measured besides, and draws batches into
    serve-HARDWARE.png. Answers under load are compared with those given alone. --lengths needs no server: it times the
    thread that decodes; `speedup` is the tokens a second of whole requests over those of one at a time.

    Examples:

      hsa bench serve

      hsa bench serve --requests 20 --clients 4 --kills 0

      hsa bench serve --requests 0 --kills 20 --supervise

      hsa bench serve --preset small_345m --requests 0 --kills 0 --lengths 8K,1M
    """
    from hsa_ultralong.bench.memory import add_record, continued
    from hsa_ultralong.cli.common import bench_results, choose_device, choose_dtype
    from hsa_ultralong.eval.metadata import write_json
    from hsa_ultralong.serve.load import LoadSettings, kill_results, load_results, machine_load

    require_folder(output)
    _check_choices(store, preset_name, bool(requests or kills), bool(kills), supervise, lengths)
    place = choose_device(device)
    path, meta = bench_results(output, "serve", hardware, place, seed)
    result = continued(path, meta)
    result["meta"]["runs"][-1] |= {"before": machine_load()}
    form = key_values or {"torch.bfloat16": "bf16", "torch.float32": "fp32"}[str(choose_dtype(dtype, place))]
    label = preset_name or ("nano" if model is None else model.name)

    def keep(metric: str, value: float, tokens: int = 0, batch: int = 1, where: str = "") -> None:
        record = {
            "metric": metric, "preset": label, "store": where, "dtype": form, "tokens": tokens,
            "batch": batch, "value": value,
        }  # fmt: skip
        add_record(result, record)
        result["meta"]["runs"][-1]["after"] = machine_load()
        write_json(path, result)
        echo(f"{metric} {tokens:,} x{batch}: {value:.4g}", err=True)

    server = ("--device", device, "--dtype", dtype)
    settings = LoadSettings(requests, clients, memories, kills=kills, supervise=supervise, seed=seed, server=server)
    with tempfile.TemporaryDirectory(prefix="hsa-bench-serve-") as folder:
        if requests:

            def answered(count: int) -> None:
                if count % max(1, requests // 10) == 0:
                    echo(f"answer {count} of {requests}", err=True)

            for metric, value in load_results(model, Path(folder, "load"), settings, answered).items():
                keep(f"load_{metric}", value, batch=clients, where="host")
        if kills:
            told = lambda count: echo(f"kill {count} of {kills}", err=True)  # noqa: E731
            for metric, value in kill_results(model, Path(folder, "kills"), settings, told).items():
                keep(f"{'supervised_' if supervise else ''}kill_{metric}", value, where="host")
    if lengths != "none":
        _measure_batches(
            preset_name, model, place, dtype, seed, lengths, batches, steps, long_prompt, store, key_values, keep
        )
    figure = _drawn(result, path)
    if as_json:
        echo_json(result)
    echo(f"Written: {path}" + (f" and {figure.name}" if figure else ""))


def _drawn(result: dict[str, Any], path: Path) -> Path | None:
    """The figure beside `path`, where there are batches to draw."""
    if not any(record["metric"] == "tokens_per_s" for record in result["records"]):
        return None
    from hsa_ultralong.bench.serve_report import has_batches, plot_serve

    if not has_batches(result):
        return None
    figure = path.with_suffix(".png")
    plot_serve(result, figure)
    return figure


def _check_choices(
    store: str, preset_name: str | None, has_server: bool, has_kills: bool, supervise: bool, lengths: str
) -> None:
    if not has_server and lengths == "none":
        raise ValueError("nothing is left to measure: give --requests, --kills or --lengths 8K")
    if store not in ("device", "host"):
        raise ValueError(f"--store must be device or host, got {store!r}")
    if preset_name is not None and has_server:
        raise ValueError("a server needs a model folder: with --preset give --requests 0 --kills 0")
    if supervise and not has_kills:
        raise ValueError("--supervise says which server --kills kills, and there are none: give --kills 20")
    if has_server and lengths != "none":
        raise ValueError("--lengths is measured alone: give --requests 0 --kills 0")


def _measure_batches(
    preset_name: str | None, model: Path | None, device: str, dtype: str, seed: int, lengths: str, batches: str,
    steps: int, long_prompt: int, store: str, key_values: str | None, keep: Any,
) -> None:  # fmt: skip
    from hsa_ultralong.cli.common import load_preset_or_model
    from hsa_ultralong.serve.throughput import ThroughputSettings, throughput_records

    settings = ThroughputSettings(
        tuple(parse_sizes(lengths, "--lengths")), tuple(parse_counts(batches, "--batches")), steps=steps,
        long_prompt=long_prompt, store=store, key_values=key_values, seed=seed,
    )  # fmt: skip
    network, _ = load_preset_or_model(preset_name, model, device, dtype, seed)

    def put(metric: str, tokens: int, batch: int, value: float) -> None:
        keep(metric, value, tokens, batch, store)

    throughput_records(network, settings, put, lambda line: echo(line, err=True))
