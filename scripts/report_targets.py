"""What the project set out to show, and what was measured: two blocks of docs/report.md, and the weights of a study.

Numbers come from results/ alone; targets and names of weights stand here. Called by report.py; tests/test_report.py.
"""

from __future__ import annotations

import json
import lzma
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hsa_ultralong.eval.intervals import wilson_interval
from hsa_ultralong.eval.plots import human_tokens
from hsa_ultralong.eval.suite_diagnosis import FUSION, READING, RETRIEVAL, RIGHT, diagnose
from hsa_ultralong.files.strict_json import read_json

M = 2**20
EARLIER = "nano before 2026-11-28"
# folder of results/ -> its weights; the first prefix that fits
WEIGHTS = {
    "needles-nano": "nano", "paper-nano": "nano", "ruler-nano": "nano", "recall-nano": "nano", "prompts-nano": "nano",
    "ppl-nano": "nano", "paper-mini": "mini of 2026-11-28", "needles-mini": "mini", "smol-": "smol",
    "smollm2-": "SmolLM2, the source of smol",
    "needles-stages": "the paper's five stages",
    "needles-pooled": f"{EARLIER}, pools", "needles-pool-": f"{EARLIER}, pools, notes",
    "needles-unpooled": f"{EARLIER}, no pools", "needles-averaged": f"{EARLIER}, pools, averaged",
    "needles-1g-averaged": f"{EARLIER}, pools, averaged", "needles-merged": "nano", "needles-forms": "nano",
    "needles-": EARLIER,
}  # fmt: skip
_FORMS = tuple(f"recall_form_{number:02}" for number in range(1, 13))


class Place(NamedTuple):
    """Where a number stands: of several tasks the mean. `words` stand before it in the table."""

    study: str
    tasks: tuple[str, ...]
    length: int
    metric: str | None = None
    words: str = ""


class Target(NamedTuple):
    """least: what each share or AUROC must reach; where there is none, `met` says it in words, or "in pairs" by the
    paired difference of the last place. samples: asked at least, or nothing is met yet."""

    what: str
    needed: str
    places: tuple[Place, ...]
    least: tuple[float, ...] = ()
    met: str = ""
    samples: int = 0


def _one(study: str, task: str, *lengths: int, metric: str | None = None) -> tuple[Place, ...]:
    return tuple(Place(study, (task,), length, metric) for length in lengths)


