"""Bodies that are too large, too slow or too many are refused before they fill memory or hold a connection for ever.

Called by app.py; tests/serve/test_hostile.py, test_guard.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from hsa_ultralong.serve.guard import OPEN_PATHS, refuse
from hsa_ultralong.serve.limits import Limits, ServeError

# what a connection holds anyway before the application reads it
_SMALL = 2**16
# all others together, in bodies of the largest size
_MOST = 4


@dataclass
class _Held:
    """Bytes of one request that count."""

    size: int = 0


class BodyLimit:
    """ASGI middleware: a body is read whole, within a number of bytes and seconds, before the application sees it.

    All bodies of more than 64 KiB together stay within four of the largest, each counted until its answer has ended.
    """

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self._all = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = _Held()
        try:
            body = await self._read(scope, receive, held)
            if body is not None:
                await self.app(scope, _once(body, receive), send)
        except _Refused as refused:
            await refuse(send, refused.error)
        finally:
            self._all -= held.size

    async def _read(self, scope: Any, receive: Any, held: _Held) -> bytes | None:
        """The whole body; None where the client left.

        Raises:
            _Refused: too large, too slow, or one too many.
        """
        if scope["path"] in OPEN_PATHS:
            return b""
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        self._require_room(int(stated) if stated.isdigit() else self.limits.body_bytes + 1, held)
        try:
            return await asyncio.wait_for(self._pieces(receive, held), self.limits.body_seconds)
        except asyncio.TimeoutError:
            text = f"the body took longer than {self.limits.body_seconds:g} seconds"
            raise _Refused(ServeError(408, text, "body_too_slow")) from None

    async def _pieces(self, receive: Any, held: _Held) -> bytes | None:
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size, more = size + len(pieces[-1]), message.get("more_body", False)
            self._require_room(size, held)
            if size > _SMALL:
                self._all, held.size = self._all + size - held.size, size
        return b"".join(pieces)

    def _require_room(self, size: int, held: _Held) -> None:
        if size > self.limits.body_bytes:
            text = f"a body has at most {self.limits.body_bytes:,} bytes"
            raise _Refused(ServeError(413, text, "body_too_large"))
        if size > _SMALL and self._all + size - held.size > _MOST * self.limits.body_bytes:
            text = f"requests under way hold {self._all:,} bytes and this one is too many; try again later"
            raise _Refused(ServeError(503, text, "bodies_full"))


class _Refused(Exception):
    """Of the body itself, whatever the application raises."""

    def __init__(self, error: ServeError) -> None:
        super().__init__(error.message)
        self.error = error


def _once(body: bytes, receive: Any) -> Any:
    """What the application receives: the body, then what the connection says."""
    is_given = False

    async def given() -> Any:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return given
