"""Write what was measured into docs/report.md, draw the figures of findings, and print the report as docs/report.pdf.

    python scripts/report.py

Between `<!-- begin NAME -->` and `<!-- end NAME -->` of docs/report.md stands what follows from the files of results/
and benchmarks/results/ alone, so that no number is typed; what has no file says "not run yet". The PDF is made by
matplotlib (report_pdf.py), which is installed anyway. Part of `make report`; tests/test_report.py.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import report_figures as shapes
import report_targets as goals
from findings import read_summary
from report_seeds import LEAST_SEEDS, begun, is_share, same_sign

from hsa_ultralong.baselines.twins import rival_parameters
from hsa_ultralong.eval.plots import MARKS, human_tokens, plt, save, token_axis
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.strict_json import read_json
from hsa_ultralong.models.accounting import count_parameters
from hsa_ultralong.recipes import recipe
from hsa_ultralong.recipes.findings import FINDINGS, Finding
from hsa_ultralong.train import apply_overrides
from hsa_ultralong.train.twins import rival_of

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path("docs/report.md")
_NOT_YET = "*Not run yet.*"
_BLOCK = re.compile(r"(<!-- begin ([a-z_]+) -->\n).*?(<!-- end \2 -->)", re.S)
# task -> how a table and a panel call it
_TITLES = {
    "s_niah": "hidden sentences answered exactly, %",
    "s_niah_authors": "S-NIAH in the authors' protocol, %",
    "mq_authors": "MQ-NIAH in the authors' protocol, %",
    "vt_authors": "variable tracking in the authors' protocol, %",
    "niah_single_2": "RULER's one fact, %",
    "niah_multiquery": "RULER's several facts, %",
    "vt": "RULER's variable tracking, %",
    "ppl_last_512": "perplexity of the last 512 tokens",
    "training": "held-out questions at the end of training answered exactly, %",
}
# how the authors' and RULER's tests are asked
_SETTINGS = {
    "memory": "Tests are asked of a memory that has read the text (`--setting memory`).",
    "rebuild": "Tests are asked of a memory that has read the text anew for each question (`--setting rebuild`), as "
    "memories of one of the runs cannot be laid together.",
}
_DIRECTIONS = {"fwd": "Forward", "fwd_bwd": "Forward and backward"}
_AUTHORS = ("s_niah_authors", "mq_authors", "vt_authors")
_CLAIMED = ("s_niah", *_AUTHORS, "ppl_last_512")
# seeds that two runs share -> how it is said that they are too few
_HAVE = {1: "no two have more than one", 2: "there are two"}
_HOW = {"teacher": ", forced", "mentions": ", mentioned", "mentions_all": ", mentioned"}
_LENGTH_TASKS = ("s_niah", "mk_niah", "s_niah_authors", "mq_authors", "vt_authors", "niah_single_2", "vt")
Records = list[dict[str, Any]]
# figure -> what draws it there
Figures = dict[Path, Callable[[Path], None]]


def pooled(records: Records) -> Records:
    """Over seeds: the mean, from the lowest to the highest end of the interval of any seed, as samples of one run say
    nothing of another; `seeds` holds the value of each seed that there is, None where this one was not measured."""
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = defaultdict(dict)
    for record in records:
        key = tuple(record.get(field) for field in ("variant", "task", "metric", "length", "depth"))
        groups[key][record["seed"]] = record
    every = sorted({record["seed"] for record in records})
    found = []
    for by_seed in groups.values():
        same = list(by_seed.values())
        values = [by_seed[seed]["value"] if seed in by_seed else None for seed in every]
        row = {**same[0], "value": sum(r["value"] for r in same) / len(same), "seeds": values}
        # a cell of depths, and one stretch of text, has no interval
        known = [r for r in same if r.get("ci_low") is not None]
        if same[0].get("samples"):
            row["samples"] = sum(r["samples"] for r in same)
            row["ci_low"] = min((r["ci_low"] for r in known), default=None)
            row["ci_high"] = max((r["ci_high"] for r in known), default=None)
        found.append(row)
    return found


def cell(record: dict[str, Any] | None) -> str:
    """A value with its interval, and in brackets that of each seed where there are several, "-" for none."""
    if record is None:
        return ""

    def show(value: float | None) -> str:
        if value is None:
            return "-"
        # halves go up
        return f"{100 * value + 1e-9:.0f}" if is_share(record) else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    text = show(record["value"])
    if record.get("ci_low") is not None:
        text += f" ({show(record['ci_low'])}-{show(record['ci_high'])})"
    seeds = record.get("seeds", [])
    return text + (f" [{', '.join(map(show, seeds))}]" if len(seeds) > 1 else "")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def by_length(records: Records, column: str) -> str:
    """A table of names (their field is `column`) by length; every name has a row."""
    lengths = sorted({record["length"] or 0 for record in records})
    known = {(record[column], record["length"] or 0): record for record in records}
    names = dict.fromkeys(record[column] for record in records)
    head = [column, *(human_tokens(length) if length else "" for length in lengths)]
    return table(head, [[name, *(cell(known.get((name, length))) for length in lengths)] for name in names])


def shown(records: Records) -> dict[str, Records]:
    """Records of a finding that are shown, by task, without cells of depth."""
    tasks: dict[str, Records] = defaultdict(list)
    for record in pooled(records):
        if record["depth"] is None and (record["task"] != "training" or record["metric"] == "needle_accuracy"):
            tasks[record["task"]].append(record)
    order = [*_TITLES]
    return dict(sorted(tasks.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def codes(settings: Sequence[str]) -> str:
    return ", ".join(f"`{setting}`" for setting in settings)


def parameters(finding: Finding, variant: str) -> str:
    """Of the model of a run, in millions."""
    config = apply_overrides(recipe("findings"), finding.settings(variant))
    rival = rival_of(config, config.shape())
    number = count_parameters(config.shape()).total if rival is None else rival_parameters(rival)
    return f"{number / 1e6:.2f}M"


def finding_block(root: Path, figures: Figures, name: str) -> str:
    """Question, claim, runs, and what was measured of a finding."""
    finding, folder = FINDINGS[name], Path("results/findings") / name
    runs = [[f"`{one}`", codes(own) or "nothing", parameters(finding, one)] for one, own in finding.variants.items()]
    parts = [f"**{finding.question}**", f"The paper: {finding.claim}", f"Here: {finding.note}"]
    if finding.common:
        parts.append(f"All runs have {codes(finding.common)}.")
    parts.append(table(["run", "differs from the recipe by", "parameters"], runs))
    summary = read_summary(root / folder)
    if not summary:
        return "\n\n".join([*parts, _NOT_YET])
    meta, tasks = summary["meta"], shown(summary["records"])
    variants = list(finding.variants)
    figures[root / folder / "figure.png"] = partial(draw_finding, tasks, variants)
    parts.append(f"![{name} by length](../{folder}/figure.png)")
    if any(task in tasks for task in _AUTHORS):
        parts.append(_SETTINGS[finding.setting])
    for task, records in tasks.items():
        if task in _TITLES:
            parts.append(f"{_capital(_TITLES[task])}:{_by_variant(records, len(variants))}")
    if short := {task: records for task, records in tasks.items() if task not in _TITLES}:
        known = {(record["variant"], task): record for task, records in short.items() for record in records}
        rows = [[one, *(cell(known.get((one, task))) for task in short)] for one in variants]
        parts.append(f"Short tasks, % (wikitext2: perplexity of a word):\n\n{table(['variant', *short], rows)}")
    parts += [begun(summary["records"], variants), differences(tasks, variants), same_sign(tasks, variants, _TITLES)]
    missing = [one for one in finding.variants if one not in {record["variant"] for record in summary["records"]}]
    parts.append(
        f"{_origins(summary)}; {', '.join(meta['hardware'])}; "
        f"[numbers and configurations](../{folder}/summary.json.xz)."
        + (f" Not run yet: {', '.join(missing)}." if missing else "")
    )
    cells = [record for record in pooled(summary["records"]) if record["depth"] is not None]
    if name == "effective_length" and cells:
        figures[root / folder / "depths.png"] = partial(draw_depths, cells, variants)
        parts.append(f"![Depth by length](../{folder}/depths.png)")
    return "\n\n".join(part for part in parts if part)


def _by_variant(records: Records, count: int) -> str:
    """A table of runs by length; what no run ever answers is said in a line."""
    if any(record["value"] or not record.get("samples") for record in records):
        return f"\n\n{by_length(records, 'variant')}"
    shortest, longest = (human_tokens(pick(record["length"] for record in records)) for pick in (min, max))
    asked = min(record["samples"] for record in records)
    runs = dict.fromkeys(record["variant"] for record in records)
    who = "every run" if len(runs) == count else " and ".join(f"`{run}`" for run in runs)
    return f" 0 in {who} at every length, {shortest} to {longest}, of at least {asked} questions each."


def _origins(summary: dict[str, Any]) -> str:
    """Seeds by commit, by how they were trained, and by the commit that asked; which runs, where a seed has not all."""
    groups: dict[tuple[int, str, bool, str], list[str]] = defaultdict(list)
    for run, source in summary["meta"]["runs"].items():
        variant, _, seed = run.rpartition("-")
        has_graphs = summary["configs"][run].get("parallel", {}).get("cuda_graphs", False)
        asked = " and ".join(commit[:7] for commit in source.get("asked", ()))
        groups[int(seed), source["commit"][:7], has_graphs, asked].append(variant)
    most = len({run.rpartition("-")[0] for run in summary["meta"]["runs"]})
    said = []
    for (seed, commit, has_graphs, asked), runs in sorted(groups.items()):
        own = "" if len(runs) == most else f" of {codes(runs)}"
        how = f"{commit}, {'by' if has_graphs else 'without'} CUDA graphs" + (f", asked at {asked}" if asked else "")
        said.append(f"Seed {seed}{own}: {how}")
    return "; ".join(said)


def differences(tasks: dict[str, Records], variants: Sequence[str]) -> str:
    """What may be claimed: where runs differ from the first with intervals apart and at least three seeds that both
    have, all of which agree."""
    found, most = [], 1
    for task in _CLAIMED:
        known = {(record["variant"], record["length"]): record for record in tasks.get(task, ())}
        for variant in variants[1:]:
            places: dict[str, list[str]] = {"above": [], "below": []}
            for length in sorted({record["length"] for record in tasks.get(task, ())}):
                first, other = known.get((variants[0], length)), known.get((variant, length))
                if first is None or other is None or None in (first["ci_low"], other["ci_low"]):
                    continue
                both = [pair for pair in zip(first["seeds"], other["seeds"], strict=True) if None not in pair]
                most = max(most, len(both))
                if len(both) < LEAST_SEEDS:
                    continue
                if other["ci_low"] > first["ci_high"] and all(two > one for one, two in both):
                    places["above"].append(human_tokens(length))
                if other["ci_high"] < first["ci_low"] and all(two < one for one, two in both):
                    places["below"].append(human_tokens(length))
            found += [
                f"- {_TITLES[task]}: `{variant}` {side} `{variants[0]}` at {', '.join(at)}"
                for side, at in places.items()
                if at
            ]
    if most < LEAST_SEEDS:
        return f"No difference is claimed: that takes three seeds of both runs, and {_HAVE[most]}."
    if not found:
        return "No run differs from the first one with intervals apart and all seeds agreeing."
    return "Differences, intervals apart and all seeds agreeing:\n\n" + "\n".join(found)


def draw_finding(tasks: dict[str, Records], variants: Sequence[str], path: Path) -> None:
    """A panel for every task with lengths that any run answers, a line a variant with its interval."""
    panels = [task for task in _TITLES if any(record["value"] for record in tasks.get(task, ()))]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    size = 4.2 * columns, 3.4 * rows
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, task in zip(grid.flat, panels, strict=False):
        for number, variant in enumerate(variants):
            own = sorted((r for r in tasks[task] if r["variant"] == variant), key=lambda r: r["length"])
            if own:
                scale = 100 if is_share(own[0]) else 1
                x, y = [r["length"] for r in own], [scale * r["value"] for r in own]
                gaps = None
                if own[0].get("samples"):  # what has no interval has none to draw
                    ends = [[r["value"] if r[side] is None else r[side] for r in own] for side in ("ci_low", "ci_high")]
                    gaps = [[scale * abs(r["value"] - end) for r, end in zip(own, one, strict=True)] for one in ends]
                mark = MARKS[number % len(MARKS)]
                axes.errorbar(x, y, gaps, label=variant, color=f"C{number}", marker=mark, ms=3, capsize=2, lw=1)
        token_axis(axes, sorted({record["length"] for record in tasks[task]}))
        axes.set_title(_TITLES[task], fontsize=8)
        if task != "ppl_last_512":
            axes.set_ylim(-3, 103)
    grid.flat[0].legend(fontsize=7)
    save(figure, path, 90)


def draw_depths(cells: Records, variants: Sequence[str], path: Path) -> None:
    """A map of depth by length for every variant and task that was measured."""
    maps: dict[str, shapes.Map] = {}
    tasks = list(dict.fromkeys(cell["task"] for cell in cells))
    for record in sorted(
        cells, key=lambda cell: (tasks.index(cell["task"]), variants.index(cell["variant"]), cell["length"])
    ):
        name = f"{record['variant']}, {record['task']}"
        maps.setdefault(name, {}).setdefault(record["length"], {})[int(10 * record["depth"])] = record["value"]
    shapes.draw_maps(maps, path, max(1, len({cell["variant"] for cell in cells})))


def lengths_block(root: Path) -> str:
    """Needles and the authors' tests of every study by length: (a), and beyond."""
    found: dict[str, list[tuple[str, Records]]] = defaultdict(list)
    for path in sorted((root / "results").glob("*/summary.json")):
        content = read_json(path)
        # with room for a sentence, what counts is whether it holds the value
        in_sentences = bool(content.get("meta", {}).get("settings", {}).get("answer_tokens"))
        records = [
            record for record in content["records"]
            if record.get("task") in _LENGTH_TASKS and record.get("depth") is None and "value" in record
            and record.get("metric") not in ("auroc", "teacher_agrees")
            and (not in_sentences or record["metric"].startswith("mentions"))
        ]  # fmt: skip
        for task in _LENGTH_TASKS:
            own = [record for record in records if record["task"] == task]
            # the first score is the task's own; a study of several forms of a memory has its first here
            own = list({record["length"]: record for record in reversed(own)}.values())
            if own:
                found[task].append((path.parent.name, own))
    parts = []
    for task in _LENGTH_TASKS:
        # what is earlier stands below
        studies = sorted(found[task], key=lambda one: goals.EARLIER in goals.weights_of(one[0]))
        rows = [
            {**record, "metric": metric, "study": study_name(root, name) + _HOW.get(metric, "")}
            for name, own in studies
            for record in own
            for metric in [record.get("metric", "exact")]
        ]
        if rows:
            parts.append(f"`{task}`, % with 95% intervals:\n\n{by_length(rows, 'study')}")
    return "\n\n".join(parts) or _NOT_YET


