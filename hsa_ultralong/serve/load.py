"""Load on `hsa serve` in a process of its own: many clients at once, and kills in the middle of writing.

Called by `hsa bench serve`; tests/serve/test_load.py.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import itertools
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_KEYS = {"anna": "key-of-anna", "bob": "key-of-bob"}
_FILLER = "The old road runs along the river and then up to the mill. Nobody knows how long it has been there. " * 8
_OBJECTS = ("silver lantern", "calm ferry", "amber falcon", "quiet harbor")
_START_SECONDS = 600.0
_ASKED: dict[str, Any] = {"model": "m", "prompt": "The secret code"}
# requests that are none: each is refused with 4xx
_MALFORMED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {}), ("/v1/completions", {**_ASKED, "max_tokens": "7"}),
    ("/v1/completions", {**_ASKED, "memory": "../x"}), ("/v1/completions", {**_ASKED, "memory": "none"}),
    ("/v1/completions", {**_ASKED, "prompt": _FILLER * 100}), ("/v1/chat/completions", {"model": "m", "messages": []}),
    ("/v1/memories", {"id": "/etc", "text": "x"}), ("/v1/memories/none/documents", {"documents": [{"text": "x"}]}),
)  # fmt: skip
_BOUNDARY = "hsa-load-file"


@dataclass(frozen=True)
class LoadSettings:
    """requests: of all clients, over `memories` in two namespaces. max_tokens: of an answer. kills: of a server that
    is written to. supervise: which starts again by itself. server: options of `hsa serve`."""

    requests: int = 200
    clients: int = 16
    memories: int = 8
    max_tokens: int = 16
    kills: int = 20
    supervise: bool = False
    seed: int = 0
    server: Sequence[str] = ()


@dataclass(frozen=True)
class Served:
    """What came of one request; seconds from its start, `first` to the first piece of text."""

    status: int
    body: dict[str, Any]
    first: float
    seconds: float

    @property
    def text(self) -> str:
        return str(self.body["choices"][0]["text"])


class ServerProcess:
    """`hsa serve` on a folder."""

    def __init__(self, model: Path | None, folder: Path, options: Sequence[str]) -> None:
        self.began = time.perf_counter()
        folder.mkdir(parents=True, exist_ok=True)
        keys = folder / "keys.txt"
        keys.write_text("".join(f"{name} {key}\n" for name, key in _KEYS.items()))
        command = [sys.executable, "-m", "hsa_ultralong", "serve", *([] if model is None else [str(model)])]
        command += ["--memories", str(folder / "memories"), "--port", "0", "--keys", str(keys), "--name", "m", *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"http://([\d.]+):(\d+)", line)
        if found is None:
            self.process.kill()
            raise ValueError(f"hsa serve did not start: {line}{self.process.stdout.read()}"[:2000])
        self.host, self.port = found[1], int(found[2])

    def ask(
        self,
        namespace: str,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        upload: tuple[str, str] | None = None,
    ) -> Served:
        """One request; a streamed answer is put together.

        Args:
            body: JSON. upload: name and text of a file, in its place.

        Raises:
            OSError, http.client.HTTPException: the server is gone.
        """
        began = time.perf_counter()
        connection = http.client.HTTPConnection(self.host, self.port, timeout=_START_SECONDS)
        with contextlib.closing(connection):
            data, kind = (None if body is None else json.dumps(body)), "application/json"
            if upload is not None:
                data, kind = _form(*upload), f"multipart/form-data; boundary={_BOUNDARY}"
            headers = {"Authorization": f"Bearer {_KEYS[namespace]}", "Content-Type": kind}
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            if "event-stream" not in response.headers.get("Content-Type", ""):
                found, first = json.loads(response.read()), time.perf_counter() - began
            else:
                found, first = _streamed(response, began)
        return Served(response.status, found, first, time.perf_counter() - began)

    def kill_served(self) -> None:
        """Kill what serves below `hsa serve --supervise`."""
        self.began = time.perf_counter()
        with open(f"/proc/{self.process.pid}/task/{self.process.pid}/children") as children:
            os.kill(int(children.read()), signal.SIGKILL)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def _form(name: str, text: str) -> str:
    """A form with one file."""
    head = f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    return f"{head}{text}\r\n--{_BOUNDARY}--\r\n"


def _streamed(response: http.client.HTTPResponse, began: float) -> tuple[dict[str, Any], float]:
    """The answer that events add up to, and when its first text came."""
    text, first, last = "", 0.0, {}
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if "error" in event:
                return event, time.perf_counter() - began
            last = event["choices"][0]
            text += last["text"]
            first = first or (time.perf_counter() - began if text else 0.0)
    return {"choices": [{**last, "text": text}]}, first or time.perf_counter() - began


def _code(number: int) -> str:
    return str(1_000_000 + 7919 * (number + 1))


def _fact(number: int) -> str:
    return f"The secret code of the {_OBJECTS[number % len(_OBJECTS)]} is {_code(number)}. "


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not pass."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def load_results(
    model: Path | None, folder: Path, settings: LoadSettings, progress: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """Numbers of a run of clients: every answer is compared with the one that was given alone."""
    server = ServerProcess(model, folder, settings.server)
    try:
        names = list(_KEYS)
        # memories of one name in two namespaces: a mixture would show
        places = [(names[number % 2], f"lib{number // 2}") for number in range(settings.memories)]
        for number, (namespace, id) in enumerate(places):
            text = _FILLER + _fact(number) + _FILLER
            made = server.ask(namespace, "POST", "/v1/memories", {"id": id, "text": text})
            if made.status != 201:
                raise ValueError(f"a memory was refused: {made.body}")

        def asked(request: int) -> Served:
            number = request % settings.memories
            namespace, id = places[number]
            prompts = (f"The secret code of the {_OBJECTS[number % len(_OBJECTS)]} is", "Nobody knows")
            body = {
                "model": "m", "prompt": prompts[request // settings.memories % 2], "memory": id, "stream": True,
                "max_tokens": settings.max_tokens, "sources": 1,
            }  # fmt: skip
            return server.ask(namespace, "POST", "/v1/completions", body)

        alone = [asked(request) for request in range(2 * settings.memories)]
        began = time.perf_counter()
        with ThreadPoolExecutor(settings.clients) as pool, ThreadPoolExecutor(1) as other:
            refusals = other.submit(refusal_seconds, server)
            found = []
            for reply in pool.map(asked, range(settings.requests)):
                found.append(reply)
                progress(len(found))
            seconds = time.perf_counter() - began
    finally:
        server.kill()
    refused = {f"refused_s_p{share}": quantile(refusals.result(), share / 100) for share in (50, 99)}
    return {**_summary(alone, found, seconds, settings), **refused}


def refusal_seconds(server: ServerProcess, rounds: int = 8) -> list[float]:
    """Times of requests that are none, one after the other, beside the load.

    Raises:
        ValueError: one was not refused with 4xx.
    """
    found = [server.ask("anna", "POST", path, body) for path, body in _MALFORMED * rounds]
    if wrong := [reply.body for reply in found if not 400 <= reply.status < 500]:
        raise ValueError(f"a malformed request was not refused: {wrong[0]}")
    return [reply.seconds for reply in found]


def _summary(
    alone: Sequence[Served], found: Sequence[Served], seconds: float, settings: LoadSettings
) -> dict[str, float]:
    codes = [_code(number) for number in range(settings.memories)]
    errors = other = mixed = 0
    for request, reply in enumerate(found):
        if reply.status != 200 or "error" in reply.body:
            errors += 1
            continue
        own = request % settings.memories
        source = "".join(one["text"] for one in reply.body["choices"][0]["retrieval"]["sources"])
        mixed += any(code in reply.text + source for number, code in enumerate(codes) if number != own)
        other += reply.text != alone[request % len(alone)].text
    return {
        "requests": len(found), "errors": errors, "mixed_answers": mixed, "other_than_alone": other,
        "answers_with_the_code": sum(
            codes[request % settings.memories] in reply.text for request, reply in enumerate(found)
            if reply.status == 200 and request // settings.memories % 2 == 0
        ),
        "code_questions": sum(request // settings.memories % 2 == 0 for request in range(len(found))),
        "requests_per_s": len(found) / seconds,
        **{
            f"{name}_p{share}": quantile([value(reply) for reply in found], share / 100)
            for name, value in (("first_token_s", _first), ("answer_s", _seconds))
            for share in (50, 99)
        },
    }  # fmt: skip


def _first(reply: Served) -> float:
    return reply.first


def _seconds(reply: Served) -> float:
    return reply.seconds


class _Writer:
    """Makes a memory, uploads files to it and appends until the server is gone, noting what was acknowledged."""

    def __init__(self, namespace: str, id: str) -> None:
        self.namespace, self.id = namespace, id
        self.acknowledged: list[str] = []
        self.num_uploads = 0
        self.is_over = threading.Event()

    def run(self, server: ServerProcess) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            made = server.ask(self.namespace, "POST", "/v1/memories", {"id": self.id, "text": _fact(0) + _FILLER})
            if made.status == 201:
                self.acknowledged.append(_fact(0) + _FILLER)
            for number in itertools.takewhile(lambda _: not self.is_over.is_set(), itertools.count(1)):
                text, place = _fact(number) + _FILLER, f"/v1/memories/{self.id}"
                if number % 2:
                    made = server.ask(self.namespace, "POST", f"{place}/files", upload=(f"d{number}.txt", text))
                else:
                    body = {"documents": [{"name": f"d{number}", "text": text}]}
                    made = server.ask(self.namespace, "POST", f"{place}/documents", body)
                if made.status in (200, 201):
                    self.acknowledged.append(text)
                    self.num_uploads += number % 2


def _asker(server: ServerProcess, writers: Sequence[_Writer]) -> None:
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        while not writers[-1].is_over.is_set():
            for writer in writers:
                if writer.acknowledged:
                    _first_answer(server, writer)
            time.sleep(0.01)


def _first_answer(server: ServerProcess, writer: _Writer) -> Served:
    body = {"model": "m", "prompt": "The secret code", "memory": writer.id, "max_tokens": 1}
    return server.ask(writer.namespace, "POST", "/v1/completions", body)


def kill_results(
    model: Path | None, folder: Path, settings: LoadSettings, progress: Callable[[int], None] = lambda _: None
) -> dict[str, float]:
    """Numbers of a server that is killed again and again while two clients write and two ask."""
    chance = random.Random(settings.seed)
    writers: list[_Writer] = []
    restarts: list[float] = []
    options = [*settings.server, *(["--supervise"] if settings.supervise else [])]
    start = functools.partial(ServerProcess, model, folder, options)
    server = start()
    try:
        for round in range(settings.kills):
            known = [writer for writer in writers if writer.acknowledged]
            if known:
                _first_answer(server, known[-1])
                restarts.append(time.perf_counter() - server.began)
            new = [_Writer(namespace, f"w{round}") for namespace in _KEYS]
            writers += new
            threads = [threading.Thread(target=writer.run, args=(server,)) for writer in new]
            threads += [threading.Thread(target=_asker, args=(server, writers[-4:])) for _ in range(2)]
            for thread in threads:
                thread.start()
            time.sleep(chance.uniform(0.1, 4.0))
            if settings.supervise:
                server.kill_served()
            else:
                server.kill()
                server = start()
            for writer in new:
                writer.is_over.set()
            for thread in threads:
                thread.join()
            progress(round + 1)
        lost, partial = _damage(server, writers)
    finally:
        server.kill()
    count = sum(len(writer.acknowledged) for writer in writers)
    numbers: dict[str, float] = {
        "kills": settings.kills, "acknowledged_writes": count, "lost_writes": lost, "partial_memories": partial,
        "acknowledged_uploads": sum(writer.num_uploads for writer in writers),
    }  # fmt: skip
    if restarts:
        numbers |= {f"restart_s_p{share}": quantile(restarts, share / 100) for share in (50, 99)}
    return numbers


def _damage(server: ServerProcess, writers: Sequence[_Writer]) -> tuple[int, int]:
    """Acknowledged writes that are missing, and memories that are served with something half in them."""
    lost = partial = 0
    for namespace in _KEYS:
        listed = {one["id"]: one for one in server.ask(namespace, "GET", "/v1/memories").body["data"]}
        own = [writer for writer in writers if writer.namespace == namespace]
        get = functools.partial(_get, server, namespace)
        for writer in own:
            texts = texts_of(get, writer.id) if writer.id in listed else []
            wanted = writer.acknowledged
            lost += sum(text not in texts for text in wanted)
            # at most the one write more that was under way
            expected = [_fact(number) + _FILLER for number in range(len(texts))]
            is_half = (
                texts != expected or len(texts) > len(wanted) + 1 or (texts and listed[writer.id]["status"] != "ready")
            )
            partial += bool(is_half)
    return lost, partial


def _get(server: ServerProcess, namespace: str, path: str) -> dict[str, Any]:
    return server.ask(namespace, "GET", path).body


def texts_of(get: Callable[[str], dict[str, Any]], id: str) -> list[str]:
    """The documents of a memory of a server; `get` gives the body of an answer by its path."""
    place = f"/v1/memories/{id}/documents"
    return [get(f"{place}/{one['id']}?stop=60000")["text"] for one in get(place)["data"]]


def machine_load() -> dict[str, Any]:
    """What else ran: processes that waited for a core, over the last 1, 5 and 15 minutes."""
    return {"load_average": [round(value, 2) for value in os.getloadavg()], "cores": len(os.sched_getaffinity(0))}
