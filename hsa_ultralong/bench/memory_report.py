"""Table and figure of memory-<hardware>.json: reading speed and decoding latency against the length memorised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

from hsa_ultralong.eval.plots import plt, save, token_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

_UNITS = {
    "read_tokens_per_s": "{:,.0f} tokens/s", "read_s": "{:,.2f} s", "decode_ms": "{:,.2f} ms", "open_s": "{:,.2f} s",
    "save_s": "{:,.2f} s", "disk_s": "{:,.2f} s", "warmup_s": "{:,.2f} s", "first_token_s": "{:,.3f} s",
    "bytes_per_token": "{:,.1f} B",
    "hit_rate": "{:.1%}", "fetch_fraction": "{:.2%}", "host_share": "{:.1%}",
    "recall_32": "{:.5f}", "recall_64": "{:.5f}", "exact_scan_ms": "{:,.2f} ms",
    "lookup_ms": "{:,.2f} ms",
}  # fmt: skip
# markers of tiers; what decodes tuned has a dashed line
_MARKERS = {"device": "o", "host": "s", "file": "d", "tiered": "^"}


def format_value(record: dict[str, Any]) -> str:
    """The value with its unit."""
    if record["metric"].endswith("_bytes"):
        return f"{record['value'] / 2**30:.2f} GiB"
    return _UNITS[record["metric"]].format(record["value"])


def table(result: dict[str, Any]) -> Table:
    """One row a record."""
    from rich.table import Table

    rows = Table("metric", "model", "tokens", "store", "form", "batch", "value", title=result["meta"]["hardware"])
    for column in (2, 5, 6):
        rows.columns[column].justify = "right"
    for record in result["records"]:
        rows.add_row(
            record["metric"], record["preset"], f"{record['tokens']:,}", record["store"], record["dtype"],
            str(record["batch"]), format_value(record),
        )  # fmt: skip
    return rows


def _curve_of(record: dict[str, Any]) -> tuple[str, str, str, int]:
    return record["preset"], record["store"], record["dtype"], record["batch"]


def _kind_of(preset: str, store: str, dtype: str) -> tuple[str, str, str]:
    """What has a colour of its own."""
    return preset, dtype, ", ".join(part for part in store.split(", ") if part.endswith("processes"))


# title, unit and metrics of a panel, factor of the values, whether its axis is logarithmic
_PANELS = (
    ("memorising", "tokens read per second", ("read_tokens_per_s",), 1.0, True),
    ("peak memory", "GiB", ("peak_device_bytes", "peak_host_bytes"), 2.0**-30, True),
    ("decoding on top of the memory", "milliseconds a token", ("decode_ms",), 1.0, False),
    ("chunks read that the cache held", "share", ("hit_rate",), 1.0, False),
)


def plot_memory(result: dict[str, Any], path: Path) -> None:
    """Reading speed, its peak memory, decoding and hits of the cache by store and form, against the length; what there
    is of them.

    Raises:
        ValueError: without reading and decoding.
    """
    records = result["records"]
    if not any(record["metric"] in ("read_tokens_per_s", "decode_ms") for record in records):
        raise ValueError("the results hold neither reading nor decoding: nothing to plot")
    panels = [panel for panel in _PANELS if any(record["metric"] in panel[2] for record in records)]
    # a colour for a model, its form and the processes that share the memory, open markers for several sequences
    drawn = [record for record in records if any(record["metric"] in panel[2] for panel in panels)]
    kinds = sorted({_kind_of(record["preset"], record["store"], record["dtype"]) for record in drawn})
    rows = -(-len(panels) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(11, 5.2 * rows), layout="constrained", squeeze=False)
    places = list(grid.flat)
    for axes, (title, unit, metrics, factor, is_log) in zip(places, panels, strict=False):
        found = [record for record in records if record["metric"] in metrics]
        for preset, store, dtype, batch in sorted({_curve_of(record) for record in found}):
            mine = [record for record in found if _curve_of(record) == (preset, store, dtype, batch)]
            points = [(record["tokens"], factor * record["value"]) for record in mine]
            label = f"{preset}, {store}, {dtype}" + (f", batch {batch}" if batch > 1 else "")
            axes.plot(
                *zip(*sorted(points), strict=True), _MARKERS.get(store.split(",")[0], "x"), ms=4.5, label=label,
                ls="--" if "," in store else "-", color=f"C{kinds.index(_kind_of(preset, store, dtype)) % 10}",
                markerfacecolor="white" if batch > 1 else None,
            )  # fmt: skip
        _label(axes, title, unit, sorted({record["tokens"] for record in found}), is_log)
    for axes in places[len(panels) :]:
        axes.axis("off")
    figure.suptitle(f"Memory on {result['meta']['hardware']}", fontsize=11)
    save(figure, path, 120)


def _label(axes: Axes, title: str, unit: str, lengths: list[int], is_log: bool) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_ylabel(unit)
    if is_log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    token_axis(axes, lengths)
    axes.set_xlabel("tokens memorised")
    axes.grid(True, alpha=0.25)
    # below the axes, where it covers nothing
    axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