def study_name(root: Path, name: str) -> str:
    """A study with its weights and commit."""
    return f"[{name}](../results/{name}), {goals.weights_of(name)} ({goals.commit_of(root, name)})"


def targets_block(root: Path) -> str:
    rows = goals.target_rows(root)
    head = ["target", "needed", "measured, 95% interval", "samples each", "met", "weights", "file (commit)"]
    return table(head, rows) if rows else _NOT_YET


def models_block(root: Path) -> str:
    rows = goals.compared_rows(root)
    return table(["", *goals.MODELS], [["model", *goals.MODELS.values()], *rows]) if rows else _NOT_YET


def misses_block(root: Path) -> str:
    rows = goals.miss_rows(root)
    head = ["task", "samples", "right", "retrieval", "fusion", "reading", "margin", "most frequent wrong answer"]
    return table(head, rows) if rows else _NOT_YET


def operators_block(root: Path, figures: Figures) -> str:
    """Time of retrieval and HSA beside full attention, by length: (g)."""
    parts = []
    for path in sorted((root / "benchmarks" / "results").glob("ops-*.json")):
        content = read_json(path)
        times, meta, name = shapes.operator_times(content["records"]), content["meta"], path.relative_to(root)
        figure = root / "docs" / "images" / f"report-{path.stem}.png"
        panels = {f"{words}, ms": shapes.operator_curves(times, direction) for direction, words in _DIRECTIONS.items()}
        figures[figure] = partial(shapes.draw_lines, panels, logarithmic=list(panels))
        card = f"{meta['hardware']}, CUDA graphs" if meta.get("graphs") else meta["hardware"]
        where = f"{card}, commit {meta['commit'][:7]} of {meta['date'][:10]}, K = {shapes.TOPK}"
        parts.append(f"{where} ([numbers](../{name})).")
        parts.append(f"![Operators by length, {card}](images/{figure.name})")
        for direction, words in _DIRECTIONS.items():
            columns, rows = ["chunk_topk", *(f"hsa {lists}" for lists in shapes.LISTS), "full_attention"], []
            for length in sorted({key[2] for key in times if key[1] == direction}):
                ms = [times.get((op, direction, length)) for op in columns]
                shares = [shapes.share_of_full(times, direction, length, "shared")]
                shares += [
                    shapes.share_of_full(times, direction, length, lists, "chunk_topk") for lists in shapes.LISTS
                ]
                row = [*("" if value is None else f"{value:.2f}" for value in ms)]
                rows.append([human_tokens(length), *row, *("" if one is None else f"{one:.2f}" for one in shares)])
            head = ["tokens", "retrieval", *(f"HSA, {lists}" for lists in shapes.LISTS), "full"]
            head += ["HSA / full, shared", *(f"both / full, {lists}" for lists in shapes.LISTS)]
            parts.append(f"{words}, ms, and in the time of full attention:\n\n{table(head, rows)}")
    return "\n\n".join(parts) or _NOT_YET


