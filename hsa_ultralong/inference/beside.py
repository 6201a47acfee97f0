"""What runs on a thread beside the loading of weights, and waiting for it; tests/inference/test_rehearsal.py."""

from __future__ import annotations

import threading
from collections.abc import Callable

_beside: threading.Thread | None = None


def run_beside(work: Callable[[], None]) -> None:
    """Run `work` on a thread that `wait` waits for."""
    global _beside
    # no daemon: a process that ends meanwhile must not leave the driver half way
    _beside = threading.Thread(target=work, name="meet-device")
    _beside.start()


def wait() -> None:
    """Return when what runs beside is done: what it prepares is prepared once, not twice at the same time."""
    thread = _beside
    if thread is not None and thread is not threading.current_thread():
        thread.join()
