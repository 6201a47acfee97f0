"""What a folder holds of an evaluation: settings that all samples share, and a record for every sample so far.

run.json has the settings, records.jsonl a line for every sample, on disk as soon as it is known. A run that was killed
goes on from them; one process writes at a time. Base of suite.py and needle_run.py; tests/eval/test_recorded_run.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch

from hsa_ultralong.data.inputs import missing_parents, remove_empty
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import Check, require, table
from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.files.messages import shown
from hsa_ultralong.files.packed import MAX_BYTES, pack, read_stored, unpacked
from hsa_ultralong.files.regular import append_text, read_regular
from hsa_ultralong.files.strict_json import parse_lines, read_json

VERSION = 1
PACKED = "records.jsonl.xz"
_Run = TypeVar("_Run", bound="RecordedRun")


class RecordedRun:
    """A run's folder, held by this process until `close`."""

    # of a record, what a run that goes on needs to know
    FIELDS: ClassVar[Mapping[str, Check]] = {}

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """
        Args:
            settings: all that a sample's result depends on, JSON values: model, seed, samples, haystack ...

        Raises:
            ValueError: the folder holds another run, naming what differs, or damaged records, or another process
                writes there.
        """
        self.folder, self.settings = folder, settings
        self.records: list[dict[str, Any]] = []
        self._made = [*([] if folder.exists() else [folder]), *missing_parents(folder)]
        folder.mkdir(parents=True, exist_ok=True)
        self._is_new = False
        self._lock = FileLock.acquire(folder / "run.lock", f"{folder} is being written")
        try:
            self._begin(folder / "run.json")
            self.records = self._read()
        except BaseException:
            self.close()
            raise

    def __enter__(self: _Run) -> _Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let another process write here; of a run without a record nothing is left."""
        if not self.records and self._is_new:
            (self.folder / "run.json").unlink(missing_ok=True)
        self._lock.release()
        if not self.records:
            remove_empty(self._made)

    def _begin(self, place: Path) -> None:
        self._is_new = not place.exists()
        if self._is_new:
            if any((self.folder / name).exists() for name in ("records.jsonl", PACKED)):
                raise ValueError(f"{self.folder} holds records of another study; give an empty folder")
            write_whole(place, json.dumps({"version": VERSION, "settings": self.settings}, indent=1) + "\n")
            return
        found = read_json(place)
        if found.get("version") != VERSION or not isinstance(found.get("settings"), dict):
            raise ValueError(f"{place} is no run of this version; give an empty folder")
        old = found["settings"]
        differs = sorted(key for key in {*old, *self.settings} if old.get(key) != self.settings.get(key))
        if differs:
            key = differs[0]
            was, now = shown(old.get(key)), shown(self.settings.get(key))
            raise ValueError(f"{self.folder} holds another run: {key} was {was}, now {now}; give another folder")

    def _read(self) -> list[dict[str, Any]]:
        """The samples so far; a last line that a kill cut off is taken away."""
        place = self.folder / "records.jsonl"
        if not place.exists() and (self.folder / PACKED).exists():
            write_whole(place, unpacked(self.folder / PACKED))
        if not place.exists():
            return []
        records, whole = read_records(place, table(self.FIELDS, is_open=True))
        if len(whole) < place.stat().st_size:
            write_whole(place, whole)
        return records

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """Keep records, in the file before this returns to the caller."""
        self.records += records
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        append_text(self.folder / "records.jsonl", lines)

    def pack(self) -> None:
        """Write the records so far as records.jsonl.xz, which is what is kept beside a summary that is published."""
        data = read_regular(self.folder / "records.jsonl", MAX_BYTES)
        write_whole(self.folder / PACKED, pack(data))


def read_records(place: Path, check: Check) -> tuple[list[dict[str, Any]], bytes]:
    """The records in a file, packed or not, and the bytes of its whole lines: a last line that a kill cut off is left
    out.

    Raises:
        ValueError: for a line that does not pass the check, naming file and line; for a damaged packed file.
    """
    data = read_stored(place)
    whole = data[: data.rfind(b"\n") + 1]
    records = parse_lines(whole, place)
    for number, record in enumerate(records, 1):
        require(check, record, f"{place}, line {number}:")
    return records, whole


def model_settings(model: Any) -> dict[str, Any]:
    """Of the settings those of the model: its weights, their dtype, and the chunks it reads per token."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.double().sum().item()!r} ".encode())
    return {
        "weights": digest.hexdigest()[:16],
        "dtype": str(model.dtype).removeprefix("torch."),
        "topk": getattr(model.config, "chunk_topk", None),
    }


def tokens_digest(tokens: torch.Tensor) -> str:
    """What tells one text (n,) from another."""
    return hashlib.sha256(tokens.cpu().contiguous().numpy().data).hexdigest()[:16]
