"""Train and measure a finding of the paper at nano size, for one seed; go on where an earlier call stopped.

    python scripts/findings.py list
    python scripts/findings.py run NAME --data SHARDS --seed 0 --device cuda --max-minutes 9
    python scripts/findings.py run NAME --data SHARDS --dry-run
    python scripts/findings.py collect NAME

For every variant of the finding (hsa_ultralong/recipes/findings.py): `hsa train findings --set ...`, then `hsa eval`.
All goes to runs/findings/VARIANT-SEED; runs without settings of their own are shared by all findings. Then everything
measured so far, of all seeds, goes to results/findings/NAME: summary.json.xz, in the accuracy form of docs/results.md
with `variant` and `seed`, beside the configuration of each run. Seeds measured elsewhere that stand there are kept.
scripts/report.py draws from these files alone. tests/train/test_findings.py.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hsa_ultralong.eval.plots import read_jsonl
from hsa_ultralong.eval.suite_summary import headlines
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.packed import SUFFIX, pack, read_stored, stored
from hsa_ultralong.files.strict_json import as_lines, parse_object, read_json
from hsa_ultralong.recipes.findings import FINDINGS, QUICK, Finding

RUNS, RESULTS, SUMMARY = Path("runs/findings"), Path("results/findings"), "summary.json"
# of a run's summary.json
_TRAINED = ("loss", "needle_accuracy", "tokens_per_s", "peak_bytes")
_SOURCE = ("command", "commit", "date", "hardware", "versions", "synthetic_share", "logged_seconds")
_LEAST_MINUTES = 0.2


class Options(NamedTuple):
    """What a call asks for; see `main`."""

    data: Path
    device: str = "auto"
    text: tuple[str, ...] = ()
    books: tuple[str, ...] = ()
    lengths: str = ""
    needles: int = 20
    ppl_lengths: str = "2K,8K,32K"
    samples: int = 20
    short: Path | None = None
    quick: bool = False
    runs: Path = RUNS


class Step(NamedTuple):
    """One command of `hsa`: the file that says that it is done, and whether it takes --max-minutes."""

    done: Path
    command: list[str]
    is_training: bool


def execute(command: Sequence[str], seconds: float) -> int:
    """Run `hsa`; after so many seconds it is asked to end, and keeps what it has. Returns the exit code."""
    process = subprocess.Popen([sys.executable, "-m", "hsa_ultralong", *command])
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        process.wait()
        return -1


def folder_of(runs: Path, name: str, variant: str, seed: int) -> Path:
    """Where a variant lies; those without settings of their own are one run."""
    label = f"{name}-{variant}" if FINDINGS[name].settings(variant) else "base"
    return runs / f"{label}-{seed}"


def steps(name: str, variant: str, seed: int, options: Options) -> list[Step]:
    """The commands of a variant in their order."""
    finding, folder = FINDINGS[name], folder_of(options.runs, name, variant, seed)
    settings = [f"seed={seed}", *finding.settings(variant), *(QUICK if options.quick else ())]
    model = folder / "model"
    changes = [part for setting in settings for part in ("--set", setting)]
    train = ["train", "findings", "--data", options.data, "-o", folder / "run", *changes, "--export", model]
    text = [part for path in options.text for part in ("--text", path)]
    books = [part for path in options.books for part in ("--text", path)] or text
    haystack = text or ["--shards", options.data]
    lengths = options.lengths or finding.lengths
    evals = {
        "needles": ["eval", "needles", "--model", model, "--lengths", lengths, "--needles", options.needles, *haystack],
        "paper": [
            "eval", model, "--tasks", "s_niah_authors,mq_authors,vt_authors", "--scoring", "teacher", "--setting",
            finding.setting, "--lengths", lengths, "--samples", options.needles, *haystack,
        ],
        "ruler": [
            "eval", model, "--tasks", "niah_single_2,niah_multiquery,vt", "--setting", finding.setting,
            "--lengths", lengths, "--samples", options.needles, *haystack,
        ],
        "perplexity": [
            "eval", model, "--tasks", "ppl_last_512", "--lengths", options.ppl_lengths, "--samples", options.samples,
            *books,
        ],
        "short": ["eval", model, "--suite", "short", "--data", f"short={options.short}", "--samples", 500],
    }  # fmt: skip
    found = [Step(model / "config.json", [*map(str, train), "--device", options.device], True)]
    for measure in finding.measures:
        if measure != "short" or options.short is not None:
            place = folder / finding.folder(measure)
            command = [*evals[measure], "--seed", seed, "--device", options.device, "-o", place]
            found.append(Step(place / "done", list(map(str, command)), False))
    return found


def run(
    name: str,
    seed: int,
    options: Options,
    *,
    only: str = "",
    minutes: float = 1e6,
    perform: Callable[[Sequence[str], float], int] = execute,
) -> bool:
    """Do what is not done yet of a finding for a seed, or of one variant; returns whether all is done.

    Raises:
        ValueError: a command failed.
    """
    deadline = time.monotonic() + 60 * minutes
    wanted = [only] if only else [*FINDINGS[name].variants]
    planned = [(variant, step) for variant in wanted for step in steps(name, variant, seed, options)]
    for number, (variant, step) in enumerate(planned, 1):
        if step.done.is_file():
            continue
        left = (deadline - time.monotonic()) / 60
        if left < _LEAST_MINUTES:
            return False
        limit = ["--max-minutes", f"{left:.2f}"] if step.is_training else []
        where = f"[{number}/{len(planned)}] {name} {variant} seed {seed}"
        print(f"{where}: hsa {shlex.join(step.command)}", file=sys.stderr, flush=True)
        code = perform([*step.command, *limit], 60 * left + (60 if step.is_training else 0))
        if code == -1 or (code == 0 and step.is_training and not step.done.is_file()):
            return False
        if code != 0:
            raise ValueError(f"hsa {step.command[0]} ended with exit code {code}; run it again to go on")
        if not step.is_training:
            step.done.touch()
    return True


def collect(name: str, runs: Path, results: Path) -> dict[str, Any]:
    """Everything measured of a finding, joined with what results/findings/NAME holds of other seeds, and written.

    Raises:
        ValueError: nothing was measured.
    """
    finding, place = FINDINGS[name], results / name
    records: list[dict[str, Any]] = []
    sources: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    for variant in finding.variants:
        prefix = folder_of(runs, name, variant, 0).name.removesuffix("0")
        for folder in sorted(runs.glob(f"{prefix}*")):
            seed = folder.name.removeprefix(prefix)
            if seed.isdecimal() and (folder / "model" / "config.json").is_file():
                records += [
                    {"variant": variant, "seed": int(seed), **{name: _short(value) for name, value in found.items()}}
                    for found in _measured(finding, folder)
                ]
                sources[f"{variant}-{seed}"] = _source(finding, folder)
                configs[f"{variant}-{seed}"] = read_json(folder / "run" / "config.json")
    if before := read_summary(place):
        new = {(record["variant"], record["seed"]) for record in records}
        records += [record for record in before["records"] if (record["variant"], record["seed"]) not in new]
        sources = {**before["meta"]["runs"], **sources}
        configs = {**before["configs"], **configs}
    if not records:
        raise ValueError(f"nothing of {name} was measured in {runs} yet: `python scripts/findings.py run {name} ...`")
    order = list(finding.variants)
    records = [record for record in records if record["variant"] in order]
    records.sort(key=lambda record: (order.index(record["variant"]), record["seed"]))
    meta = {
        "question": finding.question,
        "settings": {variant: finding.settings(variant) for variant in order},
        "seeds": sorted({record["seed"] for record in records}),
        "hardware": sorted({source["hardware"] for source in sources.values()}),
        "commits": sorted({source["commit"] for source in sources.values()}),
        "runs": sources,
    }
    summary = {"meta": meta, "configs": {name: configs[name] for name in sorted(configs)}, "records": records}
    place.mkdir(parents=True, exist_ok=True)
    write_whole(place / (SUMMARY + SUFFIX), pack(as_lines(summary).encode()))
    return summary


def read_summary(place: Path) -> dict[str, Any]:
    """What was measured of a finding; {} where nothing was.

    Raises:
        ValueError: a damaged file.
    """
    path = place / (SUMMARY + SUFFIX)
    return parse_object(read_stored(path), path) if path.is_file() else {}


def _short(value: Any) -> Any:
    """Six digits of a number say more than its interval allows."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _source(finding: Finding, folder: Path) -> dict[str, Any]:
    """Where a run came from, and the commits at which it was asked where they are others."""
    meta = read_json(folder / "run" / "summary.json")["meta"]
    places = [folder / finding.folder(measure) for measure in finding.measures]
    asked = {read_json(place / "summary.json")["meta"]["commit"] for place in places if (place / "done").is_file()}
    others = {"asked": sorted(asked)} if asked - {meta["commit"]} else {}
    return {**{field: meta[field] for field in _SOURCE if field in meta}, **others}


