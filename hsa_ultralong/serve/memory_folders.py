"""Folders of memories on a server's disk: what lies beside each, what it takes, what a client is told of its errors.

Called by memories.py; tests/serve/test_app.py, test_kills.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.memory import MemoryFile
from hsa_ultralong.memory.files import MemoryFileError
from hsa_ultralong.serve.limits import ServeError

logger = logging.getLogger(__name__)
SUFFIX = ".hsa"
_UPLOAD_LOCK = "lock"


def is_beginning(file: MemoryFile, encoded: Sequence[tuple[str, torch.Tensor]]) -> bool:
    """Whether a memory holds the beginning of (name, tokens) documents and nothing else."""
    if len(file.documents) > len(encoded):
        return False
    for record, (name, tokens) in zip(file.documents, encoded, strict=False):
        known = file.document_tokens(record.id)
        if record.name != name or not torch.equal(known, tokens[: len(known)]):
            return False
        if len(known) < len(tokens) and not record.is_open:
            return False
    return True


def partial_of(place: Path) -> Path:
    """Where a memory is made before it is there."""
    return place.with_name(f".{place.name}.partial")


def grave_of(place: Path) -> Path:
    """Where a memory lies while it is removed."""
    return place.with_name(f".{place.name}.deleted")


def uploads_of(folder: Path) -> Path:
    """Where uploaded files lie while they are read, below the folder of all namespaces; no namespace has this name."""
    return folder / ".uploads"


@contextmanager
def held_upload(uploads: Path) -> Iterator[Path]:
    """A folder for the files of one request, which no server that starts meanwhile takes for a dead one's."""
    uploads.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=uploads) as name:
        lock = FileLock.acquire(Path(name, _UPLOAD_LOCK), f"{name} is being read", is_kept=True)
        try:
            yield Path(name)
        finally:
            lock.release()


def remove_uploads(uploads: Path) -> None:
    """What killed servers were reading, not what another one reads."""
    for left in uploads.iterdir() if uploads.is_dir() else ():
        with suppress(ValueError, OSError):
            lock = FileLock.acquire(left / _UPLOAD_LOCK, f"{left} is being read", is_kept=True)
            try:
                shutil.rmtree(left)
            finally:
                lock.release()


def marker_of(place: Path) -> Path:
    """The empty file whose time is that of the last question."""
    return place.with_name(f".{place.name}.asked")


def memory_of(place: Path) -> Path:
    """The memory that a folder, or a hidden one beside it, belongs to."""
    hidden = place.name.startswith(".") and f"{SUFFIX}." in place.name
    return place.with_name(place.name[1:].rpartition(".")[0]) if hidden else place


def remove_graves(folder: Path) -> None:
    """Finish what a killed server was removing below a folder, and forget markers of memories that are gone."""
    for grave in folder.glob(f"*/.*{SUFFIX}.deleted"):
        if not grave.parent.is_symlink():
            try:
                shutil.rmtree(grave)
            except OSError as error:
                logger.warning("a deleted memory stays on disk: %s", error)
    for marker in folder.glob(f"*/.*{SUFFIX}.asked"):
        if not marker.parent.is_symlink() and not memory_of(marker).exists():
            marker.unlink(missing_ok=True)


def bytes_of(place: Path) -> int:
    """Of all files of a memory; those that a writer takes away meanwhile do not count."""
    size = 0
    for folder, _, names in os.walk(place):
        for name in names:
            with suppress(FileNotFoundError):
                size += os.lstat(os.path.join(folder, name)).st_size
    return size


def states_of(places: Sequence[Path]) -> list[tuple[int, int] | None]:
    """What tells one committed state of each memory from another; None for one that is gone."""
    found: list[tuple[int, int] | None] = []
    for place in places:
        try:
            about = (place / "manifest.json").stat()
            found.append((about.st_ino, about.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def refusal(error: Exception, folder: Path) -> ServeError:
    """What a client is told of an error of the library, without the server's paths."""
    if isinstance(error, ServeError):
        return error
    message = str(error).replace(f"{folder}/", "").replace(str(folder), "the memories")
    if isinstance(error, OSError) and not isinstance(error, MemoryFileError):
        return ServeError(507 if error.errno == 28 else 500, f"the disk refused it: {error.strerror}", "storage")
    return ServeError(409 if isinstance(error, MemoryFileError) else 400, message, "refused")
