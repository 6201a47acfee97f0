"""A server that is killed in the middle of writing: what was acknowledged is there, and nothing half is served."""

import logging
import multiprocessing
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest
import torch

from hsa_ultralong.inference import reading_loop
from hsa_ultralong.inference.file_reader import _FileSink
from hsa_ultralong.memory.files import MemoryFile, MemoryWriter
from hsa_ultralong.memory.opening import open_memory
from hsa_ultralong.serve import memories
from hsa_ultralong.serve.load import texts_of
from hsa_ultralong.testing.processes import HANG_SECONDS
from tests.serve.conftest import FILLER, memories_of, serving

logger = logging.getLogger(__name__)


def serve_in_fork(nano, folder, place):
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    with serving(nano, folder) as (address, _):
        place.send(address)
        time.sleep(HANG_SECONDS)


class Server:
    """A server in a fork of this process, which starts at once."""

    def __init__(self, nano, folder):
        context = multiprocessing.get_context("fork")
        here, there = context.Pipe()
        self.process = context.Process(target=serve_in_fork, args=(nano, folder, there), daemon=True)
        self.process.start()
        self.client = httpx.Client(base_url=here.recv(), timeout=HANG_SECONDS)
        self.is_killed = threading.Event()

    def kill(self):
        self.process.kill()
        self.process.join()
        self.is_killed.set()


def fact(number):
    return f"The secret code of the calm ferry is {1_000_000 + number}. {FILLER}"


def write_until_killed(server, id, acknowledged, begun):
    """Make a memory, then append, upload and replace in it, noting what was begun and what the server has confirmed."""
    texts = []

    def write(after, method, path, **body):
        begun[id] = after
        answer = server.client.request(method, f"/v1/memories{path}", **body)
        assert answer.status_code in (200, 201), answer.text
        acknowledged.setdefault(id, []).append(after)
        return after

    try:
        texts = write([fact(0)], "POST", "", json={"id": id, "text": fact(0)})
        for number in range(1, 1000):
            text, place = fact(number), f"/{id}/documents"
            if number % 3 == 1:
                document = {"name": f"d{number}", "text": text}
                texts = write([*texts, text], "POST", place, json={"documents": [document]})
            elif number % 3 == 2:
                upload = [("files", (f"d{number}.txt", text.encode()))]
                texts = write([*texts, text], "POST", f"/{id}/files", files=upload)
            else:
                first = server.client.get(f"/v1/memories{place}").json()["data"][0]["id"]
                texts = write([text, *texts[1:]], "PUT", f"{place}/{first}", json={"text": text})
    except httpx.HTTPError:
        pass


def ask_until_killed(server, acknowledged):
    """Questions of memories that were acknowledged, while the writer writes."""
    try:
        while not server.is_killed.is_set():
            for id in list(acknowledged):
                body = {"model": "nano", "prompt": "The secret code", "memory": id, "max_tokens": 2}
                assert server.client.post("/v1/completions", json=body).status_code == 200
            time.sleep(0.01)
    except httpx.HTTPError:
        pass


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_what_was_acknowledged_survives_a_kill_and_nothing_half_is_served(nano, tmp_path, kills):
    chance, acknowledged, begun = random.Random(0), {}, {}
    for round in range(kills):
        id = f"m{round}"
        server = Server(nano, tmp_path / "memories")
        with ThreadPoolExecutor(2) as threads:
            clients = [
                threads.submit(write_until_killed, server, id, acknowledged, begun),
                threads.submit(ask_until_killed, server, acknowledged),
            ]
            end = time.monotonic() + HANG_SECONDS
            # every other kill may come while the memory is still being made
            writes = chance.randint(1, 5) if round % 2 else 0
            while len(acknowledged.get(id, [])) < writes and time.monotonic() < end and not clients[0].done():
                time.sleep(0.005)
            time.sleep(chance.uniform(0.05, 1.5))
            server.kill()
        for client in clients:
            client.result()
        server.client.close()
    counts = sum(map(len, acknowledged.values())), len(acknowledged)
    logger.info("%d kills, %d writes acknowledged in %d memories", kills, *counts)
    assert len(acknowledged) >= kills // 2
    server = Server(nano, tmp_path / "memories")
    try:
        infos = {one["id"]: one for one in server.client.get("/v1/memories").json()["data"]}
        assert set(acknowledged) <= set(infos) <= set(begun)
        for id, info in infos.items():
            assert info["status"] == "ready"
            texts = texts_of(lambda path: server.client.get(path).json(), id)
            # as the last write that was acknowledged left it, or the one that was under way
            assert texts in (acknowledged.get(id, [None])[-1], begun[id])
            body = {"model": "nano", "prompt": "The secret code of the calm ferry is", "memory": id, "max_tokens": 2}
            assert server.client.post("/v1/completions", json=body).status_code == 200
            # and it can be written again
            more = {"documents": [{"name": "again", "text": "One more line."}]}
            assert server.client.post(f"/v1/memories/{id}/documents", json=more).status_code == 200
    finally:
        server.kill()


