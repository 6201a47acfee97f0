"""Plots of measured numbers: needle map (length x depth) and all curves of a run; drawn from committed files alone."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import TEXT, is_finite, is_number, require, rows, table, that, whole
from hsa_ultralong.files.packed import read_stored, stored
from hsa_ultralong.files.strict_json import parse_lines, read_json

_LOG_FIELDS = {"stage": TEXT, "global_step": whole(), "tokens": whole()}
_TUNING_FIELDS = dict.fromkeys(("step", "loss", "f1", "em"), that(is_finite, "a number"))
_DEPTH_BINS = 10
_INK = "#22313f"
# of curves beside one another
MARKS = "osD^vP"
# fields of a log record and the titles of their panels
LOSS = "training loss (nats per token)"
_STEP_PANELS = {
    "loss": LOSS,
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens per second",
    "mfu": "model FLOP utilisation",
    "expert_imbalance": "experts: largest load / mean load",
    "evidence_loss": "retrieval: loss of the chunks that tell a token (nats)",
    "evidence_first": "retrieval: share of tokens for which such a chunk ranks first",
    "divergence": "divergence from the source (nats)",
    "answer_loss": "loss of the answers (nats)",
    "retrieval_error": "alignment: error of retrieval (nats)",
    "output_error": "alignment: relative error of layers' outputs",
}
NEEDLES = "held-out questions answered exactly, by length"
FAMILIES = "held-out questions answered exactly, by family"
_RETRIEVAL_PANELS = {
    "entropy": "retrieval: entropy of the weights (nats)",
    "distance": "retrieval: distance of what is read (tokens)",
    "beyond_window": "retrieval: share of weight beyond the window",
}


def human_tokens(count: int) -> str:
    """4096 -> "4K", 1048576 -> "1M"."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file, plain or packed (`files/packed.py`).

    Raises:
        ValueError: for a line that is not JSON, naming file and line.
    """
    path = stored(path)
    return parse_lines(read_stored(path), path)


def read_log(path: Path) -> list[dict[str, Any]]:
    """Records of a run's log.jsonl, plain or packed; none if there is no such file yet.

    Raises:
        ValueError: for a line that is no record of a run, naming file and line.
    """
    path = stored(path)
    data = read_stored(path) if path.exists() else b""
    # the last line of a run that is under way, or was killed, may be unfinished
    records = parse_lines(data[: data.rfind(b"\n") + 1], path)
    for number, record in enumerate(records, 1):
        where = f"{path}:{number}"
        require(table(_LOG_FIELDS, is_open=True), record, f"{where}:")
        probe, retrieval = record.get("probe", {}), record.get("retrieval", {})
        numbers = {name: value for name, value in record.items() if name not in (*_LOG_FIELDS, "probe", "retrieval")}
        is_valid = all(map(is_number, numbers.values()))
        is_valid &= isinstance(probe, dict) and all(map(is_number, probe.values()))
        is_valid &= "probe" not in record or "needle_accuracy" in probe
        is_valid &= isinstance(retrieval, dict) and all(
            isinstance(values, list) and all(map(is_number, values)) for values in retrieval.values()
        )
        if not is_valid:
            raise ValueError(f"{where} holds something else than numbers; remove that line")
    return records


def read_tuning(path: Path) -> list[dict[str, Any]]:
    """Records of a tuning.json, as `hsa tune` writes it.

    Raises:
        ValueError: for a file of another form, naming it.
    """
    found = read_json(path)
    require(table({"records": rows(table(_TUNING_FIELDS, is_open=True), low=1)}, is_open=True), found, f"{path}:")
    records: list[dict[str, Any]] = found["records"]
    return records


def save(figure: Any, path: Path, dpi: int) -> None:
    """Write a figure whole or not at all; a PNG with few colours, which makes it a third as large or less.

    Curves need 48 of them; the bar beside a map, whose colours run into one another, 128.
    """
    data, kind = io.BytesIO(), path.suffix.removeprefix(".") or "png"
    figure.savefig(data, format=kind, dpi=dpi)
    plt.close(figure)
    if kind == "png":
        colours = 128 if any(axes.images for axes in figure.axes) else 48
        picture = Image.open(data).convert("RGB").quantize(colours, dither=Image.Dither.NONE)
        data = io.BytesIO()
        picture.save(data, format="png", optimize=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data.getvalue())


def token_axis(axes: Any, lengths: Sequence[int]) -> None:
    """An axis of lengths by doubling, written 4K, 1M ..."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [human_tokens(length) for length in lengths])
    axes.xaxis.minorticks_off()


