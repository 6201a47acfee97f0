"""Memories kept open for the next question, in device memory, in host memory or left on disk, under stated budgets.

A memory moves up a tier where there is room, or once it was asked twice since those that make room were asked. These
are closed, and opened on a lower tier when they are asked again. What a row reads never moves. Openings of different
memories go side by side. Called by memories.py; tests/serve/test_open_memories.py.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from hsa_ultralong.memory import Memory
from hsa_ultralong.serve.limits import ServeError

TIERS = ("device", "host", "file")
# of chunks that a file's questions keep at hand on the device
CACHE_BYTES = 32 * 2**20
Key = tuple[str, ...]
Costs = Mapping[str, Mapping[str, int]]


@dataclass
class _Entry:
    """One open memory, or several as one; costs: bytes by tier it lies on, and there by device and host."""

    stamps: Any
    costs: Costs
    tier: str = ""
    opened: Any = None
    asked: list[int] = field(default_factory=lambda: [0, 0])  # when, the last time and the time before
    # the tier that it is being opened on
    coming: str = ""

    @property
    def memory(self) -> Memory | None:
        opened = self.opened
        return None if opened is None else opened.memory

    def takes(self, place: str) -> int:
        tier = self.coming or self.tier
        return self.costs[tier][place] if tier else 0


@dataclass
class _Left:
    """What is closed and may still be read; `gone` is set once it is let go."""

    memory: Memory
    costs: Mapping[str, int]
    gone: threading.Event | None = None
    is_told: bool = False

    @property
    def is_gone(self) -> bool:
        return self.is_told and (self.gone is None or self.gone.is_set())


class OpenMemories:
    """What is open, by namespace and ids. Thread-safe."""

    def __init__(self, budgets: Mapping[str, int | None], most: int) -> None:
        """budgets: bytes of "device" and "host", None: no bound. most: memories kept open."""
        self.budgets, self.most = dict(budgets), most
        self._guard = threading.Lock()
        self._entries: dict[Key, _Entry] = {}
        # when those were asked that made room
        self._past: OrderedDict[Key, list[int]] = OrderedDict()
        self._left: list[_Left] = []
        self._turns: dict[Key, tuple[threading.Lock, list[int]]] = {}
        self._clock = itertools.count(1)
        # set by who decodes: whether a row reads or will read a memory, and a request to let go of one
        self.is_held: Callable[[Memory], bool] = lambda memory: False
        self.let_go: Callable[[Memory], threading.Event | None] = lambda memory: None

    def has(self, memory: Memory) -> bool:
        """Whether a memory is open here."""
        return any(entry.memory is memory for entry in list(self._entries.values()))

    def bytes_on(self, place: str) -> int:
        """Of "device" or "host", taken by all that is open or still read."""
        with self._guard:
            return self._bytes_on(place, list(self._entries.values()))

    def _bytes_on(self, place: str, entries: list[_Entry]) -> int:
        return sum(entry.takes(place) for entry in entries) + sum(
            one.costs[place] for one in self._left if not one.is_gone
        )

    def get(self, key: Key, look: Callable[[], tuple[Any, Costs]], read: Callable[[str], Any]) -> Any:
        """What is open under this key; opened, or moved to a better tier, first.

        Args:
            look: gives what tells this state from another, and bytes of "device" and "host" for every tier that it may
                lie on, the best first. read: opens it on a tier.

        Raises:
            ServeError: it passes a budget on every tier.
        """
        with self._turn(key):
            stamps, costs = look()
            entry = self._asked(key, stamps, costs)
            tiers = list(costs)
            with self._guard:
                memory = entry.memory
                is_fixed = memory is not None and self.is_held(memory)
            better = tiers if memory is None else [] if is_fixed else tiers[: tiers.index(entry.tier)]
            for tier in better:
                if self._take_place(key, entry, tier):
                    return self._open(key, entry, tier, read)
            opened = entry.opened
        if opened is None:
            needed = costs[tiers[-1]]
            raise ServeError(
                507,
                f"memory {', '.join(key[1:])} needs {needed['device']:,} bytes of device memory and {needed['host']:,} "
                f"of host memory, beside those that are being asked; budgets are {self.budgets['device'] or 'open'} "
                f"and {self.budgets['host'] or 'open'} (--device-memory, --host-memory)",
                "memory_budget",
            )
        return opened

    @contextmanager
    def _turn(self, key: Key) -> Iterator[None]:
        """One opening of a memory at a time."""
        with self._guard:
            lock, users = self._turns.setdefault(key, (threading.Lock(), [0]))
            users[0] += 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                users[0] -= 1
                if not users[0]:
                    del self._turns[key]

    def _asked(self, key: Key, stamps: Any, costs: Costs) -> _Entry:
        """The entry of a memory that is asked now, a new one where none of this state is open."""
        left: list[_Left] = []
        with self._guard:
            self._left = [one for one in self._left if not one.is_gone]
            entry = self._entries.get(key)
            if entry is not None and entry.stamps != stamps:
                left += self._take_out(key)
                entry = None
            if entry is None:
                entry = _Entry(stamps, costs, asked=self._past.pop(key, [0, 0]))
                left += self._take_out_one_of_many()
            entry.asked = [next(self._clock), entry.asked[0]]
        self._tell(left)
        return entry

    def close(self, is_meant: Callable[[Key], bool]) -> None:
        """Close what is meant."""
        with self._guard:
            keys = [key for key in self._entries if is_meant(key)]
            left = [one for key in keys for one in self._take_out(key)]
        self._tell(left)

    def _take_out(self, key: Key) -> list[_Left]:
        entry = self._entries.pop(key)
        return self._leave(entry)

    def _leave(self, entry: _Entry) -> list[_Left]:
        """Count what an entry holds until it is let go."""
        if entry.opened is None:
            return []
        left = _Left(entry.opened.memory, entry.costs[entry.tier])
        self._left.append(left)
        entry.opened, entry.tier = None, ""
        return [left]

    def _tell(self, left: list[_Left]) -> None:
        """Ask who decodes to let go; nobody else waits for that."""
        for one in left:
            one.gone, one.is_told = self.let_go(one.memory), True

    def _take_out_one_of_many(self) -> list[_Left]:
        """Close what was asked for longest ago, if as many are open as may be."""
        if len(self._entries) < self.most:
            return []
        idle = [key for key, entry in self._entries.items() if self._is_idle(entry)]
        return self._take_out(min(idle, key=lambda key: self._entries[key].asked[0])) if idle else []

    def _is_idle(self, entry: _Entry) -> bool:
        memory = entry.memory
        return memory is not None and not entry.coming and not self.is_held(memory)

    def _take_place(self, key: Key, entry: _Entry, tier: str) -> bool:
        """Whether there is a place for a memory on a tier, once those that make room are let go."""
        with self._guard:
            victims = self._victims(entry, tier)
            if victims is None:
                return False
            entry.coming, self._entries[key] = tier, entry
            for victim in victims:
                self._past[victim] = self._entries[victim].asked
            while len(self._past) > self.most:
                self._past.popitem(last=False)
            left = [one for victim in victims for one in self._take_out(victim)]
        self._tell(left)
        with self._guard:
            if self._fits(entry, tier, []):
                return True
            self._give_up(key, entry)
        return False

    def _give_up(self, key: Key, entry: _Entry) -> None:
        entry.coming = ""
        if entry.opened is None and self._entries.get(key) is entry:
            del self._entries[key]

    def _open(self, key: Key, entry: _Entry, tier: str, read: Callable[[str], Any]) -> Any:
        try:
            opened = read(tier)
        except BaseException:
            with self._guard:
                self._give_up(key, entry)
            raise
        with self._guard:
            left = self._leave(entry)
            entry.opened, entry.tier, entry.coming = opened, tier, ""
            if self._entries.get(key) is not entry:  # closed meanwhile
                left += self._leave(entry)
        self._tell(left)
        return opened

    def _victims(self, entry: _Entry, tier: str) -> list[Key] | None:
        """Who has to make room for a memory on a tier; None where that is not enough."""
        gone: list[Key] = []
        if self._fits(entry, tier, gone):
            return gone
        is_last = tier == list(entry.costs)[-1] and not entry.tier
        for key, other in sorted(self._entries.items(), key=lambda item: item[1].asked[0]):
            # on the last tier there is nowhere else to go
            is_older = is_last or other.asked[0] < entry.asked[1]
            if other is entry or not is_older or not self._is_idle(other):
                continue
            gone.append(key)
            if self._fits(entry, tier, gone):
                return gone
        return None

    def _fits(self, entry: _Entry, tier: str, gone: list[Key]) -> bool:
        kept = [one for key, one in self._entries.items() if one is not entry and key not in gone]
        return all(
            budget is None or self._bytes_on(place, kept) + entry.costs[tier][place] <= budget
            for place, budget in self.budgets.items()
        )
