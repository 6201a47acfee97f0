"""The sections of the page that show numbers: scores, curves, depths, diagnosis, and how they were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hsa_ultralong.eval.html_report.charts import (
    NARROW,
    Line,
    PlotPoint,
    bar_chart,
    charts,
    legend,
    line_chart,
    percent,
    plain,
)
from hsa_ultralong.eval.html_report.elements import Markup, details, heat_cell, join, table, tag
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.stored_runs import StoredRun
from hsa_ultralong.eval.suite_diagnosis import CAUSES, Diagnosis, Spread, diagnoses
from hsa_ultralong.eval.suite_summary import headlines

_TENTHS = [(tenth + 0.5) / 10 for tenth in range(10)]
# K of the curves of recall, besides the greatest; all are in the table
_SHOWN_K = (1, 4, 16)


def cell_tip(record: Mapping[str, Any]) -> str:
    """ "0.5 of 10 samples: 5%, 95% interval 2 to 9%"."""
    value, n = record["value"], record["samples"]
    interval = f"{percent(value)}, 95% interval {percent(record['ci_low'])[:-1]} to {percent(record['ci_high'])}"
    if record["metric"] == "auroc":
        return f"{n} samples: {interval}"
    return f"{plain(value * n)} of {n} samples: {interval}"


def _value_cell(record: Mapping[str, Any] | None) -> Markup:
    if record is None:
        return heat_cell(None, "", "")
    return heat_cell(record["value"], f"{100 * record['value']:.0f}", cell_tip(record))


def rows_of(runs: Sequence[StoredRun]) -> dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]]:
    """(task, metric) -> run -> length -> the record over all depths."""
    found: dict[tuple[str, str], dict[str, dict[int, Mapping[str, Any]]]] = {}
    for run in runs:
        for key, row in run.wholes.items():
            found.setdefault(key, {})[run.name] = row
    return found


def all_lengths(runs: Sequence[StoredRun]) -> list[int]:
    return sorted({record["length"] for run in runs for record in run.records})


def scores(runs: Sequence[StoredRun]) -> Markup:
    """A table of tasks by length, a line for every run."""
    lengths = all_lengths(runs)
    is_many = len(runs) > 1
    rows: list[list[object]] = []
    for (task, metric), of_run in rows_of(runs).items():
        for number, run in enumerate(runs):
            row = of_run.get(run.name, {})
            cells = [_value_cell(row.get(length)) for length in lengths]
            name = tag("th", task, " ", tag("span", metric, class_="metric"), scope="rowgroup" if is_many else "row",
                       rowspan=len(runs) if is_many else None)  # fmt: skip
            label = [tag("th", run.name, scope="row")] if is_many else []
            rows.append([*([name] if number == 0 else []), *label, *cells])
    head = ["task", *(["model"] if is_many else []), *map(human_tokens, lengths)]
    note = "Percent, by tokens of the whole sample. Hover or focus a cell for the number of samples and the interval."
    notes = [
        tag("li", f"{run.name}: " if is_many else "", f"{human_tokens(length)}: {reason}")
        for run in runs
        for (_, length), reason in sorted(run.skipped.items())
    ]
    missing = details(f"Not measured ({len(notes)})", tag("ul", *notes)) if notes else ""
    return join([tag("p", note, class_="note"), table("scores in percent", head, rows), missing])


def curves(runs: Sequence[StoredRun]) -> Markup:
    """A chart for every task and its own score, a line for every run."""
    lengths = all_lengths(runs)
    labels = [human_tokens(length) for length in lengths]
    cards = []
    own = {(record["task"], record["metric"]) for run in runs for record in headlines(run.summary)}
    for (task, metric), of_run in rows_of(runs).items():
        if (task, metric) not in own:
            continue
        lines = [
            Line(
                run.name if len(runs) > 1 else "",
                [
                    PlotPoint(
                        lengths.index(n), r["value"], r["ci_low"], r["ci_high"], f"{human_tokens(n)}: {cell_tip(r)}"
                    )
                    for n, r in sorted(of_run.get(run.name, {}).items())
                ],
            )
            for run in runs
        ]
        cards.append(_card(task, metric, line_chart(f"{task}, {metric}, by length", labels, lines)))
    key = legend([(f"s{number}", run.name) for number, run in enumerate(runs)]) if len(runs) > 1 else ""
    note = tag("p", "Upright lines are 95% intervals. The numbers stand in the table above.", class_="note")
    return join([key, note, charts(*cards)])


def _card(task: str, note: str, *content: object) -> Markup:
    return tag("article", tag("h3", task, " ", tag("span", note, class_="metric")), *content, class_="card")


def depths(runs: Sequence[StoredRun]) -> Markup:
    """A map of depth by length for every task whose facts have one, beside one another for several runs."""
    lengths = all_lengths(runs)
    cards, without = [], []
    kinds = dict.fromkeys((r["task"], r["metric"]) for run in runs for r in headlines(run.summary)
                          if r["metric"] != "auroc")  # fmt: skip
    for task, metric in kinds:
        maps = []
        for run in runs:
            cells = {
                (r["depth"], r["length"]): r
                for r in run.summary
                if (r["task"], r["metric"]) == (task, metric) and r["depth"] is not None
            }
            if cells:
                maps.append(_depth_map(run.name if len(runs) > 1 else "", cells, lengths))
        if maps:
            cards.append(_card(task, metric, *maps))
        else:
            without.append(task)
    text = (
        "The depth runs from the first token (0%) to the question (100%). Hover or focus a cell for what is behind it."
    )
    rest = tag("p", f"Facts of no single depth: {', '.join(dict.fromkeys(without))}.", class_="note") if without else ""
    return join([tag("p", text, class_="note"), charts(*cards, columns=len(lengths)), rest])


def _depth_map(name: str, cells: Mapping[tuple[float, int], Mapping[str, Any]], lengths: Sequence[int]) -> Markup:
    used = [length for length in lengths if any(n == length for _, n in cells)]
    rows = [
        [f"{100 * depth - 5:.0f}-{100 * depth + 5:.0f}%", *(_value_cell(cells.get((depth, n))) for n in used)]
        for depth in _TENTHS
    ]
    caption = name or tag("span", "scores by depth, in percent", class_="hidden")
    return table(caption, ["depth", *map(human_tokens, used)], rows, class_="map")


def diagnosis(runs: Sequence[StoredRun]) -> Markup:
    """For every task and run: causes of misses, recall of the right chunk at K, its rank, weight and margin."""
    cards = []
    for run in runs:
        for task, of_length in diagnoses(run.records).items():
            name = f"{task}, {run.name}" if len(runs) > 1 else task
            plots = tag("div", *_diagnosis_charts(name, of_length), class_="row")
            numbers = details("Numbers", _diagnosis_table(name, of_length))
            cards.append(_card(task, run.name if len(runs) > 1 else "", plots, numbers))
    key = legend([(f"{name.replace(' ', '-')}", text) for name, text in CAUSES.items()])
    note = tag(
        "p",
        "A sample's evidence is the chunks of the memory that hold what it asks for; of several facts the one that "
        "stands best counts. Rank, weight and margin are those in the head where it stands best, medians with "
        "quartiles; the margin is its weight over the best other chunk's, in nats.",
        class_="note",
    )
    return join([key, note, *cards])


def _figure(title: str, *content: object) -> Markup:
    return tag("div", tag("h4", title), *content)


def _diagnosis_charts(name: str, of_length: Mapping[int, Diagnosis]) -> list[Markup]:
    labels, found = [human_tokens(length) for length in of_length], list(of_length.values())
    bars = {
        label: [
            (kind.replace(" ", "-"), one.causes[kind], f"{label}: {one.causes[kind]} of {one.samples} samples {text}")
            for kind, text in CAUSES.items()
        ]
        for label, one in zip(labels, found, strict=True)
    }
    parts = [_figure("samples", bar_chart(f"{name}: samples by what became of them", bars))]
    most = max((max(one.recall) for one in found if one.recall), default=0)
    if not most:
        return [*parts, tag("p", "What was retrieved is not known.", class_="note")]
    recall = [
        Line(f"K = {k}", [PlotPoint(x, one.recall_at(k), None, None, f"{labels[x]}: {percent(one.recall_at(k))}")
                          for x, one in enumerate(found) if one.recall])
        for k in (*(k for k in _SHOWN_K if k < most), most)
    ]  # fmt: skip
    key = legend([(f"s{number}", line.label) for number, line in enumerate(recall)])
    chart = line_chart(f"{name}: recall of the right chunk", labels, recall, width=NARROW)
    parts.append(_figure("right chunk among the first K", chart, key))
    for field, title in (("rank", "its rank"), ("weight", "its weight"), ("margin", "its margin, nats")):
        spreads = {x: spread for x, one in enumerate(found) if (spread := getattr(one, field)) is not None}
        points = [
            PlotPoint(
                x, s.middle, s.low, s.high, f"{labels[x]}: median {s.middle:.3g}, quartiles {s.low:.3g} to {s.high:.3g}"
            )
            for x, s in spreads.items()
        ]
        if points:
            bounds = (0.0, 1.0) if field == "weight" else None
            chart = line_chart(f"{name}: {title}", labels, [Line("", points)], bounds=bounds, form=plain, width=NARROW)
            parts.append(_figure(title, chart))
    return parts


def _diagnosis_table(name: str, of_length: Mapping[int, Diagnosis]) -> Markup:
    def spread(value: Spread | None) -> str:
        return "" if value is None else f"{value.middle:.3g} ({value.low:.3g} to {value.high:.3g})"

    most = max((found.recall for found in of_length.values()), key=len)
    rows = [
        [human_tokens(length), str(found.samples), *(str(found.causes[kind]) for kind in CAUSES),
         *(percent(found.recall_at(k)) if found.recall else "" for k in most),
         spread(found.rank), spread(found.weight), spread(found.margin)]
        for length, found in of_length.items()
    ]  # fmt: skip
    head = ["length", "samples", *CAUSES, *(f"recall at {k}" for k in most), "rank", "weight", "margin"]
    return table(f"{name}: counts; medians with quartiles", head, rows)


def measured(runs: Sequence[StoredRun]) -> Markup:
    """Settings and origin of every run."""
    rows: dict[str, list[str]] = {}
    for number, run in enumerate(runs):
        meta = {
            name: value for name, value in run.meta.items() if name not in ("settings", "versions", "dtype", "seed")
        }
        versions = run.meta.get("versions")
        found = {**run.settings, **meta, **(versions if isinstance(versions, dict) else {})}
        for name, value in {"samples answered": len(run.records), **found}.items():
            rows.setdefault(name, [""] * len(runs))[number] = value if isinstance(value, str) else json.dumps(value)
    head = ["", *(run.name for run in runs)]
    return table("Settings that a sample's result depends on, and where it was measured", head,
                 [[name, *values] for name, values in rows.items()], class_="wide")  # fmt: skip
