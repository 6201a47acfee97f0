"""Draw docs/images/architecture.svg: the parts of the model, the file of each and the tensors between them.

    python scripts/draw_architecture.py [FOLDER]

The figure stands on a light card of its own, so it is readable on white and on black pages. The same versions of
matplotlib and its fonts give the same bytes. tests/test_architecture_figure.py checks that the files exist.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

WIDTH, HEIGHT = 12.6, 7.8  # inches, and the units of all coordinates
INK, QUIET, CARD, EDGE = "#1f2937", "#55606e", "#fbfbf9", "#c9cdd3"
SANS, MONO = "DejaVu Sans", "DejaVu Sans Mono"


class Box(NamedTuple):
    """One part: its lower left corner, its size, what it is called and does, and the files that hold it."""

    x: float
    y: float
    width: float
    height: float
    title: str
    what: str
    files: tuple[str, ...]
    colour: str


BOXES = {
    "embed": Box(0.45, 0.8, 3.9, 0.72, "Embedding", "", ("models/modeling_hsa.py",), "#e7e9ee"),
    "lower": Box(
        0.45, 2.12, 3.9, 1.3, "Lower decoder", "window layers with RoPE, one runner",
        ("models/stack.py", "nn/decoder_layer.py"), "#cfe3f7",
    ),
    "encoder": Box(
        5.4, 2.12, 3.2, 1.3, "Chunk encoder", "64 tokens and CLS, both directions",
        ("nn/chunk_encoder.py",), "#fbe3c0",
    ),
    "memory": Box(
        9.35, 0.8, 2.9, 5.05, "Memory", "one for all HSA layers",
        ("memory/chunk_memory.py", "memory/tiers.py", "memory/files/"), "#d8efd9",
    ),
    "retrieval": Box(
        0.7, 4.45, 2.2, 1.05, "Retrieval", "best K landmarks",
        ("nn/chunk_retriever.py", "ops/chunk_topk/"), "#e4dcf5",
    ),
    "hsa": Box(
        4.05, 4.45, 2.55, 1.05, "HSA", "attention inside these chunks",
        ("nn/hierarchical_sparse_attention.py", "ops/hsa/"), "#e4dcf5",
    ),
    "windows": Box(
        6.9, 4.45, 1.45, 1.05, "Windows", "more layers",
        ("nn/decoder_layer.py",), "#cfe3f7",
    ),
    "head": Box(0.45, 6.42, 8.15, 0.66, "Norm and head", "", ("models/causal_lm.py, models/head.py",), "#e7e9ee"),
}  # fmt: skip
GROUP = Box(0.45, 4.25, 8.15, 1.6, "Upper groups", "", ("nn/upper_group.py",), "#f4f1fa")


ROWS = {"values": 3.95, "keys": 3.2, "landmarks": 2.45}  # heights of what is drawn inside the memory


def card(axes: Axes, x: float, y: float, width: float, height: float, colour: str, **style: object) -> None:
    style = {"edgecolor": EDGE, "linewidth": 1.0, "boxstyle": "round,pad=0,rounding_size=0.09", **style}
    axes.add_patch(FancyBboxPatch((x, y), width, height, facecolor=colour, mutation_aspect=1, **style))


def text(axes: Axes, x: float, y: float, words: str, size: float, **style: object) -> None:
    axes.text(x, y, words, **{"fontsize": size, "color": INK, "family": SANS, "ha": "center", "va": "center", **style})


def draw_box(axes: Axes, box: Box) -> None:
    card(axes, box.x, box.y, box.width, box.height, box.colour)
    lines = [(box.title, 12.5, {"weight": "bold"})]
    lines += [(box.what, 9.3, {})] if box.what else []
    lines += [(file, 7.6, {"family": MONO, "color": QUIET}) for file in box.files]
    steps = [0.235 if size > 9 else 0.18 for _, size, _ in lines]
    middle = box.x + box.width / 2
    y = box.y + box.height / 2 + sum(steps) / 2 if box is not BOXES["memory"] else box.y + box.height - 0.12
    for (words, size, style), step in zip(lines, steps, strict=True):
        text(axes, middle, y - step / 2, words, size, **style)
        y -= step


def arrow(axes: Axes, path: list[tuple[float, float]], words: str = "", at: tuple[float, float] | None = None) -> None:
    """A line through the points of `path`, with a head at the last one; `words` (a tensor) stand at `at`."""
    axes.plot([x for x, _ in path[:-1]], [y for _, y in path[:-1]], color=QUIET, linewidth=1.4, solid_capstyle="round")
    style = {"arrowstyle": "-|>", "color": QUIET, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    axes.annotate("", xy=path[-1], xytext=path[-2], arrowprops=style)
    if words and at is not None:
        text(axes, *at, words, 8.2, family=MONO, color=INK)


def draw_chunks(axes: Axes, box: Box) -> None:
    """What lies in a memory: keys, values and a landmark for every chunk of every document."""
    for y, height, name, shape in (
        (ROWS["values"], 0.26, "values", "(B, C*64, Hkv, D)"),
        (ROWS["keys"], 0.26, "keys", "(B, C*64, Hkv, D)"),
        (ROWS["landmarks"], 0.12, "landmarks", "(B, C, Hr, R)"),
    ):
        text(axes, box.x + 0.2, y + height / 2 + 0.14, name, 9.3, ha="left")
        text(axes, box.x + box.width - 0.2, y + height / 2 + 0.14, shape, 7.6, ha="right", family=MONO)
        for number in range(9):
            width, gap = (box.width - 0.4) / 9, 0.04
            colour = ("#79b77d", "#4f9a94", "#b9a356")[number // 4]
            card(
                axes, box.x + 0.2 + number * width, y - height / 2, width - gap, height, colour,
                linewidth=0, boxstyle="round,pad=0,rounding_size=0.03",
            )  # fmt: skip
    for line, words in enumerate(("three documents, in any order:", "on the card, in host memory", "or in a file")):
        text(axes, box.x + box.width / 2, box.y + 0.68 - 0.2 * line, words, 8.6)


def draw() -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
    axes.axis("off")
    card(axes, 0.08, 0.08, WIDTH - 0.16, HEIGHT - 0.16, CARD)
    card(axes, GROUP.x, GROUP.y, GROUP.width, GROUP.height, GROUP.colour, edgecolor="#a99bcf", linestyle=(0, (4, 2)))
    top = GROUP.y + GROUP.height - 0.17
    text(axes, GROUP.x + 0.25, top, "Upper decoder: groups, one after another", 9.8, ha="left", weight="bold")
    text(axes, GROUP.x + GROUP.width - 0.25, top, GROUP.files[0], 7.6, ha="right", family=MONO, color=QUIET)
    for box in BOXES.values():
        draw_box(axes, box)
    memory = BOXES["memory"]
    draw_chunks(axes, memory)

    arrow(axes, [(2.4, 0.35), (2.4, 0.8)], "tokens (B, T)", (3.05, 0.54))
    arrow(axes, [(2.4, 1.52), (2.4, 2.12)], "(B, T, M)", (2.95, 1.81))
    arrow(axes, [(1.3, 3.42), (1.3, 4.45)], "(B, T, M)", (0.82, 3.72))
    arrow(axes, [(4.35, 2.77), (5.4, 2.77)], "(B, T, M)", (4.87, 2.93))
    arrow(axes, [(8.6, 2.77), (memory.x, 2.77)])
    arrow(axes, [(2.9, 4.95), (4.05, 4.95)], "indices", (3.47, 5.12))
    text(axes, 3.47, 4.8, "weights", 8.2, family=MONO)
    text(axes, 3.47, 4.62, "(B, T, Hr, K)", 7.6, family=MONO)
    arrow(axes, [(6.6, 4.95), (6.9, 4.95)])
    arrow(axes, [(2.4, 5.85), (2.4, 6.42)], "(B, T, M)", (2.95, 6.13))
    arrow(axes, [(2.4, 7.08), (2.4, 7.52)], "logits (B, T, V)", (3.2, 7.34))
    # out of the memory: landmarks to be ranked, keys and values of the chosen chunks to be read
    arrow(axes, [(memory.x, 3.57), (2.1, 3.57), (2.1, 4.45)], "landmarks", (8.97, 3.44))
    arrow(axes, [(memory.x, 3.95), (5.3, 3.95), (5.3, 4.45)], "keys, values of K chunks", (7.6, 4.08))
    figure.canvas.draw()
    return figure


def write(folder: Path) -> None:
    """Write architecture.svg, its words as text, which is a quarter of the bytes of outlines."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "architecture.svg"
    with matplotlib.rc_context({"svg.hashsalt": "architecture", "svg.fonttype": "none", "font.family": SANS}):
        figure = draw()
        figure.savefig(path, transparent=True, metadata={"Date": None, "Creator": None})
    # a reader without these fonts takes one of like widths
    text = path.read_text(encoding="utf-8").replace("'DejaVu Sans Mono'", "'DejaVu Sans Mono', Menlo, monospace")
    path.write_text(text.replace("'DejaVu Sans';", "'DejaVu Sans', Verdana, sans-serif;"), encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "docs" / "images"))
