"""What the model asks of other processes; `distributed` has the classes, given to it from outside.

`HSAModel.context_ranks` share every row (context parallelism), `HSAModel.pool_ranks` share a pool of rows; both are
ALONE otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F

from hsa_ultralong.models.stack import Windows


class PoolExchange(Protocol):
    """Processes that hold different rows."""

    rank: int
    size: int

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """(B, n, ...) of every rank side by side, (B, size * n, ...), with gradients."""
        ...

    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks."""
        ...


class ContextExchange(PoolExchange, Protocol):
    """Processes that hold consecutive slices of the same rows."""

    def windows(self, windows: Sequence[int], slice_tokens: int) -> Windows: ...

    def before(self, tail: torch.Tensor, reach: int, slice_tokens: int) -> torch.Tensor:
        """The last `reach` entries before this rank's slice, from the last entries of every slice."""
        ...

    def next_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The label of the token after each, -100 after the row's last."""
        ...


class Alone:
    """One process that shares nothing, so that the model need not ask."""

    rank, size = 0, 1

    def gather(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def total(self, part: torch.Tensor) -> torch.Tensor:
        return part

    def windows(self, windows: Sequence[int], slice_tokens: int) -> Windows:
        raise AssertionError("whole rows have nothing before them")

    def before(self, tail: torch.Tensor, reach: int, slice_tokens: int) -> torch.Tensor:
        return tail[:, :0]

    def next_labels(self, labels: torch.Tensor) -> torch.Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=-100)


ALONE = Alone()
