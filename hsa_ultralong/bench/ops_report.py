"""The numbers of the suite `ops` as rich tables and as a figure; both need the JSON alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsa_ultralong.eval.plots import human_tokens, plt, save, token_axis
from hsa_ultralong.files.strict_json import read_json

if TYPE_CHECKING:
    from rich.table import Table

# dense bf16 FLOP/s that a matrix product reaches (not the data sheet's 989), and bytes/s of the memory
_ARITHMETIC = {"h100": 790e12, "h200": 790e12}
_MEMORY = {"h100": 3.35e12, "h200": 4.8e12}

# label, colour, line style, and the records that belong to the curve
_CURVES: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("HSA, shared", "#1b6ca8", "o-", {"op": "hsa", "impl": "triton", "selection": "shared"}),
    ("HSA, random", "#1b6ca8", "o--", {"op": "hsa", "impl": "triton", "selection": "random"}),
    ("HSA, recorded", "#1b6ca8", "o:", {"op": "hsa", "impl": "triton", "selection": "recorded"}),
    ("HSA + retrieval, shared", "#12395e", "D-", {"op": "hsa + chunk_topk", "impl": "triton", "selection": "shared"}),
    ("HSA + retrieval, random", "#12395e", "D--", {"op": "hsa + chunk_topk", "impl": "triton", "selection": "random"}),
    ("HSA, torch gather", "#7aa6c8", "s-", {"op": "hsa", "impl": "torch_gather", "selection": "shared"}),
    ("HSA, torch dense", "#7aa6c8", "s:", {"op": "hsa", "impl": "torch_dense", "selection": "shared"}),
    ("full, cuDNN", "#d1603d", "^-", {"op": "full_attention", "impl": "cudnn"}),
    ("full, flash", "#e0a458", "v-", {"op": "full_attention", "impl": "flash"}),
    ("full, SDPA", "#d1603d", "^-", {"op": "full_attention", "impl": "sdpa"}),
    ("window, SDPA", "#4f7942", "d-", {"op": "window", "impl": "torch"}),
    ("window", "#9ab973", "d:", {"op": "window", "impl": "triton"}),
    ("window, flex", "#9ab973", "x:", {"op": "window", "impl": "flex"}),
    ("window, flash-attn", "#9ab973", "*:", {"op": "window", "impl": "flash_attn"}),
    ("full, flash-attn", "#e0a458", "*-", {"op": "full_attention", "impl": "flash_attn"}),
    ("one softmax, same lists", "#6b4e9b", "p-", {"op": "selected", "impl": "triton", "selection": "shared"}),
    ("one softmax, torch", "#6b4e9b", "p:", {"op": "selected", "impl": "torch", "selection": "shared"}),
    ("same lists, NSA of fla", "#b0508c", "X-", {"op": "selected", "impl": "fla", "selection": "shared"}),
    ("same lists, flex", "#8c6d5a", "x-", {"op": "selected", "impl": "flex", "selection": "shared"}),
    ("NSA, ours", "#6b4e9b", "P--", {"op": "nsa", "impl": "triton"}),
    ("NSA, torch", "#6b4e9b", "P:", {"op": "nsa", "impl": "torch"}),
    ("NSA, fla", "#b0508c", "P--", {"op": "nsa", "impl": "fla"}),
    ("MoBA, ours", "#6b4e9b", "h-.", {"op": "moba", "impl": "triton"}),
    ("MoBA, torch", "#6b4e9b", "h:", {"op": "moba", "impl": "torch"}),
    ("MoBA, fla", "#b0508c", "h-.", {"op": "moba", "impl": "fla"}),
)
# rivals' operators, and those that choose their chunks themselves
_RIVALS, _CHOOSING = ("selected", "nsa", "moba"), ("nsa", "moba")
_RIVAL_IMPLS = ("flex", "flash_attn")
_TITLES = {"fwd": "forward", "fwd_bwd": "forward and backward"}


def read_benchmark(path: Path) -> dict[str, Any]:
    """A results file of benchmarks/results/.

    Raises:
        ValueError: if it is not JSON of the form {"meta", "records"}.
    """
    value = read_json(path)
    if not {"meta", "records"} <= set(value):
        raise ValueError(f"{path} holds no benchmark: expected an object with meta and records")
    return value


def short_hardware(name: str) -> str:
    """ "NVIDIA H200" -> "h200", "..., 2 cores" -> "cpu2": the part of a file's name that says where it was measured."""
    words = name.replace(",", " ").split()
    if "cores" in words:
        return f"cpu{words[words.index('cores') - 1]}"
    count = words[-1] if words[-1].startswith("x") and words[-1][1:].isdigit() else ""
    for word in words:
        if word[0].isalpha() and any(letter.isdigit() for letter in word) and word != count:
            return word.lower() + count
    return "-".join(words).lower() or "unknown"


