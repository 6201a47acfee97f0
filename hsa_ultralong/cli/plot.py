"""`hsa plot`: draw runs, needle records, scores of suites or operator times; `--all` redraws all committed figures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_ultralong.cli.places import require_file
from hsa_ultralong.cli.terminal import echo

_FIGURES = (".png", ".pdf", ".svg")


def register(app: typer.Typer) -> None:
    app.command("plot")(plot)


def plot(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="SOURCE...",
            help="Folder of a run, of a report, of a suite or of hsa tune, log.jsonl or records.jsonl (or either .xz), "
            "summary.json, tuning.json, ops-, memory- or training-*.json; several runs, or several reports of hidden "
            "sentences, make one figure.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="PNG to write; needed for several.", show_default="beside the source"),
    ] = None,
    all_figures: Annotated[bool, typer.Option("--all", help="Redraw every committed figure from its numbers.")] = False,
) -> None:
    """Draw all curves of a run or of a tuning, the needle map of a report, the scores of a suite, the times of a
    benchmark, or several runs or reports beside one another.

    Examples:

      hsa plot runs/nano

      hsa plot quickstart-report -o map.png

      hsa plot results/recall-nano -o scores.png

      hsa plot models/smol-full-tuned -o tuning.png

      hsa plot benchmarks/results/ops-h200.json

      hsa plot runs/adamw runs/muon -o optimisers.png

      hsa plot --all
    """
    if all_figures == bool(sources):
        raise ValueError("give either what to draw, such as a run or a report, or --all")
    if all_figures and output is not None:
        raise ValueError("--all redraws every figure in its place: leave --output away")
    found = [_find(source) for source in sources or ()]
    if len(found) > 1 and output is None:
        raise ValueError("several sources need --output FILE.png")
    if output is not None:
        require_file(output, suffixes=_FIGURES)
    from hsa_ultralong.cli.figures import BENCHMARKS, compare, draw, draw_all

    if not sources:
        for path in draw_all(Path.cwd()):
            echo(f"written {path}")
        return
    if len(found) > 1:
        assert output is not None
        compare([file for file, _ in found], output, "")
        echo(f"written {output}")
        return
    (file, kind), source = found[0], sources[0]
    name = {"needles": "needles.png", "training": "loss.png", "suite": "scores.png"}.get(kind, f"{file.stem}.png")
    target = output or file.with_name(name)
    draw(file, target, kind, "" if kind in BENCHMARKS.values() else f"{source.resolve().name}")
    echo(f"written {target}")


def _find(source: Path) -> tuple[Path, str]:
    """The file to draw, and what kind of figure it makes."""
    from hsa_ultralong.cli.figures import BENCHMARKS
    from hsa_ultralong.eval.suite_summary import is_suite
    from hsa_ultralong.files.packed import stored

    tuning = source if source.name == "tuning.json" else source / "tuning.json"
    if tuning.is_file():
        return tuning, "tuning"
    log, records = (stored(source / name) for name in ("log.jsonl", "records.jsonl"))
    candidates = [source] if source.is_file() else [log, records]
    summary = source if source.name == "summary.json" else source / "summary.json"
    if summary.is_file() and not log.is_file() and is_suite(summary):
        return summary, "suite"
    for file in candidates:
        if file.is_file() and file.suffix == ".json":
            return file, BENCHMARKS.get(file.name.split("-")[0], "ops")
        if file.is_file():
            return file, "training" if file.name.startswith("log") else "needles"
    advice = ""
    if not source.exists() and (source.parent / "runs.jsonl.xz").is_file():
        advice = f"; a run published together is made a folder by `python scripts/publish.py {source} -o FOLDER`"
    raise ValueError(
        f"{source} holds neither log.jsonl (a run), nor records.jsonl (a needle report), nor summary.json (a suite), "
        f"nor tuning.json (hsa tune){advice}"
    )
