"""HTML out of Python: every text is escaped unless it is markup that was made here. tests/eval/test_html_report.py."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# what a page would act on or hide: control characters, changes of the direction of writing, halves of pairs, tags
_ACTIVE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufff9-\ufffb\U000e0000-\U000e007f]"
)
_EMPTY = {"br", "meta", "input"}


class Markup(str):
    """Text that is HTML already."""


def escaped(text: object) -> Markup:
    """Any text as it may stand in a page or in an attribute: shown, never run."""
    if isinstance(text, Markup):
        return text
    plain = _ACTIVE.sub(lambda match: f"\\u{ord(match[0]):04x}", str(text).replace("\r\n", "\n"))
    return Markup(html.escape(plain))


def join(parts: Iterable[object], between: str = "") -> Markup:
    return Markup(escaped(between).join(escaped(part) for part in parts))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element. Attributes are named as in Python: class_, data_task, aria_label; None and False leave one out."""
    written = ""
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        label = key.rstrip("_").replace("_", "-")
        written += f" {label}" if value is True else f' {label}="{escaped(value)}"'
    if name in _EMPTY:
        return Markup(f"<{name}{written}>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def table(caption: object, head: Sequence[object], rows: Iterable[Sequence[object]], *, class_: str = "") -> Markup:
    """A table that scrolls by itself and can be reached by keyboard; the first cell of a row is its heading. Cells that
    are <td> or <th> already stay as they are."""
    lines = [tag("tr", *(tag("th", cell, scope="col") for cell in head))]
    for first, *rest in rows:
        start = first if _is_cell(first) else tag("th", first, scope="row")
        lines.append(tag("tr", start, *(cell if _is_cell(cell) else tag("td", cell) for cell in rest)))
    inner = tag("table", tag("caption", caption), tag("thead", lines[0]), tag("tbody", *lines[1:]), class_=class_)
    return tag("div", inner, class_="scroll", role="region", tabindex=0, aria_label=_plain(caption))


def _is_cell(cell: object) -> bool:
    return isinstance(cell, Markup) and cell.startswith(("<td", "<th"))


def _plain(caption: object) -> Markup:
    """Markup without its tags, as an attribute may hold it."""
    return Markup(re.sub("<[^>]*>", "", escaped(caption)))


def heat_cell(value: float | None, shown: str, tip: str) -> Markup:
    """A cell coloured by a value of 0..1, with what is behind it on hover, on focus and for screen readers."""
    if value is None:
        return tag("td", tag("span", "not measured", class_="hidden"), class_="none")
    step = round(10 * min(1.0, max(0.0, value)))
    return tag("td", shown, tag("span", tip, class_="tip"), class_=f"cell h{step}")


def details(summary: object, *children: object, is_open: bool = False, **attributes: object) -> Markup:
    return tag("details", tag("summary", summary), *children, open=is_open, **attributes)
