"""Figure of serve-<hardware>.json: tokens a second and the wait for the first token, by requests at once.

Called by `hsa bench serve` and `make report`; tests/serve/test_load.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from hsa_ultralong.eval.plots import MARKS, human_tokens, plt, save

# metrics of a panel, as (solid, dashed) curves, their title and unit
_PANELS = (
    (
        ("decode_tokens_per_s", "tokens_per_s"),
        "while all rows run; dashed: from the first request to the last token",
        "tokens per second",
    ),
    (("first_token_s_p50", "first_token_s_p99"), "first token of requests that come at once; dashed: p99", "seconds"),
)


def has_batches(result: dict[str, Any]) -> bool:
    """Whether there is something to plot: speeds of at least two batches on one memory."""
    found = [_kind_of(record) for record in result["records"] if record["metric"] == "tokens_per_s"]
    return len(found) > len(set(found))


def plot_serve(result: dict[str, Any], path: Path) -> None:
    """Both panels against the number of requests, a curve for every model, form and length of memory.

    Raises:
        ValueError: without speeds of several batches.
    """
    if not has_batches(result):
        raise ValueError("the results hold no speeds of several batches (--lengths, --batches): nothing to plot")
    records = result["records"]
    kinds = sorted({_kind_of(record) for record in records if record["metric"] == "tokens_per_s"})
    batches = sorted({record["batch"] for record in records if record["metric"] == "tokens_per_s"})
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axes, (metrics, title, unit) in zip(panels, _PANELS, strict=True):
        for number, kind in enumerate(kinds):
            for metric, style in zip(metrics, ("-", "--"), strict=True):
                mine = [record for record in records if record["metric"] == metric and _kind_of(record) == kind]
                points = sorted((record["batch"], record["value"]) for record in mine)
                if not points:  # of a run that was stopped
                    continue
                preset, store, dtype, tokens = kind
                axes.plot(
                    *zip(*points, strict=True), style + MARKS[number % len(MARKS)], ms=4.5, color=f"C{number % 10}",
                    label=f"{preset}, {dtype}, {human_tokens(tokens)} tokens ({store})" if style == "-" else None,
                )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.xaxis.minorticks_off()
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("requests at once")
        axes.set_ylabel(unit)
        axes.grid(True, alpha=0.25)
        axes.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Answers beside one another on {result['meta']['hardware']}", fontsize=11)
    save(figure, path, 120)


def _kind_of(record: dict[str, Any]) -> tuple[str, str, str, int]:
    return record["preset"], record["store"], record["dtype"], record["tokens"]
