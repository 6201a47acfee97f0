"""One memory over several ranks: each scans its own landmarks, the K best of all are agreed on, partial outputs add up.

All ranks run the same tokens. Per retrieval layer one all-gather of K candidates a query, per HSA layer one all-reduce
of the outputs: nothing grows with the memory. Over NCCL both become part of a decoding graph (inference/engine.py). The
`ranks` of a ChunkMemory, made by inference/sharding.py; tests/distributed/test_memory_ranks.py, test_gpu_ranks.py.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F


class RankedMemory:
    """This rank's place in a memory of `num_chunks` chunks: it holds `first` and following ones."""

    def __init__(self, first: int, num_chunks: int, group: dist.ProcessGroup | None = None) -> None:
        self.first, self.num_chunks, self.group = first, num_chunks, group

    @torch.no_grad()
    def best(self, indices: torch.Tensor, scores: torch.Tensor, topk: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The K best of all ranks' candidates, the same on every rank bit for bit.

        Args:
            indices, scores: (B, T, Hr, k), k <= topk: int32 counted from this rank's first chunk, -1 and -inf if empty.

        Returns:
            indices counted through all ranks, in descending order with -1 last, and scores, (B, T, Hr, topk or C).
        """
        missing = topk - indices.shape[-1]
        indices = F.pad(torch.where(indices < 0, -1, indices + self.first), (0, missing), value=-1)
        scores = F.pad(scores, (0, missing), value=-torch.inf)
        # one message: indices travel as scores of the same bits
        bits = {4: torch.int32, 8: torch.int64}[scores.element_size()]
        lists = self._gather(torch.stack((scores, indices.to(bits).view(scores.dtype))))
        # every list descends and ranks hold ascending ranges: now from the first chunk to the last
        every = torch.cat([part.flip(-1) for part in lists], -1)
        every_score, every_index = every[0], every[1].view(bits).to(indices.dtype)
        # ties go to the lower chunk, as in chunk_topk
        kept = every_score.argsort(dim=-1, descending=True, stable=True)[..., : min(topk, self.num_chunks)]
        indices, place = every_index.gather(-1, kept).sort(-1, descending=True)
        return indices, every_score.gather(-1, kept).gather(-1, place)

    @torch.no_grad()
    def total(self, part: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks."""
        part = part.contiguous().clone()
        dist.all_reduce(part, group=self.group)
        return part

    @property
    def is_capturable(self) -> bool:
        """A graph of this device can hold the exchange."""
        return "nccl" in dist.get_backend_config(self.group)

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The tensor of every rank."""
        parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, tensor, group=self.group)
        return parts
