"""What paths stand for: files, readable files below a folder, standard input and pipes (copied first), hub datasets.

Called by ``sources.py``, ``build.py`` and the commands; tested in ``tests/data/test_inputs.py``.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hsa_ultralong.data import kinds
from hsa_ultralong.data.encodings import AUTO, check_encoding
from hsa_ultralong.data.input_file import HUB_PREFIX, InputFile
from hsa_ultralong.data.tables import has_field
from hsa_ultralong.files.lock import FileLock

logger = logging.getLogger(__name__)

STANDARD_INPUT = "-"
_STANDARD_INPUT_NAME = "standard input"
_COPY_BYTES = 1 << 20
_NUM_NAMED = 3


# a file, or a hub dataset: a string with its prefix
Input = InputFile | str


class PassedOver(NamedTuple):
    """A file of a folder that is not read, and why: words that fit behind a number, such as "images"."""

    path: str
    reason: str


class Spool:
    """Copies of what comes through standard input and pipes, which can be read only once; removed at the end.

    Args:
        place: folder for the copies, made when the first is wanted, held by one process at a time; a temporary one if
            not given.
    """

    def __init__(self, place: Path | None = None) -> None:
        self._place = place
        self._lock: FileLock | None = None
        self._num_copies = 0
        self._made: list[Path] = []

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            assert self._place is not None
            # removed while it is held, so that nobody finds a folder that is about to go
            shutil.rmtree(self._place, ignore_errors=True)
            self._lock.release()
            remove_empty(self._made)

    def copy(self, stream: BinaryIO, name: str, encoding: str) -> InputFile:
        """Read a stream to its end into a file.

        Raises:
            ValueError: another process uses the same place, or it is a link. OSError: the disk is full, or the stream
                fails.
        """
        path = self._folder() / str(self._num_copies)
        self._num_copies += 1
        digest = hashlib.sha256()
        # what a killed process left goes; of a link the link, not what it points to
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            while data := stream.read(_COPY_BYTES):
                digest.update(data)
                file.write(data)
        return InputFile(path, name, encoding, digest.hexdigest())

    def _folder(self) -> Path:
        if self._place is None:
            self._place = Path(tempfile.mkdtemp(prefix="hsa-"))
        if self._lock is None:
            self._made = missing_parents(self._place)
            self._place.mkdir(parents=True, exist_ok=True)
            if self._place.is_symlink():
                raise ValueError(f"{self._place} is a symbolic link, which is not followed here; remove it")
            self._lock = FileLock.acquire(self._place / "lock", f"{self._place} is in use")
        return self._place


def missing_parents(path: Path) -> list[Path]:
    """The folders around a path that do not exist yet, innermost first."""
    return [folder for folder in path.absolute().parents if not os.path.lexists(folder)]


def remove_empty(folders: Iterable[Path]) -> None:
    """Remove folders that were made in vain; what holds something stays."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def spool_of(output: Path) -> Spool:
    """The spool of a command that writes `output`: a hidden folder beside it."""
    return Spool(output.parent / f".{output.name}.spool")


def inputs_of(
    paths: Iterable[str | Path | Input],
    *,
    spool: Spool,
    field: str = "text",
    encoding: str = AUTO,
    passed_over: list[PassedOver] | None = None,
) -> list[Input]:
    """The inputs that paths stand for, in their order.

    Args:
        paths: files; folders, which stand for all readable files below them, sorted; "-" for standard input; pipes;
            "hf:NAME", "hf:NAME:CONFIG" or "hf:NAME:CONFIG:SPLIT": a dataset of the hub, a folder of data files, or one
            that `save_to_disk` wrote (an empty CONFIG is the default one; SPLIT is "train" if not given); inputs stay.
        spool: takes what comes through pipes.
        field: of tables; a .json, .csv or .tsv file in a folder that has none is passed over.
        encoding: of all text files.
        passed_over: gets every file of a folder that is not read; a warning counts them and names some in any case.

    Raises:
        ValueError: no path, one that does not exist or is no file, standard input twice, or a folder without anything
            to read.
    """
    check_encoding(encoding)
    inputs: list[Input] = []
    for entry in paths:
        if isinstance(entry, InputFile) or str(entry).startswith(HUB_PREFIX):
            inputs.append(entry if isinstance(entry, InputFile) else str(entry))
        elif str(entry) == STANDARD_INPUT:
            if any(isinstance(one, InputFile) and one.name == _STANDARD_INPUT_NAME for one in inputs):
                raise ValueError("standard input (-) is given twice, but can be read only once")
            inputs.append(_standard_input(spool, encoding))
        elif Path(entry).is_dir():
            inputs += _files_below(Path(entry), field, encoding, passed_over)
        else:
            inputs.append(_named_file(Path(entry), spool, encoding))
    if not inputs:
        raise ValueError(f"no paths given; pass files, folders, or - for standard input: {kinds.READABLE}")
    return inputs


