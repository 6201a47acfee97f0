"""Malformed, oversized and slow requests get a 4xx in one line, and touch nothing."""

import socket
import time

import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FILLER

MEMORY = {"id": "ok", "text": "x"}
COMPLETION = {"model": "nano", "prompt": "hello", "max_tokens": 2}
CHAT = {"model": "nano", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}

BAD_COMPLETIONS = [
    {}, [], "text", None, {"model": "nano"}, {**COMPLETION, "model": "gpt-4"}, {**COMPLETION, "model": 3},
    {**COMPLETION, "prompt": ""}, {**COMPLETION, "prompt": []}, {**COMPLETION, "prompt": [[1]]},
    {**COMPLETION, "prompt": [-1]}, {**COMPLETION, "prompt": [10**9]}, {**COMPLETION, "prompt": ["a", 1]},
    {**COMPLETION, "prompt": "word " * 2000}, {**COMPLETION, "max_tokens": 0}, {**COMPLETION, "max_tokens": -5},
    {**COMPLETION, "max_tokens": 10**12}, {**COMPLETION, "max_tokens": 1.5}, {**COMPLETION, "max_tokens": "7"},
    {**COMPLETION, "temperature": -1}, {**COMPLETION, "temperature": 1e9}, {**COMPLETION, "top_p": 0},
    {**COMPLETION, "top_p": 2}, {**COMPLETION, "n": 0}, {**COMPLETION, "n": 10**6, "temperature": 1},
    {**COMPLETION, "n": 2}, {**COMPLETION, "seed": -1}, {**COMPLETION, "stop": ["a"] * 99},
    {**COMPLETION, "stop": ""}, {**COMPLETION, "logprobs": 99}, {**COMPLETION, "pool_memroy": "lib"},
    {**COMPLETION, "echo": True}, {**COMPLETION, "best_of": 4}, {**COMPLETION, "logit_bias": {"5": 1}},
    {**COMPLETION, "presence_penalty": 0.5}, {**COMPLETION, "suffix": "end"}, {**COMPLETION, "sources": 3},
    {**COMPLETION, "memory": "none-such"}, {**COMPLETION, "memory": "../ok"}, {**COMPLETION, "memory": "/etc/passwd"},
    {**COMPLETION, "memory": "a/b"}, {**COMPLETION, "memory": "\u0000"}, {**COMPLETION, "memory": {"id": "x"}},
    {**COMPLETION, "memory": ["x"] * 50}, {**COMPLETION, "stream_options": {"include_usage": True}},
]  # fmt: skip
BAD_CHATS = [
    {**CHAT, "messages": []}, {**CHAT, "messages": [{"role": "wizard", "content": "x"}]},
    {**CHAT, "messages": [{"role": "user"}]}, {**CHAT, "messages": [{"role": "user", "content": ""}]},
    {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {**CHAT, "tools": [{"type": "function"}]}, {**CHAT, "response_format": {"type": "json_object"}},
    {**CHAT, "top_logprobs": 2}, {**CHAT, "messages": [*CHAT["messages"], *CHAT["messages"]]},
]  # fmt: skip
BAD_MEMORIES = [
    {}, {"id": "x"}, {"text": "x"}, {**MEMORY, "id": ""}, {**MEMORY, "id": ".."}, {**MEMORY, "id": "a/b"},
    {**MEMORY, "id": "x" * 65}, {**MEMORY, "id": "a\n"}, {**MEMORY, "id": ".hidden"}, {**MEMORY, "text": ""},
    {**MEMORY, "documents": [{"text": "y"}]}, {"id": "x", "documents": []}, {**MEMORY, "path": "/etc/passwd"},
    {"id": "x", "documents": [{"text": "y", "name": 3}]},
]  # fmt: skip


def tree(folder):
    return sorted((str(one.relative_to(folder)), one.stat().st_size) for one in folder.rglob("*") if one.is_file())


@pytest.mark.parametrize(
    ("path", "bodies"),
    [("/v1/completions", BAD_COMPLETIONS), ("/v1/chat/completions", BAD_CHATS), ("/v1/memories", BAD_MEMORIES)],
)
def test_malformed_requests_get_one_line_and_leave_nothing(client, server, path, bodies):
    folder = server[1].memories.folder
    before = tree(folder.parent)
    for body in bodies:
        found = client.post(path, json=body)
        assert 400 <= found.status_code < 500, (body, found.text)
        message = found.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in found.text and str(folder) not in found.text
    assert tree(folder.parent) == before


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/memories/..%2f..%2fetc", 404), ("GET", "/v1/memories/%2e%2e", 400),
        ("DELETE", "/v1/memories/x", 404),
        ("GET", "/v1/memories/x/documents", 404), ("GET", "/v1/memories/x/documents/one", 400),
        ("GET", "/nothing", 404),
        ("PUT", "/v1/memories/x/documents/1", 400), ("PATCH", "/v1/models", 405), ("GET", "/v1/models/other", 404),
        ("POST", "/v1/memories/x/merge", 400), ("GET", "/page.html", 404), ("GET", "/v1/memories/%00", 400),
    ],
)  # fmt: skip
def test_paths_that_are_none_are_refused(client, method, path, status):
    found = client.request(method, path)
    assert found.status_code == status and found.json()["error"]["message"]


def test_a_body_that_is_no_json_is_refused(client):
    for body in (b"{", b"\xff\xfe", b"[" * 100_000, b'{"model": "nano", "prompt": NaN}'):
        found = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert found.status_code == 400, found.text


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    found = client.post("/v1/memories", json={"id": "big", "text": "x" * 2**21})
    assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"

    def endless():
        for _ in range(64):
            yield b"x" * 2**16

    found = client.post("/v1/memories", content=endless())
    assert found.status_code == 413


def test_a_body_that_comes_too_slowly_is_refused(server):
    host, port = server[0].removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=HANG_SECONDS) as slow:
        slow.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        answer = slow.recv(4096)
    assert b"408" in answer.split(b"\r\n")[0]


def test_a_client_that_leaves_gives_its_row_back(client, server):
    answers = server[1]
    assert client.post("/v1/memories", json={"id": "left", "text": FILLER}).status_code == 201
    body = {"model": "nano", "prompt": "The old road", "max_tokens": 400, "stream": True, "memory": "left"}
    with client.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    end = time.monotonic() + HANG_SECONDS
    while answers.worker.num_running and time.monotonic() < end:
        time.sleep(0.05)
    assert answers.worker.num_running == 0
