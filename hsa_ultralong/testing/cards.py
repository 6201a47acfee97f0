"""What aot.py has to know of cards that are not there: limits of each compute capability that kernels compile for."""

from __future__ import annotations

from typing import NamedTuple


class Card(NamedTuple):
    """One card of a compute capability: its multiprocessors, bytes of shared memory that one program may ask for, bytes
    of its second-level cache, and columns of tensor memory, 0 where there is none."""

    name: str
    capability: int
    num_processors: int
    shared_bytes: int
    cache_bytes: int
    tensor_columns: int = 0

    @property
    def major_minor(self) -> tuple[int, int]:
        return divmod(self.capability, 10)


CARDS = {
    card.capability: card
    for card in (
        Card("A100", 80, 108, 166_912, 40 << 20),
        Card("A10, RTX 30", 86, 72, 101_376, 6 << 20),
        Card("L4, L40S, RTX 40", 89, 142, 101_376, 96 << 20),
        Card("H100, H200", 90, 132, 232_448, 50 << 20),
        Card("B200", 100, 148, 232_448, 126 << 20, 512),
        Card("RTX 50", 120, 170, 101_376, 96 << 20),
    )
}
