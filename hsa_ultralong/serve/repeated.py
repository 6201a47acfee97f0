"""Requests that were done already: a key that the client chose is kept in the memory that was changed.

It is committed together with the change, so that it holds exactly when that does, also after a kill. Called by
memories.py; tests/serve/test_memories.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from hsa_ultralong.serve.limits import ServeError

# kept for each memory, the last ones
MOST_KEYS = 64
_LONGEST = 255
_NOTE = "requests"


class RequestKey(NamedTuple):
    """What tells a request from others, and what was asked with it, as digests."""

    key: str
    asked: str

    @staticmethod
    def make(key: str | None, *asked: Any) -> RequestKey | None:
        """Of a header Idempotency-Key, None without one; asked: JSON.

        Raises:
            ServeError: the header is no key.
        """
        if key is None:
            return None
        if not 0 < len(key) <= _LONGEST or not key.isascii() or not key.isprintable():
            raise ServeError(400, f"an Idempotency-Key has 1 to {_LONGEST} visible ASCII characters", "invalid_key")
        return RequestKey(*(hashlib.sha256(text.encode()).hexdigest()[:32] for text in (key, json.dumps(asked))))

    def is_done(self, build_state: Mapping[str, Any]) -> bool:
        """Whether a memory with this state was changed so already.

        Raises:
            ServeError: the key was used for another request.
        """
        asked = dict(_known(build_state)).get(self.key)
        if asked is not None and asked != self.asked:
            raise ServeError(422, "this Idempotency-Key was used for another request", "idempotency_key_reused")
        return asked is not None

    def note(self, build_state: Mapping[str, Any]) -> dict[str, Any]:
        """What is to be committed with the change."""
        return {_NOTE: [*_known(build_state), [*self]][-MOST_KEYS:]}


def _known(build_state: Mapping[str, Any]) -> list[list[str]]:
    """The pairs that a state holds; what is none is left out: another program may write there."""
    found = build_state.get(_NOTE)
    pairs = found if isinstance(found, list) else []
    return [
        one for one in pairs if isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one)
    ]
