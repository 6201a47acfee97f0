"""Room on disk for memories: what new ones will take, what all take, and who makes room in what order.

Bytes are promised to a change before it begins, so that changes side by side cannot pass a budget together. Called by
memories.py; tests/serve/test_disk_budget.py.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from hsa_ultralong.files.durable import sync_folder
from hsa_ultralong.memory import MemorySpec
from hsa_ultralong.serve.last_asked import LastAsked
from hsa_ultralong.serve.limits import Limits, ServeError
from hsa_ultralong.serve.memory_folders import bytes_of, grave_of, memory_of, partial_of, uploads_of

# of a small memory beside its rows: manifest, header of a shard, lock
_FILE_BYTES = 2048
_DOCUMENT_BYTES = 128
# of a shard at least, but for the last, and of its header and its records
_SHARD_BYTES, _PER_SHARD = 2**23, 1024
# of a page, and of its checksum written out
_PAGE_BYTES, _PER_PAGE = 2**20, 12


def file_bytes(spec: MemorySpec, documents: Iterable[tuple[str, int]]) -> int:
    """Bytes that a memory of (name, tokens) documents takes at most on disk, and hardly less."""
    rows, about = 0, _FILE_BYTES
    for name, num_tokens in documents:
        rows += -(-num_tokens // spec.chunk_size) * spec.row_bytes
        about += _DOCUMENT_BYTES + len(json.dumps(name))
    return rows + about + rows // _SHARD_BYTES * _PER_SHARD + rows // _PAGE_BYTES * _PER_PAGE


class DiskBudget:
    """Budgets of all memories and of every namespace's; one change of a memory at a time. Thread-safe."""

    def __init__(self, folder: Path, limits: Limits, asked: LastAsked, close: Callable[[Path], None]) -> None:
        """close: is told of a memory that is gone."""
        self.folder, self.limits, self.asked, self.close = folder, limits, asked, close
        self._guard = threading.Lock()
        self._changing: set[Path] = set()
        # bytes that memories under change may come to take; memories that changes of others read
        self._promised: dict[Path, int] = {}
        self._needed: Counter[Path] = Counter()
        # folders that are being removed
        self._going: set[Path] = set()

    @contextmanager
    def changing(self, place: Path) -> Iterator[None]:
        """The right to change a memory.

        Raises:
            ServeError: somebody else has it.
        """
        with self._guard:
            if place in self._changing:
                raise ServeError(409, f"memory {place.stem!r} is being changed; try again", "memory_busy")
            self._changing.add(place)
        try:
            yield
        finally:
            with self._guard:
                self._changing.discard(place)

    def used(self) -> int:
        """Bytes of all memories, with unfinished ones and with what could not be removed."""
        return sum(sum(self._sizes(namespace).values()) for namespace in self._namespaces())

    def _namespaces(self) -> list[str]:
        found = (one for one in self.folder.iterdir() if one.is_dir() and not one.is_symlink())
        return [one.name for one in found if one != uploads_of(self.folder)]

    def _sizes(self, namespace: str) -> dict[Path, int]:
        """Bytes on disk of every memory, with those of its hidden folders."""
        found: Counter[Path] = Counter()
        for one in (self.folder / namespace).iterdir():
            if not one.is_symlink() and one not in self._going:
                found[memory_of(one)] += bytes_of(one)
        return found

    @contextmanager
    def room(self, place: Path, count: int, *, is_whole: bool = False, needed: Sequence[Path] = ()) -> Iterator[None]:
        """Promise `count` more bytes to a memory under change, or as many in all if `is_whole`, until the block ends.

        What killed requests of its namespace left goes first; then, with `limits.evict`, memories of its namespace that
        were not asked for longest, none of `needed`.

        Raises:
            ServeError: it passes a budget.
        """
        with self._guard:
            self._needed.update(needed)
        try:
            while (victim := self._promise(place, count, is_whole)) is not None:
                try:
                    self.remove(victim)
                finally:
                    with self._guard:
                        self._changing.discard(victim)
            yield
        finally:
            with self._guard:
                self._promised.pop(place, None)
                self._needed -= Counter(needed)

    def _promise(self, place: Path, count: int, is_whole: bool) -> Path | None:
        """Promise the bytes, or take the right to change the memory that has to go first."""
        bounds = self.limits.disk_bytes, self.limits.namespace_bytes
        if bounds == (None, None):
            return None
        with self._guard:
            sizes = {name: self._sizes(name) for name in self._namespaces()}
            own = sizes.setdefault(place.parent.name, {})
            known = own.pop(place, 0)
            total = max(known, count if is_whole else known + count)
            taken = {name: self._taken(name, of_one) for name, of_one in sizes.items()}
            used = sum(taken.values()), taken[place.parent.name]
            victims = self._victims(own)
            free = sum(own[one] for one in victims)
            for bound, others, whose in zip(bounds, used, ("all memories", "memories of a namespace"), strict=True):
                if bound is not None and others - free + total > bound:
                    raise ServeError(
                        507, f"memory {place.stem!r} would take about {total:,} bytes, which passes the budget of "
                        f"{bound:,} for {whose}; delete memories", "disk_budget",
                    )  # fmt: skip
            if all(bound is None or others + total <= bound for bound, others in zip(bounds, used, strict=True)):
                self._promised[place] = total
                return None
            self._changing.add(victims[0])
            return victims[0]

    def _taken(self, namespace: str, sizes: Mapping[Path, int]) -> int:
        promised = {place: size for place, size in self._promised.items() if place.parent.name == namespace}
        return sum(max(sizes.get(place, 0), promised.get(place, 0)) for place in sizes.keys() | promised.keys())

    def _victims(self, sizes: Mapping[Path, int]) -> list[Path]:
        """Who may make room, in this order."""
        idle = [one for one in sizes if one not in self._changing and not self._needed[one]]
        begun = [one for one in idle if not one.exists() and partial_of(one).is_dir()]
        whole = [one for one in idle if self.limits.evict and (one / "manifest.json").is_file()]
        return sorted(begun, key=lambda one: partial_of(one).stat().st_mtime_ns) + sorted(whole, key=self.asked.last)

    def remove(self, place: Path) -> None:
        """Take a memory under change off the disk, with what killed requests left of it.

        Raises:
            OSError: something stays; the memory is gone nevertheless.
        """
        grave = grave_of(place)
        with self._guard:
            self._going.add(grave)
        try:
            if grave.exists():
                shutil.rmtree(grave)
            for one in (place, partial_of(place)):
                if os.path.lexists(one):
                    # out of the way in one step, so that a kill leaves it whole or gone
                    one.rename(grave)
                    sync_folder(place.parent)
                    self.close(place)
                    shutil.rmtree(grave)
            self.asked.forget(place)
        finally:
            with self._guard:
                self._going.discard(grave)
