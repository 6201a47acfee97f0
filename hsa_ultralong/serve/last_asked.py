"""When memories were asked the last time, also before a restart: the time of an empty file beside each.

Called by disk_budget.py and memories.py; tests/serve/test_disk_budget.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path

from hsa_ultralong.serve.memory_folders import marker_of

logger = logging.getLogger(__name__)


class LastAsked:
    """Times of the last question of every memory. Thread-safe."""

    def __init__(self, seconds: float = 60.0) -> None:
        """seconds: a memory's time is written that often at most."""
        self.seconds = seconds
        self._guard = threading.Lock()
        self._known: dict[Path, int] = {}
        self._written: dict[Path, int] = {}

    def note(self, place: Path) -> None:
        """A memory is asked now."""
        now = time.time_ns()
        with self._guard:
            self._known[place] = now
            if 0 <= now - self._written.get(place, 0) < self.seconds * 1e9:
                return
            self._written[place] = now
        try:
            descriptor = os.open(marker_of(place), os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            try:
                os.utime(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            logger.warning("when %s was asked is not kept: %s", place.stem, error)

    def last(self, place: Path) -> int:
        """When a memory was asked or changed the last time, in ns of the epoch."""
        times = [self._known.get(place, 0)]
        for one in (marker_of(place), place / "manifest.json"):
            with suppress(OSError):
                times.append(one.lstat().st_mtime_ns)
        return max(times)

    def forget(self, place: Path) -> None:
        """A memory is gone."""
        with self._guard:
            self._known.pop(place, None)
            self._written.pop(place, None)
        marker_of(place).unlink(missing_ok=True)
