"""A process that serves nothing itself: it imports, opens the port, and starts the server again whenever that dies.

Most of a start is importing torch and transformers; the server is a fork, which has them. Connections wait at the open
port meanwhile, so clients see at most the answers fail that were under way. Linux only, and nothing may run on a device
or in threads before the fork. Called by cli/serve.py; tests/serve/test_supervisor.py.
"""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType

_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
# a server that dies so often in a row before it serves would die again
_MOST_AT_START = 3


def open_port(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        ValueError: the address is taken or cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: {error.strerror}") from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"port {port} of {host}: {why}; give another --port or --host") from None


def fork_servers(report: Callable[[str], None]) -> Callable[[], object]:
    """Return in a fork, and in a new one whenever that dies; this process itself stays here until the end.

    SIGTERM and SIGINT are passed on.

    Args:
        report: takes a line about a death.

    Returns:
        What the fork calls once it serves.

    Raises:
        ValueError: not on Linux.
        SystemExit: here, in the first process, with the exit code of a server that ended by itself; 1 if three in a
            row died before they served.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError("--supervise needs Linux; elsewhere a service manager starts hsa serve again")
    child, stopped_by, in_a_row = 0, 0, 0

    def pass_on(number: int, _: FrameType | None) -> None:
        nonlocal stopped_by
        stopped_by = number
        if child:
            os.kill(child, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    while True:
        told, tell = os.pipe()
        child = _fork()
        if not child:
            os.close(told)
            for number, handler in before.items():
                signal.signal(number, handler)
            if stopped_by:  # told before the line above
                os.kill(os.getpid(), stopped_by)
            return functools.partial(os.write, tell, b"1")
        os.close(tell)
        if stopped_by:  # told between two servers
            os.kill(child, stopped_by)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        child, has_served = 0, bool(os.read(told, 1))
        os.close(told)
        if stopped_by or code >= 0:
            raise SystemExit(max(code, 0))
        in_a_row = 0 if has_served else in_a_row + 1
        name = signal.Signals(-code).name
        if in_a_row == _MOST_AT_START:
            report(f"the server died of {name}; {_MOST_AT_START} in a row before they served")
            raise SystemExit(1)
        report(f"the server died of {name} and is started again")


def _fork() -> int:
    """Number of a process that dies with this one, 0 in it."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if not child:
        # Ctrl-C in a terminal is for the parent alone, which passes it on once
        os.setpgid(0, 0)
        ctypes.CDLL(None, use_errno=True).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
    return child