_PPL = _one("ppl-nano-paired", "ppl_last_4096", 8192, 2**16, 2**18, M, metric="perplexity")
TARGETS = (
    Target("S-NIAH, our own sentences, one at a time", "99% at 1M, 97.5% at 16M, 95% at 128M",
           (*_one("needles-nano-1m-depths", "s_niah", M), *_one("needles-nano-16m", "s_niah", 16 * M),
            *_one("needles-nano-64m", "s_niah", 64 * M), *_one("needles-nano-128m", "s_niah", 128 * M),
            *_one("needles-nano-256m", "s_niah", 256 * M)), (0.99, 0.975, 0.95, 0.95, 0.95)),
    Target("the same at 1G", "90% of 40", _one("needles-nano-1g", "s_niah", 1024 * M),
           (0.9,), samples=40),
    Target("S-NIAH, the authors' form, forced", "99% at 1M, 97.5% at 16M, 95% at 128M",
           (*_one("paper-nano-16m", "s_niah_authors", M, 16 * M, metric="teacher"),
            *_one("paper-nano-128m", "s_niah_authors", 128 * M, metric="teacher")), (0.99, 0.975, 0.95)),
    Target("the same at 1G, generated", "90% of 40", _one("needles-nano-1g-authors", "s_niah_authors", 1024 * M),
           (0.9,), samples=40),
    Target("MQ, forced as the authors do", "90% at 1M, 80% at 16M",
           _one("paper-nano-16m", "mq_authors", M, 16 * M, metric="teacher"), (0.9, 0.8)),
    Target("MQ, generated, both numbers and no other", "90% at 1M, 80% at 16M",
           _one("paper-nano-16m", "mq_authors", M, 16 * M, metric="in_order"), (0.9, 0.8)),
    Target("VT, forced as the authors do", "90% at 16M",
           _one("paper-nano-16m", "vt_authors", 16 * M, metric="teacher"), (0.9,)),
    Target("sentence forms never trained, mean of twelve", "90% at 64K",
           (Place("recall-nano", _FORMS, 2**16, "exact"),), (0.9,)),
    Target("100 similar sentences together", "80", (*_one("needles-nano-together", "mk_niah", 2**16),
           *_one("needles-nano-together-1m", "mk_niah", M)), (0.8, 0.8)),
    Target("short prompts, a fact of a word and two digits, filler of Opticks", "95% from 16 to 48",
           _one("prompts-nano-short", "recall_prompt_short", 16, 32, 48, metric="begins"), (0.95,) * 3),
    Target("short prompts, a fact of seven digits, filler of the training text", "95% from 64 to 128",
           _one("prompts-nano", "recall_prompt", 64, 96, 128, metric="begins"), (0.95,) * 3),
    Target("certainty, AUROC", ".97", (
        *_one("recall-nano-short", "recall_absent", 4096, metric="auroc"),
        *_one("recall-nano", "recall_absent", 2**16, metric="auroc"),
        *_one("recall-nano-1m", "recall_absent", M, metric="auroc"),
        *_one("recall-nano-16m", "recall_absent", 16 * M, metric="auroc")), (0.97,) * 4),
    Target("perplexity of books, the same last 4,096 tokens", "flat or falling to 1M", _PPL,
           met="in pairs"),
)  # fmt: skip
# models that one can load or make -> parameters and text seen; docs/training.md and the cards say the rest
MODELS = {
    "nano": "9.2M parameters; 516M tokens, 70 to 78% synthetic rows; 14 card-minutes beside other runs",
    "mini": "31M; 293M tokens, the same rows; 8.4 minutes, alone on its card; its weights do not ship",
    "smol": "144M, SmolLM2-135M-Instruct with a memory; its card says what trained",
}
_KINDS = tuple(f"recall_value_{kind}" for kind in ("names", "cities", "times", "dates", "digits14", "words2"))
_ASKED = {"nano": "recall-nano", "mini": "recall-mini", "smol": "smol-recall-64k"}
# what is asked -> model -> where its number stands
COMPARED: dict[str, dict[str, Place]] = {
    f"{words}, {human_tokens(length)}": {
        model: Place(study, tasks, length, metric) for model, (study, metric) in own.items()
    }
    for words, tasks, length, own in (
        *(
            (f"{what}, {how}", tasks, length, {model: (study, metric) for model, study in own.items()})
            for what, tasks, length, own in (
                ("twelve forms never trained", _FORMS, 2**16, _ASKED),
                ("twelve forms never trained", _FORMS, M, {"nano": "recall-nano-1m", "smol": "smol-recall-1m"}),
                ("six kinds of values in the trained form", _KINDS, 2**16, _ASKED),
                ("one of 64 alike", ("recall_similar_64",), 2**16, _ASKED),
            )
            for metric, how in (("exact", "nothing else"), ("mentions", "mentioned"))
        ),
        ("S-NIAH, our own sentences", ("s_niah",), M,
         {"nano": ("needles-nano-1m-depths", None), "mini": ("needles-mini-1m", None)}),
        ("S-NIAH, the authors' form, forced", ("s_niah_authors",), M,
         {"nano": ("paper-nano-16m", "teacher"), "mini": ("paper-mini-16m", "teacher")}),
        ("S-NIAH, the authors' form, forced", ("s_niah_authors",), 16 * M,
         {"nano": ("paper-nano-16m", "teacher"), "mini": ("paper-mini-16m", "teacher")}),
        ("RULER's niah_single_2", ("niah_single_2",), 2**16,
         {"nano": ("ruler-nano", None), "smol": ("smol-niah", None)}),
        ("RULER's niah_single_2", ("niah_single_2",), M,
         {"nano": ("ruler-nano-1m", None), "smol": ("smol-niah", None)}),
        ("RULER's niah_single_2", ("niah_single_2",), 16 * M,
         {"nano": ("ruler-nano-16m", None), "smol": ("smol-niah", None)}),
        ("certainty, AUROC", ("recall_absent",), 2**16,
         {"nano": ("recall-nano", "auroc"), "mini": ("recall-mini", "auroc"), "smol": ("smol-recall-64k", "auroc")}),
    )
}  # fmt: skip
# task -> its studies, of which misses are counted
MISSES = {
    "s_niah_authors": ("paper-nano", "paper-nano-16m", "paper-nano-128m"), "mq_authors": ("paper-nano-16m",),
    "vt_authors": ("paper-nano-16m",),
    "recall_form": ("recall-nano", "recall-nano-1m", "recall-nano-16m", "recall-nano-128m"),
}  # fmt: skip


def weights_of(study: str) -> str:
    """Raises: ValueError: a study whose weights have no name here."""
    for prefix, name in WEIGHTS.items():
        if study.startswith(prefix):
            return name
    raise ValueError(f"scripts/report_targets.py does not say which weights results/{study} measured")


def commit_of(root: Path, study: str) -> str:
    return str(read_json(root / "results" / study / "summary.json")["meta"]["commit"])[:7]


