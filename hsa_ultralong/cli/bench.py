"""`hsa bench`: measure speed on this machine. `ops` puts every operator beside its baselines, `memory` times reading
and decoding; `training`, `reading`, `first` and `serve` are in files of their own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.bench_first import first
from hsa_ultralong.cli.bench_reading import reading
from hsa_ultralong.cli.bench_serve import serve
from hsa_ultralong.cli.bench_training import training
from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, MAX_TOPK, finite, parse_counts, parse_size, parse_sizes
from hsa_ultralong.cli.places import require_folder
from hsa_ultralong.cli.terminal import console, echo, echo_json

if TYPE_CHECKING:
    from hsa_ultralong.bench.memory import MemorySettings
    from hsa_ultralong.bench.points import Settings

bench = typer.Typer(no_args_is_help=True, help="Measure speed and memory on this machine.")

_MILLION = 2**20
_QUICK = {"lengths": (4096, 16_384), "topks": (32,), "decode_chunks": (65_536,), "budget_s": 0.05}
_ON_CPU = {"lengths": (1024, 4096), "topks": (32,), "decode_chunks": (1024,)}


def register(app: typer.Typer) -> None:
    bench.command("training")(training)
    bench.command("reading")(reading)
    bench.command("first")(first)
    bench.command("serve")(serve)
    app.add_typer(bench, name="bench")


@bench.command("ops")
def bench_ops(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the JSON and the figure.")] = Path(
        "benchmarks/results"
    ),
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    lengths: Annotated[str | None, typer.Option(help="Tokens.", show_default="4K to 256K by doubling")] = None,
    longest: Annotated[bool, typer.Option("--max", help="Also 1M tokens, where they fit.")] = False,
    topk: Annotated[str | None, typer.Option(help="Chunks kept per token.", show_default="32,16,64")] = None,
    retrieval_dim: Annotated[
        int | None, typer.Option(min=16, max=8192, help="Width R of landmarks.", show_default="256")
    ] = None,
    ops: Annotated[
        str | None,
        typer.Option(
            help="Some of hsa, full_attention, window, selected, nsa, moba, chunk_topk, decode, in this order; "
            "nsa:fla is one with one implementation alone.",
            show_default="all",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few sizes, short repeats.")] = False,
    full_max: Annotated[str, typer.Option(help="Full attention up to this length; it is quadratic.")] = "128K",
    max_minutes: Annotated[
        float | None, typer.Option(min=0, max=1e9, callback=finite, help="Begin no point after so many minutes.")
    ] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="Time replays of CUDA graphs; on a GPU.")] = False,
    text: Annotated[Path | None, typer.Option(help="Text for recorded selections.", show_default="Opticks")] = None,
    model: Annotated[Path | None, typer.Option(help="Model that reads it.", show_default="checkpoints/nano")] = None,
    hardware: Annotated[str | None, typer.Option(help="Name in the file.", show_default="such as h200, cpu2")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of inputs and selections.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of tables.")] = False,
) -> None:
    """Time HSA, retrieval, windows and decoding beside full and other sparse attention, in one run on one card.

    NSA, MoBA and attention in given lists are our own kernels', those of flash-linear-attention and block masks of
    flex_attention; flash-attn is tried too. What is not installed is named and left out.

    Writes ops-HARDWARE.json after every point and draws ops-HARDWARE.png from it. A Triton operator is checked
    against its reference first and is not timed if it is wrong.

    With --graphs every point is the replay of one CUDA graph, as in training by graphs: the device's time without the
    host's launches. What no graph holds is noted and left out. The files are ops-graphs-HARDWARE.json and .png.

    Examples:

      hsa bench ops --quick

      hsa bench ops --ops hsa,full_attention --max --full-max 64K --topk 32 -o /tmp/bench

      hsa bench ops --ops hsa,chunk_topk,selected,nsa,moba,full_attention --lengths 8K,32K --topk 32

      hsa bench ops --ops hsa:triton,nsa:fla,selected:flex,full_attention --lengths 4K,64K --topk 32 --max-minutes 5

      hsa bench ops --graphs --ops hsa:triton,chunk_topk,full_attention:cudnn --lengths 4K,8K,16K --topk 32

      hsa bench ops --ops decode --topk 32 --retrieval-dim 512 -o /tmp/bench

      hsa bench ops --device cpu --lengths 256,512 --topk 4
    """
    from hsa_ultralong import ops as operators
    from hsa_ultralong.bench.ops import OPS, run_ops
    from hsa_ultralong.bench.ops_report import plot_ops
    from hsa_ultralong.cli.common import bench_results, choose_device

    require_folder(output)
    place = choose_device(device)
    if graphs and place != "cuda":
        raise ValueError(f"--graphs needs a CUDA device, got {place}: leave it out")
    settings = _settings(place, lengths, topk, full_max, quick, longest, seed, retrieval_dim)
    if graphs:
        from hsa_ultralong.train.graphs import CudaCapture

        settings = replace(settings, make_capture=CudaCapture)
    if text is not None and not text.is_file():
        raise ValueError(f"{text} is no file: give --text a text that the model shall read")
    path, meta = bench_results(output, "ops-graphs" if graphs else "ops", hardware, place, seed)
    wanted = tuple(part.strip() for part in ops.split(",")) if ops else OPS
    result = run_ops(
        operators, settings, meta, ops=wanted, recorder=_recorder(settings, model, text), path=path,
        progress=_show, minutes=float("inf") if max_minutes is None else max_minutes,
    )  # fmt: skip
    if {record["op"] for record in result["records"]} - {"chunk_topk", "copy", "read", "decode_topk", "decode_hsa"}:
        plot_ops(result, path.with_suffix(".png"))
    if as_json:
        echo_json(result)
    else:
        _print_tables(result, path)
    if not result["records"]:
        failures = result["meta"]["failures"]
        why = failures[0]["error"] if failures else f"no point began within {max_minutes:g} minutes"
        raise ValueError(f"nothing was measured: {why}")


@bench.command("memory")
def memory(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("benchmarks/results"),
    preset_name: Annotated[
        str | None, typer.Option("--preset", help="Preset with random weights instead of a trained model.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="Model folder, or its name in models/.", show_default="checkpoints/nano")
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens to memorise: 8K,1M,16M; none: leave out.")] = "8K,64K,256K",
    store: Annotated[str, typer.Option(help="Where the memory that is read lies: device, host or tiered.")] = "device",
    key_values: Annotated[
        str | None, typer.Option(help="Its form: bf16, int8, fp8.", show_default="the model's")
    ] = None,
    landmarks: Annotated[str | None, typer.Option(help="Form of its landmarks: bf16, int8.")] = None,
    file: Annotated[Path | None, typer.Option(help="Existing memory file to open and decode on.")] = None,
    stores: Annotated[
        str | None,
        typer.Option(help="Where opened files' keys and values lie.", show_default="device,host,file"),
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="Forms of keys and values in files.", show_default="bf16,int8")
    ] = None,
    file_max: Annotated[
        str | None, typer.Option(help="Longest memory that is also read into a file and saved.", show_default="1M")
    ] = None,
    batches: Annotated[str, typer.Option(help="Sequences that share the memory while decoding.")] = "1",
    lookups: Annotated[
        str | None, typer.Option(help="For --file: some of exact, sketch, lists.", show_default="exact")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Tokens decoded and timed.")] = 32,
    piece: Annotated[
        str | None,
        typer.Option("--piece", "--segment", help="Tokens per forward of reading; 128K and its multiples compile."),
    ] = None,
    tune: Annotated[bool, typer.Option(help="Let the compiler measure its choices for decoding (GPU).")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="bf16, fp32 or auto.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="Name in the file.", show_default="such as h200, cpu2")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of tokens and weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of a table.")] = False,
) -> None:
    """Time reading and decoding against the length of the memory, its store and its form.

    Writes memory-HARDWARE.json after every record, keeping what earlier runs measured besides, and draws it.

    Examples:

      hsa bench memory --lengths 8K,64K

      hsa bench memory --preset small_345m --lengths 8K,1M,16M --batches 1,8

      hsa bench memory --lengths 1G --store tiered --key-values int8 --landmarks int8

      hsa bench memory --preset small_345m --lengths 16M --piece 128K --file-max 16M --formats bf16 --stores file

      hsa bench memory --lengths none --file lib.hsa --stores file

      torchrun --standalone --nproc-per-node=2 --no-python hsa bench memory --preset small_345m --lengths 8K,16M

    Started by torchrun, decoding is timed once with the whole memory on every GPU and once with its chunks shared out
    over the processes; reading once whole in every process, all at once, and once a part in each.
    """
    import torch.distributed as dist

    from hsa_ultralong.bench.memory import MemorySettings
    from hsa_ultralong.cli.common import bench_results, choose_device, load_preset_or_model
    from hsa_ultralong.distributed.mesh import init_distributed

    require_folder(output)
    place = choose_device(device)
    init_distributed(place)
    if dist.is_initialized() and (store != "device" or key_values or landmarks):
        raise ValueError("processes share out a memory on the device in the model's form, or --file: leave --store out")
    settings = MemorySettings(
        **_file_options(file, stores, formats, file_max, lookups, is_alone=not dist.is_initialized()),
        lengths=() if lengths == "none" else tuple(parse_sizes(lengths, "--lengths")),
        batches=tuple(parse_counts(batches, "--batches")),
        steps=steps,
        piece_tokens=None if piece is None else parse_size(piece, "--piece"),
        store=store, key_values=key_values, landmarks=landmarks, tune=tune, seed=seed,
    )  # fmt: skip
    network, label = load_preset_or_model(preset_name, model, place, dtype, seed)
    path, meta = bench_results(output, "memory", hardware, place, seed)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    result = _measure_memory(network, label, settings, file, path, meta, is_first=is_first)
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first:
        _report_memory(result, path, as_json)


def _file_options(
    file: Path | None, stores: str | None, formats: str | None, file_max: str | None, lookups: str | None, *,
    is_alone: bool,
) -> dict[str, Any]:  # fmt: skip
    """What MemorySettings takes of files; what was given and nothing would read is refused."""
    longest = parse_size(file_max or "1M", "--file-max", 0)
    if lookups and file is None:
        raise ValueError("--lookups are those of an opened file: name one by --file, or leave --lookups out")
    if not is_alone and (formats or (file_max and longest) or (stores and file is None)):
        raise ValueError("several processes make no files: leave out --formats, --file-max, --stores without --file")
    return {
        "stores": tuple((stores or "device,host,file").split(",")),
        "formats": tuple((formats or "bf16,int8").split(",")),
        "lookups": tuple((lookups or "exact").split(",")),
        "file_max": longest,
    }


def _measure_memory(
    network: Any, label: str, settings: MemorySettings, file: Path | None, path: Path, meta: dict[str, Any], *,
    is_first: bool,
) -> dict[str, Any]:  # fmt: skip
    """All records, those of earlier runs besides; the first process writes after every one."""
    from hsa_ultralong.bench.memory import add_record, continued, file_records, memory_records
    from hsa_ultralong.bench.memory_report import format_value
    from hsa_ultralong.eval.metadata import write_json

    result = continued(path, meta)

    def keep(record: dict[str, Any]) -> None:
        if is_first:
            add_record(result, record)
            write_json(path, result)
            echo(f"{record['metric']} {record['tokens']:,} {record['store']}: {format_value(record)}", err=True)

    if settings.lengths:
        memory_records(network, label, settings, keep)
    if file is not None:
        file_records(network, label, file, settings, keep)
    return result


def _report_memory(result: dict[str, Any], path: Path, as_json: bool) -> None:

    from hsa_ultralong.bench.memory_report import plot_memory, table

    if any(record["metric"] in ("read_tokens_per_s", "decode_ms") for record in result["records"]):
        plot_memory(result, path.with_suffix(".png"))
    if as_json:
        echo_json(result)
        return
    console().print(table(result))
    echo(f"Written: {path} and {path.with_suffix('.png').name}")


def _settings(
    device: str, lengths: str | None, topk: str | None, full_max: str, quick: bool, longest: bool, seed: int,
    retrieval_dim: int | None,
) -> Settings:  # fmt: skip
    import torch

    from hsa_ultralong.bench.points import Settings

    fields: dict[str, Any] = {"device": device, "seed": seed, "full_max": parse_size(full_max, "--full-max", 0)}
    if device == "cpu":
        fields |= {**_ON_CPU, "dtype": torch.float32}
    elif quick:
        fields |= _QUICK
    if lengths:
        fields["lengths"] = tuple(parse_sizes(lengths, "--lengths"))
    if topk:
        fields["topks"] = tuple(parse_counts(topk, "--topk", MAX_TOPK))
    if quick:
        fields["budget_s"] = _QUICK["budget_s"]
    if retrieval_dim is not None:
        fields["R"] = retrieval_dim
    if longest:
        fields["lengths"] = (*fields.get("lengths", Settings.lengths), _MILLION)
    fields |= {key: tuple(dict.fromkeys(fields[key])) for key in ("lengths", "topks") if key in fields}
    return Settings(**fields)


def _recorder(settings: Settings, folder: Path | None, text: Path | None) -> Any:
    """Loads model and text when a recorded selection is first wanted; what fails then is noted as a failure."""

    def record(topk: int) -> Any:
        import torch

        from hsa_ultralong.bench.selections import recorded_lists
        from hsa_ultralong.cli.common import load_model
        from hsa_ultralong.data import read_text
        from hsa_ultralong.eval.haystack import opticks

        network, tokenizer = load_model(folder, settings.device)
        source = read_text(text) if text else opticks()
        longest = min(settings.recorded_max, max(settings.lengths))
        # no token is shorter than a character
        tokens = torch.tensor(tokenizer(source[: 16 * longest])["input_ids"][:longest])
        return recorded_lists(network, tokens, topk)

    return record


def _show(found: dict[str, Any]) -> None:
    """One line a point on standard error."""
    size = (
        f"T={found['T']:,}" + (f" C={found['C']:,}" if found["C"] else "") + (f" K={found['K']}" if found["K"] else "")
    )
    kind = "" if found["selection"] == "none" else f" {found['selection']}"
    outcome = f"failed: {found['error']}" if "error" in found else f"{found['ms']:.3f} ms"
    echo(f"{found['op']} {found['impl']} {found['direction']}{kind} {size}: {outcome}", err=True)


def _print_tables(result: dict[str, Any], path: Path) -> None:
    from hsa_ultralong.bench.ops_report import tables

    screen = console()
    for table in tables(result):
        screen.print(table)
    if left_out := result["meta"].get("left_out"):
        echo(f"Left out without a GPU: {', '.join(left_out)}.")
    if stopped := result["meta"].get("stopped_before"):
        echo(f"Stopped before {stopped}.")
    if failures := result["meta"]["failures"]:
        echo(f'{len(failures)} points failed, see meta["failures"].')
    picture = path.with_suffix(".png")
    echo(f"Written: {path}" + (f" and {picture.name}" if picture.is_file() else ""))
