"""What an answer was read from: the largest weight of every chunk over all of its tokens. Called by worker.py;
tests/serve/test_worker.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hsa_ultralong.memory import Memory

# lists that are kept before they are summed up
_MOST_LISTS = 256


class Evidence:
    """Gathers what the tokens of one answer retrieved from one memory."""

    def __init__(self, memory: Memory | None) -> None:
        self.num_chunks = 0 if memory is None else memory.num_chunks_of_all
        self._chunks: np.ndarray = np.empty(0, np.int64)  # ascending
        self._weights: np.ndarray = np.empty(0, np.float32)
        # indices and weights of all rows, the row, and the number of the memory's first chunk there
        self._lists: list[tuple[np.ndarray, np.ndarray, int, int]] = []

    def begin_with(self, weights: Mapping[int, float]) -> None:
        """Weights that were found before the answer's own prompt was read."""
        self._add(np.array(list(weights), np.int64), np.array(list(weights.values()), np.float32))

    def put(self, retrieved: Sequence[tuple[np.ndarray, np.ndarray]], row: int, offset: int) -> None:
        """Indices and weights (b, Hr, K) of every group, of which `row` is the answer's; they are kept. offset: number
        of the memory's first chunk there."""
        if self.num_chunks:
            self._lists += [(indices, weights, row, offset) for indices, weights in retrieved]
            if len(self._lists) > _MOST_LISTS:
                self._sum_up()

    def _sum_up(self) -> None:
        if not self._lists:
            return
        count = len(self._lists)
        # an empty slot is -1, and stays below 0
        offsets = np.array([offset for _, _, _, offset in self._lists])
        chunks = np.concatenate([indices[row] for indices, _, row, _ in self._lists]).reshape(count, -1)
        weights = np.concatenate([weights[row] for _, weights, row, _ in self._lists]).reshape(count, -1)
        chunks, self._lists = chunks - offsets[:, None], []
        is_own = (chunks >= 0) & (chunks < self.num_chunks)
        self._add(chunks[is_own], weights[is_own])

    def _add(self, chunks: np.ndarray, weights: np.ndarray) -> None:
        chunks, weights = np.concatenate((self._chunks, chunks)), np.concatenate((self._weights, weights))
        if not len(chunks):
            return
        order = chunks.argsort(kind="stable")
        ordered = chunks[order]
        first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        self._chunks, self._weights = ordered[first], np.maximum.reduceat(weights[order], first)

    def ranked(self, most: int | None = None) -> list[tuple[int, float]]:
        """Chunks and their weights, the largest first, of equal ones the latest; up to `most`."""
        self._sum_up()
        order = np.lexsort((-self._chunks, -self._weights))[:most]
        return list(zip(self._chunks[order].tolist(), self._weights[order].tolist(), strict=True))

    def weights_of(self, chunks: Sequence[int]) -> list[float]:
        """Weights of chunks that were retrieved, or that it began with."""
        self._sum_up()
        return self._weights[np.searchsorted(self._chunks, np.array(chunks, np.int64))].tolist()
