"""The right of one process to write somewhere. tests/files/test_regular.py, tests/memory/test_files_refusals.py."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import socket
import time
import weakref
from contextlib import suppress
from pathlib import Path

from hsa_ultralong.files.folder import is_same_file, open_file, parent_of
from hsa_ultralong.files.regular import WrongKind

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class FileLock:
    """An flock on a file, freed by the kernel when the process dies. A process forked meanwhile does not hold it."""

    _held: weakref.WeakSet[FileLock] | None = None

    def __init__(self, path: Path, descriptor: int, is_kept: bool = False) -> None:
        self.path, self._is_kept = path, is_kept
        self._descriptor: int | None = descriptor
        if FileLock._held is None:
            FileLock._held = weakref.WeakSet()
            os.register_at_fork(after_in_child=FileLock._forget)
        FileLock._held.add(self)

    @staticmethod
    def acquire(
        path: Path, doing: str, advice: str = "wait until it is done, or stop it", *, is_kept: bool = False
    ) -> FileLock:
        """Take the lock or refuse at once. A file that is hard-linked elsewhere, in a copy of its folder for example,
        is replaced, not written to.

        Args:
            doing: what its holder does, for the refusal: "runs/nano is being trained".
            is_kept: the file stays when the lock is released; else it is removed.

        Raises:
            ValueError: another process holds it (named), or a link or no regular file is in its place.
            OSError: it cannot be written.
        """
        while True:
            with parent_of(path.parent, path.name) as (parent, leaf):
                try:
                    descriptor = open_file(parent, leaf, os.O_RDWR | os.O_CREAT)
                except WrongKind as error:
                    raise ValueError(f"{path} {error.strerror}; remove it") from error
                lock = FileLock(path, descriptor, is_kept=True)
                try:
                    _flock(descriptor, path, f"{doing} by {{}}; {advice}")
                    is_shared = os.fstat(descriptor).st_nlink > 1
                    if is_shared and lock.is_in_place:
                        os.unlink(leaf, dir_fd=parent)
                except BaseException:
                    lock.release()
                    raise
            # between open and flock the file, or its folder, may have been removed or renamed and made anew
            if not is_shared and lock.is_in_place:
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode("ascii", "replace"), 0)
                lock._is_kept = is_kept
                return lock
            lock.release()

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    @property
    def is_in_place(self) -> bool:
        """Whether the file is still the one that is locked: without it another process can take the lock."""
        return self._descriptor is not None and is_same_file(self._descriptor, self.path.parent, self.path.name)

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if not self._is_kept and self.is_in_place:
            with suppress(OSError):
                self.path.unlink()
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)

    def __del__(self) -> None:
        self.release()

    @staticmethod
    def _forget() -> None:
        """A child that kept the descriptors open would hold the locks after its parent's death."""
        for lock in list(FileLock._held or ()):
            if lock._descriptor is not None:
                os.close(lock._descriptor)
                lock._descriptor = None


def _flock(descriptor: int, path: Path, refusal: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            found = b""
            for _ in range(20):
                found = os.pread(descriptor, 200, 0)
                if found:
                    break
                # its holder is just about to write who it is
                time.sleep(0.01)
            owner = re.fullmatch(r"(\d+)( \S+)?\n", found.decode("ascii", "replace"))
            process = "another process" if owner is None else f"process {owner[1]}"
            if owner is not None and owner[2]:
                process += f" on{owner[2]}"
            raise ValueError(refusal.format(process)) from None
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning(
            "the file system of %s has no locks (%s): take care that no second command writes there",
            path.parent, error.strerror,
        )  # fmt: skip
