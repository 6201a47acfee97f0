"""`hsa plot`: draw a training run or needle records; `--all` redraws the project's committed figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("plot")(plot)


def plot(
    source: Annotated[
        Path | None, typer.Argument(help="A run folder, a report folder, a log.jsonl or records.jsonl.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="PNG to write [default: beside the source].")
    ] = None,
    all_figures: Annotated[bool, typer.Option("--all", help="Redraw every committed figure from results/.")] = False,
) -> None:
    """Draw loss and needle accuracy of a run, or the needle map of a report.

    Examples:

      hsa plot runs/nano

      hsa plot quickstart-report -o map.png

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
    target = output or file.with_name("needles.png" if kind == "needles" else "loss.png")
    draw(file, target, kind, f"{source.resolve().name}")
    typer.echo(f"written {target}")


def _find(source: Path) -> tuple[Path, str]:
    candidates = [source] if source.is_file() else [source / "log.jsonl", source / "records.jsonl"]
    for file in candidates:
        if file.is_file():
            return file, "training" if file.name.startswith("log") else "needles"
    raise ValueError(f"{source} holds neither log.jsonl (a run) nor records.jsonl (a needle report)")
