"""Charts as SVG inside the page: colours from its style sheet, values as titles on hover.

Nothing here is needed to read the page: the numbers of every chart stand in a table too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from hsa_ultralong.eval.html_report.elements import Markup, join, tag

_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 8, 8, 20
_HEIGHT = 150
# units across of a chart in a card of its own, and of one of five in a row: what its letters are relative to
WIDE, NARROW = 300, 210
_COLOURS = 8


class PlotPoint(NamedTuple):
    """A place on the x axis (its number in the list of labels), a value, an interval if there is one, a text."""

    x: int
    value: float
    low: float | None
    high: float | None
    tip: str


class Line(NamedTuple):
    label: str
    points: Sequence[PlotPoint]


def percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def plain(value: float) -> str:
    return f"{value:.3g}"


def line_chart(
    title: str,
    labels: Sequence[str],
    lines: Sequence[Line],
    *,
    bounds: tuple[float, float] | None = (0.0, 1.0),
    form: Callable[[float], str] = percent,
    width: int = WIDE,
) -> Markup:
    """Values by length, an interval as a thin upright line.

    Args:
        labels: of the x axis. bounds: of the y axis, None: those of the values. form: how its numbers are written.
    """
    low, high = bounds or _bounds(lines)

    def across(x: int) -> float:
        room = width - _LEFT - _RIGHT
        return _LEFT + room * ((x + 0.5) / len(labels))

    def up(value: float) -> float:
        share = (min(high, max(low, value)) - low) / (high - low)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts: list[Markup] = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + share * (high - low)
        parts.append(tag("line", x1=_LEFT, x2=width - _RIGHT, y1=_n(up(value)), y2=_n(up(value)), class_="rule"))
        if share in (0.0, 0.5, 1.0):
            parts.append(_label(_LEFT - 4, up(value) + 3, form(value), "end"))
    parts += [_label(across(x), _HEIGHT - 6, label, "middle") for x, label in _few(labels, width // 33)]
    for number, line in enumerate(lines):
        parts.append(_line(line, number, len(lines), across, up))
    name = f"{title}: {', '.join(line.label for line in lines)}" if len(lines) < 9 else title
    return tag(
        "svg", tag("title", name), *parts, viewBox=f"0 0 {width} {_HEIGHT}", role="img", class_="chart", aria_label=name
    )


def _line(
    line: Line, number: int, total: int, across: Callable[[int], float], up: Callable[[float], float]
) -> Markup:  # fmt: skip
    # lines of several runs stand a little beside one another, so that no interval hides another
    shift = 5 * (number - (total - 1) / 2) / max(1, total - 1) * (total > 1)
    places = [(across(point.x) + shift, up(point.value)) for point in line.points]
    parts = []
    if len(places) > 1:
        parts.append(tag("polyline", points=" ".join(f"{_n(x)},{_n(y)}" for x, y in places)))
    for point, (x, y) in zip(line.points, places, strict=True):
        if point.low is not None and point.high is not None:
            parts.append(tag("line", x1=_n(x), x2=_n(x), y1=_n(up(point.low)), y2=_n(up(point.high)), class_="span"))
        parts.append(_mark(number, x, y, f"{line.label}: {point.tip}" if line.label else point.tip))
    return tag("g", *parts, class_=f"s{number % _COLOURS}")


def _mark(number: int, x: float, y: float, tip: str) -> Markup:
    """Series differ in form too, not in colour alone; the disc around a mark is easy to point at."""
    forms = (
        f"M{_n(x - 3.2)} {_n(y)}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0",
        f"M{_n(x - 3)} {_n(y - 3)}h6v6h-6z",
        f"M{_n(x)} {_n(y - 4)}l4 7h-8z",
        f"M{_n(x)} {_n(y - 4.2)}l4.2 4.2l-4.2 4.2l-4.2 -4.2z",
    )
    shape = tag("path", d=forms[number % len(forms)], class_="mark")
    return tag("g", tag("title", tip), tag("circle", cx=_n(x), cy=_n(y), r=9, class_="reach"), shape)


def bar_chart(title: str, rows: Mapping[str, Sequence[tuple[str, int, str]]]) -> Markup:
    """Stacked bars, one for every length: (class, count, tip) of its parts."""
    height, step = 18 * len(rows) + 4, 18
    room = NARROW - _LEFT - _RIGHT
    parts: list[Markup] = []
    for number, (label, counts) in enumerate(rows.items()):
        total, x, y = sum(count for _, count, _ in counts), float(_LEFT), number * step + 3
        parts.append(_label(_LEFT - 4, y + 11, label, "end"))
        for name, count, tip in counts:
            width = room * count / total if total else 0.0
            if count:
                box = tag("rect", x=_n(x), y=y, width=_n(width), height=14, class_=f"cause {name}")
                text = _label(x + width / 2, y + 10.5, str(count), "middle", f"on {name}") if width > 14 else ""
                parts.append(tag("g", tag("title", tip), box, text))
            x += width
    return tag(
        "svg", tag("title", title), *parts, viewBox=f"0 0 {NARROW} {height}", role="img", class_="chart",
        aria_label=title,
    )  # fmt: skip


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """(class, text) of colours: "s0" of a line, "right" of a part of a bar."""
    return tag("ul", *(tag("li", _swatch(name), text) for name, text in entries), class_="legend")


def _swatch(name: str) -> Markup:
    if name.startswith("s") and name[1:].isdigit():
        inner = tag("g", _mark(int(name[1:]), 8, 7, ""), class_=f"s{int(name[1:]) % _COLOURS}")
    else:
        inner = tag("rect", x=1, y=1, width=14, height=12, class_=f"cause {name}")
    return tag("svg", inner, viewBox="0 0 16 14", width=16, height=14, aria_hidden="true")


def _bounds(lines: Sequence[Line]) -> tuple[float, float]:
    values = [v for line in lines for p in line.points for v in (p.value, p.low, p.high) if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    # numbers of two digits at both ends
    unit = 10 ** math.floor(math.log10(max(high - low, 1e-6))) / 2
    low, high = math.floor(low / unit) * unit, math.ceil(high / unit) * unit
    return (low, high) if high > low else (low - unit, high + unit)


def _few(labels: Sequence[str], most: int) -> list[tuple[int, str]]:
    """At most so many labels of the axis."""
    step = math.ceil(len(labels) / most)
    return list(enumerate(labels))[::step]


def _label(x: float, y: float, text: str, anchor: str, class_: str = "label") -> Markup:
    return tag("text", text, x=_n(x), y=_n(y), text_anchor=anchor, class_=class_)


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".")


def charts(*cards: Markup, columns: int = 1) -> Markup:
    """Cards side by side, as many as fit; wider ones for tables of many columns."""
    kind = "" if columns <= 5 else " wide-cards" if columns <= 9 else " widest-cards"
    return tag("div", join(cards), class_=f"cards{kind}")
