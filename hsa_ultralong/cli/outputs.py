"""Memories that commands write: checked before the work, and nothing left of a command that ends in an error.

Called by `hsa memorize` and `hsa memory`; tests/cli/test_outputs.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hsa_ultralong.cli.places import require_folder


def require_output(path: Path, *, may_exist: bool = False) -> None:
    """Refuse an output that a memory could not be written to; `may_exist`: a memory there is gone on with.

    Raises:
        ValueError: a file, another folder or a memory is there, or the folder cannot be written.
    """
    from hsa_ultralong.memory.files.housekeeping import require_empty

    require_folder(path)
    if path.is_dir() and not (may_exist and _holds_memory(path)):
        # what a killed command left of a memory that it was making is nothing
        require_empty(path)


@contextmanager
def nothing_left(path: Path) -> Iterator[None]:
    """If the block fails, remove the memory that it made as long as no document is in it, and the folders for it."""
    from hsa_ultralong.data.inputs import missing_parents, remove_empty

    made = [*([] if path.exists() else [path]), *missing_parents(path)]
    had_memory = _holds_memory(path)
    try:
        yield
    except BaseException:
        if not had_memory:
            _remove_empty_memory(path)
            remove_empty(made)
        raise


def _holds_memory(path: Path) -> bool:
    return (path / "manifest.json").exists()


def _remove_empty_memory(path: Path) -> None:
    """Remove the files of a memory without documents; never what holds anything else, or what another one writes."""
    from hsa_ultralong.memory import MemoryFileError, MemoryWriter

    # the lock is held: without it another command may have begun to fill the memory
    with suppress(MemoryFileError, OSError), MemoryWriter.open(path) as writer:
        if not writer.documents:
            (path / "shards").rmdir()
            (path / "manifest.json").unlink()
            (path / "writer.lock").unlink()