def _chip(meta: dict[str, Any]) -> str:
    return str(meta.get("hardware_name", short_hardware(meta["hardware"]))).split("x")[0]


def _by_graphs(meta: dict[str, Any]) -> str:
    return ", CUDA graphs" if meta.get("graphs") else ""


def select(records: list[dict[str, Any]], **fields: Any) -> list[dict[str, Any]]:
    """Records that have all these values."""
    return [record for record in records if all(record.get(key) == value for key, value in fields.items())]


def _ms(records: list[dict[str, Any]], **fields: Any) -> float | None:
    found = select(records, **fields)
    return found[0]["ms"] if found else None


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(ours: float | None, theirs: float | None) -> str:
    return "" if ours is None or theirs is None else f"{ours / theirs:.2f}x"


def tables(result: dict[str, Any]) -> list[Table]:
    """HSA beside full attention with ratios, a table per direction, its rivals, then all other operators with rates."""
    records = result["records"]
    attention = [_attention_table(records, direction) for direction in _TITLES]
    found = [*attention, _rivals_table(records), _rates_table(records)]
    for table in found:
        table.title = f"{table.title}{_by_graphs(result['meta'])}"
    return [table for table in found if table.row_count]


def _table(title: str, columns: tuple[str, ...], num_names: int = 0) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 1))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < num_names else "right", no_wrap=True)
    return table


def _attention_table(records: list[dict[str, Any]], direction: str) -> Table:
    here = select(records, direction=direction)
    impl = "sdpa" if select(here, op="full_attention", impl="sdpa") else "cudnn"
    name = {"cudnn": "cuDNN", "sdpa": "SDPA"}[impl]
    columns = ("T", "K", "shared", "random", "recorded", "torch", name, "flash", "x shared", "x random")
    title = f"HSA beside full causal attention, {_TITLES[direction]}, ms; x = ratio to {name}"
    table = _table(title, columns)
    for topk, length in sorted({(record["K"], record["T"]) for record in select(here, op="hsa")}):
        hsa = select(here, op="hsa", K=topk, T=length)
        shared, random, recorded = (
            _ms(hsa, impl="triton", selection=selection) for selection in ("shared", "random", "recorded")
        )
        torch_ms = min((record["ms"] for record in hsa if record["impl"].startswith("torch")), default=None)
        full = _ms(here, op="full_attention", impl=impl, T=length)
        flash = _ms(here, op="full_attention", impl="flash", T=length)
        cells = map(_cell, (shared, random, recorded, torch_ms, full, flash))
        # without kernels (a CPU) the torch path is what runs
        ratios = _ratio(torch_ms if shared is None else shared, full), _ratio(random, full)
        table.add_row(human_tokens(length), str(topk), *cells, *ratios)
    return table


def _is_rival(record: dict[str, Any]) -> bool:
    return record["op"] in _RIVALS or record["impl"] in _RIVAL_IMPLS


def _rivals_table(records: list[dict[str, Any]]) -> Table:
    """Other sparse attention beside HSA of the same T, K and lists; with chunk_topk where the rival chooses too."""
    columns = ("rival", "lists", "T", "reads", "fwd", "fwd+bwd", "HSA / it", "MiB", "HSA MiB")
    table = _table("Rivals, ms; HSA with chunk_topk beside what chooses, reads = chunks or window", columns, 2)
    fields = ("op", "impl", "selection", "T", "K")
    keys = dict.fromkeys(tuple(record[name] for name in fields) for record in records if _is_rival(record))
    for key in sorted(keys, key=lambda key: (key[3], key[:3])):
        here = select(records, **dict(zip(fields, key, strict=True)))
        times = {record["direction"]: record["ms"] for record in here}
        direction = "fwd_bwd" if "fwd_bwd" in times else "fwd"
        last = select(here, direction=direction)[0]
        topks = [record["K"] for record in records if record["op"] == "hsa"]
        topk = key[4] or (32 if 32 in topks else min(topks, default=None))
        same = {"T": key[3], "K": topk, "direction": direction}
        impls = {record["impl"] for record in select(records, op="hsa", **same)}
        impl = "triton" if "triton" in impls else min(impls, default="")
        wanted = key[2] if key[2] in ("shared", "random") else "shared"
        hsa = select(records, op="hsa", impl=impl, selection=wanted, **same)
        ours = hsa[0]["ms"] if hsa else None
        if ours is not None and key[0] in _CHOOSING:
            chosen = _ms(records, op="chunk_topk", impl="triton" if impl == "triton" else "torch", **same)
            ours = None if chosen is None else ours + chosen
        peaks = [last["peak_bytes"] / 2**20, hsa[0]["peak_bytes"] / 2**20 if hsa else None]
        table.add_row(
            f"{key[0]} {key[1]}", key[2].replace("none", ""), human_tokens(key[3]),
            str(last.get("window") or key[4] or "all"), _cell(times.get("fwd")), _cell(times.get("fwd_bwd")),
            _ratio(ours, last["ms"]), *(_cell(peak) for peak in peaks),
        )  # fmt: skip
    return table