def _measured(finding: Finding, folder: Path) -> list[dict[str, Any]]:
    """Records of a variant and seed: the last stage of training, the tokens after which half of the held-out questions
    were first answered, and what was evaluated; with cells by depth where lengths go far, as only those are drawn."""
    trained = read_json(folder / "run" / "summary.json")["records"]
    last = trained[-1]["stage"]
    found = [
        {"task": "training", "metric": record["metric"], "length": record["context"], "depth": None,
         "value": record["value"]}
        for record in trained if record["stage"] == last and record["metric"] in _TRAINED
    ]  # fmt: skip
    begun = [
        (line["tokens"], line["probe"]["length"])
        for line in read_jsonl(stored(folder / "run" / "log.jsonl"))
        if line.get("probe", {}).get("needle_accuracy", 0) >= 0.5
    ]
    if begun:
        tokens, length = min(begun)
        found.append(
            {"task": "training", "metric": "half_answered_tokens", "length": length, "depth": None, "value": tokens}
        )
    fields = ("task", "metric", "length", "depth", "samples", "value", "ci_low", "ci_high", "distinct_chunks")
    for measure in ("paper", "ruler", "perplexity", "short"):
        place = folder / finding.folder(measure)
        if (place / "done").is_file():
            records = headlines(read_json(place / "summary.json")["records"])
            found += [{field: record.get(field) for field in fields} for record in records]
    place = folder / finding.folder("needles")
    if (place / "done").is_file():
        records = read_json(place / "summary.json")["records"]
        found += [
            {**{field: record.get(field) for field in fields}, "metric": "exact"}
            for record in records
            if "task" in record
        ]
        if place.name.endswith("-far"):
            found += _by_depth(read_jsonl(place / "records.jsonl"))
    return found


