"""Keys and values left in a file, and a cache of hot chunks before a store; those on tiers of memory are in tiers.py.

All are KeyValueStores (nn/views.py): the HSA layer fetches what a few tokens selected. A store of the same dtype
gives the logits of device memory: bit for bit from every store, and on a CPU for up to 15 tokens at a time; longer
prompts may take another path through ops/hsa and differ in the last bits. Made by opening.open_memory;
tests/memory/test_stores.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

import torch

from hsa_ultralong.memory.columns import from_payload
from hsa_ultralong.memory.files import MemoryFile
from hsa_ultralong.nn.views import KeyValueStore

_NAMES = ("keys_values", "keys_values_scale")


class FileStore:
    """Keys and values of a MemoryFile, read from disk at every fetch; pages are verified when first read."""

    def __init__(self, file: MemoryFile, device: torch.device | str, dtype: torch.dtype, first: int = 0) -> None:
        """first: the file's chunk that is number 0 here."""
        self.file, self.device, self.dtype, self.first = file, torch.device(device), dtype, first

    def fetch(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chunks = chunks.cpu() + self.first
        payload, scales = (self.file.fetch(name, chunks) if name in self.file.spec.columns else None for name in _NAMES)
        assert payload is not None
        pairs = from_payload(payload, scales, self.device, self.dtype)  # (n, 2, S, Hkv, D)
        return pairs[:, 0], pairs[:, 1]

    @property
    def format(self) -> str:
        return str(self.file.spec.metadata["formats"]["key_values"])

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        columns = self.file.spec.columns
        found = [self.file.read(n, first + self.first, stop + self.first) if n in columns else None for n in _NAMES]
        assert found[0] is not None
        return found[0], found[1]

    @property
    def num_bytes(self) -> int:
        columns = self.file.spec.columns
        return self.file.num_chunks * sum(columns[name].row_bytes for name in _NAMES if name in columns)


class CachedStore:
    """The most recently used chunks of a slower store, ready for the model; least recently used ones make room.

    Attributes:
        num_hits, num_misses: chunks asked for and found here, or fetched from below; their ratio is the hit rate.
    """

    def __init__(self, below: KeyValueStore, capacity: int) -> None:
        """capacity: chunks to keep; fewer than a fetch asks for serves that fetch without keeping anything new."""
        self.below, self.capacity = below, capacity
        self.num_hits = self.num_misses = 0
        self._slots: OrderedDict[int, int] = OrderedDict()
        self._pairs: torch.Tensor | None = None
        # several threads may ask one memory
        self._guard = threading.Lock()

    def fetch(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with self._guard:
            return self._fetch(chunks)

    def _fetch(self, chunks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        numbers = chunks.tolist()
        missing = [number for number in dict.fromkeys(numbers) if number not in self._slots]
        self.num_hits, self.num_misses = self.num_hits + len(numbers) - len(missing), self.num_misses + len(missing)
        if not numbers or len(set(numbers)) > self.capacity:
            return self.below.fetch(chunks)
        for number in numbers:
            if number in self._slots:
                self._slots.move_to_end(number)
        if missing:
            self._take(missing)
        assert self._pairs is not None
        slots = torch.tensor([self._slots[number] for number in numbers], device=self._pairs.device)
        pairs = self._pairs[slots]  # (n, 2, S, Hkv, D)
        return pairs[:, 0], pairs[:, 1]

    def _take(self, missing: list[int]) -> None:
        k, v = self.below.fetch(torch.tensor(missing))
        if self._pairs is None:
            self._pairs = k.new_empty((self.capacity, 2, *k.shape[1:]))
        places = []
        for number in missing:
            # what this fetch needs was just moved to the end, or comes after it
            place = len(self._slots) if len(self._slots) < self.capacity else self._slots.popitem(last=False)[1]
            self._slots[number] = place
            places.append(place)
        where = torch.tensor(places, device=k.device)
        self._pairs[where, 0], self._pairs[where, 1] = k, v

    @property
    def format(self) -> str:
        return self.below.format

    def kept(self, first: int, stop: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.below.kept(first, stop)

    @property
    def num_bytes(self) -> int:
        return self.below.num_bytes
