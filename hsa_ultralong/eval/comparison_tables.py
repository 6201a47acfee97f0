"""A comparison of runs as tables in Markdown and LaTeX, one for every suite and length, and as curves by length.

Called by cli/compare.py; tests/eval/test_suite_compare.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hsa_ultralong.eval.intervals import Difference
from hsa_ultralong.eval.plots import MARKS, human_tokens, plt, save
from hsa_ultralong.eval.suite_compare import MEAN, Cell, Comparison

LEGEND = (
    "Percent with 95% intervals. A difference is the model's minus the first one's, in points, over pairs of the same "
    "sample, or of so many other ones; bold where its interval leaves zero out, as one in twenty does by chance."
)


def markdown(comparison: Comparison) -> str:
    """Notes, then a table of every suite and length."""
    parts = []
    if comparison.notes:
        parts.append("What is not the same:\n" + "\n".join(f"- {note}" for note in comparison.notes))
    for (suite, length), table in comparison.tables.items():
        head = " | ".join(_bar(name) for name in _head(comparison))
        lines = [f"{suite} at {human_tokens(length)}:", "", f"| {head} |"]
        lines.append("|" + "---|" * len(_head(comparison)))
        for (task, metric), row in table.items():
            cells = [task, metric]
            for run in comparison.runs:
                cells += _texts(row.get(run.name), row, comparison, is_first=run is comparison.runs[0])
            lines.append("| " + " | ".join(map(_bar, cells)) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _bar(cell: str) -> str:
    return cell.replace("|", r"\|")


def _head(comparison: Comparison) -> list[str]:
    first, *others = (run.name for run in comparison.runs)
    return ["task", "metric", first, *(part for name in others for part in (name, f"{name} - {first}"))]


def _texts(cell: Cell | None, row: Any, comparison: Comparison, *, is_first: bool) -> list[str]:
    if cell is None:
        return [""] if is_first else ["", ""]
    score = f"{100 * cell.value:.0f} ({100 * cell.low:.0f}-{100 * cell.high:.0f})"
    if is_first:
        return [score]
    if cell.difference is None:
        return [score, cell.reason]
    first = row[comparison.runs[0].name]
    text = difference_text(cell.difference)
    text = f"**{text}**" if cell.difference.is_clear else text
    return [score, f"{text}, {number_text(cell.difference, first, cell)}"]


def difference_text(difference: Difference) -> str:
    """ "+20 (-8 to +45)", in points."""
    value, low, high = (_signed(100 * v) for v in (difference.value, difference.low, difference.high))
    return f"{value} ({low} to {high})"


def _signed(value: float) -> str:
    text = f"{value:+.0f}"
    return "0" if text in ("+0", "-0") else text


def number_text(difference: Difference, first: Cell, cell: Cell) -> str:
    """ "10 pairs", or "10 and 12" of different samples."""
    if difference.pairs is None:
        return f"{first.samples} and {cell.samples}"
    return f"{difference.pairs} pair{'s' if difference.pairs != 1 else ''}"


def latex(comparison: Comparison) -> str:
    """The same tables as LaTeX (booktabs), a tabular of each; clear differences in bold."""
    parts = []
    for (suite, length), table in comparison.tables.items():
        head = [_tex(name) for name in _head(comparison)]
        lines = [f"% {suite} at {length} tokens", r"\begin{tabular}{ll" + "r" * (len(head) - 2) + "}", r"\toprule"]
        lines += [" & ".join(head) + r" \\", r"\midrule"]
        for (task, metric), row in table.items():
            cells = [_tex(task), _tex(metric)]
            for run in comparison.runs:
                cell, is_first = row.get(run.name), run is comparison.runs[0]
                cells.append("--" if cell is None else f"{100 * cell.value:.1f}")
                if not is_first:
                    cells.append("--" if cell is None or cell.difference is None else _tex_difference(cell.difference))
            lines.append(" & ".join(cells) + r" \\")
        parts.append("\n".join([*lines, r"\bottomrule", r"\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _tex_difference(difference: Difference) -> str:
    value, low, high = (100 * v for v in (difference.value, difference.low, difference.high))
    number = rf"\mathbf{{{value:+.1f}}}" if difference.is_clear else f"{value:+.1f}"
    return rf"${number}$ {{\scriptsize $[{low:+.0f}, {high:+.0f}]$}}"


def _tex(text: str) -> str:
    """Text with what LaTeX would act on escaped."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def draw_curves(comparison: Comparison, path: Path) -> None:
    """A panel for every task and its own score: by length, a curve with its 95% intervals for every run."""
    cells: dict[tuple[str, str], dict[str, dict[int, Cell]]] = {}
    for (suite, length), table in comparison.tables.items():
        own = {task: metric for task, metric in reversed(list(table)) if metric != "auroc"}
        for (task, metric), row in table.items():
            if metric not in (own.get(task), "auroc"):
                continue
            # of how many tasks it is the mean may differ from length to length
            of_run = cells.setdefault((f"{suite}: {task}", "") if task == MEAN else (task, metric), {})
            for name, cell in row.items():
                of_run.setdefault(name, {})[length] = cell
    lengths = sorted({length for _, length in comparison.tables})
    columns = min(4, len(cells))
    height = -(-len(cells) // columns)
    figure, grid = plt.subplots(
        height, columns, figsize=(3.0 * columns, 2.2 * height + 0.6), layout="constrained", squeeze=False, sharey=True
    )
    for axes, ((task, metric), of_run) in zip(grid.flat, cells.items(), strict=False):
        for number, run in enumerate(comparison.runs):
            found = sorted(of_run.get(run.name, {}).items())
            values = [cell.value for _, cell in found]
            spans = [[max(0.0, c.value - c.low) for _, c in found], [max(0.0, c.high - c.value) for _, c in found]]
            style: dict[str, Any] = {"marker": MARKS[number % len(MARKS)], "color": f"C{number}", "label": run.name}
            # runs stand a little beside one another, so that no interval hides another
            shift = 0.07 * (number - (len(comparison.runs) - 1) / 2)
            axes.errorbar(
                [lengths.index(n) + shift for n, _ in found], values, spans, ms=4, lw=1.2, elinewidth=0.7, **style
            )
        axes.set_title(task if metric != "auroc" else f"{task} (AUROC)", fontsize=8)
        axes.set_xticks(range(len(lengths)), [human_tokens(length) for length in lengths])
        axes.set_xlim(-0.4, len(lengths) - 0.6)
        axes.set_ylim(-0.05, 1.05)
        axes.tick_params(labelsize=7)
        axes.grid(True, alpha=0.2)
    for axes in grid.flat[len(cells) :]:
        axes.axis("off")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=8, frameon=False)
    save(figure, path, 130)
