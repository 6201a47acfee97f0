"""The folder of a run: one trainer at a time, settings, log. A command that is refused leaves nothing of it behind.

Nothing in it is followed out of it. Called by loop.py and cli/train.py; tests/train/test_run_folder.py.
"""

from __future__ import annotations

import json
import logging
import os
import weakref
from pathlib import Path
from typing import Any

from hsa_ultralong.distributed.mesh import on_first, patient_group
from hsa_ultralong.files.durable import write_whole
from hsa_ultralong.files.fields import is_whole
from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.files.messages import shown
from hsa_ultralong.files.regular import append_text, read_regular
from hsa_ultralong.files.strict_json import read_json

logger = logging.getLogger(__name__)

LOCK_FILE = "train.lock"
_LOG_BYTES = 2**32


class RunFolder:
    """The right to train in a folder, held by the first of all processes that train together.

    Within a process the newest holder has it, so that a notebook can make a new trainer beside an old one.

    Attributes:
        path: the folder, the same one for all processes.
    """

    _holders: weakref.WeakValueDictionary[Path, RunFolder] = weakref.WeakValueDictionary()

    def __init__(self, path: Path) -> None:
        self.path = path
        self._process: int | None = None
        self._group = patient_group()
        self._lock: FileLock | None = None
        self._made: list[Path] = []

    @property
    def is_held(self) -> bool:
        """Whether this process, not one that it was forked from, holds the folder."""
        return self._process == os.getpid()

    def take(self) -> None:
        """Make the folder if it is missing, and lock it; every process calls it.

        Raises:
            ValueError: another process trains there, it is no folder for a run, or one of its folders is a link.
        """
        place = self.path.absolute().resolve()
        before = self._holders.get(place)
        if before is not None and before.is_held:
            self._lock, self._made = before._lock, before._made
            before._process, before._lock, before._made = None, None, []
        else:
            on_first(self._take, self._group)
        self._holders[place] = self
        self._process = os.getpid()

    def _take(self) -> None:
        check_run_folder(self.path)
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._made.append(path)
        try:
            self._lock = FileLock.acquire(self.path / LOCK_FILE, f"{self.path} is being trained")
        except BaseException:
            self._remove()
            raise

    def release(self) -> None:
        """Give the folder back; it goes if it was made here and nothing lies in it."""
        self._process = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None
            self._remove()

    def _remove(self) -> None:
        made, self._made = self._made, []
        for path in reversed(made):
            try:
                path.rmdir()
            except OSError:
                return


def check_run_folder(run: Path) -> None:
    """A run can go into the folder: it is new, empty, or has been one of a run; nothing is written.

    Raises:
        ValueError: it is not, or cannot be written; naming why.
    """
    exists = next(path for path in (run, *run.absolute().parents) if path.exists() or path.is_symlink())
    if not exists.is_dir():
        raise ValueError(f"the run folder cannot be {run}: {exists} is no folder")
    if not os.access(exists, os.W_OK | os.X_OK):
        raise ValueError(f"the run folder {run} cannot be written: no permission in {exists}")
    for name in ("checkpoints", "tensorboard"):
        if (run / name).is_symlink():
            raise ValueError(
                f"{run / name} is a symbolic link, which a run does not write through; let the run folder be the link"
            )
    config = run / "config.json"
    if config.exists() and not (run / "checkpoints").is_dir() and not (run / "log.jsonl").is_file():
        settings = read_json(config)
        if "stages" not in settings:
            raise ValueError(f"{config} is not that of a run: choose another run folder than {run}")


def write_settings(run: Path, settings: dict[str, Any], *, is_resumed: bool) -> None:
    """config.json of a run; a resumed run warns of what its last command set otherwise."""
    file, new = run / "config.json", json.dumps(settings, indent=1)
    if is_resumed and file.is_file():
        try:
            changes = _changes(read_json(file), json.loads(new))
        except (OSError, ValueError) as error:
            logger.warning("%s is written anew: %s", file, error)
        else:
            if changes:
                logger.warning("the run goes on with other settings than before: %s", "; ".join(changes))
    write_whole(file, new)


def _changes(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two settings: "warmup.tokens: 100 -> 200"."""
    if path == "stages":
        old, new = _by_name(old), _by_name(new)
        path = ""
    if isinstance(old, dict) and isinstance(new, dict):
        names = [*new, *(old.keys() - new.keys())]
        return [part for name in names for part in _changes(old.get(name), new.get(name), f"{path}.{name}".strip("."))]
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _by_name(stages: Any) -> dict[str, Any]:
    if not isinstance(stages, list) or not all(
        isinstance(stage, dict) and isinstance(stage.get("name"), str) for stage in stages
    ):
        raise ValueError("its stages are no list of stages with names")
    return {stage["name"]: stage for stage in stages}


class RunLog:
    """log.jsonl of a run, one record a line.

    Args:
        last_step: of the checkpoint that the run goes on from; records of later steps are dropped, as a run that died
            takes these steps again.

    Raises:
        ValueError: a line is no record; naming it.
    """

    def __init__(self, run: Path, last_step: int) -> None:
        self.path = run / "log.jsonl"
        if not self.path.exists():
            return
        lines = read_regular(self.path, _LOG_BYTES, follow=False).decode("utf-8", "replace").splitlines(keepends=True)
        # a line without its end was cut off while it was written
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for number, line in enumerate(whole, 1) if self._step(number, line) <= last_step]
        # what other names the file has, in a copy of the run say, must not grow with it
        if kept != lines or self.path.stat().st_nlink > 1:
            write_whole(self.path, "".join(kept))

    def _step(self, number: int, line: str) -> int:
        try:
            step = json.loads(line)["global_step"]
        except (ValueError, TypeError, KeyError, RecursionError):
            step = None
        if not is_whole(step):
            raise ValueError(f"{self.path}:{number} is no record of a run ({shown(line.rstrip())}); remove that line")
        assert isinstance(step, int)
        return step

    def write(self, record: dict[str, Any]) -> None:
        append_text(self.path, json.dumps(record) + "\n")
