"""Memories kept open for the next question, in device memory, in host memory or left on disk, under stated budgets.

A memory moves up a tier where there is room, or once it was asked twice since those that make room were asked; these
move down. What a row reads never moves. Called by memories.py; tests/serve/test_tiers.py.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import ServeError

TIERS = ("device", "host", "file")
# of chunks that a file's questions keep at hand on the device
CACHE_BYTES = 32 * 2**20
Key = tuple[str, ...]


@dataclass
class _Entry:
    """One open memory, or several as one; costs: bytes by tier it lies on, and there by device and host."""

    stamps: Any
    costs: Mapping[str, Mapping[str, int]]
    read: Callable[[str], Any]
    tier: str = ""
    opened: Any = None
    asked: list[int] = field(default_factory=lambda: [0, 0])  # when, the last time and the time before

    @property
    def memory(self) -> Memory:
        return self.opened.memory


class OpenMemories:
    """What is open, by namespace and ids. Not thread-safe: the caller holds its lock."""

    def __init__(self, budgets: Mapping[str, int | None], most: int) -> None:
        """budgets: bytes of "device" and "host", None: no bound. most: memories kept open."""
        self.budgets, self.most = dict(budgets), most
        self._entries: dict[Key, _Entry] = {}
        self._clock = itertools.count(1)
        # set by who decodes: whether a row reads or will read a memory, and a request to let go of one
        self.is_held: Callable[[Memory], bool] = lambda memory: False
        self.let_go: Callable[[Memory], threading.Event | None] = lambda memory: None
        # costs of what is closed and still read, by the event of its end
        self._leaving: list[tuple[threading.Event, Mapping[str, int]]] = []

    def has(self, memory: Memory) -> bool:
        """Whether a memory is open here."""
        return any(entry.opened is not None and entry.memory is memory for entry in list(self._entries.values()))

    def bytes_on(self, place: str) -> int:
        """Of "device" or "host", taken by all that is open or still read."""
        taken = sum(entry.costs[entry.tier][place] for entry in list(self._entries.values()) if entry.tier)
        return taken + self._bytes_leaving(place)

    def _bytes_leaving(self, place: str) -> int:
        return sum(costs[place] for gone, costs in list(self._leaving) if not gone.is_set())

    def num_on(self, tier: str) -> int:
        """Open memories on a tier."""
        return sum(entry.tier == tier for entry in list(self._entries.values()))

    def get(self, key: Key, stamps: Any, costs: Mapping[str, Mapping[str, int]], read: Callable[[str], Any]) -> Any:
        """What is open under this key; opened, or moved to a better tier, first.

        Args:
            stamps: what tells this state from another. costs: bytes of "device" and "host" for every tier that it may
                lie on, the best first. read: opens it on a tier.

        Raises:
            ServeError: it passes a budget on every tier.
        """
        self._leaving = [pair for pair in self._leaving if not pair[0].is_set()]
        entry = self._entries.get(key)
        if entry is None or entry.stamps != stamps:
            if entry is not None:
                self._close(key)
            entry = _Entry(stamps, costs, read)
        entry.asked = [next(self._clock), entry.asked[0]]
        tiers = list(costs)
        better = tiers if not entry.tier else tiers[: tiers.index(entry.tier)]
        if not entry.tier:
            self._close_one_of_many()
        if not (entry.tier and self.is_held(entry.memory)):
            for tier in better:
                if self._make_room(entry, tier):
                    self._move(key, entry, tier)
                    break
        if not entry.tier:
            needed = costs[tiers[-1]]
            raise ServeError(
                507,
                f"memory {', '.join(key[1:])} needs {needed['device']:,} bytes of device memory and {needed['host']:,} "
                f"of host memory, beside those that are being asked; budgets are {self.budgets['device'] or 'open'} "
                f"and {self.budgets['host'] or 'open'} (--device-memory, --host-memory)",
                "memory_budget",
            )
        return entry.opened

    def close(self, is_meant: Callable[[Key], bool]) -> None:
        """Close what is meant."""
        for key in [key for key in self._entries if is_meant(key)]:
            self._close(key)

    def _close(self, key: Key) -> None:
        entry = self._entries.pop(key)
        memory, costs = entry.memory, entry.costs[entry.tier]
        entry.opened, entry.tier = None, ""
        self._leave(memory, costs)

    def _leave(self, memory: Memory, costs: Mapping[str, int]) -> None:
        gone = self.let_go(memory)
        if gone is not None and not gone.is_set():
            self._leaving.append((gone, costs))

    def _move(self, key: Key, entry: _Entry, tier: str) -> None:
        old, costs = entry.opened, entry.costs.get(entry.tier)
        entry.opened, entry.tier = entry.read(tier), tier
        self._entries[key] = entry
        if old is not None and costs is not None:
            self._leave(old.memory, costs)

    def _close_one_of_many(self) -> None:
        """Close what was asked for longest ago, if as many are open as may be."""
        idle = [key for key, entry in self._entries.items() if not self.is_held(entry.memory)]
        if len(self._entries) >= self.most and idle:
            self._close(min(idle, key=lambda key: self._entries[key].asked[0]))

    def _make_room(self, entry: _Entry, tier: str) -> bool:
        """Whether a memory fits on a tier, those that may make room moved down or closed."""
        victims = self._victims(entry, tier)
        if victims is None:
            return False
        for key in victims:
            other = self._entries[key]
            tiers = list(other.costs)
            lower = [one for one in tiers[tiers.index(other.tier) + 1 :] if self._fits(other, one, [])]
            if lower:
                self._move(key, other, lower[0])
            else:
                self._close(key)
        return self._fits(entry, tier, [])

    def _victims(self, entry: _Entry, tier: str) -> list[Key] | None:
        """Who has to make room for a memory on a tier; None where that is not enough."""
        gone: list[Key] = []
        if self._fits(entry, tier, gone):
            return gone
        is_last = tier == list(entry.costs)[-1] and not entry.tier
        for key, other in sorted(self._entries.items(), key=lambda item: item[1].asked[0]):
            # on the last tier there is nowhere else to go
            is_older = is_last or other.asked[0] < entry.asked[1]
            if other is entry or not is_older or self.is_held(other.memory):
                continue
            gone.append(key)
            if self._fits(entry, tier, gone):
                return gone
        return None

    def _fits(self, entry: _Entry, tier: str, gone: list[Key]) -> bool:
        kept = [one for key, one in self._entries.items() if one is not entry and key not in gone]
        for place, budget in self.budgets.items():
            used = sum(one.costs[one.tier][place] for one in kept) + self._bytes_leaving(place)
            if budget is not None and used + entry.costs[tier][place] > budget:
                return False
        return True
