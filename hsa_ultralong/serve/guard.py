"""Who may ask, by the headers alone: names of this server, origins of pages, keys. Nothing of a body is read before.

A browser sends what any web page asks it to send, also to this machine's own address. Called by app.py;
tests/serve/test_guard.py.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from hsa_ultralong.serve.limits import ServeError

DEFAULT_NAMESPACE = "default"
# for load balancers, Prometheus, and people who have yet to type their key; they take no bodies
OPEN_PATHS = ("/", "/health", "/ready", "/metrics")
_READING = ("GET", "HEAD", "OPTIONS")
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(:[0-9]{1,5})?")


class HeaderCheck:
    """ASGI middleware that refuses by headers, and notes the namespace in the request's state.

    Args:
        keys: namespace of every API key's SHA-256 in hex; None: no key is needed and all share one namespace.
        hosts: what `require_host` gives for the names that the server has beside this machine's own.
    """

    def __init__(self, app: Any, keys: Mapping[str, str] | None = None, hosts: Sequence[str] = ()) -> None:
        self.app, self.keys = app, keys
        self.hosts = frozenset(hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def sent(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-content-type-options", b"nosniff")]}
            await send(message)

        try:
            headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
            self._check_host(headers)
            if scope["method"] not in _READING:
                self._check_origin(headers)
            if scope["path"] not in OPEN_PATHS:
                scope.setdefault("state", {})["namespace"] = self._namespace(headers)
        except ServeError as error:
            await refuse(sent, error)
            return
        await self.app(scope, receive, sent)

    def _check_host(self, headers: Mapping[bytes, str]) -> None:
        """Without keys: a foreign name that leads here (DNS rebinding) would let its pages read everything."""
        host = headers.get(b"host", "").lower()
        if self.keys is None and not is_loopback(_name_of(host)) and not self._is_allowed(host):
            raise ServeError(
                403, f"this server has no keys and answers to localhost, not to {host[:80]!r}; start it with "
                "--allow-host NAME, or with --keys", "host_not_allowed",
            )  # fmt: skip

    def _check_origin(self, headers: Mapping[bytes, str]) -> None:
        """What changes or costs something comes from programs, or from the server's own page."""
        origin = headers.get(b"origin")
        place = "" if origin is None else origin.lower().rpartition("://")[2]
        is_own = origin is None or place == headers.get(b"host", "").lower() or self._is_allowed(place)
        if not is_own or headers.get(b"sec-fetch-site", "").lower() == "cross-site":
            raise ServeError(
                403, f"pages of other sites may not use this server (Origin {(origin or 'unknown')[:80]!r}); open its "
                "own page, and behind a proxy that changes Host start it with --allow-host NAME", "origin_not_allowed",
            )  # fmt: skip

    def _is_allowed(self, host: str) -> bool:
        return host in self.hosts or _name_of(host) in self.hosts

    def _namespace(self, headers: Mapping[bytes, str]) -> str:
        if self.keys is None:
            return DEFAULT_NAMESPACE
        scheme, _, key = headers.get(b"authorization", "").partition(" ")
        digest = hashlib.sha256(key.strip().encode("latin-1")).hexdigest()
        found = [name for known, name in self.keys.items() if hmac.compare_digest(known, digest)]
        if scheme.lower() != "bearer" or not found:
            raise ServeError(401, "a valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        return found[0]


def require_host(value: str) -> str:
    """NAME, NAME:PORT or an address, in small letters.

    Raises:
        ValueError: it is none.
    """
    if not _HOST.fullmatch(value.lower()):
        raise ValueError(f"a host is a name or an address, such as memories.example.org; got {value!r}")
    return value.lower()


def _name_of(host: str) -> str:
    """Without its port."""
    found = _HOST.fullmatch(host)
    return found[1] if found else ""


def is_loopback(name: str) -> bool:
    """Whether a name or address is this machine's own."""
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]")).is_loopback
    except ValueError:
        return name == "localhost"


async def refuse(send: Any, error: ServeError) -> None:
    """Answer without the application; the connection ends, as a body may lie in it that nobody reads."""
    body = json.dumps(error.body()).encode()
    headers = [(name.lower().encode(), value.encode()) for name, value in error.headers().items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(
        {"type": "http.response.start", "status": error.status, "headers": [*headers, (b"connection", b"close")]}
    )
    await send({"type": "http.response.body", "body": body})
