"""Malformed, oversized and slow requests get a 4xx in one line, and touch nothing."""

import hashlib
import io
import json
import socket
import statistics
import tarfile
import time
import zipfile
from dataclasses import replace

import httpx
import pytest

from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FILLER, connected, rest_of, serving

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
    {**COMPLETION, "reread": 2}, {**COMPLETION, "reread": 65}, {**COMPLETION, "reread": -1},
    {**COMPLETION, "prompt": "a \ud800 b"}, {**COMPLETION, "prompt": ["a", "\udcff"]},
    {**COMPLETION, "reread_tokens": 9}, {**COMPLETION, "memory": "x", "reread": 2, "reread_tokens": 0},
]  # fmt: skip
BAD_CHATS = [
    {**CHAT, "messages": []}, {**CHAT, "messages": [{"role": "wizard", "content": "x"}]},
    {**CHAT, "messages": [{"role": "user"}]}, {**CHAT, "messages": [{"role": "user", "content": ""}]},
    {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {**CHAT, "tools": [{"type": "function"}]}, {**CHAT, "tool_choice": "required"},
    {**CHAT, "tools": [], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    {**CHAT, "response_format": {"type": "json_object"}},
    {**CHAT, "messages": [{"role": "user", "content": "\ud800"}]}, {**CHAT, "max_completion_tokens": 3},
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
    before, seconds = tree(folder.parent), []
    for body in bodies:
        found = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        seconds.append(found.elapsed.total_seconds())
        assert 400 <= found.status_code < 500, (body, found.text)
        message = found.json()["error"]["message"]
        assert message and "\n" not in message and "Traceback" not in found.text and str(folder) not in found.text
    assert tree(folder.parent) == before
    # milliseconds; `hsa bench serve` measures them under load (refused_s), and here a slow machine must pass
    assert statistics.median(seconds) < 60


def test_what_is_far_too_long_or_too_many_is_refused_before_all_of_it_is_tokenised(client, server, monkeypatch):
    answers, sizes = server[1], []
    real = answers.tokenizer

    class Counting:
        def __call__(self, text):
            sizes.append(len(text))
            return real(text)

        def __getattr__(self, name):
            return getattr(real, name)

    monkeypatch.setattr(answers, "tokenizer", Counting())
    long = "word " * 200_000
    for path, body, code in (
        ("/v1/completions", {**COMPLETION, "prompt": long}, "context_length_exceeded"),
        ("/v1/completions", {**COMPLETION, "prompt": long + "\ud800"}, "context_length_exceeded"),
        ("/v1/chat/completions", {**CHAT, "messages": [{"role": "user", "content": long}]}, "context_length_exceeded"),
        ("/v1/completions", {**COMPLETION, "prompt": ["x"] * 100_000}, "too_many_choices"),
        ("/v1/completions", {**COMPLETION, "prompt": [5], "n": 99, "temperature": 1}, "too_many_choices"),
    ):
        sizes.clear()
        found = client.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert found.status_code == 400 and found.json()["error"]["code"] == code, found.text
        assert sum(sizes) < 16 * answers.limits.context_tokens
    # many characters and few tokens: the whole of it counts
    spaces = " " * (20 * answers.limits.context_tokens) + "x"
    assert len(real(spaces)["input_ids"]) < answers.limits.context_tokens
    found = client.post("/v1/completions", json={**COMPLETION, "prompt": spaces, "max_tokens": 1})
    assert found.status_code == 200, found.text


def test_half_a_surrogate_pair_is_no_text_of_a_change(client):
    headers = {"Content-Type": "application/json"}
    found = client.put("/v1/memories/x/documents/0", content='{"text": "\\ud800"}', headers=headers)
    assert found.status_code == 400 and "surrogate" in found.json()["error"]["message"]


def test_requests_beyond_a_quota_are_told_when_to_try_again(client, server, monkeypatch):
    answers = server[1]
    monkeypatch.setattr(answers.worker, "limits", replace(answers.worker.limits, waiting=0))
    for path, body in (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT)):
        for more in ({}, {"stream": True}):
            found = client.post(path, json={**body, **more})
            assert found.status_code == 429 and found.headers["retry-after"] == "2", found.text
            assert found.json()["error"]["code"] == "overloaded"
    assert answers.worker.num_waiting == answers.worker.num_running == 0
    monkeypatch.setattr(answers.memories.disk, "limits", replace(answers.memories.limits, disk_bytes=1))
    found = client.post("/v1/memories", json={"id": "large", "text": FILLER})
    assert found.status_code == 507 and client.get("/v1/memories/large").status_code == 404


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


def test_a_body_that_is_no_object_is_told_how_to_be_one(client):
    for options, said in (
        ({"content": '{"model": "nano", "prompt": "x"}'}, "Content-Type: application/json"),
        ({}, "Content-Type: application/json"),
        ({"content": "{bad", "headers": {"Content-Type": "application/json"}}, "at character 1"),
    ):
        found = client.post("/v1/completions", **options)
        assert found.status_code == 400 and said in found.json()["error"]["message"]


def test_a_body_that_is_too_large_is_refused_before_it_is_read(client):
    found = client.post("/v1/memories", json={"id": "big", "text": "x" * 2**21})
    assert found.status_code == 413 and found.json()["error"]["code"] == "body_too_large"

    def endless():
        for _ in range(64):
            yield b"x" * 2**16

    found = client.post("/v1/memories", content=endless())
    assert found.status_code == 413


def test_headers_and_bodies_that_come_too_slowly_are_refused(server, client):
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
    begun = {
        "body": head + b"Content-Length: 100\r\n\r\n{", "line": b"GE", "headers": head + b"Accept: ", "nothing": b"",
        "second": b"GET /hea",
    }  # fmt: skip
    slow = {name: connected(server[0]) for name in begun}
    slow["second"].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    first = b""
    while not first.endswith(b"}"):
        first += slow["second"].recv(4096)
    for name, one in slow.items():
        one.sendall(begun[name])
    answers = {}
    for name, one in slow.items():
        with one:
            answers[name] = rest_of(one)
    assert b"body_too_slow" in answers["body"] and answers["body"].startswith(b"HTTP/1.1 408 ")
    assert b"headers_too_slow" in answers["line"] and answers["line"].startswith(b"HTTP/1.1 408 ")
    assert answers["line"] == answers["headers"] == answers["second"] and first.startswith(b"HTTP/1.1 200 ")
    # a connection that asks nothing is closed without a word
    assert answers["nothing"] == b""
    assert client.get("/health").status_code == 200


RAW = [
    b"", b"\r\n\r\n", b"GET\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
]  # fmt: skip


def test_lines_that_are_no_requests_are_refused_and_the_server_goes_on(server, client):
    for line in RAW:
        with connected(server[0]) as one:
            one.sendall(line)
            one.shutdown(socket.SHUT_WR)
            answer = one.recv(65_536)
        assert not answer or answer.split(b" ")[1].startswith(b"4"), (line[:60], answer[:60])
        assert b"Traceback" not in answer and b"root:" not in answer
    assert client.get("/health").status_code == 200


def archive(kind):
    """An archive whose members lead elsewhere, or are far larger than they look."""
    target = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=target, mode="w") as made:
            link = tarfile.TarInfo("link.txt")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            made.addfile(link)
            above = tarfile.TarInfo("../../above.txt")
            above.size = 4
            made.addfile(above, io.BytesIO(b"text"))
    else:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as made:
            made.writestr(
                "../../above.txt" if kind == "zip" else "large.txt", b"text" if kind == "zip" else bytes(2**22)
            )
    return target.getvalue()


@pytest.mark.parametrize("kind", ["tar", "zip", "bomb"])
def test_archives_that_lead_elsewhere_leave_nothing_there(client, server, kind):
    folder = server[1].memories.folder
    before = tree(folder.parent)
    name = "a.tar" if kind == "tar" else "a.zip"
    found = client.post(f"/v1/memories/arch-{kind}/files", files=[("files", (name, archive(kind)))])
    assert found.status_code < 500 and "root:" not in found.text and "/tmp" not in found.text
    if found.status_code < 300:  # read as what they hold, under a plain name
        texts = client.get(f"/v1/memories/arch-{kind}/documents").json()["data"]
        assert all("root:" not in one["name"] for one in texts)
        assert client.delete(f"/v1/memories/arch-{kind}").status_code == 200
    left = [one for one in tree(folder.parent) if not one[0].startswith(folder.name + "/default/.")]
    assert [one for one in left if "above" in one[0]] == [] and len(left) <= len(before)


@pytest.mark.parametrize(
    "files",
    [
        [], [("other", ("a.txt", b"x"))], [("files", ("a.txt", b""))], [("files", ("a.json", b"{"))],
        [("files", ("a.pdf", b"%PDF-1.4 nothing"))], [("files", ("a.zip", b"PK\x03\x04 nothing"))],
        [("files", ("a.parquet", b"PAR1"))],
    ],
)  # fmt: skip
def test_files_that_hold_no_text_are_refused(client, files):
    found = client.post("/v1/memories/nothing/files", files=files)
    # 415: a package for such files is not installed
    assert found.status_code in (400, 415) and "Traceback" not in found.text and "/tmp" not in found.text, found.text
    assert client.get("/v1/memories/nothing").status_code == 404


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/nano"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"),
    ("GET", "/v1/memories"), ("POST", "/v1/memories"), ("GET", "/v1/memories/m"), ("DELETE", "/v1/memories/m"),
    ("POST", "/v1/memories/m/files"), ("POST", "/v1/memories/m/merge"), ("GET", "/v1/memories/m/documents"),
    ("POST", "/v1/memories/m/documents"), ("GET", "/v1/memories/m/documents/1"), ("PUT", "/v1/memories/m/documents/1"),
    ("DELETE", "/v1/memories/m/documents/1"),
]  # fmt: skip
WRONG_KEYS = ["", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer right right", "Bearer RIGHT"]


def test_every_route_asks_for_a_key_before_anything_else(nano, tmp_path):
    keys = {hashlib.sha256(b"right").hexdigest(): "anna"}
    with serving(nano, tmp_path / "m", keys=keys) as (address, _), httpx.Client(base_url=address) as client:
        for method, path in ROUTES:
            found = client.request(method, path, headers={"Authorization": "Bearer wrong"})
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key", (method, path)
        for key in WRONG_KEYS:
            found = client.get("/v1/models", headers={"Authorization": key})
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer", key
        assert client.get("/v1/models", headers={"Authorization": "bearer right"}).status_code == 200
        assert not list((tmp_path / "m").iterdir())


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
