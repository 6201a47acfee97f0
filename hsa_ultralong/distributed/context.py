"""Context parallelism: every row is cut into equal slices, one a rank, and the result is that of one process.

A window needs the keys and values of the W - 1 tokens before the slice: one exchange with the ranks that hold them.
Retrieval needs the chunks before the slice: the memory is small (fact 7), so it is gathered. All else is local.
Given to the model as `model.model.context_ranks`; tests/distributed/test_context.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hsa_ultralong.distributed.collectives import Ranks

IGNORE_INDEX = -100


class WindowBefore:
    """What the window of one layer reads before the slice; stands where a cache's window stands."""

    def __init__(self, ranks: ContextRanks, window: int, slice_tokens: int) -> None:
        self.ranks, self.reach, self.slice_tokens = ranks, max(window - 1, 0), slice_tokens

    @property
    def length(self) -> int:
        """Tokens before the slice that the window reaches."""
        return min(self.reach, self.ranks.rank * self.slice_tokens)

    def extend(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, T, Hkv, D) of the slice -> (B, length + T, Hkv, D)."""
        if self.reach == 0:
            return keys, values
        first = max(0, self.slice_tokens - self.reach)
        tail = torch.stack((keys[:, first:], values[:, first:]), dim=2)  # (B, n, 2, Hkv, D)
        old_keys, old_values = self.ranks.before(tail, self.reach, self.slice_tokens).unbind(2)
        return torch.cat((old_keys, keys), 1), torch.cat((old_values, values), 1)


class ContextWindows:
    """The windows of all layers, in the form in which the model takes those of a cache."""

    def __init__(self, layers: list[WindowBefore]) -> None:
        self._layers = layers

    @property
    def length(self) -> int:
        """Tokens before the slice that a window reaches."""
        return max(layer.length for layer in self._layers)

    def state(self, layer: int) -> WindowBefore:
        return self._layers[layer]


class ContextRanks(Ranks):
    """Rank r of n holds tokens r*T .. (r + 1)*T - 1 of every row of n*T tokens.

    The loss of a rank is its share: the sum over the ranks is the loss of the rows, and likewise for every gradient.
    """

    def windows(self, windows: Sequence[int], slice_tokens: int) -> ContextWindows:
        """The windows (keys each, one per layer) of slices of `slice_tokens`."""
        return ContextWindows([WindowBefore(self, window, slice_tokens) for window in windows])

    def before(self, tail: torch.Tensor, reach: int, slice_tokens: int) -> torch.Tensor:
        """The last `reach` entries before this rank's slice, or all there are.

        Args:
            tail: (B, min(reach, T), ...), the last entries of this rank's slice of T = `slice_tokens`.

        Returns:
            (B, min(reach, rank * T), ...), in the order of the row.
        """

        def wanted(distance: int) -> int:
            """Entries that a rank reads of the one `distance` before it."""
            return 0 if distance < 1 else min(slice_tokens, max(0, reach - (distance - 1) * slice_tokens))

        send = [wanted(other - self.rank) for other in range(self.size)]
        receive = [wanted(self.rank - other) for other in range(self.size)]
        rows = tail.transpose(0, 1)  # (n, B, ...)
        parts = torch.cat([rows[len(rows) - count :] for count in send])
        return self.exchange(parts, send, receive).transpose(0, 1)

    def next_labels(self, labels: torch.Tensor) -> torch.Tensor:
        """The label of the token after each, (B, T): across the end of the slice too; -100 after the row's last."""
        firsts = self.gather(labels[:, :1])  # (B, size)
        nothing = torch.full_like(firsts[:, :1], IGNORE_INDEX)
        following = torch.cat((firsts, nothing), 1)[:, self.rank + 1 : self.rank + 2]
        return torch.cat((labels[:, 1:], following), 1)
