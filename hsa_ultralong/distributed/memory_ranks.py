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
    """This rank's place in a memory of `num_chunks` chunks: it holds `first` and following ones; ranks hold ascending
    ranges."""

    def __init__(self, first: int, num_chunks: int, group: dist.ProcessGroup | None = None) -> None:
        self.first, self.num_chunks, self.group = first, num_chunks, group
        self._firsts: list[int] | None = None

    @torch.no_grad()
    def lists(
        self, indices: torch.Tensor, scores: torch.Tensor, topk: int
    ) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        """The candidates of every rank, (indices, scores, number of its first chunk), the same on all ranks.

        Args:
            indices, scores: (B, T, Hr, k), k <= topk: int32 counted from this rank's first chunk, -1 and -inf if empty.
        """
        if self._firsts is None:
            self._firsts = self._meet(topk, scores)
        missing = topk - indices.shape[-1]
        if missing:
            indices, scores = F.pad(indices, (0, missing), value=-1), F.pad(scores, (0, missing), value=-torch.inf)
        # one message: indices travel as scores of the same bits
        bits = {4: torch.int32, 8: torch.int64}[scores.element_size()]
        every = self._gather(torch.stack((scores, indices.to(bits).view(scores.dtype))))  # (ranks, 2, B, T, Hr, K)
        parts = zip(every.unbind(), self._firsts, strict=True)
        return [(part[1].view(bits).to(indices.dtype), part[0], first) for part, first in parts]

    def _meet(self, topk: int, scores: torch.Tensor) -> list[int]:
        """First chunks of all ranks, which must read alike: what differs would break the exchange or its sums.

        Raises:
            ValueError: on all ranks, for another number of chunks a token, or numbers of another size.
        """
        own = torch.tensor([self.first, topk, scores.element_size()], device=scores.device)
        first, *alike = self._gather(own).T.tolist()
        for name, found in zip(("chunks a token (chunk_topk)", "bytes of a score (dtype)"), alike, strict=True):
            if len(set(found)) > 1:
                raise ValueError(f"processes that share a memory must read alike; {name} by rank: {found}")
        return list(first)

    @torch.no_grad()
    def total(self, part: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place where `part` is contiguous; no gradient."""
        part = part.detach().contiguous()
        dist.all_reduce(part, group=self.group)
        return part

    @property
    def is_capturable(self) -> bool:
        """A graph of this device can hold the exchange."""
        return "nccl" in dist.get_backend_config(self.group)

    def _gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor of every rank, (ranks, ...)."""
        every = tensor.new_empty((dist.get_world_size(self.group), *tensor.shape))
        # gloo wants the tensors of all ranks behind one another; torch 2.13 gave the call another name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(every.flatten(0, 1), tensor.contiguous(), group=self.group)
        return every
