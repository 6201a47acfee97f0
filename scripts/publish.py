"""Copy runs of `hsa eval` or `hsa train` as they are published under results/: packed, without places or others' texts.

    python scripts/publish.py RUN -o results/NAME
    python scripts/publish.py runs/twins/run-* runs/twins/eval* -o results/twins --each

Of a suite: summary.json, summary.md, and records.jsonl.xz without the places of chunks (ranks and weights stay, with
six digits) and without questions and answers whose files are share-alike; scores by depth are left out of summary.json,
as the records tell them. Of a training run: summary.json, config.json, log.jsonl.xz. With --each every run goes to a
folder of its own name below -o, and the records of all suites to one file there, each with its `run`: models that are
asked the same take a third of the room. With --small there is no summary.md. All runs are looked at before any is
copied. A published run that is there is replaced, any other folder is not. docs/results.md says what is kept;
tests/test_publish.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hsa_ultralong.eval.metadata import write_json
from hsa_ultralong.eval.plots import read_jsonl
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.packed import SUFFIX, pack, read_stored, stored
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


def files_of(run: Path, is_small: bool = False) -> list[str]:
    """What is published of a run, by the names that it has in the run.

    Raises:
        ValueError: the folder is no run of either kind, or lacks one of them.
    """
    kind = next((name for name in (RECORDS, LOG) if stored(run / name).is_file()), None)
    if kind is None and (run / "summary.json").is_file() and _records(run):
        kind = RECORDS
    if kind is None:
        raise ValueError(f"{run} has neither {RECORDS} nor {LOG}: name a run of hsa eval or hsa train")
    beside = ["config.json"] if kind == LOG else [] if is_small else ["summary.md"]
    names = ["summary.json", *beside]
    if missing := [name for name in names if not (run / name).is_file()]:
        raise ValueError(f"{run} has no {missing[0]}: let the run end first")
    return [*names, kind]


def publish(run: Path, target: Path, is_small: bool = False, is_one_of_several: bool = False) -> list[Path]:
    """Write what is published of a run; returns the files.

    Args:
        is_small: without summary.md. is_one_of_several: a suite's records stay out, for `joined_records`.

    Raises:
        ValueError: as files_of; `target` holds something else than a published run.
    """
    *names, lines = files_of(run, is_small)
    if target.exists() and not (target / "summary.json").is_file():
        raise ValueError(f"{target} is there and is no published run: give another folder, or --each")
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in names:
        if name.endswith(".json"):
            write_json(partial / name, read_json(run / name))
        else:
            shutil.copyfile(run / name, partial / name)
    summary = read_json(run / "summary.json")
    if lines == RECORDS:
        summary["records"] = [record for record in summary["records"] if record.get("depth") is None]
    write_json(partial / "summary.json", summary)
    if lines == LOG:
        write_whole(partial / f"{LOG}{SUFFIX}", pack(read_stored(stored(run / LOG))))
    elif not is_one_of_several:
        _write_records(partial, map(published, _records(run)))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return sorted(target.iterdir())


def joined_records(runs: Sequence[Path], target: Path) -> list[dict[str, Any]]:
    """Records of several suites by the names of their folders, and those of other runs that `target` has.

    Raises:
        ValueError: the records there are those of one run.
    """
    new = {run.name: records for run in runs if (records := _records(run))}
    there = stored(target / RECORDS)
    before = read_jsonl(there) if there.is_file() else []
    if any("run" not in record for record in before):
        raise ValueError(f"{target} is one published run: give another folder")
    kept = [record for record in before if record["run"] not in new]
    for name, records in new.items():
        kept += [{"run": name, **published(one)} for one in records]
    return kept


def _records(run: Path) -> list[dict[str, Any]]:
    """Of a suite, also of one that was published together with others; [] of other runs."""
    own, together = stored(run / RECORDS), stored(run.parent / RECORDS)
    if own.is_file():
        return read_jsonl(own)
    records = read_jsonl(together) if together.is_file() else []
    return [{key: value for key, value in one.items() if key != "run"} for one in records if one.get("run") == run.name]


def _write_records(folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_whole(folder / f"{RECORDS}{SUFFIX}", pack("".join(f"{json.dumps(one)}\n" for one in records).encode()))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results/NAME")
    parser.add_argument("--each", action="store_true", help="a folder below -o for every run")
    parser.add_argument("--small", action="store_true", help="no summary.md")
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and not options.each:
        parser.error("several runs need --each")
    try:
        for run in options.runs:
            files_of(run, options.small)
        joined = joined_records(options.runs, options.output) if options.each else []
        for run in options.runs:
            target = options.output / run.name if options.each else options.output
            files = publish(run, target, options.small, options.each)
            size = sum(file.stat().st_size for file in files)
            print(f"{target}: {', '.join(file.name for file in files)}, {size / 1024:.0f} KiB")
        if joined:
            _write_records(options.output, joined)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
