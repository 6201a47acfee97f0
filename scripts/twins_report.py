"""Join what a comparison of twins measured into results/twins: summary.json.xz, summary.md and recall.png.

    python scripts/twins_report.py FOLDER [-o results/twins]

FOLDER holds, for every twin and seed, run-NAME-SEED (of `hsa train`: summary.json) and folders of `hsa eval` called
WHAT-NAME-SEED (summary.json; WHAT may have a word more after "_", for other lengths: eval_8k); speed-NAME-SEED, a few
steps of `hsa train` with nothing else on the card; or all these in runs.jsonl.xz, as `publish.py --together` writes
them; and reading*/reading.json of `hsa bench reading`. Scores of several seeds are pooled: the mean with the 95% Wilson
interval of all samples, and the value of every seed beside it. What was not measured has no row. A stage that was cut
off, so ended before that of other runs, is named in "cut_off" and is not pooled. tests/test_twins_report.py.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.plots import human_tokens, plt, save
from hsa_ultralong.eval.stored_runs import records_together, runs_together
from hsa_ultralong.eval.suite_summary import headlines
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.packed import pack
from hsa_ultralong.files.strict_json import as_lines, read_json

# WHAT-NAME-SEED; names of twins have no "-"
_FOLDER = re.compile(r"(?P<what>[a-z0-9_]+)-(?P<twin>[a-z0-9_]+)-(?P<seed>\d+)")
# of runs of hsa train, and of those few steps that tell speed alone
_TOLD = {"run": ("loss", "tokens_per_s", "peak_bytes", "needle_accuracy"), "speed": ("tokens_per_s", "peak_bytes")}
Key = tuple[str, str, str, int]


def collect(folder: Path) -> dict[str, Any]:
    """{"meta", "records"} of all that lies in the folder."""
    values: dict[Key, list[dict[str, Any]]] = defaultdict(list)
    sources, hardware = {}, set()
    runs = runs_together(folder)
    records_together(folder, runs)  # refused if they do not fit
    contents = {name: files["summary.json"] for name, files in runs.items()}
    contents |= {path.parent.name: read_json(path) for path in folder.glob("*/summary.json")}
    contents = {name: contents[name] for name in sorted(contents) if _FOLDER.fullmatch(name)}
    cut_off = _cut_off({name: content["records"] for name, content in contents.items() if name.startswith("run-")})
    for name, content in contents.items():
        found = _FOLDER.fullmatch(name)
        assert found is not None
        what, twin, seed = found["what"].partition("_")[0], found["twin"], int(found["seed"])
        sources[name] = {key: content["meta"].get(key) for key in ("command", "commit", "date")}
        hardware.add(content["meta"].get("hardware"))
        for record in content["records"]:
            if record.get("depth") is not None or record["metric"] not in _TOLD.get(what, (record["metric"],)):
                continue
            if record.get("stage") in cut_off.get(name, {}):
                continue
            length = record.get("length") or record.get("tokens") or record.get("context") or 0
            task = record.get("task") or record.get("stage") or ""
            values[f"{what} {task}".strip(), record["metric"], twin, length].append({**record, "seed": seed})
    records = [_pooled(key, found) for key, found in values.items()]
    for path in sorted(folder.glob("reading*/reading.json")):
        content = read_json(path)
        hardware.add(content["meta"].get("hardware"))
        sources[path.parent.name] = {key: content["meta"].get(key) for key in ("command", "commit", "date")}
        for record in content["records"]:
            twin = record["preset"].rsplit("-", 1)[0]
            row = {"task": "reading", "metric": record["metric"], "twin": twin, "length": record["tokens"]}
            records.append({**row, "value": record["value"], "seeds": {}})
    if not records:
        raise ValueError(f"{folder} holds no folder of twins such as run-hsa-0/summary.json")
    meta = {"hardware": sorted(filter(None, hardware)), "cut_off": cut_off, "sources": sources}
    return {"meta": meta, "records": records}


def _cut_off(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, list[int]]]:
    """Run -> stage -> [last step, last step of the longest run]: stages that ended early."""
    steps = {
        name: {r["stage"]: max(s["step"] for s in found if s.get("stage") == r["stage"]) for r in found if "step" in r}
        for name, found in runs.items()
    }
    longest = {stage: max(own.get(stage, 0) for own in steps.values()) for own in steps.values() for stage in own}
    return {
        name: early
        for name, own in steps.items()
        if (early := {stage: [own.get(stage, 0), most] for stage, most in longest.items() if own.get(stage, 0) < most})
    }


def _pooled(key: Key, found: list[dict[str, Any]]) -> dict[str, Any]:
    task, metric, twin, length = key
    value = sum(r["value"] for r in found) / len(found)
    seeds = {str(r["seed"]): r["value"] for r in sorted(found, key=lambda r: r["seed"])}
    row: dict[str, Any] = {"task": task, "metric": metric, "twin": twin, "length": length, "value": value}
    if "ci_low" in found[0]:
        samples = sum(r["samples"] for r in found)
        if metric.endswith("perplexity"):
            # one stretch of text has no interval
            known = [r for r in found if r["ci_low"] is not None]
            low, high = (
                min((r["ci_low"] for r in known), default=None),
                max((r["ci_high"] for r in known), default=None),
            )
        else:
            low, high = wilson_interval(sum(r["value"] * r["samples"] for r in found), samples)
        row |= {"samples": samples, "ci_low": low, "ci_high": high}
    return {**row, "seeds": seeds}


def tables(records: list[dict[str, Any]], cut_off: dict[str, dict[str, list[int]]]) -> str:
    """A Markdown table for every task and metric, twins by length."""
    parts = []
    for task, metric in dict.fromkeys((r["task"], r["metric"]) for r in records):
        rows = [r for r in records if (r["task"], r["metric"]) == (task, metric)]
        lengths = sorted({r["length"] for r in rows})
        twins = list(dict.fromkeys(r["twin"] for r in rows))
        known = {(r["twin"], r["length"]): r for r in rows}
        head = " | ".join(human_tokens(n) if n else "" for n in lengths)
        lines = [f"## {task}: {metric}", "", f"| twin | {head} |", "|---|" + "---|" * len(lengths)]
        for twin in twins:
            lines.append(f"| {twin} | " + " | ".join(_cell(known.get((twin, n))) for n in lengths) + " |")
        parts.append("\n".join(lines))
    note = "Shares in percent with 95% intervals; where there are several seeds, the value of each in brackets."
    lines = [
        f"- {name}: {step} of {steps} steps of `{stage}`"
        for name, stages in cut_off.items()
        for stage, (step, steps) in stages.items()
    ]
    early = ["Cut off, and so not in the tables of that stage:\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join(["# Twins", note, *early, *parts]) + "\n"


def _cell(record: dict[str, Any] | None) -> str:
    if record is None:
        return ""
    is_share = "ci_low" in record and not record["metric"].endswith("perplexity")
    is_share |= record["metric"] == "needle_accuracy"

    def show(value: float) -> str:
        return f"{100 * value:.0f}" if is_share else f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"

    text = show(record["value"])
    if record.get("ci_low") is not None:
        text += f" ({show(record['ci_low'])}-{show(record['ci_high'])})"
    return text + (f" [{', '.join(map(show, record['seeds'].values()))}]" if len(record["seeds"]) > 1 else "")


def draw(records: list[dict[str, Any]], path: Path) -> None:
    """A panel for training's own needles after its last stage and every task of recall and RULER.

    A line a twin, with its interval where there is one, against the length."""
    rows = [r for r in records if "ci_low" in r and r["task"] != "ppl" and not r["metric"].endswith("perplexity")]
    rows = [r for r in headlines(rows) if r["metric"] != "auroc"]
    probes = [r for r in records if r["metric"] == "needle_accuracy"]
    stages = list(dict.fromkeys(r["task"] for r in probes))
    rows = [r for r in probes if r["task"] == stages[-1]] + rows
    tasks = list(dict.fromkeys(r["task"] for r in rows))
    if not tasks:
        return
    wide = min(4, len(tasks))
    high = -(-len(tasks) // wide)
    figure, panels = plt.subplots(
        high, wide, figsize=(3.2 * wide, 2.5 * high + 0.4), squeeze=False, sharey=True, layout="constrained"
    )
    twins = list(dict.fromkeys(r["twin"] for r in rows))
    for axes, task in zip(panels.flat, tasks, strict=False):
        for number, twin in enumerate(twins):
            own = sorted((r for r in rows if (r["task"], r["twin"]) == (task, twin)), key=lambda r: r["length"])
            if own:
                x, y = [r["length"] for r in own], [r["value"] for r in own]
                # rounding may put an end of the interval on the wrong side by 1e-17
                gaps = [[max(0.0, r["value"] - r.get("ci_low", r["value"])) for r in own],
                        [max(0.0, r.get("ci_high", r["value"]) - r["value"]) for r in own]]  # fmt: skip
                axes.errorbar(x, y, gaps, label=twin, color=f"C{number}", marker=".", capsize=2, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths := sorted({r["length"] for r in rows if r["task"] == task}))
        axes.set_xticklabels([human_tokens(n) for n in lengths], fontsize=6, rotation=45)
        axes.set_ylim(-0.03, 1.03)
        is_probe = task.startswith("run ")
        axes.set_title("needles of training, at its end" if is_probe else task.removeprefix("eval "), fontsize=8)
        axes.set_xlabel("tokens", fontsize=7)
    for axes in panels[:, 0]:
        axes.set_ylabel("answered", fontsize=8)
    for axes in panels.flat[len(tasks) :]:
        axes.axis("off")
    handles = {label: h for axes in panels.flat for h, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize=7)
    save(figure, path, 130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("results/twins"))
    arguments = parser.parse_args()
    found = collect(arguments.folder)
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.output / "summary.json.xz", pack(as_lines(found).encode()))
    write_whole(arguments.output / "summary.md", tables(found["records"], found["meta"]["cut_off"]))
    draw(found["records"], arguments.output / "recall.png")


if __name__ == "__main__":
    main()
