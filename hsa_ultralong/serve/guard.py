"""Bodies that are too large or too slow are refused before they fill memory or hold a connection for ever.

Called by app.py; tests/serve/test_hostile.py.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

from hsa_ultralong.serve.limits import Limits, ServeError


class _TooLarge(Exception):
    pass


class BodyLimit:
    """ASGI middleware: a body is read whole, within a number of bytes and seconds, before the application sees it."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > self.limits.body_bytes:
            await self._refuse(send, 413, f"a body has at most {self.limits.body_bytes:,} bytes", "body_too_large")
            return
        try:
            body = await asyncio.wait_for(self._body(receive), self.limits.body_seconds)
        except asyncio.TimeoutError:
            text = f"the body took longer than {self.limits.body_seconds:g} seconds"
            await self._refuse(send, 408, text, "body_too_slow")
            return
        except _TooLarge:
            text = f"a body has at most {self.limits.body_bytes:,} bytes"
            await self._refuse(send, 413, text, "body_too_large")
            return
        if body is None:
            return
        is_given = False

        async def given() -> Any:
            nonlocal is_given
            if is_given:
                return await receive()
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, given, send)

    async def _body(self, receive: Any) -> bytes | None:
        """The whole body; None where the client left."""
        pieces: list[bytes] = []
        size, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            pieces.append(message.get("body", b""))
            size, more = size + len(pieces[-1]), message.get("more_body", False)
            if size > self.limits.body_bytes:
                raise _TooLarge
        return b"".join(pieces)

    @staticmethod
    async def _refuse(send: Any, status: int, message: str, code: str) -> None:
        body = json.dumps(ServeError(status, message, code).body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
