"""`hsa bench training`: optimiser steps against the context, or the longest row that trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hsa_ultralong.cli.numbers import MAX_COUNT, MAX_SEED, finite, parse_size, parse_sizes
from hsa_ultralong.cli.places import require_folder
from hsa_ultralong.cli.terminal import console, echo, echo_json

if TYPE_CHECKING:
    import torch

    from hsa_ultralong.bench.training import TrainingSettings
    from hsa_ultralong.bench.training_longest import LongestSettings
    from hsa_ultralong.bench.training_ranks import Way
    from hsa_ultralong.models import HSAConfig


def training(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = Path("benchmarks/results"),
    preset_name: Annotated[str, typer.Option("--preset", help="Preset, with random weights.")] = "small_345m",
    contexts: Annotated[str, typer.Option(help="Tokens a row: 8K,16K,32K,128K.")] = "8K,16K,32K,128K",
    attention: Annotated[
        str, typer.Option(help="hsa, and twins in one process: full (its window layers alone), full_rope (its size).")
    ] = "hsa,full",
    batch_tokens: Annotated[str, typer.Option(help="Tokens of an optimiser step.")] = "128K",
    micro_tokens: Annotated[str, typer.Option(help="Tokens of a forward to try; the fastest counts.")] = "16K,32K",
    checkpointing: Annotated[str, typer.Option(help="Activation checkpointing: none or full.")] = "none",
    longest: Annotated[bool, typer.Option("--longest", help="Instead: search the longest row that trains.")] = False,
    methods: Annotated[
        str, typer.Option(help="For --longest: plain, checkpointing, segmented, offloaded (pieces on the host).")
    ] = "plain,checkpointing,segmented",
    caps: Annotated[str | None, typer.Option(help="For --longest: limits on memory.", show_default="80GB,card")] = None,
    max_tokens: Annotated[str | None, typer.Option(help="For --longest: no longer row.", show_default="16M")] = None,
    piece_tokens: Annotated[
        str, typer.Option("--piece-tokens", "--segment-tokens", help="For --longest: tokens of a piece.")
    ] = "32K",
    max_minutes: Annotated[
        float, typer.Option(min=0, max=1e9, callback=finite, help="For --longest: begin no trial that ends later.")
    ] = 1e9,
    start: Annotated[str | None, typer.Option("--from", help="For --longest: first row.", show_default="8K")] = None,
    spread: Annotated[
        str, typer.Option(help="Under torchrun: shard, replicate, context, pool, each also with -fp32 weights.")
    ] = "shard,context",
    tile_tokens: Annotated[str, typer.Option(help="Of --spread: tokens of a feed-forward tile; 0: whole.")] = "0",
    offload: Annotated[bool, typer.Option("--offload", help="Of --spread: activations wait on the host.")] = False,
    compile_layers: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile.", show_default="GPU, not --longest")
    ] = None,
    precision: Annotated[str, typer.Option(help="Of feed-forward blocks: bf16, or fp8 on a GPU.")] = "bf16",
    graphs: Annotated[bool, typer.Option("--graphs", help="By CUDA graphs; one process on a GPU.")] = False,
    steps: Annotated[int, typer.Option(min=1, max=MAX_COUNT, help="Steps timed.")] = 4,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="Name in the file.", show_default="such as h200, cpu2")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Seed of tokens and weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON instead of a table.")] = False,
) -> None:
    """Time optimiser steps against the context, beside a transformer of the same width with full attention.

    --longest doubles one row until it no longer trains and bisects, under every cap: plain, with activation
    checkpointing, and in pieces. Run it again to go on where it was cut off.

    Started by torchrun, steps are timed once in every process alone and once spread over all, by FSDP2, with shared
    rows or with a shared pool, which is compared with the same pool in one process.

    Writes training-HARDWARE.json after every record, keeping what earlier runs measured besides, and draws it.

    Examples:

      hsa bench training --contexts 8K,128K

      hsa bench training --contexts 8K --micro-tokens 128K --precision fp8

      hsa bench training --contexts 8K --graphs

      hsa bench training --longest --caps 80GB,card --max-minutes 25

      hsa bench training --preset debug --contexts 256 --batch-tokens 1024 --micro-tokens 256,512 --device cpu

      hsa bench training --longest --preset debug --max-tokens 512 --piece-tokens 64 --device cpu

      torchrun --standalone --nproc-per-node=2 --no-python hsa bench training --contexts 8K --spread shard
    """
    from hsa_ultralong.cli.common import choose_device, collect_as_usual
    from hsa_ultralong.distributed.mesh import init_distributed
    from hsa_ultralong.models.presets import preset

    require_folder(output)
    place = choose_device(device)
    here = init_distributed(place)
    use_compile = place == "cuda" and (not longest if compile_layers is None else compile_layers)
    results = _Results(output, hardware, place, seed)
    collect_as_usual()
    model, kinds = preset(preset_name), [kind.strip() for kind in attention.split(",")]
    is_timed_alone = not longest and not results.is_shared
    _require_graphs(graphs, model, place == "cuda" and is_timed_alone)
    _require_precision(precision, model, place, is_timed_alone)
    saving = _saving(tile_tokens, offload, place, longest, results.is_shared)
    if longest:
        rows = _longest_settings(
            methods, caps, max_tokens, piece_tokens, max_minutes, start, use_compile, seed, place
        )  # fmt: skip
        _search_longest(model, preset_name, kinds, rows, place, results)
    else:
        settings = _speed_settings(contexts, batch_tokens, micro_tokens, steps, checkpointing, seed, precision)
        _measure_speed(model, preset_name, kinds, settings, spread, saving, use_compile, graphs, here, results)
    if results.is_first:
        _report_training(results.found, results.path, as_json)


def _require_graphs(graphs: bool, model: HSAConfig, has_place: bool) -> None:
    if graphs and not has_place:
        raise ValueError("--graphs is for timed steps of one process on a GPU: leave it out")
    if graphs and model.num_experts:
        raise ValueError(
            "--graphs cannot hold a mixture of experts, which reads counts: leave it out, or name another --preset"
        )


def _require_precision(precision: str, model: HSAConfig, place: str, is_timed_alone: bool) -> None:
    import torch

    from hsa_ultralong.train.config import PRECISIONS
    from hsa_ultralong.train.precision import require_blocks, require_precision

    if precision not in PRECISIONS:
        raise ValueError(f"--precision is one of {', '.join(PRECISIONS)}; got {precision!r}")
    if precision != "bf16" and not is_timed_alone:
        raise ValueError(f"--precision {precision} is for timed steps of one process: leave it out")
    require_blocks(precision, model)
    require_precision(precision, torch.device(place))


def _saving(tile_tokens: str, offload: bool, place: str, longest: bool, is_shared: bool) -> dict[str, Any]:
    """Options of ParallelConfig by which a spread step saves memory; refuses those that nothing would read."""
    if longest and is_shared:
        raise ValueError("--longest searches on one card: start it without torchrun")
    tiles = parse_size(tile_tokens, "--tile-tokens", 0)
    if not is_shared and (tiles or offload):
        raise ValueError("--tile-tokens and --offload are for steps that torchrun spreads: leave them out")
    if offload and place != "cuda":
        raise ValueError("--offload needs a GPU: leave it out")
    return {"mlp_tile_tokens": tiles, "offload_activations": offload}


def _speed_settings(
    contexts: str, batch_tokens: str, micro_tokens: str, steps: int, checkpointing: str, seed: int, precision: str
) -> TrainingSettings:
    from hsa_ultralong.bench.training import TrainingSettings

    rows, micro = parse_sizes(contexts, "--contexts"), parse_sizes(micro_tokens, "--micro-tokens")
    tokens = parse_size(batch_tokens, "--batch-tokens")
    return TrainingSettings(tuple(rows), tokens, tuple(micro), steps, checkpointing, seed, precision)


class _Results:
    """The results file, those of earlier runs besides; the first process writes it after every record."""

    def __init__(self, output: Path, hardware: str | None, place: str, seed: int) -> None:
        import torch.distributed as dist

        from hsa_ultralong.bench.memory import continued
        from hsa_ultralong.cli.common import bench_results

        self.is_shared = dist.is_initialized()
        self.is_first = not self.is_shared or dist.get_rank() == 0
        self.path, meta = bench_results(output, "training", hardware, place, seed)
        self.found = continued(self.path, meta)

    def keep(self, record: dict[str, Any]) -> None:
        from hsa_ultralong.bench.training_report import REPORTED, add_record, format_value
        from hsa_ultralong.eval.metadata import write_json

        if not self.is_first:
            return
        add_record(self.found, record)
        write_json(self.path, self.found)
        # a search says itself how its trials went
        if record["metric"] in REPORTED:
            way = f", {record['parallel']}" if self.is_shared else ""
            self.say(f"{record['attention']} {record['context']:,}{way} {record['metric']}: {format_value(record)}")

    def say(self, text: str) -> None:
        if self.is_first:
            echo(text, err=True)


def _measure_speed(
    model: HSAConfig, name: str, kinds: list[str], settings: TrainingSettings, spread: str, saving: dict[str, Any],
    use_compile: bool, has_graphs: bool, device: torch.device, results: _Results,
) -> None:  # fmt: skip
    """Steps of the model and its twin; under torchrun of the model alone, in one process and over all."""
    import torch.distributed as dist

    from hsa_ultralong.bench.training import require_attentions, training_records
    from hsa_ultralong.bench.training_ranks import ranks_records
    from hsa_ultralong.train.graphs import CudaCapture

    require_attentions(kinds, model)
    if dist.is_initialized():
        if "hsa" not in kinds:
            raise ValueError("under torchrun the model alone is measured: leave --attention out")
        ways = _ways(spread, settings.checkpointing, saving, use_compile, device)
        ranks_records(model, name, ways, settings, device, results.keep, results.say)
        dist.destroy_process_group()
        return
    for kind in kinds:
        training_records(
            model, name, kind, settings, device, results.keep, _preparation(use_compile, settings.precision),
            on_failure=results.say, make_capture=CudaCapture if has_graphs else None,
        )  # fmt: skip


def _ways(names: str, checkpointing: str, saving: dict[str, Any], use_compile: bool, place: torch.device) -> list[Way]:
    """One process, the ways called `names` (SPREADS, with "-fp32" for weights in fp32), and a pool in one process.

    Ways that none of them is compared with are left out.
    """
    from dataclasses import replace

    import torch.distributed as dist

    from hsa_ultralong.bench.training_ranks import SPREADS, Way
    from hsa_ultralong.distributed.mesh import ParallelConfig, build_mesh, data_rank, total
    from hsa_ultralong.train.activations import activation_context
    from hsa_ultralong.train.parallelize import begin_forward, clip_gradients, parallelize

    world = dist.get_world_size()

    def way(name: str) -> Way:
        kind, _, dtype = name.partition("-")
        if name and (kind not in SPREADS or dtype not in ("", "fp32")):
            raise ValueError(f"--spread takes {', '.join(SPREADS)}, each also with -fp32; got {name!r}")
        sizes: dict[str, Any] = {"replicate": {"replicate": world}, "context": {"context": world}}.get(kind, {})
        config = ParallelConfig(
            **sizes, pool_over_ranks=kind == "pool", activation_checkpointing=checkpointing,
            param_dtype="float32" if dtype else "bfloat16", **(saving if name else {}),
        )  # fmt: skip
        tiles, offloads = config.mlp_tile_tokens, config.offload_activations
        mesh = build_mesh(config, place.type) if name else None
        slice_of_row = mesh.get_local_rank("context") if mesh is not None else 0
        return Way(
            f"{kind} {world}" + (", fp32 weights" if dtype else "") if name else "",
            world if name else 1, config.context,
            lambda model: parallelize(model, mesh, config, use_compile=use_compile),
            (data_rank(mesh), slice_of_row), lambda part: total(part, mesh), clip_gradients,
            lambda model, is_last: begin_forward(model, config, is_last=is_last),
            world if kind == "pool" else 0,
            (f", tiles of {tiles:,}" if tiles else "") + (", offloaded" if offloads else ""),
            lambda: activation_context(config),
        )  # fmt: skip

    wanted = [part.strip() for part in names.split(",")]
    if not all(wanted):
        raise ValueError(f"--spread takes {', '.join(SPREADS)}, separated by commas; got {names!r}")
    one, ways = way(""), [way(name) for name in wanted]
    pools = [found for found in ways if found.pool_world]
    before = [one] if len(pools) < len(ways) else []
    after = [replace(one, name=found.against, pool_world=world) for found in pools[:1]]
    return [*before, *ways, *after]


def _report_training(result: dict[str, Any], path: Path, as_json: bool) -> None:

    from hsa_ultralong.bench.training_report import plot_training_speed, tables

    curves = ("tokens_per_s", "longest_sequence")
    has_figure = any(record["metric"] in curves and record["value"] for record in result["records"])
    if has_figure:
        plot_training_speed(result, path.with_suffix(".png"))
    if as_json:
        echo_json(result)
        return
    for table in tables(result):
        console().print(table)
    echo(f"Written: {path}" + (f" and {path.with_suffix('.png').name}" if has_figure else ""))


def _preparation(use_compile: bool, precision: str = "bf16") -> Any:
    """What the trainer does to a model before its first step (train/parallelize.py), for one process."""
    from hsa_ultralong.models import HSAForCausalLM
    from hsa_ultralong.train.activations import recompute_activations
    from hsa_ultralong.train.compilation import compile_layers
    from hsa_ultralong.train.precision import set_precision

    def prepare(model: Any, checkpointing: str) -> None:
        set_precision(model, precision)
        if isinstance(model, HSAForCausalLM):
            recompute_activations(model, checkpointing)
        if use_compile:
            compile_layers(model, joins=checkpointing != "full")

    return prepare


def _longest_settings(
    methods: str, caps: str | None, max_tokens: str | None, piece_tokens: str, max_minutes: float,
    start: str | None, use_compile: bool, seed: int, place: str,
) -> LongestSettings:  # fmt: skip
    import time

    import torch

    from hsa_ultralong.bench.training_longest import LongestSettings, choose_caps, choose_methods

    if max_tokens is None and place == "cpu":
        raise ValueError("--longest on a CPU needs a bound, such as --max-tokens 4K")
    names = [part.strip() for part in methods.split(",")]
    return LongestSettings(
        max_tokens=parse_size(max_tokens or "16M", "--max-tokens"),
        methods=choose_methods(names, parse_size(piece_tokens, "--piece-tokens"), use_compile),
        caps=choose_caps(caps, torch.device(place)),
        first=None if start is None else parse_size(start, "--from"),
        deadline=time.monotonic() + 60 * max_minutes,
        seed=seed,
    )


def _search_longest(
    model: HSAConfig, name: str, kinds: list[str], settings: LongestSettings, place: str, results: _Results
) -> None:
    """The longest rows of the model and its twin, from the trials in `results` on."""
    import torch

    from hsa_ultralong.bench.training import require_attentions
    from hsa_ultralong.bench.training_longest import LongestSearch, usable_trials
    from hsa_ultralong.train.segmented import segmented_loss_backward

    require_attentions(kinds, model)
    known = usable_trials(results.found, name)
    searches = [
        LongestSearch(
            model, name, kind, settings, torch.device(place), segmented=segmented_loss_backward,
            prepare=_preparation(settings.methods[0].compiled), on_record=results.keep, say=results.say, known=known,
        )
        for kind in kinds
    ]  # fmt: skip
    for search in searches:
        search.run()
