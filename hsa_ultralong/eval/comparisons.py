"""Several needle studies, or several training runs, in one figure: recall and margin by length, loss and needles by
tokens. Called by cli/plot.py and cli/figures.py; tests/eval/test_comparisons.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import quantiles
from typing import Any

from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.plots import LOSS, MARKS, NEEDLES, plt, save, token_axis, training_panels
from hsa_ultralong.eval.suite_summary import Records


def compare_needles(studies: Mapping[str, Records], path: Path, title: str) -> None:
    """Exact match with its 95% interval, and the score margin (median, quartiles) where measured, by length.

    Args:
        studies: name and lines of records.jsonl of each.
    """
    with_margin = any(line.get("margin") is not None for lines in studies.values() for line in lines)
    figure, grid = plt.subplots(
        1, 1 + with_margin, figsize=(4.6 * (1 + with_margin), 3.6), layout="constrained", squeeze=False
    )
    recall, margin = grid[0, 0], grid[0, -1]
    for number, (name, lines) in enumerate(studies.items()):
        style: dict[str, Any] = {"color": f"C{number}", "label": name, "marker": MARKS[number % len(MARKS)], "ms": 5}
        of_length = {length: [line for line in lines if line["length"] == length] for length in _lengths(lines)}
        _draw_recall(recall, of_length, style)
        _draw_margins(margin, of_length, style)
    recall.set_ylim(-0.03, 1.03)
    recall.set_title("sentences answered exactly", fontsize=9)
    if with_margin:
        margin.axhline(0, color="0.4", lw=0.8)
        margin.set_title("score of the right chunk over the best other (nats)", fontsize=9)
    lengths = _lengths([line for lines in studies.values() for line in lines])
    for axes in grid.flat:
        token_axis(axes, lengths)
        axes.set_xlabel("tokens memorised", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, alpha=0.2)
    recall.legend(fontsize=8, frameon=False, loc="lower left")
    figure.suptitle(title, fontsize=11)
    save(figure, path, 130)


def _lengths(lines: Records) -> list[int]:
    return sorted({line["length"] for line in lines})


def _draw_recall(axes: Any, of_length: Mapping[int, Records], style: dict[str, Any]) -> None:
    """Share of right answers with its Wilson interval."""
    shares, below, above = [], [], []
    for lines in of_length.values():
        right = sum(line["correct"] for line in lines)
        low, high = wilson_interval(right, len(lines))
        shares.append(right / len(lines))
        # rounding may put an end of 0 or 1 on the wrong side
        below.append(max(0.0, shares[-1] - low))
        above.append(max(0.0, high - shares[-1]))
    axes.errorbar(list(of_length), shares, yerr=[below, above], capsize=3, lw=1.4, **style)


def _draw_margins(axes: Any, of_length: Mapping[int, Records], style: dict[str, Any]) -> None:
    """Median of the margins, the middle half shaded; nothing for a study without."""
    cuts = []
    for length, lines in of_length.items():
        margins = [line["margin"] for line in lines if line.get("margin") is not None]
        if len(margins) > 1:
            cuts.append((length, *quantiles(margins, n=4)))
    if cuts:
        lengths, lower, middle, upper = zip(*cuts, strict=True)
        axes.plot(lengths, middle, lw=1.4, **style)
        axes.fill_between(lengths, lower, upper, color=style["color"], alpha=0.12, lw=0)


def compare_training(runs: Mapping[str, Records], path: Path, title: str, *, is_short: bool = False) -> None:
    """Every panel that all the runs have numbers for, a curve for each; of needles, the longest length of each.

    Args:
        runs: name and lines of log.jsonl of each.
        is_short: loss and needles only, for runs whose speeds say nothing of each other.

    Raises:
        ValueError: if a log holds no step yet.
    """
    panels = {name: training_panels(log) for name, log in runs.items()}
    for name, log in runs.items():
        if not any("loss" in record for record in log):
            raise ValueError(f"{name} holds no training step yet: nothing to plot")
    first, *others = panels.values()
    shared = [kind for kind in first if all(kind in one for one in others) and kind != "learning rate"]
    if is_short:
        shared = [kind for kind in shared if kind in (LOSS, NEEDLES)]
    rows = -(-len(shared) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(10.4, 2.5 * rows + 0.5), layout="constrained", squeeze=False)
    for axes, kind in zip(grid.flat, shared, strict=False):
        for number, (name, own) in enumerate(panels.items()):
            curve = own[kind][-1]
            label = f"{name}, {curve.label}" if curve.label else name
            style = "o-" if len(curve.points) < 40 else "-"
            axes.plot(*zip(*curve.points, strict=True), style, ms=2.5, lw=1.1, color=f"C{number}", label=label)
        axes.set_title(kind, fontsize=9)
        axes.set_xlabel("training tokens (millions)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, alpha=0.2)
        axes.legend(fontsize=7, frameon=False)
    for axes in grid.flat[len(shared) :]:
        axes.axis("off")
    figure.suptitle(title, fontsize=11)
    save(figure, path, 130)
