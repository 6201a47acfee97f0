"""Work that runs behind its caller, one call after the other: a file is written while the next part of it is computed.

Used by inference/file_reader.py; tests/memory/test_behind.py.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

logger = logging.getLogger(__name__)


class Behind:
    """Runs calls in order on a thread of its own. A context manager: when it is left, all that was given has run.

    The first error ends the work: no later call runs, and the next `run`, `finish` or the end of the block raises it.
    A block that fails or is interrupted still has its calls run, so that what was given is never half done; a second
    interrupt drops those that have not begun.
    """

    def __init__(self, room: int) -> None:
        """room: bytes that may wait for their call; one call may always."""
        self._room, self._waiting_bytes = room, 0
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._is_ended = False
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> Behind:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        interrupt: BaseException | None = None
        while True:
            try:
                self._thread.shutdown()
                break
            except BaseException as caught:
                # what runs must end before anybody else touches its file
                self._is_ended, interrupt = True, caught
        try:
            self.finish()
        except BaseException as failure:
            if error is None and interrupt is None:
                raise
            if failure is not error:
                logger.warning("what was still to be written failed: %s", failure)
        if error is None and interrupt is not None:
            raise interrupt

    def run(self, call: Callable[[], None], num_bytes: int) -> None:
        """Have a call run that holds this many bytes; waits while there is no room for them."""
        while self._waiting and (self._is_ended or self._waiting_bytes + num_bytes > self._room):
            self._take_oldest()
        self._waiting.append((self._thread.submit(self._run, call), num_bytes))
        self._waiting_bytes += num_bytes

    def finish(self) -> None:
        """Wait until all has run."""
        while self._waiting:
            self._take_oldest()

    def _take_oldest(self) -> None:
        oldest, num_bytes = self._waiting[0]
        oldest.result()
        self._waiting.popleft()
        self._waiting_bytes -= num_bytes

    def _run(self, call: Callable[[], None]) -> None:
        if self._is_ended:
            return
        try:
            call()
        except BaseException:
            self._is_ended = True
            raise
