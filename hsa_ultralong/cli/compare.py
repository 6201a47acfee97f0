"""`hsa compare`: runs of `hsa eval MODEL --suite` side by side, with the differences and their intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hsa_ultralong.cli.places import require_file, require_folder
from hsa_ultralong.cli.terminal import echo, echo_json


def register(app: typer.Typer) -> None:
    app.command("compare")(compare)


def compare(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN...",
            help="Output folders of `hsa eval MODEL --suite`, or NAME=FOLDER; a folder of several runs stands for all. "
            "The first is what the others are compared with.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for compare.json, compare.md, compare.tex and curves.png, .svg."),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="One page without network; of a single run its report.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print compare.json instead of tables.")] = False,
) -> None:
    """Put models, or commits of one model, beside one another: scores, differences and their 95% intervals.

    Differences are taken pair by pair where both answered the same sample, which a checksum tells; else the samples
    count as independent, and the tables say so. What differs in samples, scoring or settings is named first.

    Examples:

      hsa compare runs/nano runs/mine

      hsa compare before=runs/a/nano after=runs/b/nano -o runs/before-after --html before-after.html

      hsa compare runs/beside --json

      hsa compare runs/nano --html nano.html
    """
    from hsa_ultralong.eval.stored_runs import find_runs, read_runs

    if output is not None:
        require_folder(output)
    if html is not None:
        require_file(html, "--html", (".html", ".htm"))
    found = read_runs(find_runs(runs))
    from hsa_ultralong.eval.html_report import write_page

    if len(found) == 1 and html is not None and output is None and not as_json:
        write_page(found, html)
        echo(f"written {html}")
        return
    from hsa_ultralong.eval.comparison_tables import draw_curves, latex, markdown
    from hsa_ultralong.eval.html_report.compared import compared
    from hsa_ultralong.eval.metadata import command_line, write_json
    from hsa_ultralong.eval.suite_compare import compare_runs
    from hsa_ultralong.files.durable import write_whole

    comparison = compare_runs(found)
    summary = {
        "meta": {
            "command": command_line(),
            "runs": [{"name": r.name, "settings": r.settings, **r.meta} for r in found],
        },
        "notes": comparison.notes,
        "records": comparison.records(),
    }
    if as_json:
        echo_json(summary)
    else:
        echo(markdown(comparison))
    if output is not None:
        write_json(output / "compare.json", summary)
        write_whole(output / "compare.md", markdown(comparison))
        write_whole(output / "compare.tex", latex(comparison))
        for name in ("curves.png", "curves.svg"):
            draw_curves(comparison, output / name)
        echo(f"Written: {output}/compare.json, compare.md, compare.tex, curves.png, curves.svg", err=as_json)
    if html is not None:
        write_page(found, html, first=[("comparison", "Comparison", compared(comparison))])
        echo(f"Written: {html}", err=as_json)