def _by_depth(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Shares of hidden sentences by length and tenth of depths."""
    cells: dict[tuple[int, int], list[bool]] = {}
    for line in lines:
        cells.setdefault((line["length"], min(9, int(10 * line["depth"]))), []).append(line["correct"])
    records = []
    for (length, tenth), right in sorted(cells.items()):
        records.append(
            {"task": "s_niah", "metric": "exact", "length": length, "depth": (tenth + 0.5) / 10, "samples": len(right),
             "value": sum(right) / len(right)}
        )  # fmt: skip
    return records


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list", help="findings, their variants and settings")
    defaults = Options(Path())
    for verb, words in (("run", "train and measure one seed"), ("collect", "join what was measured")):
        sub = verbs.add_parser(verb, help=words)
        sub.add_argument("name", choices=[*FINDINGS])
        sub.add_argument("--runs", type=Path, default=RUNS, help="folder of the runs")
        sub.add_argument("--results", type=Path, help=f"default {RESULTS}, with --quick RUNS/results")
        if verb == "collect":
            continue
        sub.add_argument("--data", type=Path, required=True, help="token shards made by `hsa data`")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--device", default=defaults.device)
        sub.add_argument("--max-minutes", type=float, default=1e6, help="stop then; the same command goes on")
        sub.add_argument("--text", action="append", default=[],
                         help="text to measure on; default: the shards, and Opticks for perplexity")  # fmt: skip
        sub.add_argument("--books", action="append", default=[], help="text of perplexity; default: --text")
        sub.add_argument(
            "--lengths", default=defaults.lengths, help="of hidden sentences and tests; default: the finding's"
        )
        sub.add_argument("--needles", type=int, default=defaults.needles, help="hidden sentences and samples a length")
        sub.add_argument("--ppl-lengths", default=defaults.ppl_lengths, help="of perplexity")
        sub.add_argument("--samples", type=int, default=defaults.samples, help="stretches of text a length")
        sub.add_argument("--short", type=Path, help="folder of the short tasks (docs/evaluate.md)")
        sub.add_argument("--quick", action="store_true", help="toy sizes, to try the command on a CPU")
        sub.add_argument("--only", default="", help="this variant alone; `collect` joins what was measured")
        sub.add_argument("--dry-run", action="store_true", help="only print the commands that are left")
    return parser


def main(arguments: Sequence[str] | None = None, perform: Callable[[Sequence[str], float], int] = execute) -> int:
    given = parser().parse_args(arguments)
    if given.verb == "list":
        for name, finding in FINDINGS.items():
            print(f"{name}: {finding.question}")
            for variant in finding.variants:
                print(f"  {variant}: {' '.join(finding.settings(variant)) or 'the recipe as it is'}")
        return 0
    is_quick = getattr(given, "quick", False)
    only = getattr(given, "only", "")
    if only and only not in FINDINGS[given.name].variants:
        raise ValueError(f"{given.name} has no variant {only}: {', '.join(FINDINGS[given.name].variants)}")
    results = given.results or (given.runs / "results" if is_quick else RESULTS)
    if given.verb == "run" and given.short is not None and "short" not in FINDINGS[given.name].measures:
        raise ValueError(f"{given.name} measures no short tasks: leave --short out")
    if given.verb == "run":
        options = Options(
            given.data, given.device, tuple(given.text), tuple(given.books), given.lengths, given.needles,
            given.ppl_lengths, given.samples, given.short, is_quick, given.runs,
        )  # fmt: skip
        if given.dry_run:
            for variant in [only] if only else FINDINGS[given.name].variants:
                for step in steps(given.name, variant, given.seed, options):
                    print(f"{variant}: {'done: ' if step.done.is_file() else ''}hsa {shlex.join(step.command)}")
            return 0
        if not run(given.name, given.seed, options, only=only, minutes=given.max_minutes, perform=perform):
            print(f"{given.name} seed {given.seed}: stopped; the same command goes on", file=sys.stderr)
            return 3
        if only:
            return 0
    collect(given.name, given.runs, results)
    print(f"written {results / given.name}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        # who read the list has seen enough; Python would complain once more when it flushes
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
