"""What a server allows, and what it answers when more is wanted. Called by all of serve/; tests/serve/test_app.py."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# characters of a beginning for each token of a row, and tokens by which its end may differ from the whole
_CHARACTERS, _CUT_TOKENS = 8, 64
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,62}[A-Za-z0-9])?")


class ServeError(Exception):
    """What a client is told: a status of HTTP, a message of one line, and a code that programs can compare."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Those that tell a client how to go on."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "2"} if self.status in (429, 503) else {}


@dataclass(frozen=True)
class Limits:
    """Bounds of one server.

    body_bytes: of a request. context_tokens: prompt and answer of one row. rows: answered at once. waiting: requests
    that may wait for a row. request_seconds: from arrival to the last token. body_seconds: for a body to arrive, and
    for headers. disk_bytes: of all memories, namespace_bytes: of those of one namespace, None: no bound. evict: past
    these, memories of the same namespace go. choices: of `n`. memories_per_request: of one question.
    open_memories: kept open for the next question. row_tokens: of all rows together, None: room for all at their
    longest. piece_tokens: of prompts, read between two steps. prefix_bytes: for beginnings of prompts that are known.
    device_bytes, host_bytes: of open memories on the device and in host memory, None: no bound.
    """

    body_bytes: int = 64 * 2**20
    body_seconds: float = 30.0
    context_tokens: int = 8192
    rows: int = 8
    waiting: int = 256
    request_seconds: float = 300.0
    disk_bytes: int | None = None
    namespace_bytes: int | None = None
    evict: bool = False
    choices: int = 8
    memories_per_request: int = 16
    open_memories: int = 32
    row_tokens: int | None = None
    piece_tokens: int = 512
    prefix_bytes: int = 256 * 2**20
    device_bytes: int | None = None
    host_bytes: int | None = None


def require_id(value: str, what: str = "memory id") -> str:
    """Raises: ServeError for a name that is none: it becomes a folder's name."""
    if not _NAME.fullmatch(value):
        raise ServeError(
            400,
            f"a {what} has 1 to 64 letters, digits, '.', '_' and '-', no '.', '_' or '-' at its ends; "
            f"got {value[:80]!r}",
            "invalid_id",
        )
    return value


def require_few_and_short(tokenizer: Any, texts: Sequence[str], n: int, limits: Limits) -> None:
    """Raises: ServeError for prompts far beyond the limits, before all of them is tokenised: that takes minutes."""
    if max(1, len(texts)) * n > limits.choices:
        raise ServeError(400, f"at most {limits.choices} answers a request", "too_many_choices")
    most = limits.context_tokens
    for text in texts:
        size = _CHARACTERS * most
        while size < len(text):
            beginning = text[:size].encode(errors="ignore").decode()
            if len(tokenizer(beginning)["input_ids"]) > most + _CUT_TOKENS:
                raise ServeError(
                    400,
                    f"more than {most:,} tokens of prompt pass the {most:,} of a row; put long text into a memory",
                    "context_length_exceeded",
                )
            size *= 4
