"""What a memory folder contains besides its current generation: leftovers of killed writers, strangers, gaps.

Called by writer.py, transfer.py and saving.py; tests/memory/test_files_crash.py, tests/memory/test_files_refusals.py.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hsa_ultralong.files.durable import TEMPORARY, make_folder, remove_file, sync_folder
from hsa_ultralong.files.folder import parent_of
from hsa_ultralong.files.lock import FileLock
from hsa_ultralong.memory.files.manifest import FILE, Manifest, generation_on_disk
from hsa_ultralong.memory.files.shard import FOLDER
from hsa_ultralong.memory.files.spec import MemoryFileError, clear_errors

LOCK_FILE = "writer.lock"
# by the folder inside the memory's, "" for the memory's own
_OURS = {
    "": re.compile(r"(continuation-\d{6,}\.safetensors|manifest\.json)(\.tmp)?", re.ASCII),
    FOLDER: re.compile(r"\d{6,}\.(safetensors|pages\.json)(\.tmp)?", re.ASCII),
}


def require_empty(folder: Path) -> None:
    """Refuse to make a memory in a folder that holds anything but the traces of a killed `create`.

    Raises:
        MemoryFileError: names what is there.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.name not in (LOCK_FILE, FILE + TEMPORARY))
    if FILE in names:
        raise MemoryFileError(f"{folder} holds a memory already; open it, or choose another name")
    if names and (names != [FOLDER] or _names(folder, FOLDER)):
        raise MemoryFileError(f"{folder} is not empty ({names[0]}); choose another name, or empty the folder")


def lock_writer(folder: Path) -> FileLock:
    """The right to change a memory, or a refusal at once; the lock file stays.

    Raises:
        MemoryFileError: another writer has the memory open; the message names its process.
    """
    advice = "a memory has one writer at a time, wait until it is done or open the memory for reading"
    try:
        return FileLock.acquire(folder / LOCK_FILE, f"{folder} is being written", advice, is_kept=True)
    except ValueError as error:
        raise MemoryFileError(str(error)) from error


def require_own_generation(folder: Path, lock: FileLock, stamp: bytes) -> None:
    """Refuse to write where another writer was: one can begin when `writer.lock` or the folder is taken away.

    Args:
        stamp: `generation_on_disk` of the writer's last generation.

    Raises:
        MemoryFileError: the lock file is another one or gone, or another generation is on disk.
    """
    if not lock.is_in_place:
        what = "writer.lock, or the whole folder, was removed or replaced"
    elif generation_on_disk(folder) != stamp:
        what = "another writer committed"
    else:
        return
    raise MemoryFileError(
        f"{folder}: {what} while the memory was open for writing; nothing more is written by this writer, open the "
        "memory again and repeat the change"
    )


def remove_leftovers(folder: Path, manifest: Manifest) -> None:
    """Remove temporary files and what no manifest names; files that are not ours stay."""
    make_folder(folder, FOLDER)
    wanted = manifest.files() | {FILE}
    for inside, pattern in _OURS.items():
        prefix = f"{inside}/" if inside else ""
        for name in _names(folder, inside):
            if pattern.fullmatch(name) and prefix + name not in wanted:
                remove_file(folder, prefix + name)


@contextmanager
def new_folder(path: Path, doing: str) -> Iterator[Path]:
    """A folder that takes the name `path` when the block is done; what a killed block left is removed.

    Raises:
        MemoryFileError: something is there already, or is in the way of the unfinished folder `.NAME.partial`.
    """
    target = path.absolute()
    if os.path.lexists(target) and (not target.is_dir() or any(target.iterdir())):
        raise MemoryFileError(f"{target} exists already; choose another name")
    partial = target.with_name(f".{target.name}.partial")
    with clear_errors(target, doing):
        remove_unfinished(partial)
        try:
            yield partial
            os.rename(partial, target)
            sync_folder(target.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def remove_unfinished(folder: Path) -> None:
    """Remove a memory that a killed command began, if there is one.

    Raises:
        MemoryFileError: it is being written, or is no memory.
    """
    if os.path.lexists(folder):
        _require_partial(folder)
        lock_writer(folder).release()
        shutil.rmtree(folder)


def _require_partial(folder: Path) -> None:
    """Refuse to remove what is not a memory that was being written."""
    known = {LOCK_FILE, FOLDER}
    is_ours = folder.is_dir() and not folder.is_symlink()
    is_ours = is_ours and all(name in known or _OURS[""].fullmatch(name) for name in os.listdir(folder))
    if is_ours and os.path.lexists(folder / FOLDER):
        is_ours = all(_OURS[FOLDER].fullmatch(name) for name in _names(folder, FOLDER))
    if not is_ours:
        raise MemoryFileError(f"{folder} is in the way and no unfinished memory; remove it, or choose another name")


def _names(folder: Path, inside: str) -> list[str]:
    with parent_of(folder, f"{inside}/." if inside else ".") as (descriptor, _):
        return os.listdir(descriptor)
