"""A page of Markdown as a PDF: headings, paragraphs, lists, tables, code and pictures, by matplotlib alone.

Called by report.py; tests/test_report.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import PdfPages
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from PIL import Image

from hsa_ultralong.eval.plots import plt

# inches and points
_PAGE, _MARGIN, _TEXT, _TABLE = (8.27, 11.69), 0.85, 9.0, 7.0
_WIDTH = _PAGE[0] - 2 * _MARGIN
# a picture's longer side
_PIXELS = 900
_HEADINGS = {1: 17.0, 2: 13.0, 3: 10.5}
_PICTURE = re.compile(r"!\[[^\]]*\]\(([^)]+)\)")
_ITEM = re.compile(r"^\s*(?:[-*]|\d+\.) ")
_RENDERER: Any = FigureCanvasAgg(Figure(dpi=72)).get_renderer()


def plain(text: str) -> str:
    """Without marks of emphasis, code and links."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return re.sub(r"\*\*|`|(?<![\w*])\*(?=\S)|(?<=\S)\*(?![\w*])", "", text)


@lru_cache(maxsize=1 << 16)
def width(text: str, size: float, family: str = "sans-serif", weight: str = "normal") -> float:
    """Inches of a text on one line."""
    font = FontProperties(family=family, size=size, weight=weight)
    return _RENDERER.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def wrapped(text: str, size: float, room: float, **style: str) -> list[str]:
    """Lines of a text that fit into `room` inches; a longer word has a line of its own."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and width(longer, size, **style) > room:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


class Pages:
    """Pages that fill from the top."""

    def __init__(self, pdf: PdfPages) -> None:
        self.pdf, self.left = pdf, 0.0
        self.figure: Any = None
        self._begin()

    def _begin(self) -> None:
        self.close()
        self.figure, self.left = plt.figure(figsize=_PAGE), _PAGE[1] - _MARGIN

    def close(self) -> None:
        if self.figure is not None:
            self.pdf.savefig(self.figure)
            plt.close(self.figure)

    def need(self, height: float) -> None:
        """Begin a new page unless so many inches are left."""
        if self.left - height < _MARGIN and self.left < _PAGE[1] - _MARGIN:
            self._begin()

    def write(self, text: str, size: float, x: float = 0.0, **style: str) -> None:
        """One line at x inches from the margin, its top where the page is filled to."""
        self.figure.text(
            (_MARGIN + x) / _PAGE[0], self.left / _PAGE[1], text, size=size, va="top", parse_math=False, **style
        )

    def lines(self, lines: Sequence[str], size: float, x: float = 0.0, **style: str) -> None:
        for line in lines:
            self.need(size / 50)
            self.write(line, size, x, **style)
            self.left -= size / 50
        self.left -= 0.07

    def table(self, rows: Sequence[Sequence[str]]) -> None:
        """The first row is the head."""
        size, gap = _TABLE, 0.08
        columns = range(max(map(len, rows)))
        rooms = [max(width(row[i], size) for row in rows if i < len(row)) + gap for i in columns]
        while sum(rooms) > _WIDTH:
            rooms[rooms.index(max(rooms))] *= 0.95
        for number, row in enumerate(rows):
            cells = [wrapped(text, size, rooms[i] - gap) for i, text in enumerate(row)]
            height = max(map(len, cells)) * size / 55
            self.need(height + 0.05)
            top = self.left
            for i, lines in enumerate(cells):
                for line in lines:
                    self.write(line, size, sum(rooms[:i]), weight="bold" if number == 0 else "normal")
                    self.left -= size / 55
                self.left = top
            self.left -= height + 0.035
        self.left -= 0.1

    def picture(self, path: Path) -> None:
        picture = Image.open(path).convert("RGB")
        picture.thumbnail((_PIXELS, _PIXELS))
        # few colours take a third of the bytes
        pixels = np.asarray(picture.quantize(48, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).convert("RGB"))
        ratio = pixels.shape[0] / pixels.shape[1]
        wide = min(_WIDTH, 0.45 * _PAGE[1] / ratio)
        self.need(wide * ratio + 0.1)
        self.left -= wide * ratio
        place = _MARGIN / _PAGE[0], self.left / _PAGE[1], wide / _PAGE[0], wide * ratio / _PAGE[1]
        axes = self.figure.add_axes(place)
        axes.imshow(pixels, interpolation="none")
        axes.axis("off")
        self.left -= 0.15


def parts(text: str) -> Iterator[list[str]]:
    """Lines that belong together: a heading, a paragraph or item, a table, a block of code with its fences."""
    found: list[str] = []
    is_code = False
    for line in re.sub(r"<!--.*?-->\n?", "", text, flags=re.S).splitlines():
        is_fence = line.lstrip().startswith("```")
        breaks = not line.strip() or line.startswith("#") or bool(_ITEM.match(line)) or is_fence
        if not is_code and breaks and found:
            yield found
            found = []
        if line.strip() or is_code:
            found.append(line)
        if is_fence:
            is_code = not is_code
            if not is_code:
                yield found
                found = []
        elif not is_code and line.startswith("#"):
            yield found
            found = []
    if found:
        yield found


def print_pdf(text: str, folder: Path, target: Path) -> None:
    """Markdown as a PDF; `folder`: where its pictures are named from. The same text gives the same bytes."""
    with PdfPages(target, metadata={"CreationDate": None, "Producer": None}) as pdf:
        pages = Pages(pdf)
        for lines in parts(text):
            first = lines[0]
            if first.startswith("#"):
                level = len(first) - len(first.lstrip("#"))
                size = _HEADINGS.get(level, _TEXT)
                pages.need(1.0)
                pages.left -= 0.08
                pages.lines(wrapped(plain(first.lstrip("# ")), size, _WIDTH, weight="bold"), size, weight="bold")
            elif first.lstrip().startswith("```"):
                pages.lines([line[:110] for line in lines[1:-1]], 7.0, 0.1, family="monospace")
            elif first.startswith("|"):
                cells = [[plain(cell).strip() for cell in line.strip().strip("|").split(" | ")] for line in lines]
                pages.table([cells[0], *cells[2:]])
            elif picture := _PICTURE.match(first):
                pages.picture(folder / picture[1])
            else:
                mark = "• " if _ITEM.match(first) else ""
                words = plain(" ".join(line.strip() for line in [_ITEM.sub("", first), *lines[1:]]))
                pages.lines(wrapped(mark + words, _TEXT, _WIDTH), _TEXT)
        pages.close()