def figures_block(root: Path, figures: Figures, name: str) -> str:
    """One of the figures that take several files."""
    found = shapes.FIGURES[name](root)
    if found is None:
        return _NOT_YET
    words, draw = found
    path = f"images/report{'' if name == 'summary' else '-' + name}.png"
    figures[root / "docs" / path] = draw
    return f"![{words}]({path})"


def blocks(root: Path, figures: Figures) -> dict[str, Callable[[], str]]:
    """What makes the content of each block, and puts its figures among `figures`."""
    own: dict[str, Callable[[], str]] = {name: partial(finding_block, root, figures, name) for name in FINDINGS}
    own |= {name: partial(figures_block, root, figures, name) for name in shapes.FIGURES}
    own |= {"operators": partial(operators_block, root, figures), "lengths": partial(lengths_block, root)}
    own |= {"targets": partial(targets_block, root), "models": partial(models_block, root)}
    return {**own, "misses": partial(misses_block, root)}


def render(text: str, root: Path) -> tuple[str, Figures]:
    """The page with all its blocks made anew, and what draws its figures.

    Raises:
        ValueError: a block is unknown, or a finding has none.
    """
    figures: Figures = {}
    makers = blocks(root, figures)
    names = [match[2] for match in _BLOCK.finditer(text)]
    if sorted(names) != sorted(makers):
        wrong = sorted({*names} ^ {*makers})
        raise ValueError(f"{PAGE} must have each block once; missing, unknown or twice: {', '.join(wrong) or names}")
    return _BLOCK.sub(lambda match: f"{match[1]}{makers[match[2]]()}\n{match[3]}", text), figures


def main() -> None:
    from report_pdf import print_pdf

    page = ROOT / PAGE
    text, figures = render(page.read_text(encoding="utf-8"), ROOT)
    for path, draw in figures.items():
        draw(path)
    write_whole(page, text)
    print_pdf(text, page.parent, page.with_suffix(".pdf"))
    print(f"written {PAGE}, {PAGE.with_suffix('.pdf')} and {len(figures)} figures")


if __name__ == "__main__":
    main()
