"""A server that dies is started again by a process that holds the port; without torch, as the process has none here."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from hsa_ultralong.serve.supervisor import open_port
from hsa_ultralong.testing.processes import HANG_SECONDS

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of Linux")
SERVER = """
import os, signal, sys
from hsa_ultralong.serve.supervisor import fork_servers, open_port
# a shell has processes in the background ignore it
signal.signal(signal.SIGINT, signal.default_int_handler)
port = open_port("127.0.0.1", 0)
print(port.getsockname()[1], flush=True)
serves = fork_servers(lambda line: print(line, flush=True))
%s
serves()
while True:
    client, _ = port.accept()
    with client:
        client.sendall(str(os.getpid()).encode())
"""


@pytest.fixture
def supervised():
    """Starts a supervised server, whose code begins as given; the process and its port."""
    processes = []

    def start(code=""):
        command = [sys.executable, "-c", SERVER % code]
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        return processes[-1], int(processes[-1].stdout.readline())

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def pid_of_server(port):
    with socket.create_connection(("127.0.0.1", port), timeout=HANG_SECONDS) as client:
        return int(client.recv(100))


def test_a_killed_server_is_started_again_at_the_same_port(supervised):
    process, port = supervised()
    seen = {process.pid, pid_of_server(port)}
    for number in range(4):
        os.kill(pid_of_server(port), signal.SIGKILL)
        assert process.stdout.readline() == "the server died of SIGKILL and is started again\n"
        seen.add(pid_of_server(port))
        assert len(seen) == 3 + number


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_is_stopped_with_its_server(supervised, number):
    process, port = supervised()
    server = pid_of_server(port)
    process.send_signal(number)
    assert process.wait(HANG_SECONDS) == 0
    assert not is_alive(server)


def test_a_server_dies_with_the_process_above_it(supervised):
    process, port = supervised()
    server = pid_of_server(port)
    process.kill()
    process.wait()
    deadline = time.monotonic() + HANG_SECONDS
    while is_alive(server):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid):
    """Whether a process runs; one that ended and that nobody waited for does not."""
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    ("code", "exit_code", "deaths"), [("sys.exit(2)", 2, 0), ("os.kill(os.getpid(), signal.SIGSEGV)", 1, 3)]
)
def test_one_that_cannot_start_is_not_started_for_ever(supervised, code, exit_code, deaths):
    process, _ = supervised(code)
    assert process.wait(HANG_SECONDS) == exit_code
    lines = process.stdout.read().splitlines()
    assert len(lines) == deaths and all("died of SIGSEGV" in line for line in lines)


def test_a_taken_port_is_refused_in_one_line():
    with open_port("127.0.0.1", 0) as taken, pytest.raises(ValueError, match=r"in use; give another --port or --host"):
        open_port("127.0.0.1", taken.getsockname()[1])