def test_a_long_request_goes_on_after_a_kill_and_makes_what_one_made_at_once_is(nano, tmp_path, monkeypatch):
    documents = [("a", FILLER * 8), ("b", fact(0)), ("c", fact(1))]
    monkeypatch.setitem(reading_loop._PIECE_TOKENS, "cpu", 128)
    monkeypatch.setattr(memories, "COMMIT_TOKENS", 256)
    place, publish = tmp_path / "killed" / "default" / ".long.hsa.partial", MemoryWriter.publish

    def stop_after_the_second(writer, state=None):
        generation = publish(writer, state)
        if generation == 2:
            time.sleep(HANG_SECONDS)
        return generation

    monkeypatch.setattr(MemoryWriter, "publish", stop_after_the_second)
    server = Server(nano, tmp_path / "killed")
    monkeypatch.setattr(MemoryWriter, "publish", publish)
    body = {"id": "long", "documents": [{"name": name, "text": text} for name, text in documents]}
    with ThreadPoolExecutor(1) as pool, suppress(httpx.HTTPError):
        asked = pool.submit(server.client.post, "/v1/memories", json=body)
        end = time.monotonic() + HANG_SECONDS
        while not (place / "manifest.json").exists() or MemoryFile.open_unverified(place).generation < 2:
            assert time.monotonic() < end
            time.sleep(0.01)
        server.kill()
        asked.result()
    server.client.close()
    with MemoryFile.open_unverified(place) as file:
        known = file.num_tokens
    assert known >= 256 and memories_of(nano, tmp_path / "killed").ids("default") == []

    counts, made, take = [], [], _FileSink.take

    def counted(sink, tokens, *rest, **options):
        counts[-1] += len(tokens)
        return take(sink, tokens, *rest, **options)

    monkeypatch.setattr(_FileSink, "take", counted)
    for folder in ("killed", "whole"):
        counts.append(0)
        memories_of(nano, tmp_path / folder).create("default", "long", documents)
        made.append(open_memory(tmp_path / folder / "default" / "long.hsa").loaded())
    left, right = made
    assert counts == [right.num_tokens - known, right.num_tokens]
    for name in ("k", "v", "landmarks"):
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert [(one.name, one.tokens.tolist()) for one in left.documents] == [
        (one.name, one.tokens.tolist()) for one in right.documents
    ]


def test_a_server_that_is_told_to_stop_while_it_starts_ends_well(tmp_path):
    code = """
import sys, time
from hsa_ultralong.cli import main, serve

def late(*_):
    print("starting", flush=True)
    time.sleep(600)

serve._check_choices = late
sys.argv = ["hsa", "serve"]
main.main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout.readline() == "starting\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_SECONDS) == 0
    assert process.stdout.read() == "Stopped.\n"
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_stop_finishes_its_answers(tmp_path, number):
    command = [sys.executable, "-m", "hsa_ultralong", "serve", "--memories", str(tmp_path / "memories"), "--port", "0"]
    options = ["--dtype", "fp32", "--device", "cpu"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    line = process.stdout.readline()
    address = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert address, line + process.stdout.read()
    body = {"model": "nano", "prompt": "The old road", "max_tokens": 200}
    answers = []
    with httpx.Client(base_url=address[0], timeout=HANG_SECONDS) as client:
        asking = threading.Thread(
            target=lambda: answers.append(client.post("/v1/completions", json=body).json()["choices"][0])
        )
        asking.start()
        end = time.monotonic() + HANG_SECONDS
        while "hsa_rows_running 1" not in client.get("/metrics").text and time.monotonic() < end:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(HANG_SECONDS) == 0
        asking.join(HANG_SECONDS)
    process.stdout.close()
    assert answers and answers[0]["finish_reason"] in ("length", "stop")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--host", "0.0.0.0"), "give --keys"),
        (("--store", "moon"), "--store must be one of"),
        (("--evict",), "--evict needs --max-disk"),
        (("--keys", "/dev/null"), "regular file"),
        (("--max-body", "0"), "--max-body: from 1 to"),
        (("--context", "many"), "--context"),
        (("--allow-host", "https://a.org"), "--allow-host: a host is a name"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(tmp_path, options, message):
    from typer.testing import CliRunner

    from hsa_ultralong.cli.main import app

    found = CliRunner().invoke(app, ["serve", "--memories", str(tmp_path / "m"), *options])
    assert found.exit_code != 0 and message in str(found.exception) + found.output
    assert not (tmp_path / "m").exists()


def test_keys_that_are_no_text_are_refused(tmp_path):
    from hsa_ultralong.cli.serve import read_keys

    place = tmp_path / "keys"
    place.write_bytes(b"anna \xff")
    with pytest.raises(ValueError, match="keys is no UTF-8 text, from byte 5 on"):
        read_keys(place)


def test_a_port_that_is_taken_is_refused_in_one_line():
    import uvicorn

    from hsa_ultralong.cli.serve import _Server

    async def empty(scope, receive, send):
        pass

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = uvicorn.Config(empty, port=taken.getsockname()[1], lifespan="off", log_level="critical")
        with pytest.raises(ValueError, match="the address is taken or cannot be used; give another --port"):
            _Server(config, None).run()
