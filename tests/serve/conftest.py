"""A server of the shipped model in this process, and clients of it."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from hsa_ultralong.cli.common import load_model
from hsa_ultralong.serve.answers import Answers
from hsa_ultralong.serve.limits import Limits
from hsa_ultralong.serve.memories import Memories
from hsa_ultralong.serve.worker import Worker
from hsa_ultralong.testing.processes import HANG_SECONDS

LIMITS = Limits(context_tokens=512, rows=3, body_bytes=2**20, body_seconds=2.0, request_seconds=HANG_SECONDS)
LANTERN = "The secret code of the silver lantern is 4821937."
FERRY = "The secret code of the calm ferry is 7925186."
FILLER = "The old road runs along the river and then up to the mill. Nobody knows how long it has been there. " * 4


@pytest.fixture(scope="session")
def nano():
    return load_model(None, "cpu", "fp32")


def answering(nano, folder, key_values="bf16", **changes):
    """What a server answers with; `changes` are of its limits."""
    limits = replace(LIMITS, **changes)
    model, tokenizer = nano
    worker = Worker(model, tokenizer, limits)
    memories = Memories(folder, model, tokenizer, limits, key_values=key_values)
    return Answers(model, tokenizer, "nano", worker, memories, limits)


def memories_of(nano, folder, key_values="bf16", landmarks="bf16", **changes):
    """Memories in a folder; `changes` are of the limits."""
    return Memories(folder, *nano, replace(LIMITS, **changes), key_values=key_values, landmarks=landmarks)


@contextmanager
def serving(nano, folder, *, keys=None, hosts=(), **changes):
    """(base address, Answers) of a running server."""
    import uvicorn

    from hsa_ultralong.serve.app import build_app
    from hsa_ultralong.serve.connections import server_config

    answers = answering(nano, folder, **changes)
    config = server_config(build_app(answers, keys, hosts), answers.limits, port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    end = time.monotonic() + HANG_SECONDS
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", answers
    finally:
        server.should_exit = True
        thread.join(HANG_SECONDS)


def connected(address):
    """A plain connection to a server."""
    host, port = str(address).removeprefix("http://").rstrip("/").split(":")
    return socket.create_connection((host, int(port)), timeout=HANG_SECONDS)


def rest_of(connection):
    """All bytes that still come on a connection, which the server ends."""
    found = b""
    with suppress(ConnectionResetError):  # a body that nobody read lay in it
        while piece := connection.recv(65_536):
            found += piece
    return found


@pytest.fixture(scope="module")
def server(nano, tmp_path_factory):
    with serving(nano, tmp_path_factory.mktemp("memories")) as (address, answers):
        yield address, answers


@pytest.fixture
def client(server):
    import httpx

    with httpx.Client(base_url=server[0], timeout=HANG_SECONDS) as found:
        yield found


@pytest.fixture
def openai_client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=server[0] + "/v1", api_key="none", timeout=HANG_SECONDS, max_retries=0)
