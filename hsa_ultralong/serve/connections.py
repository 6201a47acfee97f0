"""Connections of uvicorn whose headers come within a time: it has none of its own. Called by cli/serve.py;
tests/serve/test_guard.py."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from hsa_ultralong.serve.limits import Limits, ServeError


class _Timed(H11Protocol):
    """A connection that is closed where a request's headers do not come in time, with 408 if they have begun."""

    header_seconds = 30.0
    _timer: asyncio.TimerHandle | None = None
    _has_begun = False

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._is_answering():
            self._stop()
        elif self._timer is None:
            self._wait()
        self._has_begun = not self._is_answering()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._late)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._is_answering() or self.transport.is_closing():
            return
        if self._has_begun and self.conn.our_state is h11.IDLE:
            text = f"the headers took longer than {self.header_seconds:g} seconds"
            body = json.dumps(ServeError(408, text, "headers_too_slow").body())
            head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
            self.transport.write(f"HTTP/1.1 408 Request Timeout\r\n{head}\r\n\r\n{body}".encode())
        self.transport.close()


def server_config(app: Any, limits: Limits, **options: Any) -> uvicorn.Config:
    """Settings of uvicorn for an application; `options` are its own."""
    timed: Any = type("Timed", (_Timed,), {"header_seconds": limits.body_seconds})
    return uvicorn.Config(app, http=timed, ws="none", access_log=False, **options)
