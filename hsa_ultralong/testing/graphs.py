"""A stand-in for CUDA graphs, with which decoding engines are tested on a CPU; tests only."""

from __future__ import annotations

from collections.abc import Callable, Sequence


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
