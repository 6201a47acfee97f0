"""The sections of the page that put runs beside the first of them. tests/eval/test_suite_compare.py."""

from __future__ import annotations

from hsa_ultralong.eval.comparison_tables import LEGEND, difference_text, number_text
from hsa_ultralong.eval.html_report.charts import charts
from hsa_ultralong.eval.html_report.elements import Markup, heat_cell, join, table, tag
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.suite_compare import Cell, Comparison


def compared(comparison: Comparison) -> Markup:
    """What is not the same, then a table of every suite and length."""
    notes = tag("ul", *(tag("li", note) for note in comparison.notes))
    same = tag("p", "Same samples, same settings, same scoring.")
    first, *others = (run.name for run in comparison.runs)
    head = ["task", first, *(part for name in others for part in (name, f"{name} - {first}"))]
    tables = []
    for (suite, length), of_task in comparison.tables.items():
        rows = []
        for (task, metric), row in of_task.items():
            cells: list[object] = [join([task, " ", tag("span", metric, class_="metric")])]
            for run in comparison.runs:
                cell = row.get(run.name)
                cells.append(_score(cell))
                if run is not comparison.runs[0]:
                    cells.append(_difference(row.get(first), cell))
            rows.append(cells)
        tables.append(table(f"{suite} at {human_tokens(length)}", head, rows))
    parts = [tag("h3", "What is not the same"), notes] if comparison.notes else [same]
    return join([*parts, tag("p", LEGEND, class_="note"), charts(*tables, columns=6)])


def _score(cell: Cell | None) -> Markup:
    if cell is None:
        return heat_cell(None, "", "")
    tip = f"{cell.samples} samples, 95% interval {100 * cell.low:.0f} to {100 * cell.high:.0f}%"
    return heat_cell(cell.value, f"{100 * cell.value:.0f}", tip)


def _difference(first: Cell | None, cell: Cell | None) -> Markup:
    if cell is None or first is None or cell.difference is None:
        return tag("td", cell.reason if cell else "", class_="metric")
    found = cell.difference
    tip = f"{number_text(found, first, cell)} ({found.method})"
    if found.better is not None:
        tip += f"; {found.better} better, {found.worse} worse"
    if found.p_value is not None:
        tip += f"; exact McNemar p = {found.p_value:.2g}"
    text = difference_text(found)
    kind = "" if not found.is_clear else " up" if found.value > 0 else " down"
    return tag("td", tag("b", text) if found.is_clear else text, tag("span", tip, class_="tip"), class_=f"cell{kind}")
