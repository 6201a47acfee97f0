"""Table and figure of training-<hardware>.json: training speed against the row, and the longest rows that train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from hsa_ultralong.eval.plots import human_tokens, plt, save, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_UNITS = {
    "tokens_per_s": "{:,.0f} tokens/s", "mfu": "{:.1%}", "loss": "{:.4f}", "grad_norm": "{:.4f}", "scaling": "{:.2f}x",
    "longest_sequence": "{:,} tokens",
}  # fmt: skip
# metrics of a point of speed
REPORTED = ("tokens_per_s", "mfu", "peak_bytes", "loss", "grad_norm", "scaling")
_LIMITS = {"memory": "memory", "max_tokens": "--max-tokens", "time": "time: run again"}
_POINT = ("metric", "preset", "attention", "context", "gpus", "parallel", "cap")


def add_record(result: dict[str, Any], record: dict[str, Any]) -> None:
    """Put a record of the newest run in the place of an older one of the same point."""
    key = [record.get(name) for name in _POINT]
    result["records"] = [old for old in result["records"] if [old.get(name) for name in _POINT] != key]
    result["records"].append({**record, "run": len(result["meta"]["runs"]) - 1})


def format_value(record: dict[str, Any]) -> str:
    """The value with its unit."""
    if record["metric"] == "peak_bytes":
        return f"{record['value'] / 1e9:.1f} GB" if record["value"] else "unknown"
    return _UNITS[record["metric"]].format(record["value"])


def tables(result: dict[str, Any]) -> list[Table]:
    """Speed, one row a point, and longest rows, one row a method and cap; what there is of them."""
    return [one for one in (_speed_table(result), _longest_table(result)) if one.row_count]


def _table(title: str, names: tuple[str, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE, padding=(0, 1, 0, 0))
    for name in names:
        is_text = name in ("model", "how", "cap", "ended by")
        # numbers are never cut, words go on in the next line
        table.add_column(name, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    return table


def _speed_table(result: dict[str, Any]) -> Table:
    names: tuple[str, ...] = ("model", "how", "context", "rows", "tokens/s", "MFU", "peak")
    has_ranks = any(record["metric"] == "scaling" for record in result["records"])
    if has_ranks:
        names = (*names[:5], "faster", *names[5:], "loss")
    table = _table(f"Training on {result['meta']['hardware']}", names)
    points: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for record in result["records"]:
        if record["metric"] in REPORTED:
            key = tuple(record[name] for name in ("preset", "attention", "parallel", "context"))
            points.setdefault(key, {})[record["metric"]] = record
    for (preset, attention, parallel, context), found in sorted(points.items()):
        speed = f"{found['tokens_per_s']['value']:,.0f}" if "tokens_per_s" in found else ""
        shown = ("scaling", "mfu", "peak_bytes", "loss") if has_ranks else ("mfu", "peak_bytes")
        values = [format_value(found[name]) if name in found else "" for name in shown]
        rows = str(next(iter(found.values()))["micro_batch_rows"])
        # beside ways to spread a step, what is not recomputed goes without saying
        plain = "checkpointing none"
        how = {plain: "one process"}.get(parallel, parallel.removesuffix(f", {plain}")) if has_ranks else parallel
        table.add_row(f"{preset}, {attention}", how, f"{context:,}", rows, speed, *values)
    return table


def _longest(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The longest rows by model, then cap, from the shortest on."""
    found = [record for record in result["records"] if record["metric"] == "longest_sequence"]
    order = ("preset", "attention", "cap_bytes", "value", "parallel")
    return sorted(found, key=lambda record: [record[name] or 0 for name in order])


def _longest_table(result: dict[str, Any]) -> Table:
    names = ("model", "cap", "how", "longest", "too long", "tokens/s", "peak", "ended by")
    table = _table(f"Longest row that trains on {result['meta']['hardware']}", names)
    for record in _longest(result):
        failed = "" if record["shortest_failed"] is None else f"{record['shortest_failed']:,}"
        speed = "" if record["tokens_per_s"] is None else f"{record['tokens_per_s']:,.0f}"
        peak = "unknown" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e9:.1f} GB"
        table.add_row(
            f"{record['preset']}, {record['attention']}", record["cap"], record["parallel"], f"{record['value']:,}",
            failed, speed, peak, _LIMITS[record["limit"]],
        )  # fmt: skip
    return table


