"""Experts spread over ranks: rows travel to the rank that holds their expert, and back (dropless, exact).

Two exchanges a layer forward, two backward, sizes known after one small exchange of counts. The shared expert runs
while the first is under way, in the backward too. Given to every
nn.moe.MixtureOfExperts by train/parallelize.py; tests/distributed/test_parallelize.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from hsa_ultralong.distributed.collectives import Ranks
from hsa_ultralong.ops._permute import inverse, take_rows

Experts = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class ExpertRanks(Ranks):
    """Rank r of n holds experts r*E/n .. (r + 1)*E/n - 1."""

    def local(self, weight: torch.Tensor) -> torch.Tensor:
        """This rank's experts of a weight (E, ...), (E/n, ...); copies of it on other ranks add to its gradient."""
        if not isinstance(weight, DTensor):
            return weight
        partial: list[Placement] = [Partial() if part.is_replicate() else part for part in weight.placements]
        return weight.to_local(grad_placements=partial)

    @torch.compiler.disable
    def run(
        self, rows: torch.Tensor, load: torch.Tensor, experts: Experts, shared: nn.Module | None, x: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Apply `experts` where they are, and `shared` to x while rows travel.

        Args:
            rows: (N, M) sorted by expert, `load` (E,) int64 rows each.
            experts: (rows sorted by own expert, their numbers (E/n,)) -> rows of the same shape.
            shared: what every token of x passes, None for nothing.
        """
        load = load.view(self.size, -1)  # (n, E/n)
        arriving = torch.empty_like(load)
        dist.all_to_all_single(arriving, load, group=self.group)
        send, receive = torch.stack((load.sum(1), arriving.sum(1))).tolist()
        travel = self.travel(send, receive)
        rows = travel.depart(rows)
        try:
            beside = None if shared is None else shared(x)
        except BaseException:
            travel.wait()
            raise
        # they arrive by rank, then expert
        expert = torch.arange(arriving.numel(), device=rows.device) % arriving.shape[1]
        order = expert.repeat_interleave(arriving.flatten(), output_size=sum(receive)).argsort(stable=True)
        places = inverse(order)
        out = experts(take_rows(travel.arrive(rows), order, places), arriving.sum(0))
        return self.exchange(take_rows(out, places, order), receive, send), beside


def spread(weight: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A parameter (E, ...) that every rank holds whole -> one cut by expert over the last dimension of the mesh."""
    rank, size = mesh.get_local_rank(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    placements: list[Placement] = [*[Replicate()] * (mesh.ndim - 1), Shard(0)]
    own = weight.detach().chunk(size)[rank].clone()
    return DTensor.from_local(own, mesh, placements, run_check=False)
