"""What `hsa train --dry-run` prints: the resolved run, and what each stage takes. tests/train/test_planning.py."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hsa_ultralong.cli.terminal import console, echo_json

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from hsa_ultralong.train import TrainConfig

# more stages side by side are too wide for a narrow terminal
_STAGES_ABREAST = 5


def show_plan(config: TrainConfig, as_json: bool) -> None:
    """The resolved run, and what each stage takes."""

    from hsa_ultralong.train import as_dict
    from hsa_ultralong.train.planning import plan_as_dict, plan_run

    plan = plan_as_dict(config, plan_run(config))
    if as_json:
        echo_json({**as_dict(config), "plan": plan})
        return

    echo_json(as_dict(config))
    console().print(plan_table(config, plan))


def plan_table(config: TrainConfig, plan: dict[str, Any]) -> RenderableType:
    """Stages side by side, in more than one table if there are many, with their sums after the last."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    from hsa_ultralong.baselines.twins import rival_parameters
    from hsa_ultralong.cli.plan import format_count
    from hsa_ultralong.models.accounting import count_parameters
    from hsa_ultralong.train.twins import rival_of

    model = config.shape()
    parameters, rival = count_parameters(model), rival_of(config, model)
    count = parameters.total if rival is None else rival_parameters(rival)
    gpus = f"{plan['gpus']} GPU{'s' if plan['gpus'] > 1 else ''}"
    active = f", {format_count(parameters.active)} active" if parameters.active < parameters.total else ""
    name = (
        "the given model" if config.base else f"{config.preset}, twin {config.twin}" if config.twin else config.preset
    )
    title = f"{name}: {format_count(count)} parameters{active}; {gpus}, bytes are of one"
    caption = (
        f"Time: FLOP at {plan['mfu']:.0%} of {plan['peak_flops'] / 1e12:.0f} TFLOP/s a GPU (H100, H200), probes and "
        "checkpoints left out. Activations are an estimate (train/planning.py)."
    )
    stages, tables = plan["stages"], []
    width = -(-len(stages) // -(-len(stages) // _STAGES_ABREAST))
    for start in range(0, len(stages), width):
        table = Table("", box=box.SIMPLE, padding=(0, 1, 0, 0))
        _fill(table, stages[start : start + width], plan if start + width >= len(stages) else None)
        tables.append(table)
    return Group(Text(title), *tables, Text(caption))


def _fill(table: Table, stages: list[dict[str, Any]], plan: dict[str, Any] | None) -> None:
    """Columns of these stages and, with the plan, of the whole."""
    from hsa_ultralong.cli.plan import format_bytes, format_count

    for name in (*(stage["stage"] for stage in stages), *(("all",) if plan else ())):
        table.add_column(name, justify="right", no_wrap=True)
    whole: dict[str, list[str]] = {"steps": [], "tokens": [], "time": []}
    if plan:
        steps, tokens = (sum(stage[name] for stage in plan["stages"]) for name in ("steps", "tokens"))
        whole = {"steps": [f"{steps:,}"], "tokens": [format_count(tokens)], "time": [_duration(plan["seconds"])]}
    table.add_row("context", *(f"{stage['seq_len']:,}" for stage in stages))
    table.add_row("steps", *(f"{stage['steps']:,}" for stage in stages), *whole["steps"])
    table.add_row("tokens", *(format_count(stage["tokens"]) for stage in stages), *whole["tokens"])
    kinds = {"optimizer": "optimiser", "total_bytes": "sum"}
    for key in ("weights", "gradients", "optimizer", "activations", "total_bytes"):
        table.add_row(kinds.get(key, key), *(format_bytes(stage[key]) for stage in stages))
    if any(stage["host"] for stage in stages):
        table.add_row("host", *(format_bytes(stage["host"]) if stage["host"] else "" for stage in stages))
    table.add_row("time", *(_duration(stage["seconds"]) for stage in stages), *whole["time"])


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds >= 0.1 else "< 0.1 s"