def _rates_table(records: list[dict[str, Any]]) -> Table:
    columns = ("operator", "", "T", "C", "K", "ms", "TFLOP/s", "GB/s", "peak GiB")
    table = _table("Other operators", columns, 2)
    for record in records:
        if record["op"] in ("hsa", "full_attention") or _is_rival(record):
            continue
        seconds = max(record["ms"], 1e-9) / 1e3
        table.add_row(
            f"{record['op']} {record['impl']}",
            "fwd+bwd" if record["direction"] == "fwd_bwd" else "fwd",
            human_tokens(record["T"]),
            human_tokens(record["C"]) if record["C"] else "",
            str(record["K"] or ""),
            _cell(record["ms"]),
            f"{record['flops'] / seconds / 1e12:.3g}",
            f"{record['bytes'] / seconds / 1e9:,.0f}",
            f"{record['peak_bytes'] / 2**30:.2f}",
        )
    return table


def plot_ops(result: dict[str, Any], path: Path, title: str = "") -> None:
    """Milliseconds against T, one panel a direction, log-log, with the floors of the card where they are known.

    Raises:
        ValueError: if there is no attention record to draw.
    """
    meta, records = result["meta"], result["records"]
    hsa = select(records, op="hsa")
    topks = sorted({record["K"] for record in hsa})
    topk = 32 if 32 in topks or not topks else topks[0]
    drawn = [record for record in records if record["op"] != "hsa" or record["K"] == topk]
    drawn += with_retrieval(drawn)
    attention = ("hsa", "full_attention", "window", *_RIVALS)
    lengths = sorted({record["T"] for record in drawn if record["op"] in attention})
    if not lengths:
        raise ValueError("the results hold no attention operator: nothing to plot")
    figure, panels = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained", sharey=True)
    for axes, (direction, name) in zip(panels, _TITLES.items(), strict=True):
        here = select(drawn, direction=direction)
        for label, colour, style, fields in _CURVES:
            curve = sorted(select(here, **fields), key=lambda record: record["T"])
            if curve:
                place, ms = [r["T"] for r in curve], [r["ms"] for r in curve]
                axes.plot(place, ms, style, color=colour, ms=4, lw=1.5, label=label)
                axes.fill_between(
                    place, [r["ms_low"] for r in curve], [r["ms_high"] for r in curve], color=colour, alpha=0.15, lw=0
                )
        _draw_floors(axes, select(here, op="hsa"), _chip(meta))
        token_axis(axes, lengths)
        axes.set_yscale("log")
        axes.set_xlabel("tokens")
        axes.set_title(name, fontsize=10)
        axes.grid(True, which="major", alpha=0.25)
    panels[0].set_ylabel("milliseconds")
    # the panels may hold different curves
    entries = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside right center", fontsize=9, frameon=False)
    figure.suptitle(title or _title(meta, records, topk), fontsize=11)
    save(figure, path, 90)


def with_retrieval(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """HSA and chunk_topk of the same point as one operator, "hsa + chunk_topk"; none where no rival chooses.

    Times are sums of both records, quantiles too.
    """
    if not any(record["op"] in _CHOOSING for record in records):
        return []
    found = []
    for record in select(records, op="hsa", impl="triton"):
        same = {name: record[name] for name in ("direction", "T", "K")}
        for other in select(records, op="chunk_topk", impl="triton", **same):
            times = {name: record[name] + other[name] for name in ("ms", "ms_low", "ms_high")}
            found.append({**record, **times, "op": "hsa + chunk_topk"})
    return found


def _draw_floors(axes: Any, hsa: list[dict[str, Any]], chip: str) -> None:
    """What the selected chunks' arithmetic and the smallest traffic cost on this card."""
    points = {record["T"]: record for record in hsa}
    lengths = sorted(points)
    for rates, field, label, style in (
        (_ARITHMETIC, "flops", "floor: arithmetic, 790 TFLOP/s", "-."),
        (_MEMORY, "bytes", "floor: memory", ":"),
    ):
        if chip in rates and lengths:
            values = [points[length][field] / rates[chip] * 1e3 for length in lengths]
            axes.plot(lengths, values, style, color="#22313f", lw=1, alpha=0.7, label=label)


def _title(meta: dict[str, Any], records: list[dict[str, Any]], topk: int) -> str:
    first = records[0]
    shape = ", ".join(f"{name}={first[name]}" for name in ("Hq", "Hkv", "D", "S"))
    return f"Attention operators on {meta['hardware']}: {shape}, K={topk}, {first['dtype']}{_by_graphs(meta)}"
