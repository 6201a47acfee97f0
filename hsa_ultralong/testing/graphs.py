"""Stand-ins for CUDA graphs, with which decoding engines and training steps are tested on a CPU; tests only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch


class EagerGraphs:
    """Runs its parts where `StepGraphs` warms up and captures, as that does, and where it replays."""

    made = 0

    def __init__(self, parts: Sequence[Callable[[], None]]) -> None:
        EagerGraphs.made += 1
        self.parts = parts
        for _ in range(4):
            for part in parts:
                part()

    def replay(self, number: int) -> None:
        self.parts[number]()


class EagerCapture:
    """train.graphs.CudaCapture on a CPU: runs nothing where that captures, and the function where that replays.

    Attributes:
        captured, replayed: how often, of all of them. waited: what `aside` was told, in order.
    """

    captured, replayed = 0, 0
    waited: list[bool] = []

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @classmethod
    def reset(cls) -> None:
        cls.captured, cls.replayed, cls.waited = 0, 0, []

    @contextmanager
    def aside(self, *, may_wait: bool) -> Iterator[None]:
        EagerCapture.waited.append(may_wait)
        yield

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        EagerCapture.captured += 1
        result = torch.full((3,), torch.nan, device=self.device)

        def replay() -> None:
            EagerCapture.replayed += 1
            result.copy_(function())

        return replay, result
