"""Every committed figure and the committed file it is drawn from: `make report` redraws them all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hsa_ultralong.bench.memory_report import plot_memory
from hsa_ultralong.bench.ops_report import plot_ops, read_benchmark
from hsa_ultralong.bench.serve_report import plot_serve
from hsa_ultralong.bench.training_report import has_points, plot_training_speed
from hsa_ultralong.eval.comparisons import compare_needles, compare_training
from hsa_ultralong.eval.plots import plot_needles, plot_training, plot_tuning, read_jsonl, read_log, read_tuning
from hsa_ultralong.eval.suite_plots import draw_table
from hsa_ultralong.files.packed import SUFFIX, stored
from hsa_ultralong.files.strict_json import read_json

# suites of benchmarks/results and the kinds of their figures
BENCHMARKS = {"ops": "ops", "memory": "memory", "serve": "serve", "training": "training_speed"}

# source, figure, kind, title
FIGURES = (
    (
        "results/needles-nano/records.jsonl.xz",
        "docs/images/needles-nano.png",
        "needles",
        "nano: sentences hidden in Opticks",
    ),
    ("results/training-nano-facts/log.jsonl.xz", "docs/images/training-nano.png", "training", "nano: training"),
    (
        "results/smol-tuned/tuning.json",
        "docs/images/smol-tuned.png",
        "tuning",
        "SmolLM2-135M-Instruct with full attention, tuned on the questions",
    ),
    ("benchmarks/results/rivals/ops-h200.json", "docs/images/rivals.png", "ops", ""),
)

# sources, figure, title: drawn beside one another
COMPARISONS = (
    (
        (
            "results/needles-before-pool",
            "results/needles-unpooled",
            "results/needles-pooled",
            "results/needles-pooled-60-steps",
            "results/needles-averaged",
        ),
        "docs/images/pooled-memory.png",
        "nano and 21M tokens more (63M: 60 steps), whose rows share a memory of 1M tokens or do not",
    ),
    (
        ("results/training-adamw", "results/training-muon"),
        "docs/images/optimisers.png",
        "nano from scratch: AdamW and Muon",
    ),
    (
        (
            "results/training-smol-low-rank",
            "results/training-smol-all-weights",
            "results/training-smol-aligned",
            "results/training-smol-no-evidence",
            "results/training-smol-evidence-1",
        ),
        "docs/images/smol-recall.png",
        "SmolLM2-135M learns to use a memory; aligned: 8.2M tokens of alignment came before",
    ),
)


def draw(source: Path, figure: Path, kind: str, title: str) -> None:
    """Draw one figure from its file."""
    if not source.is_file():
        raise ValueError(f"{source} does not exist: nothing to draw {figure} from")
    if kind == "ops":
        plot_ops(read_benchmark(source), figure, title)
        return
    if kind == "memory":
        plot_memory(read_benchmark(source), figure)
        return
    if kind == "serve":
        plot_serve(read_benchmark(source), figure)
        return
    if kind == "training_speed":
        plot_training_speed(read_benchmark(source), figure)
        return
    if kind == "tuning":
        plot_tuning(read_tuning(source), figure, title)
        return
    if kind == "suite":
        records = read_json(source)["records"]
        draw_table(records, figure, f"{records[0]['model']}: score in percent, by task and length")
        return
    if kind == "needles":
        lines = _first_form(read_jsonl(source))
        if not all("correct" in line for line in lines):
            if (source.parent / "runs.jsonl.xz").is_file():
                raise ValueError(
                    f"{source.parent} holds several runs published together: draw one from a folder made of it by "
                    f"`python scripts/publish.py {source.parent}/RUN -o FOLDER`"
                )
            raise ValueError(
                f"{source} holds no hidden sentences; of a suite draw the folder, once its command wrote summary.json"
            )
        plot_needles(lines, figure, title)
        return
    plot_training(read_log(source), figure, title)


def _first_form(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a study of several forms of one memory, the first."""
    return [line for line in lines if line.get("form", "") == lines[0].get("form", "")]


def compare(sources: Sequence[Path], figure: Path, title: str, *, is_short: bool = False) -> None:
    """One figure of several needle studies (records.jsonl), or of several runs (log.jsonl), named by their folders.

    Args:
        is_short: loss and needles only.

    Raises:
        ValueError: for a mixture of both, for files of another kind, or for two of one name.
    """
    kinds = {source.name.removesuffix(SUFFIX) for source in sources}
    if kinds not in ({"records.jsonl"}, {"log.jsonl"}):
        raise ValueError("only runs (log.jsonl) or only reports of hidden sentences (records.jsonl) go into one figure")
    names = [source.resolve().parent.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError("the sources are told apart by the names of their folders, which must differ")
    read = read_jsonl if kinds == {"records.jsonl"} else read_log
    named = {_short(name): read(source) for name, source in zip(names, sources, strict=True)}
    if kinds == {"records.jsonl"}:
        compare_needles({name: _first_form(lines) for name, lines in named.items()}, figure, title)
    else:
        compare_training(named, figure, title, is_short=is_short)


def _short(name: str) -> str:
    """Of a folder of results/ what tells it from the others of its kind."""
    return name.removeprefix("needles-").removeprefix("training-").replace("-", " ")


def benchmark_figures(root: Path) -> list[tuple[str, str, str, str]]:
    """One figure beside each benchmarks/results/<suite>-<hardware>.json, in the form of FIGURES; titled by its meta.

    Records taken from the log of a run of training (training-moe-*.json) are no points of a figure.
    """
    return [
        (str(path.relative_to(root)), str(path.relative_to(root).with_suffix(".png")), kind, "")
        for suite, kind in BENCHMARKS.items()
        for path in sorted(root.glob(f"benchmarks/results/{suite}-*.json"))
        if kind != "training_speed" or has_points(read_benchmark(path))
    ]


def study_figures(root: Path) -> list[tuple[str, str, str, str]]:
    """needles.png in every results/needles-* that has one."""
    folders = sorted(path.parent.relative_to(root) for path in root.glob("results/needles-*/needles.png"))
    return [
        (
            str(stored(root / folder / "records.jsonl").relative_to(root)),
            f"{folder}/needles.png",
            "needles",
            f"Hidden sentences, {folder.name}",
        )
        for folder in folders
    ]


def suite_figures(root: Path) -> list[tuple[str, str, str, str]]:
    """scores.png in every folder of results/ that has one, in the form of FIGURES; titled by its records."""
    folders = sorted(path.parent.relative_to(root) for path in root.glob("results/*/scores.png"))
    return [(f"{folder}/summary.json", f"{folder}/scores.png", "suite", "") for folder in folders]


def all_figures(root: Path) -> list[tuple[str, str, str, str]]:
    """Every figure with one source."""
    return [*FIGURES, *study_figures(root), *suite_figures(root), *benchmark_figures(root)]


def draw_all(root: Path) -> list[Path]:
    """Redraw every figure of FIGURES, of studies, suites and benchmarks below `root`; returns the files written."""
    figures = all_figures(root)
    for source, figure, kind, title in figures:
        draw(root / source, root / figure, kind, title)
    for folders, figure, title in COMPARISONS:
        name = "records.jsonl" if "needles" in folders[0] else "log.jsonl"
        # the two optimisers shared a card
        compare([stored(root / folder / name) for folder in folders], root / figure, title, is_short=True)
    return [*(root / figure for _, figure, _, _ in figures), *(root / figure for _, figure, _ in COMPARISONS)]
