"""Copy runs of `hsa eval` or `hsa train` as they are published under results/: packed, without places or others' texts.

    python scripts/publish.py RUN -o results/NAME
    python scripts/publish.py runs/twins/run-* runs/twins/speed-* runs/twins/eval* -o results/twins --together --small
    python scripts/publish.py results/twins/run-hsa-0 -o runs/hsa-0

Of a suite: summary.json (numbers with six digits), summary.md, and records.jsonl.xz without the places of chunks
(ranks and weights stay, with six digits) and without questions and answers whose files are share-alike; scores by
depth are left out of summary.json, as the records tell them. Of a training run: summary.json, config.json,
log.jsonl.xz. With --together all runs go to two files in -o: runs.jsonl.xz, a line a run with its name as `run` and
all these files but records, and records.jsonl.xz of all suites, each record with its `run`. A small file takes a whole
block of a disk, and models that are asked the same take a third of the room. A run of these is named as if it were a
folder there, and publishing it again makes one. With --small there is no summary.md; such a folder is published again
with --small. All runs are looked at before any is copied. A published run that is there is replaced, any other folder
is not. Two files that were not written whole are refused when they are read. docs/results.md says what is kept;
tests/test_publish.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hsa_ultralong.eval.metadata import write_json
from hsa_ultralong.eval.plots import read_jsonl
from hsa_ultralong.eval.recorded_run import PACKED
from hsa_ultralong.eval.stored_runs import TOGETHER, is_together, records_together, run_together, runs_together
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.packed import SUFFIX, pack, stored
from hsa_ultralong.files.strict_json import read_json

RECORDS, LOG = "records.jsonl", "log.jsonl"
_PLACES = ("retrieved", "evidence")
_TEXTS = {"query": "", "expected": [], "answered": ""}
# measured to no more digits than these, and random ones do not pack; scores stay whole
_MEASURED = ("certainty", "weight", "margin", "nats", "log_likelihoods")
_DIGITS = 6


def published(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without places, and without texts of share-alike files: the suite `qa`, and RULER's qa_1 and qa_2.

    Likelihoods and weights have six digits.
    """
    kept = {key: _short(value) if key in _MEASURED else value for key, value in record.items() if key not in _PLACES}
    return kept | _TEXTS if record["task"].startswith("qa_") else kept


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(one) for one in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def files_of(run: Path, is_small: bool = False) -> dict[str, Any]:
    """What is published of a run: the content of each file by the name that it has in the run, of lines a list.

    Raises:
        ValueError: the folder is no run of either kind, or lacks a file.
    """
    if is_together(run):
        files, records = run_together(run)
        files = {name: content for name, content in files.items() if not (is_small and name == "summary.md")}
        return files if records is None else {**files, RECORDS: records}
    if (run / TOGETHER).is_file():
        raise ValueError(f"{run} holds several runs published together: name one, FOLDER/RUN")
    kind = next((name for name in (RECORDS, LOG) if stored(run / name).is_file()), None)
    if kind is None:
        raise ValueError(f"{run} has neither {RECORDS} nor {LOG}: name a run of hsa eval or hsa train")
    beside = ["config.json"] if kind == LOG else [] if is_small else ["summary.md"]
    names = ["summary.json", *beside]
    if missing := [name for name in names if not (run / name).is_file()]:
        advice = ", or give --small if it was published so" if missing == ["summary.md"] else ""
        raise ValueError(f"{run} has no {missing[0]}: let the run end first{advice}")
    files = {
        name: read_json(run / name) if name.endswith(".json") else (run / name).read_text(encoding="utf-8")
        for name in names
    }
    lines = read_jsonl(run / kind)
    if kind == RECORDS:
        if not lines:
            raise ValueError(f"{run} holds no sample yet: let the run end first")
        summary = files["summary.json"]
        summary["records"] = [
            {key: _short(value) for key, value in record.items()}
            for record in summary["records"]
            if record.get("depth") is None
        ]
        if "pairs" in summary:
            summary["pairs"] = [{key: _short(value) for key, value in pair.items()} for pair in summary["pairs"]]
        lines = [published(record) for record in lines]
    return {**files, kind: lines}


def write_folder(files: Mapping[str, Any], target: Path) -> None:
    """Write a run of `files_of` into a folder of its own.

    Raises:
        ValueError: `target` holds something else than a published run.
    """
    if target.exists() and not (target / "summary.json").is_file():
        raise ValueError(f"{target} is there and is no published run: give another folder, or --together")
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, content in files.items():
        if name in (RECORDS, LOG):
            _write_lines(partial / f"{name}{SUFFIX}", content)
        elif name.endswith(".json"):
            write_json(partial / name, content)
        else:
            write_whole(partial / name, content)
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def write_together(runs: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Write runs of `files_of`, by their names, beside those that `target` has of other names.

    Raises:
        ValueError: `target` is one published run, or has records of no run; what it has of other names does not fit.
    """
    if not (target / TOGETHER).is_file():
        if (target / "summary.json").is_file():
            raise ValueError(f"{target} is one published run: give another folder")
        if (target / PACKED).is_file():
            raise ValueError(f"{target} has {PACKED} but no {TOGETHER}, so nothing says whose: give another folder")
    old = runs_together(target)
    old_records = records_together(target, old, replaced=runs)
    suites = {name: files[RECORDS] for name, files in runs.items() if RECORDS in files}
    records = {name: own for name, own in old_records.items() if name not in runs or name in suites} | suites
    target.mkdir(parents=True, exist_ok=True)
    if records != old_records:
        # suites whose records change leave first and come back last: after a stop between, all is as it was or
        # `records_together` refuses it; new records never lie beside an old summary
        changed = [name for name in suites if name in old_records and old_records[name] != suites[name]]
        _write_runs({name: files for name, files in old.items() if name not in changed}, target)
        if records:
            lines = [{"run": name, **record} for name, own in records.items() for record in own]
            _write_lines(target / PACKED, lines)
        else:
            (target / PACKED).unlink()
    new = {name: {key: files[key] for key in files if key != RECORDS} for name, files in runs.items()}
    _write_runs({**old, **new}, target)


def _write_runs(runs: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    _write_lines(target / TOGETHER, [{"run": name, **files} for name, files in runs.items()])


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    write_whole(path, pack("".join(f"{json.dumps(one)}\n" for one in lines).encode()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results/NAME")
    parser.add_argument("--together", action="store_true", help="all runs in two files, by their names")
    parser.add_argument("--small", action="store_true", help="no summary.md")
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and not options.together:
        parser.error("several runs need --together")
    target = options.output
    try:
        runs = {run.name: files_of(run, options.small) for run in options.runs}
        if len(runs) < len(options.runs):
            raise ValueError("runs are told apart by the names of their folders, which must differ")
        if options.together:
            write_together(runs, target)
        else:
            write_folder(*runs.values(), target)
        files = sorted(target.iterdir())
        size = sum(file.stat().st_size for file in files)
        print(f"{target}: {', '.join(file.name for file in files)}, {size / 1024:.0f} KiB")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
