"""Finished or unfinished runs of `hsa eval MODEL --suite`, read from their folders: for reports and comparisons.

tests/eval/test_stored_runs.py.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hsa_ultralong.eval.recorded_run import PACKED, VERSION, read_records
from hsa_ultralong.eval.suite_summary import cells, is_share, summary_records, wholes
from hsa_ultralong.files.fields import OBJECT, TEXT, is_finite, is_whole, optional, require, rows, table, that, whole
from hsa_ultralong.files.strict_json import read_json

_SHARE = that(lambda value: is_finite(value) and 0 <= value <= 1, "a number of 0 to 1")
_NUMBER = that(is_finite, "a finite number")
_PLACE = table(
    {"document": whole(), "start": whole(), "stop": whole(), "text": TEXT, "weight": _SHARE,
     "is_evidence": that(lambda value: isinstance(value, bool), "true or false")},
    may_lack=("text", "weight", "is_evidence"),
)  # fmt: skip
# runs that were published together, a line each: its name, and its files by their names
TOGETHER = "runs.jsonl.xz"
# of a sample's record
FIELDS = {
    "model": TEXT, "task": TEXT, "length": whole(), "index": whole(), "depth": optional(_SHARE), "setting": TEXT,
    "metric": TEXT, "query": TEXT, "expected": rows(TEXT), "answered": TEXT, "score": optional(_NUMBER),
    "certainty": optional(_SHARE), "found": that(lambda value: value in (None, True, False), "true, false or null"),
    "rank": optional(that(lambda value: is_whole(value, 1), "a whole number from 1 on")), "weight": optional(_SHARE),
    "margin": optional(_NUMBER),
}  # fmt: skip
# and of those of newer runs
_MORE = {"sample": TEXT, "retrieved": optional(rows(_PLACE)), "evidence": rows(_PLACE)}
_RECORD = table({**FIELDS, **_MORE}, may_lack=tuple(_MORE), is_open=True)
_RECORD_OF_A_RUN = table({"run": TEXT, **FIELDS, **_MORE}, may_lack=tuple(_MORE), is_open=True)
_FILES = table({"run": TEXT, "summary.json": OBJECT}, is_open=True)
_SUMMARY = table(
    {"meta": OBJECT, "skipped": rows(table({"task": TEXT, "length": whole(1), "reason": TEXT}))},
    may_lack=("skipped",), is_open=True,
)  # fmt: skip


@dataclass(frozen=True)
class StoredRun:
    """One model's samples and how they were made.

    Attributes:
        name: what tables call it. settings: of run.json. meta: of summary.json, empty while the run is under way.
        records: lines of records.jsonl. skipped: (task, length) -> why it was not measured.
    """

    name: str
    settings: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    meta: Mapping[str, Any] = field(default_factory=dict)
    skipped: Mapping[tuple[str, int], str] = field(default_factory=dict)

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """Shares of samples; perplexities stand in summary.json alone."""
        return [record for record in summary_records(self.records, {}) if is_share(record["metric"])]

    @cached_property
    def wholes(self) -> dict[tuple[str, str], dict[int, Mapping[str, Any]]]:
        """(task, metric) -> length -> the summary over all depths."""
        return wholes(self.summary)

    @cached_property
    def cells(self) -> dict[tuple[str, int], list[Mapping[str, Any]]]:
        """(task, length) -> records."""
        return cells(self.records)


def read_run(folder: Path, name: str) -> StoredRun:
    """The run in a folder: of `hsa eval`, or what is kept of one, summary.json with its settings and records.jsonl.xz.

    Raises:
        ValueError: if the folder holds none, an empty one, or one of another version, or a damaged file.
    """
    return read_runs({name: folder})[0]


def read_runs(found: Mapping[str, Path]) -> list[StoredRun]:
    """The runs in folders, by name; runs that were published together are read once, and need no folder of their own.

    Raises:
        ValueError: as `read_run`; a run is none of those that were published together beside it.
    """
    places = {folder.parent for folder in found.values() if is_together(folder)}
    files = {place: runs_together(place) for place in places}
    records = {place: records_together(place, files[place]) for place in places}
    runs = []
    for name, folder in found.items():
        if not is_together(folder):
            runs.append(_read_folder(folder, name))
            continue
        place = folder.parent
        suites = [one for one in files[place] if one in records[place]]
        if folder.name not in suites:
            raise ValueError(f"{place} has no suite {folder.name}, but {len(suites)} others: {_first(suites)}")
        content, where = files[place][folder.name]["summary.json"], f"{place / TOGETHER}, {folder.name}"
        require(_SUMMARY, content, f"{where}:")
        runs.append(_stored_run(name, where, content["meta"].get("settings"), content, records[place][folder.name]))
    return runs


def is_together(folder: Path) -> bool:
    """Whether a path names a run by the folder of runs that were published together: there is no folder of its own."""
    return not folder.is_dir() and (folder.parent / TOGETHER).is_file()


def _read_folder(folder: Path, name: str) -> StoredRun:
    place = folder / "run.json"
    summary, packed = folder / "summary.json", folder / PACKED
    is_kept = not place.is_file() and summary.is_file() and packed.is_file()
    content: dict[str, Any] = {"meta": {}}
    if summary.is_file():
        content = read_json(summary)
        require(_SUMMARY, content, f"{summary}:")
    is_study = (folder / "needles.png").exists() or (is_kept and "settings" not in content["meta"])
    if is_study or not (place.is_file() or is_kept):
        what = "a study of hidden sentences, which `hsa plot` draws" if is_study else "none"
        if (folder / TOGETHER).is_file():
            what = "several that were published together: name them, FOLDER/RUN"
        raise ValueError(f"{folder} must hold a run of `hsa eval MODEL --suite` (run.json), got {what}")
    found = {"version": VERSION, "settings": content["meta"].get("settings")} if is_kept else read_json(place)
    settings = found.get("settings") if found.get("version") == VERSION else None
    file = next((file for file in (folder / "records.jsonl", packed) if file.exists()), None)
    records = read_records(file, _RECORD)[0] if file else []
    run = _stored_run(name, str(summary if is_kept else place), settings, content, records)
    if not records:
        raise ValueError(f"{folder} holds no sample yet; wait for the run, or start it again")
    return run


def _stored_run(
    name: str, where: str, settings: Any, content: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> StoredRun:
    """A run of its summary's content and its records; errors say where it lies."""
    if not isinstance(settings, dict):
        raise ValueError(f"{where} is no run of this version; measure it again")
    skipped = {(one["task"], one["length"]): one["reason"] for one in content.get("skipped", [])}
    return StoredRun(name, settings, records, content["meta"], skipped)


