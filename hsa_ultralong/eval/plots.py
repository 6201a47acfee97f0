"""Plots of measured numbers: needle map (length x depth) and training curves; drawn from committed files alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np

_DEPTH_BINS = 10
_INK = "#22313f"


def human_tokens(count: int) -> str:
    """4096 -> "4K", 1048576 -> "1M"."""
    for unit, size in (("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file.

    Raises:
        ValueError: for a line that is not JSON, naming file and line.
    """
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON ({error.msg})") from error
    return records


def plot_needles(samples: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Heat map of exact match by length and depth; `samples` are lines of records.jsonl."""
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
    axes.set_xlabel("tokens memorised, and exact match over all depths")
    axes.set_ylabel("depth of the hidden sentence")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label="exact match", shrink=0.8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_training(log: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Loss and in-training needle accuracy against tokens; stages are shaded; `log` is a run's log.jsonl."""
    steps = [record for record in log if "loss" in record]
    probes = [record for record in log if "probe" in record]
    if not steps:
        raise ValueError("the log holds no training step yet: nothing to plot")
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    millions = [record["tokens"] / 1e6 for record in steps]
    axes.plot(millions, [record["loss"] for record in steps], color="#2c6fbb", lw=1.2, label="training loss")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("loss (nats per token)", color="#2c6fbb")
    other = axes.twinx()
    other.plot(
        [record["tokens"] / 1e6 for record in probes],
        [record["probe"]["needle_accuracy"] for record in probes],
        "o-",
        color="#d1603d",
        ms=3.5,
        lw=1,
    )
    other.set_ylim(-0.02, 1.02)
    other.set_ylabel("held-out needles answered exactly", color="#d1603d")
    names: list[str] = list(dict.fromkeys(record["stage"] for record in steps))
    previous = 0.0
    for number, name in enumerate(names):
        inside = [record["tokens"] / 1e6 for record in steps if record["stage"] == name]
        start = previous
        axes.axvspan(start, inside[-1], color="#22313f", alpha=0.03 + 0.05 * (number % 2))
        axes.text(
            (start + inside[-1]) / 2,
            0.55,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            va="center",
            rotation=90,
            fontsize=9,
        )
        previous = inside[-1]
    axes.set_title(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