def plot_needles(samples: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Heat map of exact match by length and depth, of notes by their order; `samples` are lines of records.jsonl."""
    is_notes = all(sample.get("task") == "notes" for sample in samples)
    lengths = sorted({sample["length"] for sample in samples})
    right = np.zeros((_DEPTH_BINS, len(lengths)))
    count = np.zeros_like(right)
    for sample in samples:
        row = min(_DEPTH_BINS - 1, int(sample["depth"] * _DEPTH_BINS))
        column = lengths.index(sample["length"])
        right[row, column] += sample["correct"]
        count[row, column] += 1
    with np.errstate(invalid="ignore"):
        share = right / count
    figure, axes = plt.subplots(figsize=(1.6 + 1.15 * len(lengths), 4.6), layout="constrained")
    image = axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for row, column in np.ndindex(*share.shape):
        if count[row, column]:
            label = f"{int(right[row, column])}/{int(count[row, column])}"
            ink = "white" if abs(share[row, column] - 0.5) > 0.38 else _INK
            axes.text(column, row, label, ha="center", va="center", fontsize=8, color=ink)
    means = [np.nansum(right[:, i]) / count[:, i].sum() for i in range(len(lengths))]
    axes.set_xticks(range(len(lengths)), [f"{human_tokens(n)}\n{m:.0%}" for n, m in zip(lengths, means, strict=True)])
    axes.set_yticks(range(_DEPTH_BINS), [f"{(i + 0.5) / _DEPTH_BINS:.0%}" for i in range(_DEPTH_BINS)])
    # one or two columns are narrower than the line
    gap = "\n" if len(lengths) < 3 else " "
    axes.set_xlabel(f"tokens memorised,{gap}and exact match over all {'notes' if is_notes else 'depths'}")
    axes.set_ylabel("place in the order of the notes" if is_notes else "depth of the hidden sentence")
    # nor does a long title fit one column
    axes.set_title(fill(title, 20 + 16 * len(lengths), break_on_hyphens=False), fontsize=10)
    figure.colorbar(image, label="exact match", shrink=0.8)
    save(figure, path, 150)


class Curve(NamedTuple):
    """One line of a panel: (millions of tokens, value) pairs."""

    label: str
    points: list[tuple[float, float]]


def training_panels(log: Sequence[Mapping[str, Any]]) -> dict[str, list[Curve]]:
    """Title of every panel that a run's log has numbers for, and its curves."""
    panels: dict[str, list[Curve]] = {}
    for key, title in _STEP_PANELS.items():
        points = [(record["tokens"] / 1e6, record[key]) for record in log if key in record]
        if points:
            panels[title] = [Curve("", points)]
    probes = [record for record in log if "probe" in record]
    needles = []
    for length in sorted({record["probe"].get("length", 0) for record in probes}):
        of_length = [record for record in probes if record["probe"].get("length", 0) == length]
        points = [(record["tokens"] / 1e6, record["probe"]["needle_accuracy"]) for record in of_length]
        needles.append(Curve(human_tokens(length) if length else "", points))
    if needles:
        panels[NEEDLES] = needles
    families = sorted({name for record in probes for name in record["probe"] if name.startswith("family/")})
    for name in families:
        # of the lengths measured after one step, the longest
        points = list({one["tokens"] / 1e6: one["probe"][name] for one in probes if name in one["probe"]}.items())
        panels.setdefault(FAMILIES, []).append(Curve(name.removeprefix("family/"), points))
    for key, title in _RETRIEVAL_PANELS.items():
        # every length is measured after the same step: the longest says most
        found = [record for record in probes if record.get("retrieval", {}).get(key)]
        groups = max((len(record["retrieval"][key]) for record in found), default=0)
        for group in range(groups):
            points = list({record["tokens"] / 1e6: record["retrieval"][key][group] for record in found}.items())
            panels.setdefault(title, []).append(Curve(f"group {group + 1}", points))
    return panels


def plot_training(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """All curves of a run against tokens, a panel each, stages shaded; `log` is a run's log.jsonl.

    Raises:
        ValueError: if there is no step in it yet.
    """
    steps = [record for record in log if "loss" in record]
    if not steps:
        raise ValueError("the log holds no training step yet: nothing to plot")
    panels = training_panels(log)
    columns = 1 if len(panels) == 1 else 2
    rows = -(-len(panels) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(5.2 * columns, 2.5 * rows + 0.5), layout="constrained", sharex=True, squeeze=False
    )
    for axes, (name, curves) in zip(grid.flat, panels.items(), strict=False):
        for number, curve in enumerate(curves):
            style = "o-" if len(curve.points) < 40 else "-"
            axes.plot(*zip(*curve.points, strict=True), style, ms=2.5, lw=1.1, color=f"C{number}", label=curve.label)
        if name in (NEEDLES, FAMILIES):
            axes.set_ylim(-0.03, 1.03)
        if any(curve.label for curve in curves):
            axes.legend(fontsize=7, frameon=False)
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(True, alpha=0.2)
    used = list(grid.flat[: len(panels)])
    _shade_stages(used, steps)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes in used[-columns:]:
        axes.set_xlabel("training tokens (millions)", fontsize=8)
        axes.tick_params(labelbottom=True)
    figure.suptitle(title, fontsize=11)
    save(figure, path, 100)


def plot_tuning(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Held-out F1 and exact match of `hsa tune` by step, the best step marked, and the loss of its answers beside them.

    The record of step 0 is the source as it was; it has scores and no loss.
    """
    best = max(records, key=lambda record: record["f1"])
    figure, (scores, loss) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    steps = [record["step"] for record in records]
    for number, (key, name) in enumerate((("f1", "F1"), ("em", "exact match"))):
        scores.plot(steps, [record[key] for record in records], "o-", ms=3, lw=1.1, color=f"C{number}", label=name)
    label = f"kept: step {best['step']:.0f}, F1 {best['f1']:.3f}"
    scores.axvline(best["step"], color=_INK, lw=0.8, ls=":", label=label)
    scores.set_ylim(0, 1)
    scores.legend(fontsize=7, frameon=False, loc="lower right")
    scores.set_title("held-out questions, the passage in the prompt", fontsize=9)
    trained = [record for record in records if record["step"]]
    loss.plot([record["step"] for record in trained], [record["loss"] for record in trained], "o-", ms=3, lw=1.1)
    loss.set_title(_STEP_PANELS["answer_loss"], fontsize=9)
    for axes in (scores, loss):
        axes.set_xlabel("optimiser steps", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(True, alpha=0.2)
    figure.suptitle(title, fontsize=11)
    save(figure, path, 130)


def _shade_stages(panels: Sequence[Any], steps: Sequence[dict[str, Any]]) -> None:
    """Grey bands behind every panel, names of the stages in the first."""
    start = 0.0
    for number, name in enumerate(dict.fromkeys(record["stage"] for record in steps)):
        stop = max(record["tokens"] / 1e6 for record in steps if record["stage"] == name)
        for axes in panels:
            axes.axvspan(start, stop, color=_INK, alpha=0.02 + 0.06 * (number % 2), lw=0)
        first = panels[0]
        place = {"transform": first.get_xaxis_transform(), "ha": "center", "va": "top"}
        first.text((start + stop) / 2, 0.97, name, rotation=90, fontsize=8, color=_INK, **place)
        start = stop