def runs_together(folder: Path) -> dict[str, dict[str, Any]]:
    """Of runs that were published together in a folder: name -> file -> content, of lines a list. {} without any.

    Records of suites lie beside them: `records_together`.

    Raises:
        ValueError: a damaged file.
    """
    lines = read_records(folder / TOGETHER, _FILES)[0] if (folder / TOGETHER).is_file() else []
    return {line["run"]: {name: content for name, content in line.items() if name != "run"} for line in lines}


def run_together(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
    """Of one run that was published together with others (`is_together`): its files, and its records if it is a suite.

    Raises:
        ValueError: there is no such run, naming some that there are; else as `records_together`.
    """
    runs = runs_together(run.parent)
    if run.name not in runs:
        raise ValueError(f"{run.parent} has no run {run.name}, but {len(runs)} others: {_first([*runs])}")
    return runs[run.name], records_together(run.parent, runs).get(run.name)


def records_together(
    folder: Path, runs: Mapping[str, Mapping[str, Any]], replaced: Collection[str] = ()
) -> dict[str, list[dict[str, Any]]]:
    """Of suites that were published together in a folder: name -> records. {} without any.

    Args:
        runs: what `runs_together` has of the folder.
        replaced: names that need not fit, as they are published again.

    Raises:
        ValueError: a damaged file; records without a run, or a suite without records: writing was stopped between.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    if (folder / TOGETHER).is_file() and (folder / PACKED).is_file():
        for record in read_records(folder / PACKED, _RECORD_OF_A_RUN)[0]:
            found.setdefault(record.pop("run"), []).append(record)
    suites = {name for name, files in runs.items() if "log.jsonl" not in files}
    if unfit := sorted((suites ^ found.keys()).difference(replaced)):
        raise ValueError(
            f"{folder / PACKED} and {TOGETHER} do not fit, as after a stop: publish {_first(unfit)} again, "
            f"`python scripts/publish.py RUN... -o {folder} --together`"
        )
    return found


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def find_runs(given: Sequence[str]) -> dict[str, Path]:
    """Name -> folder of what FOLDER or NAME=FOLDER stand for; a folder of several runs stands for all of them.

    Of runs that were published together FOLDER is that of all and the run's name: no folder of its own.

    Raises:
        ValueError: for a folder that is none, or two runs that have one name.
    """
    found: dict[str, Path] = {}
    for entry in given:
        name, sign, rest = entry.partition("=")
        is_named = bool(sign) and not Path(entry).exists()
        folder = Path(rest if is_named else entry)
        if not folder.is_dir() and not is_together(folder):
            raise ValueError(f"there is no folder {folder}; give the output folders of `hsa eval`")
        inner = [] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))
        for place in inner or [folder]:
            label = place.resolve().name
            if is_named:
                label = f"{name}/{label}" if inner else name
            if label in found:
                raise ValueError(
                    f"two runs are called {label!r} ({found[label]} and {place}); tell them apart: "
                    f"first={found[label]} second={place}"
                )
            found[label] = place
    return found
