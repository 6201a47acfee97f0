"""Figures of a suite's run: scores, depth by length, and what becomes of the right chunk by length.

Called by suite.py; tests/eval/test_suite_plots.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hsa_ultralong.eval.plots import human_tokens, plt, save
from hsa_ultralong.eval.suite_diagnosis import CAUSES, Diagnosis, diagnoses
from hsa_ultralong.eval.suite_summary import Records, headlines, wholes

# of right, reading, fusion, retrieval, not known
COLOURS = dict(zip(CAUSES, ("#1f7a6e", "#e3b505", "#e07b39", "#9c3d6e", "#a3aeb8"), strict=True))
_KINDS = (".png", ".svg")


def draw_all(records: Records, summary: Records, folder: Path, label: str) -> list[str]:
    """Write every figure that the run has numbers for, as PNG and SVG; returns their names without suffix."""
    names = {
        "scores": draw_table(summary, folder / "scores", f"{label}: score in percent, by task and length"),
        "depths": draw_depths(summary, folder / "depths", f"{label}: score in percent, by depth and length"),
        "diagnosis": draw_diagnosis(records, folder / "diagnosis", f"{label}: the right chunk, by length"),
    }
    return [name for name, is_drawn in names.items() if is_drawn]


def _save(figure: Any, path: Path) -> None:
    """In the form that the path names, or in both."""
    for kind in (path.suffix,) if path.suffix else _KINDS:
        save(figure, path.with_suffix(kind), 130)


def draw_table(summary: Records, path: Path, title: str) -> bool:
    """A map of the tasks' own scores, tasks by length, each cell with its percent; False without any."""
    rows = wholes(headlines(summary))
    if not rows:
        return False
    lengths = sorted({r["length"] for r in summary})
    values = np.array([[row[n]["value"] if n in row else np.nan for n in lengths] for row in rows.values()])
    figure, axes = plt.subplots(
        figsize=(max(4.6, 2.6 + 0.75 * len(lengths)), 1.1 + 0.28 * len(rows)), layout="constrained"
    )
    image = _map(axes, values, 8)
    axes.set_xticks(range(len(lengths)), [human_tokens(length) for length in lengths], fontsize=8)
    labels = [task if metric != "auroc" else f"{task} (AUROC)" for task, metric in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, ax=axes, fraction=0.05, format="{x:.0f}")
    _save(figure, path)
    return True


def _map(axes: Any, values: Any, size: int) -> Any:
    """Values of 0..1 (rows, columns) as colours and percent."""
    image = axes.imshow(100 * values, cmap="RdYlGn", vmin=0, vmax=100, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        if not np.isnan(value):
            color = "white" if value < 0.2 or value > 0.85 else "black"
            axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=size, color=color)
    return image


def draw_depths(summary: Records, path: Path, title: str) -> bool:
    """A map of depth by length for every task whose facts have one; False if there is none."""
    cells: dict[str, dict[tuple[int, int], float]] = {}
    for record in summary:
        if record["depth"] is not None:
            cells.setdefault(record["task"], {})[round(10 * record["depth"] - 0.5), record["length"]] = record["value"]
    if not cells:
        return False
    lengths = sorted({length for found in cells.values() for _, length in found})
    figure, grid = _grid(len(cells), min(4, len(cells)), max(2.2, 0.9 + 0.36 * len(lengths)), 2.5)
    for axes, (task, found) in zip(grid, cells.items(), strict=False):
        values = np.array([[found.get((tenth, length), np.nan) for length in lengths] for tenth in range(10)])
        _map(axes, values, 6)
        axes.set_xticks(range(len(lengths)), [human_tokens(length) for length in lengths], fontsize=7)
        axes.set_yticks(range(10), [f"{10 * tenth + 5}%" for tenth in range(10)], fontsize=6)
        axes.set_title(task, fontsize=8)
    _entitle(figure, title)
    _save(figure, path)
    return True


def draw_diagnosis(records: Records, path: Path, title: str) -> bool:
    """A row for every task: what became of its samples, recall of the right chunk at K, its rank, weight and margin;
    False if no sample has a right answer."""
    found = diagnoses(records)
    if not found:
        return False
    figure, grid = _grid(5 * len(found), 5, 2.5, 1.9)
    for number, (task, of_length) in enumerate(found.items()):
        _diagnosis_row(grid[5 * number : 5 * number + 5], task, of_length)
    _entitle(figure, title)
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in CAUSES]
    names = ["right", *(f"missed: {kind}" for kind in list(CAUSES)[1:])]
    figure.legend(marks, names, loc="lower center", ncols=len(names), fontsize=8, frameon=False)
    _save(figure, path)
    return True


def _grid(count: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure of `count` panels, (panels,); those that are left over stay empty."""
    rows = -(-count // columns)
    tall, wide = height * rows + 1.0, width * columns + 0.5
    # a layout that is fitted would take minutes for a hundred panels
    figure, grid = plt.subplots(rows, columns, figsize=(wide, tall), squeeze=False)
    figure.subplots_adjust(
        left=0.6 / wide, right=1 - 0.15 / wide, top=1 - 0.6 / tall, bottom=0.75 / tall, wspace=0.26, hspace=0.42
    )
    for axes in grid.flat[count:]:
        axes.axis("off")
    return figure, grid.reshape(-1)


def _entitle(figure: Any, title: str) -> None:
    figure.suptitle(title, fontsize=10, y=1 - 0.1 / figure.get_figheight(), va="top")


def _diagnosis_row(panels: Sequence[Any], task: str, of_length: Mapping[int, Diagnosis]) -> None:
    places, below = range(len(of_length)), np.zeros(len(of_length))
    for kind in CAUSES:
        share = np.array([one.causes[kind] / one.samples for one in of_length.values()])
        panels[0].bar(places, share, bottom=below, color=COLOURS[kind], width=0.8)
        below += share
    panels[0].set_ylabel(task, fontsize=7)
    panels[0].set_title("samples", fontsize=8)
    most = max((max(one.recall) for one in of_length.values() if one.recall), default=0)
    for number, k in enumerate(sorted({k for k in (1, 4, 16) if k < most} | ({most} if most else set()))):
        points = [(x, one.recall_at(k)) for x, one in enumerate(of_length.values()) if one.recall]
        panels[1].plot(*zip(*points, strict=True), "o-", ms=3, lw=1.1, color=f"C{number}", label=f"K = {k}")
    panels[1].set_title("right chunk among the first K", fontsize=8)
    panels[1].set_ylim(-0.05, 1.05)
    if most:
        panels[1].legend(fontsize=6, frameon=False)
    for axes, name in zip(panels[2:], ("rank", "weight", "margin"), strict=True):
        points = [(x, spread) for x, one in enumerate(of_length.values()) if (spread := getattr(one, name))]
        if points:
            xs, spreads = zip(*points, strict=True)
            axes.plot(xs, [s.middle for s in spreads], "o-", ms=3, lw=1.1)
            axes.fill_between(xs, [s.low for s in spreads], [s.high for s in spreads], alpha=0.15, lw=0)
        axes.set_title(f"its {name}" + (", nats" if name == "margin" else ""), fontsize=8)
    panels[3].set_ylim(-0.05, 1.05)
    for axes in panels:
        axes.set_xticks(places, [human_tokens(length) for length in of_length], fontsize=7)
        axes.set_xlim(-0.6, len(of_length) - 0.4)
        axes.tick_params(axis="y", labelsize=6)
        axes.grid(True, alpha=0.2)
