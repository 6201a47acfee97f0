"""What runs on a thread beside the loading of weights, and waiting for it; tests/inference/test_rehearsal.py."""

from __future__ import annotations

import threading
from collections.abc import Callable

_threads: list[threading.Thread] = []


def run_beside(work: Callable[[], None]) -> None:
    """Run `work` on a thread that `wait` waits for."""
    # no daemon: a process that ends meanwhile must not leave the driver half way
    thread = threading.Thread(target=work, name="meet-device")
    _threads.append(thread)
    thread.start()


def wait() -> None:
    """Return when all that runs beside is done: what it prepares is prepared once, not twice at the same time."""
    for thread in tuple(_threads):
        if thread is not threading.current_thread():
            thread.join()
            _threads[:] = [one for one in _threads if one is not thread]


def is_wanted() -> bool:
    """Whether anybody may still wait: the main thread has not ended."""
    return threading.main_thread().is_alive()
