"""The figures of docs/report.md, each from the JSON below results/ and benchmarks/results/ alone.

FIGURES names those that take several files. Called by report.py; tests/test_report.py.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any, NamedTuple

from report_memories import QUESTION_TOKENS, memory_speed
from report_tasks import tasks_figure

from hsa_ultralong.eval.plots import MARKS, human_tokens, plt, read_jsonl, save, token_axis
from hsa_ultralong.eval.recorded_run import PACKED, unpacked
from hsa_ultralong.eval.suite_diagnosis import CAUSES, RIGHT, cause
from hsa_ultralong.eval.suite_plots import COLOURS
from hsa_ultralong.files.packed import stored
from hsa_ultralong.files.strict_json import parse_lines, read_json

Records = list[dict[str, Any]]
Times = dict[tuple[str, str, int], float]
# of operators: chunks a token, and how their lists were chosen (docs/results.md)
TOPK, LISTS = 32, ("shared", "recorded", "random")
# model -> its studies of hidden sentences; the same length is shown of the first that has it
NEEDLES = {
    "nano": (
        "needles-nano",
        "needles-nano-card",
        "needles-nano-1m-depths",
        "needles-nano-16m",
        "needles-nano-64m",
        "needles-nano-128m",
        "needles-nano-256m",
        "needles-nano-1g",
        "needles-nano-4g",
    ),
    "nano before 2026-11-28": ("needles-before-pool", "needles-1g"),
    "the same, pools, averaged": ("needles-averaged", "needles-1g-averaged"),
}
_SUITES = ("paper-*", "ruler-*", "recall-*")
_SUITE_TASKS = (
    "s_niah_authors", "mq_authors", "vt_authors", "niah_single_2", "vt", "recall_form_01", "recall_value_cities",
    "recall_similar_16",
)  # fmt: skip
# how a curve of what is recalled is called -> its tasks, of which it is the mean, and their score
_RECALLED = {
    "twelve forms never trained": ([f"recall_form_{number:02}" for number in range(1, 13)], "exact"),
    "values of other kinds": (
        [f"recall_value_{kind}" for kind in ("names", "cities", "times", "dates", "digits14", "words2")], "exact"
    ),
    "one of 64 alike": (["recall_similar_64"], "exact"),
    "the authors' needle": (["s_niah_authors"], "teacher"),
}  # fmt: skip
# how a panel of what misses come from is called -> its tasks, of one fact each
_ASKED = {
    **{name: tasks for name, (tasks, _) in _RECALLED.items()},
    "one of 256 alike": ["recall_similar_256"],
    "a fact that changed": ["recall_changed"],
    "form 8 alone": ["recall_form_08"],
    "RULER's niah_single_1": ["niah_single_1"],
    "RULER's niah_single_2": ["niah_single_2"],
    "RULER's niah_multikey_1": ["niah_multikey_1"],
}  # fmt: skip
_ANEW = ", read anew"
_INK = "0.35"


class Line(NamedTuple):
    """Points of a curve by length; `low` and `high` shade what lies around it."""

    x: list[int]
    y: list[float]
    low: list[float] = []
    high: list[float] = []


Map = dict[int, dict[int, float]]  # tokens -> tenth of depths -> share


def hidden_sentences(root: Path) -> dict[str, Map]:
    """Model -> share of hidden sentences that were answered, by length and tenth of depths."""
    found: dict[str, Map] = {}
    for model, lines in _needles(root).items():
        cells: dict[int, dict[int, list[bool]]] = {}
        for line in lines:
            tenths = cells.setdefault(line["length"], {})
            tenths.setdefault(min(9, int(10 * line["depth"])), []).append(line["correct"])
        found[model] = {
            length: {tenth: sum(right) / len(right) for tenth, right in tenths.items()}
            for length, tenths in sorted(cells.items())
        }
    return found


def _needles(root: Path, needed: str = "correct") -> dict[str, Records]:
    """Model -> lines of its studies with a field; of each length those of one study and one form of the memory."""
    found: dict[str, Records] = {}
    for model, studies in NEEDLES.items():
        kept: dict[int, Records] = {}
        for study in studies:
            path = stored(root / "results" / study / "records.jsonl")
            lines = [line for line in (read_jsonl(path) if path.is_file() else []) if line.get(needed) is not None]
            for length in dict.fromkeys(line["length"] for line in lines):
                own = [line for line in lines if line["length"] == length]
                kept.setdefault(length, [line for line in own if line["form"] == own[0]["form"]])
        if kept:
            found[model] = [line for length in sorted(kept) for line in kept[length]]
    return found


def suite_maps(root: Path) -> dict[str, Map]:
    """Task -> share answered of nano, by length and tenth of depths; counted, as summaries are published without."""
    found: dict[str, dict[int, dict[int, list[float]]]] = {}
    for path in _suite_paths(root, PACKED):
        own: dict[tuple[str, int], dict[int, list[float]]] = {}
        for record in parse_lines(unpacked(path), path):
            is_shown = record["model"] == "nano" and record["task"] in _SUITE_TASKS
            if is_shown and record["score"] is not None and record["depth"] is not None:
                tenths = own.setdefault((record["task"], record["length"]), {})
                tenths.setdefault(int(10 * min(0.999, record["depth"])), []).append(record["score"])
        for (task, length), tenths in own.items():
            found.setdefault(task, {}).setdefault(length, tenths)
    return {
        task: {
            length: {tenth: sum(scores) / len(scores) for tenth, scores in sorted(tenths.items())}
            for length, tenths in sorted(found[task].items())
        }
        for task in _SUITE_TASKS
        if task in found
    }


def _suite_paths(root: Path, name: str) -> list[Path]:
    return sorted(path for suite in _SUITES for path in (root / "results").glob(f"{suite}/{name}"))


def _all_suites(root: Path) -> Records:
    return [record for path in _suite_paths(root, "summary.json") for record in read_json(path)["records"]]


def _suite_records(root: Path) -> Records:
    return [
        record
        for record in _all_suites(root)
        if record.get("task") in _SUITE_TASKS and record["model"] == "nano" and record["metric"] != "auroc"
    ]


def recalled(root: Path) -> dict[str, Line]:
    """What is asked -> percent that nano answers, by length."""
    records = [record for record in _all_suites(root) if record["model"] == "nano" and record["depth"] is None]
    found = {}
    for name, (tasks, metric) in _RECALLED.items():
        values: dict[int, list[float]] = {}
        for record in records:
            if record["task"] in tasks and record["metric"] == metric:
                values.setdefault(record["length"], []).append(100 * record["value"])
        whole = sorted(length for length, own in values.items() if len(own) == len(tasks))
        if whole:
            found[name] = Line(whole, [sum(values[length]) / len(tasks) for length in whole])
    return found


def _median_margins(root: Path, studies: Sequence[str]) -> dict[int, float]:
    """Of studies that keep no lines: the median by length."""
    paths = [root / "results" / study / "summary.json" for study in studies]
    records = [record for path in paths if path.is_file() for record in read_json(path)["records"]]
    return {record["tokens"]: record["value"] for record in records if record.get("metric") == "score_margin"}


def margins(root: Path) -> dict[str, Line]:
    """Model -> score of the right chunk over the best other one, by length: median and, where lines are kept, the
    middle half, else NaN."""
    lines, found = _needles(root, "margin"), {}
    for model, studies in NEEDLES.items():
        cuts = {length: (math.nan, median, math.nan) for length, median in _median_margins(root, studies).items()}
        for length in dict.fromkeys(line["length"] for line in lines.get(model, ())):
            own = [line["margin"] for line in lines[model] if line["length"] == length]
            if len(own) > 1:
                cuts[length] = tuple(quantiles(own, n=4))
        if cuts:
            x = sorted(cuts)
            low, middle, high = ([cuts[length][place] for length in x] for place in range(3))
            found[model] = Line(x, middle, low, high)
    return found


def evidence_found(root: Path) -> dict[str, Line]:
    """Task -> share of questions of nano for which a chunk with the fact was retrieved, by length."""
    found: dict[str, dict[int, float]] = {}
    for record in _suite_records(root):
        if record["depth"] is None and record.get("evidence_found") is not None:
            found.setdefault(record["task"], {}).setdefault(record["length"], record["evidence_found"])
    return {
        task: Line(sorted(own), [own[length] for length in sorted(own)]) for task, own in found.items() if len(own) > 1
    }


def causes(root: Path) -> dict[str, dict[int, dict[str, float]]]:
    """What is asked -> tokens -> to what the answers of nano are put down (eval/suite_diagnosis.py), as shares."""
    found: dict[str, dict[int, Counter[str]]] = {name: {} for name in _ASKED}
    for path in _suite_paths(root, PACKED):
        for record in parse_lines(unpacked(path), path):
            if record["model"] == "nano" and record["score"] is not None:
                for name in (name for name, tasks in _ASKED.items() if record["task"] in tasks):
                    found[name].setdefault(record["length"], Counter())[cause(record)] += 1
    return {
        name: {length: {one: own[length][one] / own[length].total() for one in CAUSES} for length in sorted(own)}
        for name, own in found.items()
        if own
    }


def _line(values: dict[int, float]) -> Line:
    return Line(sorted(values), [values[length] for length in sorted(values)])


def operator_times(records: Records) -> Times:
    """(operator, direction, tokens) -> ms of the fastest; HSA is "hsa LISTS", by how its lists were chosen."""
    times: Times = {}
    for record in records:
        op, impl, lists = record["op"], record["impl"], record["selection"]
        if op == "hsa" and impl == "triton" and lists in LISTS:
            op = f"hsa {lists}"
        elif op != "full_attention" and (op, impl) != ("chunk_topk", "triton"):
            continue
        if record["K"] in (None, TOPK):
            key = op, record["direction"], record["T"]
            times[key] = min(record["ms"], times.get(key, float("inf")))
    return times


def share_of_full(times: Times, direction: str, length: int, lists: str, *others: str) -> float | None:
    """Time of HSA and other operators in that of full attention; None where one was not measured."""
    parts = [times.get((op, direction, length)) for op in (f"hsa {lists}", *others)]
    full = times.get(("full_attention", direction, length))
    return None if full is None or None in parts else sum(part for part in parts if part is not None) / full


def operator_curves(times: Times, direction: str) -> dict[str, Line]:
    """Full attention, HSA with retrieval by lists, HSA alone and retrieval alone: ms by length."""
    lengths = sorted({length for _, one, length in times if one == direction})
    sums = {"full attention": ("full_attention",), "HSA and retrieval, shared lists": ("hsa shared", "chunk_topk")}
    sums |= {
        "HSA and retrieval, random lists": ("hsa random", "chunk_topk"),
        "HSA alone, shared lists": ("hsa shared",),
    }
    sums |= {"retrieval alone": ("chunk_topk",)}
    found = {}
    for name, parts in sums.items():
        own = {
            length: sum(times[op, direction, length] for op in parts)
            for length in lengths
            if all((op, direction, length) in times for op in parts)
        }
        if own:
            found[name] = _line(own)
    return found


def draw_maps(maps: dict[str, Map], path: Path, columns: int = 5) -> None:
    """A panel a map: depth by length, in percent."""
    columns = min(columns, len(maps))
    rows = -(-len(maps) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.6 * columns + 0.6, 2.5 * rows), squeeze=False, layout="constrained"
    )
    for axes, (name, own) in zip(grid.flat, maps.items(), strict=False):
        image = _map(axes, own)
        axes.set_title(name, fontsize=9)
    for axes in grid.flat[len(maps) :]:
        axes.axis("off")
    figure.colorbar(image, ax=grid, label="answered, %", shrink=0.8)
    save(figure, path, 110)


def _map(axes: Any, own: Map) -> Any:
    lengths = list(own)
    share = [[100 * own[length].get(tenth, float("nan")) for length in lengths] for tenth in range(10)]
    image = axes.imshow(share, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
    # of many lengths every second is named, the last among them
    named = range(len(lengths))[:: -2 if len(lengths) > 7 else -1]
    axes.set_xticks(named, [human_tokens(lengths[place]) for place in named], fontsize=7)
    axes.set_yticks((0, 4.5, 9), ("start", "depth", "end"), fontsize=7, rotation=90, va="center")
    return image


def draw_lines(panels: dict[str, dict[str, Line]], path: Path, logarithmic: Sequence[str] = ()) -> None:
    """A panel a title, a curve a name, which has one colour; names of the first panel are not named again."""
    names = list(dict.fromkeys(name for own in panels.values() for name in own))
    figure, grid = plt.subplots(1, len(panels), figsize=(4.3 * len(panels), 3.3), squeeze=False, layout="constrained")
    for axes, (title, own) in zip(grid.flat, panels.items(), strict=True):
        _lines(axes, own, names, title in logarithmic)
        axes.set_title(title, fontsize=9)
        if axes is grid[0, 0] or next(iter(own)) not in panels[next(iter(panels))]:
            axes.legend(fontsize=7, frameon=False)
    save(figure, path, 110)


def _lines(axes: Any, own: dict[str, Line], names: Sequence[str], is_logarithmic: bool) -> None:
    for name, line in own.items():
        number, is_anew = names.index(name.removesuffix(_ANEW)), name.endswith(_ANEW)
        style: dict[str, Any] = {"ls": "--" if is_anew else "-", "label": None if is_anew else name}
        axes.plot(line.x, line.y, color=f"C{number}", marker=MARKS[number % len(MARKS)], ms=3.5, lw=1.2, **style)
        if line.low:
            axes.fill_between(line.x, line.low, line.high, color=f"C{number}", alpha=0.12, lw=0)
    lengths = sorted({length for line in own.values() for length in line.x})
    token_axis(axes, lengths)
    # of many lengths every second is named
    named = lengths[:: -2 if len(lengths) > 7 else -1]
    axes.set_xticks(named, [human_tokens(length) for length in named])
    if is_logarithmic:
        axes.set_yscale("log")
    axes.tick_params(labelsize=7, colors=_INK)
    axes.grid(True, alpha=0.2)
    axes.set_xlabel("tokens", fontsize=8)


def draw_summary(shares: dict[str, Line], margin: dict[str, Line], speed: dict[str, Line], path: Path) -> None:
    """README's picture: what is recalled by length, the margin of retrieval, and speed."""
    figure, grid = plt.subplots(1, 3, figsize=(12, 2.9), layout="constrained")
    _lines(grid[0], shares, list(shares), False)
    grid[0].set_ylim(0, 103)
    grid[0].set_title("nano: facts recalled, %", fontsize=9)
    _lines(grid[1], margin, list(margin), False)
    grid[1].axhline(0, color=_INK, lw=0.8)
    grid[1].set_title("score of the right chunk over the best other", fontsize=9)
    _lines(grid[2], speed, list(speed), True)
    grid[2].set_title("ms, forward and backward, one layer", fontsize=9)
    for axes in grid:
        axes.legend(fontsize=7, frameon=False)
    save(figure, path, 110)


