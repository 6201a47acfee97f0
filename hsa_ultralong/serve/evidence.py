"""What an answer was read from: the largest weight of every chunk over all of its tokens. Called by worker.py;
tests/serve/test_worker.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hsa_ultralong.memory import Memory

# steps whose lists are kept before they are summed up
_STEPS = 64


class Evidence:
    """Gathers what the tokens of one answer retrieved from one memory."""

    def __init__(self, memory: Memory | None) -> None:
        self.num_chunks = 0 if memory is None else memory.num_chunks_of_all
        self._best: dict[int, float] = {}
        self._lists: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def begin_with(self, weights: Mapping[int, float]) -> None:
        """Weights that were found before the answer's own prompt was read."""
        self._best.update(weights)

    def put(self, retrieved: Sequence[tuple[torch.Tensor, torch.Tensor]], offset: int) -> None:
        """Indices and weights (Hr, K) of every group, on the host; offset: number of the memory's first chunk there."""
        if self.num_chunks:
            self._lists += [(indices, weights, offset) for indices, weights in retrieved]
            if len(self._lists) > _STEPS:
                self._sum_up()

    def _sum_up(self) -> None:
        if not self._lists:
            return
        chunks = torch.cat(
            [torch.where(indices < 0, -1, indices - offset).flatten() for indices, _, offset in self._lists]
        )
        weights = torch.cat([weights.flatten() for _, weights, _ in self._lists])
        self._lists = []
        is_own = (chunks >= 0) & (chunks < self.num_chunks)
        numbers, places = chunks[is_own].unique(return_inverse=True)
        best = torch.zeros(len(numbers)).scatter_reduce_(0, places, weights[is_own].float(), "amax")
        for number, weight in zip(numbers.tolist(), best.tolist(), strict=True):
            self._best[number] = max(self._best.get(number, 0.0), weight)

    def ranked(self) -> list[tuple[int, float]]:
        """Chunks and their weights, the largest first; of equal ones the latest."""
        self._sum_up()
        return sorted(self._best.items(), key=lambda item: (-item[1], -item[0]))
