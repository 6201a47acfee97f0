"""Where commands write: checked before the work, so that hours are not lost to a name. tests/cli/test_places.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_folder(path: Path, option: str = "--output", *, is_new: bool = False) -> None:
    """Refuse a folder that cannot be written.

    Args:
        is_new: it must not exist yet, or be empty.

    Raises:
        ValueError: it is a file, is not empty though new, or the folder around it cannot hold it.
    """
    if path.is_dir():
        if is_new and any(path.iterdir()):
            raise ValueError(f"{option} {path} exists already; remove it or choose another folder")
    elif path.exists() or path.is_symlink():
        raise ValueError(f"{option} {path} is no folder; choose another name")
    _require_place(path, option)


def require_file(path: Path, option: str = "--output", suffixes: tuple[str, ...] = ()) -> None:
    """Refuse a file that cannot be written.

    Raises:
        ValueError: it is a folder, has a suffix of another kind, or the folder around it cannot hold it.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder; give the name of a file")
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"{option} {path}: the name must end in {' or '.join(suffixes)}")
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{option} {path} cannot be written; choose another name")
    _require_place(path.parent, option)


@contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """If the block fails, remove the folder that it was making, and the folders around it that were made for it."""
    from hsa_ultralong.data.inputs import missing_parents, remove_empty

    made = missing_parents(path)
    try:
        yield
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        remove_empty(made)
        raise


def _require_place(path: Path, option: str) -> None:
    """Look at the nearest folder that exists."""
    around = next(folder for folder in (path, *path.absolute().parents) if folder.exists() or folder.is_symlink())
    if not around.is_dir():
        raise ValueError(f"{option} {path}: {around} is no folder")
    if not os.access(around, os.W_OK | os.X_OK):
        raise ValueError(f"{option} {path}: the folder {around} cannot be written; choose another place")