def draw_causes(shares: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """A panel for what is asked: of the answers at each length, how many are right and what the others miss by."""
    columns = min(5, len(shares))
    rows = -(-len(shares) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(2.2 * columns, 1.9 * rows + 0.3), squeeze=False, sharey=True, layout="constrained"
    )
    for axes, (name, own) in zip(grid.flat, shares.items(), strict=False):
        below = [0.0] * len(own)
        for one in CAUSES:
            values = [100 * share[one] for share in own.values()]
            axes.bar(range(len(own)), values, bottom=below, color=COLOURS[one], width=0.8)
            below = [low + value for low, value in zip(below, values, strict=True)]
        axes.set_xticks(range(len(own)), [human_tokens(length) for length in own])
        axes.set_xlim(-0.6, max(len(own), 5) - 0.4)
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7, colors=_INK)
    for axes in grid[:, 0]:
        axes.set_ylabel("% of answers", fontsize=7)
    for axes in grid.flat[len(shares) :]:
        axes.axis("off")
    shown = [one for one in CAUSES if any(share[one] for own in shares.values() for share in own.values())]
    marks = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[one]) for one in shown]
    names = [one if one == RIGHT else f"missed in {one}" for one in shown]
    figure.legend(marks, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    save(figure, path, 100)


# what a figure shows, in words, and what draws it to a path; None: nothing was measured
Figure = tuple[str, Callable[[Path], None]] | None


def _depths(root: Path) -> Figure:
    maps = hidden_sentences(root)
    return ("Hidden sentences answered, by length and place", partial(draw_maps, maps)) if maps else None


def _suites(root: Path) -> Figure:
    maps = suite_maps(root)
    return ("Tasks of the suites answered by nano, by length and place", partial(draw_maps, maps)) if maps else None


def _margins(root: Path) -> Figure:
    panels = {
        "score of the right chunk over the best other (nats)": margins(root),
        "share of questions for which a right chunk was retrieved": evidence_found(root),
    }
    panels = {title: lines for title, lines in panels.items() if lines}
    return ("Margin of retrieval, and what it finds, by length", partial(draw_lines, panels)) if panels else None


def _diagnosis(root: Path) -> Figure:
    shares = causes(root)
    return (
        ("Answers of nano, right or missed and by what, in percent by length", partial(draw_causes, shares))
        if shares
        else None
    )


def _memories(root: Path) -> Figure:
    values = memory_speed(root)
    if not values:
        return None
    speed = {metric: {name: _line(own) for name, own in curves.items()} for metric, curves in values.items()}
    question = speed.get("question_s", {})
    anew = {name + _ANEW: line for name, line in speed.get("anew_s", {}).items()}
    panels = {
        "reading, tokens/s": speed.get("read_tokens_per_s", {}),
        "one step of decoding, ms": speed.get("decode_ms", {}),
        f"a question of {QUESTION_TOKENS} tokens, s; dashed: its text is read first": {**question, **anew},
    }
    draw = partial(draw_lines, panels, logarithmic=list(panels))
    return "Reading, a step of decoding, and a question on a memory or with its text read anew, by length", draw


def _summary(root: Path) -> Figure:
    shares, margin = recalled(root), margins(root)
    path = root / "benchmarks" / "results" / "ops-h200.json"
    if not shares or not margin or not path.is_file():
        return None
    curves = operator_curves(operator_times(read_json(path)["records"]), "fwd_bwd")
    speed = {name: line for name, line in curves.items() if "alone" not in name}
    return "Recall by length, margin of retrieval, speed", partial(draw_summary, shares, margin, speed)


FIGURES: dict[str, Callable[[Path], Figure]] = {
    "summary": _summary,
    "depths": _depths,
    "suites": _suites,
    "protocols": tasks_figure,
    "margins": _margins,
    "diagnosis": _diagnosis,
    "memories": _memories,
}
