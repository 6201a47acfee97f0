"""`hsa plot`: draw a training run, needle records or operator times; `--all` redraws all committed figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("plot")(plot)


def plot(
    source: Annotated[
        Path | None,
        typer.Argument(help="A run or report folder, log.jsonl, records.jsonl, ops-, memory- or training-*.json."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write.", show_default="beside the source")
    ] = None,
    all_figures: Annotated[bool, typer.Option("--all", help="Redraw every committed figure from its numbers.")] = False,
) -> None:
    """Draw all curves of a run, the needle map of a report, or the times of `hsa bench ops`.

    Examples:

      hsa plot runs/nano

      hsa plot quickstart-report -o map.png

      hsa plot benchmarks/results/ops-h200.json

      hsa plot --all
    """
    if all_figures == (source is not None):
        raise ValueError("give either a run or report to draw, or --all")
    from hsa_ultralong.eval.figures import draw, draw_all

    if source is None:
        for path in draw_all(Path.cwd()):
            typer.echo(f"written {path}")
        return
    file, kind = _find(source)
    name = {"needles": "needles.png", "training": "loss.png"}.get(kind, f"{file.stem}.png")
    target = output or file.with_name(name)
    draw(file, target, kind, "" if kind in ("ops", "memory", "training_speed") else f"{source.resolve().name}")
    typer.echo(f"written {target}")


def _find(source: Path) -> tuple[Path, str]:
    candidates = [source] if source.is_file() else [source / "log.jsonl", source / "records.jsonl"]
    for file in candidates:
        if file.is_file() and file.suffix == ".json":
            return file, {"memory": "memory", "training": "training_speed"}.get(file.name.split("-")[0], "ops")
        if file.is_file():
            return file, "training" if file.name.startswith("log") else "needles"
    raise ValueError(f"{source} holds neither log.jsonl (a run) nor records.jsonl (a needle report)")