def has_points(result: dict[str, Any]) -> bool:
    """Whether there is a point of speed or a longest row to draw."""
    return bool(_speeds(result) or any(record["value"] for record in _longest(result)))


def _speeds(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Points of speed; what was taken from the log of a run does not say how it was spread and is none."""
    return [record for record in result["records"] if record["metric"] == "tokens_per_s" and "parallel" in record]


def plot_training_speed(result: dict[str, Any], path: Path) -> None:
    """Tokens per second against the row, one line per model, attention and way to train, and bars of the longest rows.

    Raises:
        ValueError: without such records.
    """
    speeds = _speeds(result)
    longest = [record for record in _longest(result) if record["value"]]
    panels = [draw for draw, found in ((_draw_speed, speeds), (_draw_longest, longest)) if found]
    if not panels:
        raise ValueError("the results hold neither training speed nor longest rows: nothing to plot")
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 4.2), layout="constrained", squeeze=False)
    for draw, place in zip(panels, axes[0], strict=True):
        draw(place, speeds if draw is _draw_speed else longest)
    figure.suptitle(f"Training on {result['meta']['hardware']}", fontsize=11)
    save(figure, path, 110)


def _draw_speed(axes: Axes, records: list[dict[str, Any]]) -> None:
    """One colour a model, attention and number of GPUs, one marker a way to train; where every context was trained in
    one way only, a thin line joins the ways."""
    ways = sorted({record["parallel"] for record in records}, reverse=True)
    kinds = sorted({(-r["gpus"], r["preset"], r["attention"]) for r in records}, reverse=True)
    for number, kind in enumerate(kinds):
        model = kind[1:]
        mine = sorted(
            (r["context"], r["value"], r["parallel"])
            for r in records
            if (-r["gpus"], r["preset"], r["attention"]) == kind
        )
        if len({one[0] for one in mine}) == len(mine):
            axes.plot([one[0] for one in mine], [one[1] for one in mine], "-", color=f"C{number}", lw=0.8, alpha=0.4)
        for way in ways:
            curve = [one[:2] for one in mine if one[2] == way]
            if curve:
                style = f"{'osd^v'[ways.index(way) % 5]}-"
                axes.plot(*zip(*curve, strict=True), style, color=f"C{number}", ms=5, label=", ".join((*model, way)))
    lengths = sorted({record["context"] for record in records})
    token_axis(axes, lengths)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("tokens a row")
    axes.set_ylabel("tokens trained per second")
    axes.grid(True, alpha=0.25)
    # below: many ways to train would lie on the curves
    axes.legend(fontsize=7, frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def _draw_longest(axes: Axes, records: list[dict[str, Any]]) -> None:
    """One bar a method and cap, with its tokens and what ended the search where it was not memory."""
    caps = list(dict.fromkeys(record["cap"] for record in sorted(records, key=lambda one: one["cap_bytes"] or 0)))
    labels = list(dict.fromkeys((r["preset"], r["attention"], r["parallel"]) for r in records))
    height = 0.8 / len(caps)
    for number, cap in enumerate(caps):
        found = [record for record in records if record["cap"] == cap]
        places = [labels.index((r["preset"], r["attention"], r["parallel"])) + number * height for r in found]
        texts = [human_tokens(r["value"]) + ("" if r["limit"] == "memory" else " or more") for r in found]
        bars = axes.barh(places, [record["value"] for record in found], height, label=f"cap: {cap}")
        axes.bar_label(bars, texts, padding=3, fontsize=8)
    middle = 0.4 - height / 2
    axes.set_yticks([number + middle for number in range(len(labels))], [", ".join(one) for one in labels], fontsize=8)
    axes.invert_yaxis()
    values = [record["value"] for record in records]
    token_axis(axes, [2**power for power in range(min(values).bit_length(), max(values).bit_length() + 2, 3)])
    # room for the texts
    axes.set_xlim(min(values) / 4, max(values) * 8)
    axes.set_xlabel("longest row that trains, tokens")
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(fontsize=8, frameon=False)
