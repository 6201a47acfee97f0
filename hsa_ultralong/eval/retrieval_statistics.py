"""What the tokens of a probe retrieve, in three numbers per upper group; training logs them (docs/training.md).

Called by probes.py; tests/eval/test_retrieval_statistics.py.
"""

from __future__ import annotations

from typing import Any

import torch

_SAMPLED_TOKENS = 1024


class RetrievalStatistics:
    """Statistics of what every upper group finds, over the forwards that are added; a sample of tokens."""

    def __init__(self, chunk_size: int, window: int) -> None:
        """window: a weight is beyond it if its chunk ends that many tokens before, or more."""
        self.chunk_size, self.window = chunk_size, window
        self._sums: list[torch.Tensor] = []

    @staticmethod
    def sample(num_tokens: int, device: torch.device | str) -> torch.Tensor:
        """Tokens (n,) whose retrieval is wanted."""
        return torch.arange(0, num_tokens, max(1, num_tokens // _SAMPLED_TOKENS), device=device)

    @torch.no_grad()
    def add(self, retrieval: tuple[Any, ...], tokens: torch.Tensor) -> None:
        """The output `retrieval` of a forward, of these tokens (n,) of its rows."""
        self._sums.append(torch.stack([self._measure(found, tokens) for found in retrieval]))

    def _measure(self, found: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Sums over tokens that read something, and their number, (4,) fp32."""
        weights = found.weights.float()  # (B, n, Hr, K)
        # the row's own chunks come last
        chunk = found.indices.long() - (found.offsets[-1] if found.offsets else 0)
        distance = tokens[:, None, None] - ((chunk + 1) * self.chunk_size - 1)
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum()
        reads = (weights.sum(-1) > 0).sum()
        beyond = (weights * (distance >= self.window)).sum()
        return torch.stack((entropy, (weights * distance).sum(), beyond, reads.float()))

    def record(self) -> dict[str, list[float]]:
        """Means over tokens, one number per upper group.

        entropy: of the fusion weights, nats. distance: tokens of the row between a token and the last one of a chunk
        that it reads, by weight. beyond_window: share of the weight on chunks that end before the window.
        """
        measured = torch.stack(self._sums).sum(0).tolist() if self._sums else []
        names = ("entropy", "distance", "beyond_window")
        return {name: [sums[i] / max(sums[-1], 1.0) for sums in measured] for i, name in enumerate(names)}
