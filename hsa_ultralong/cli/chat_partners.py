"""Who answers in `hsa chat`: a model in this process, or a running `hsa serve`. Called by chat.py.

Both have `pieces(text)`, the answer as it comes; `found()`, what is known of it so far, with its passages; `keep`,
which makes a turn part of the conversation and, where it is remembered, returns its name once it is on disk; and
`clear`. tests/cli/test_chat.py, tests/serve/test_chat.py.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from hsa_ultralong.cli.ask import report

MOST_SOURCES = 8
_SECONDS = 600.0


class Here:
    """A model in this process."""

    def __init__(self, talk: Any) -> None:
        self.talk = talk
        self.stream: Any = None

    def pieces(self, text: str) -> Iterator[str]:
        self.stream = self.talk.stream(text)
        yield from self.stream

    def found(self) -> dict[str, Any]:
        return report(self.stream.answer, self.stream.memory, self.talk.tokenizer, MOST_SOURCES)

    def keep(self, text: str, answer: str) -> str | None:
        name: str | None = self.talk.keep(text, answer)
        return name

    def clear(self) -> None:
        self.talk.clear()

    @property
    def messages(self) -> list[dict[str, str]]:
        found: list[dict[str, str]] = self.talk.messages
        return found

    @property
    def num_left_out(self) -> int:
        return int(self.talk.num_left_out)


class There:
    """A server: `hsa serve`, whose memories are named by their ids."""

    def __init__(
        self,
        address: str,
        key: str | None,
        memories: list[str],
        *,
        remember: str | None = None,
        system: str | None = None,
        **options: Any,
    ) -> None:
        """
        Raises:
            ValueError: no address of a server, nobody answers there, or a memory that it does not have.
        """
        if urllib.parse.urlsplit(address).scheme not in ("http", "https"):
            raise ValueError(f"--server is an address such as http://localhost:8000, got {address!r}")
        self.address, self.key = address.rstrip("/").removesuffix("/v1"), key
        (model,) = self._call("/v1/models")["data"]
        self.name, self.is_chat = str(model["id"]), bool(model.get("has_chat_template"))
        if system is not None and not self.is_chat:
            raise ValueError(f"--system needs a chat template, and {self.name} has none")
        for id in memories:
            self._memory(id, may_lack=False)
        self.memories, self.remember, self.system = memories, remember, system
        self.number = 1 if remember is None else self._turns_before(remember) + 1
        self.options = {name: value for name, value in options.items() if value is not None}
        self.options.setdefault("max_tokens", 256 if self.is_chat else 24)
        self.messages: list[dict[str, str]] = []
        self.num_left_out = 0
        self._found: dict[str, Any] = {}

    # the conversation -------------------------------------------------------------------------------------------------

    def pieces(self, text: str) -> Iterator[str]:
        self._found = {}
        # without a chat template every message is asked by itself
        kept = self.messages if self.is_chat else []
        while True:
            try:
                response = self._open("/v1/chat/completions", self._body(text, kept))
                break
            except _Refused as error:
                if error.code != "context_length_exceeded" or not kept:
                    raise
                kept = kept[2:]
        self.num_left_out = len(self.messages) - len(kept) if self.is_chat else 0
        text = ""
        with response:
            for event in _events(response):
                choice = event["choices"][0]
                if choice.get("retrieval"):
                    self._found = choice["retrieval"]
                piece = choice["delta"].get("content") or ""
                text += piece
                self._found["answer"] = text
                if piece:
                    yield piece

    def _body(self, text: str, kept: list[dict[str, str]]) -> dict[str, Any]:
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        body = {"model": self.name, "messages": [*first, *kept, {"role": "user", "content": text}], "stream": True}
        named = self.memories if self.number == 1 or self.remember is None else [*self.memories, self.remember]
        reading = ("reread", "reread_tokens", "unsure_below")
        options = {name: value for name, value in self.options.items() if named or name not in reading}
        return {**body, **options, **({"memory": named, "sources": MOST_SOURCES} if named else {})}

    def found(self) -> dict[str, Any]:
        def passage(source: dict[str, Any]) -> dict[str, Any]:
            return {**source, "passage": source["text"]}

        known = self._found
        return {
            "answer": known.get("answer", "").strip(),
            "weight": known.get("weight", 0.0),
            "unsure_below": known.get("unsure_below"),
            "is_uncertain": known.get("is_uncertain"),
            "sources": [passage(source) for source in known.get("sources", [])],
            "reread": [passage(source) for source in known.get("reread", [])],
        }

    def keep(self, text: str, answer: str) -> str | None:
        from hsa_ultralong.inference.conversation import turn_text

        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
        if self.remember is None:
            return None
        turn = {"name": f"turn {self.number}", "text": turn_text(text, answer)}
        if self.number == 1:
            self._call("/v1/memories", {"id": self.remember, "documents": [turn]})
        else:
            self._call(f"/v1/memories/{self.remember}/documents", {"documents": [turn]})
        self.number += 1
        return turn["name"]

    def clear(self) -> None:
        self.messages, self.num_left_out = [], 0

    # the server -------------------------------------------------------------------------------------------------------

    def _memory(self, id: str, *, may_lack: bool) -> dict[str, Any] | None:
        try:
            return self._call(f"/v1/memories/{urllib.parse.quote(id, safe='')}")
        except _Refused as error:
            if may_lack and error.code == "memory_not_found":
                return None
            raise

    def _turns_before(self, id: str) -> int:
        known = self._memory(id, may_lack=True)
        return 0 if known is None else int(known["documents"])

    def _call(self, path: str, body: Any = None) -> dict[str, Any]:
        with self._open(path, body) as response:
            value: dict[str, Any] = json.loads(response.read())
        return value

    def _open(self, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            return urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers), timeout=_SECONDS)
        except urllib.error.HTTPError as error:
            raise _refusal(error, self.address) from None
        except urllib.error.URLError as error:
            raise ValueError(f"no server answers at {self.address}: {error.reason}") from None


class _Refused(ValueError):
    """What a server said to a request, with the code that programs compare."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


def _refusal(error: urllib.error.HTTPError, address: str) -> _Refused:
    try:
        said = json.loads(error.read())["error"]
        return _Refused(f"the server refused it: {said['message']}", str(said["code"]))
    except (ValueError, KeyError, TypeError):
        return _Refused(f"{address} is no hsa serve: it answered with status {error.code}", "unknown")


def _events(response: Any) -> Iterator[dict[str, Any]]:
    """The values of server-sent events; one that is an error is raised."""
    for line in response:
        data = line.decode().strip().removeprefix("data: ")
        if not data or data == "[DONE]":
            continue
        value = json.loads(data)
        if "error" in value:
            raise _Refused(f"the server failed: {value['error']['message']}", str(value["error"]["code"]))
        yield value