def source_files(
    paths: Sequence[str | Path],
    *,
    spool: Spool,
    field: str = "text",
    encoding: str = AUTO,
    passed_over: list[PassedOver] | None = None,
) -> list[InputFile]:
    """As `inputs_of`, without hub datasets."""
    for path in paths:
        if str(path).startswith(HUB_PREFIX):
            raise ValueError(f"{path}: hub datasets are read by hsa data only; pass files or folders")
    found = inputs_of(paths, spool=spool, field=field, encoding=encoding, passed_over=passed_over)
    return [one for one in found if isinstance(one, InputFile)]


def file_label(path: Path) -> str:
    """A path as text, with what is no UTF-8 in it written as escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _standard_input(spool: Spool, encoding: str) -> InputFile:
    stream = getattr(sys.stdin, "buffer", None)
    if stream is None:
        raise ValueError("standard input is closed; pass a file, or pipe text into -")
    return spool.copy(stream, _STANDARD_INPUT_NAME, encoding)


def _named_file(path: Path, spool: Spool, encoding: str) -> InputFile:
    name = file_label(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ValueError(f"{name} does not exist; pass a file, a folder, or - for standard input") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISREG(mode):
        return InputFile(path, name, encoding)
    if not stat.S_ISFIFO(mode):
        raise ValueError(f"{name} is a device or a socket; pass a file, a folder, or - for standard input")
    with path.open("rb") as stream:
        return spool.copy(stream, name, encoding)


def _files_below(folder: Path, field: str, encoding: str, passed_over: list[PassedOver] | None) -> list[InputFile]:
    found: list[InputFile] = []
    skipped: list[PassedOver] = []
    for root, folders, names in os.walk(folder, onerror=lambda error: skipped.append(_unreadable(error))):
        for name in list(folders):
            path = Path(root, name)
            if name.startswith(".") or path.is_symlink():
                folders.remove(name)
                reason = "hidden" if name.startswith(".") else "links to folders"
                skipped.append(PassedOver(file_label(path) + os.sep, reason))
        for name in names:
            file = InputFile(Path(root, name), file_label(Path(root, name)), encoding, is_found=True)
            if reason := _why_not(file, field):
                skipped.append(PassedOver(file.name, reason))
            else:
                found.append(file)
    skipped.sort()
    if not found:
        held = f" ({_summary(skipped)})" if skipped else ""
        raise ValueError(f"folder {file_label(folder)} holds nothing to read{held}; what can be read: {kinds.READABLE}")
    if skipped:
        logger.warning("passed over %d in folder %s: %s", len(skipped), file_label(folder), _summary(skipped))
    if passed_over is not None:
        passed_over += skipped
    return sorted(found, key=lambda file: file.path)


def _unreadable(error: OSError) -> PassedOver:
    return PassedOver(file_label(Path(error.filename)), f"that cannot be read ({error.strerror})")


def _why_not(file: InputFile, field: str) -> str:
    """Why a file in a folder is passed over, "" if it is read."""
    if file.path.name.startswith("."):
        return "hidden"
    try:
        status = file.path.stat()
    except OSError:
        return "links to nothing"
    if not stat.S_ISREG(status.st_mode):
        return "pipes, sockets or devices"
    kind = kinds.kind_by_name(file.name)
    if not kind:
        return kinds.why_unreadable(file.name)
    if status.st_size == 0:
        return "empty"
    if kind in (kinds.JSON, kinds.CSV, kinds.TSV):
        return "" if has_field(file, kind, field) else f"tables without a field {field!r} (--text-field)"
    return kinds.missing_library(kind)


def _summary(skipped: Sequence[PassedOver]) -> str:
    by_reason: dict[str, list[str]] = {}
    for path, reason in skipped:
        by_reason.setdefault(reason, []).append(os.path.basename(path.rstrip(os.sep)))
    parts = []
    for reason, names in sorted(by_reason.items(), key=lambda item: (-len(item[1]), item[0])):
        more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
        parts.append(f"{len(names)} {reason} ({', '.join(names[:_NUM_NAMED])}{more})")
    return ", ".join(parts)