def measured(root: Path, place: Place) -> dict[str, Any] | None:
    """The number, with Wilson's interval where it is the mean of several tasks; None without a file."""
    path = root / "results" / place.study / "summary.json"
    if not path.is_file():
        return None
    found = [
        r for r in read_json(path)["records"]
        if r.get("task") in place.tasks and place.length in (r.get("length"), r.get("tokens"))
        and r.get("depth") is None and place.metric in (None, r.get("metric"))
    ]  # fmt: skip
    if len(found) != len(place.tasks):
        return None
    if len(found) == 1:
        return dict(found[0])
    right, samples = sum(r["value"] * r["samples"] for r in found), sum(r["samples"] for r in found)
    low, high = wilson_interval(right, samples)
    return {**found[0], "value": right / samples, "samples": samples, "ci_low": low, "ci_high": high}


def shown(record: dict[str, Any]) -> str:
    """A value with its interval: shares in percent, perplexities and AUROC as they are."""
    metric = record.get("metric", "")
    form, scale = ("{:.3f}", 1) if metric == "auroc" else ("{:.1f}", 1 if metric == "perplexity" else 100)
    value, low, high = (form.format(scale * record[name]) for name in ("value", "ci_low", "ci_high"))
    return f"{value} ({low}-{high})"


def paired(root: Path, place: Place) -> str:
    """Whether a perplexity is flat or falling: its difference from the shortest length of the same ends."""
    pairs = read_json(root / "results" / place.study / "summary.json")["pairs"]
    (found,) = (r for r in pairs if r["task"] in place.tasks and r["length"] == place.length)
    more, low, high = (100 * math.expm1(found[name]) for name in ("value", "ci_low", "ci_high"))
    words = (
        f"{more:.1f}% ({low:.1f}-{high:.1f}) more at {human_tokens(place.length)} than at {human_tokens(found['over'])}"
    )
    return f"{'yes' if low <= 0 else 'no'}: {words}, in pairs"


def target_rows(root: Path) -> list[list[str]]:
    """A row for every target of which something was measured."""
    rows = []
    for target in TARGETS:
        found = [(place, record) for place in target.places if (record := measured(root, place))]
        if not found:
            continue
        cells = [f"{place.words}{human_tokens(place.length)}: {shown(record)}" for place, record in found]
        samples = sorted({record["samples"] for _, record in found})
        studies = dict.fromkeys(place.study for place, _ in found)
        weights = dict.fromkeys(weights_of(study) for study in studies)
        files = ", ".join(f"[{study}](../results/{study}) ({commit_of(root, study)})" for study in studies)
        reached = [record["value"] >= least for (_, record), least in zip(found, target.least, strict=False)]
        met = paired(root, found[-1][0]) if target.met == "in pairs" else target.met
        met = met or ("yes" if all(reached) else "no" if not any(reached) else "in part")
        if samples[0] < target.samples:
            met = f"open: {samples[0]} of {target.samples} asked"
        n = " to ".join(dict.fromkeys(map(str, (samples[0], samples[-1]))))
        rows.append([target.what, target.needed, "; ".join(cells), n, met, "; ".join(weights), files])
    return rows


def compared_rows(root: Path) -> list[list[str]]:
    """What each model answers of what was asked of several; empty where it was not asked."""
    found = {what: {model: measured(root, place) for model, place in own.items()} for what, own in COMPARED.items()}
    cells = {what: {model: shown(record) for model, record in own.items() if record} for what, own in found.items()}
    return [[what, *(own.get(model, "") for model in MODELS)] for what, own in cells.items() if own]


def records_of(root: Path, study: str) -> Iterator[dict[str, Any]]:
    path = root / "results" / study / "records.jsonl.xz"
    # not splitlines(): strings may hold other line separators
    lines = lzma.decompress(path.read_bytes()).decode().rstrip("\n").split("\n") if path.is_file() else []
    return map(json.loads, lines)


def miss_rows(root: Path) -> list[list[str]]:
    """Where misses come from, by task and length, and the wrong answer that is given most often."""
    rows = []
    for task, studies in MISSES.items():
        for study in studies:
            own = [record for record in records_of(root, study) if record["task"].startswith(task)]
            for length in sorted({record["length"] for record in own}):
                here = [record for record in own if record["length"] == length]
                found = diagnose(here)
                wrong = Counter(record["answered"].strip() for record in here if record["score"] < 1)
                answer, often = wrong.most_common(1)[0]
                rows.append([
                    f"`{task}`, {human_tokens(length)}", str(found.samples),
                    *(str(found.causes.get(cause, 0)) for cause in (RIGHT, RETRIEVAL, FUSION, READING)),
                    "" if found.margin is None else f"{found.margin.middle:.2f}",
                    f"`{answer[:24]}`, {often}" if often > 9 else "",
                ])  # fmt: skip
    return rows
