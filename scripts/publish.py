"""Copy runs of `hsa eval` or `hsa train` as they are published under results/: packed, without places or others' texts.

    python scripts/publish.py RUN [RUN ...] -o results/NAME
    python scripts/publish.py runs/twins/* -o results/twins --each

Of a suite: summary.json, summary.md, and records.jsonl.xz without the places of chunks (ranks and weights stay) and
without questions and answers whose files are share-alike. Of a training run: summary.json, config.json, log.jsonl.xz.
With --each every run goes to a folder of its own name below -o; with --small there are no scores by depth, which the
records tell as well, and no summary.md. A folder that is there is replaced. docs/results.md says what is kept;
tests/test_publish.py.
"""

from __future__ import annotations

import argparse
import json
import lzma
import shutil
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from hsa_ultralong.eval.metadata import write_json
from hsa_ultralong.eval.plots import read_jsonl
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.strict_json import read_json

_PLACES = ("retrieved", "evidence")
_TEXTS = {"query": "", "expected": [], "answered": ""}


def is_share_alike(task: str) -> bool:
    """Whether the texts of a task come from share-alike files: the suite `qa`, and RULER's qa_1 and qa_2."""
    return task.startswith("qa_")


def published(record: dict) -> dict:
    """A record without places, and without texts that may not be copied here."""
    kept = {key: value for key, value in record.items() if key not in _PLACES}
    return kept | _TEXTS if is_share_alike(record["task"]) else kept


def pack(lines: Iterable[str]) -> bytes:
    """Lines as `xz -9e` packs them."""
    return lzma.compress("".join(f"{line}\n" for line in lines).encode(), preset=9 | lzma.PRESET_EXTREME)


def publish(run: Path, target: Path, is_small: bool = False) -> list[str]:
    """Write what is published of a run; returns the names of the files.

    is_small: without summary.md and scores by depth.

    Raises:
        ValueError: the folder is no run of either kind.
    """
    is_suite = (run / "records.jsonl").is_file() or (run / "records.jsonl.xz").is_file()
    if not (run / "summary.json").is_file() or not (is_suite or (run / "log.jsonl").is_file()):
        raise ValueError(f"{run} has no summary.json beside records.jsonl or log.jsonl: name a run of eval or train")
    partial = target.with_name(f".{target.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    summary = read_json(run / "summary.json")
    if is_small:
        summary["records"] = [record for record in summary["records"] if record.get("depth") is None]
    write_json(partial / "summary.json", summary)
    if is_suite:
        source = run / "records.jsonl" if (run / "records.jsonl").is_file() else run / "records.jsonl.xz"
        records = pack(json.dumps(published(record)) for record in read_jsonl(source))
        write_whole(partial / "records.jsonl.xz", records)
        if not is_small:
            shutil.copyfile(run / "summary.md", partial / "summary.md")
    else:
        shutil.copyfile(run / "config.json", partial / "config.json")
        write_whole(partial / "log.jsonl.xz", pack((run / "log.jsonl").read_text(encoding="utf-8").splitlines()))
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)
    return sorted(path.name for path in target.iterdir())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("-o", "--output", type=Path, required=True, help="results/NAME")
    parser.add_argument("--each", action="store_true", help="a folder below -o for every run")
    parser.add_argument("--small", action="store_true", help="no scores by depth, no summary.md")
    options = parser.parse_args(arguments)
    if len(options.runs) > 1 and not options.each:
        parser.error("several runs need --each")
    for run in options.runs:
        target = options.output / run.name if options.each else options.output
        try:
            names = publish(run, target, options.small)
        except (ValueError, OSError) as error:
            sys.exit(f"error: {error}")
        size = sum((target / name).stat().st_size for name in names)
        print(f"{target}: {', '.join(names)}, {size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
