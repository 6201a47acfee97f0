"""Exchanges between processes through which gradients flow back, and the ranks of a group that use them.

Made of collectives that every backend and torch release has under one name. Gradients are summed in the order of the
ranks, in fp32 if they are 16-bit, so a run repeats bit for bit. Used by context.py, pool.py and experts.py;
tests/distributed/.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def _refuse_second() -> None:
    """In a backward: refuse one that is to be differentiated itself; its result would lack what crosses processes."""
    if torch.is_grad_enabled():
        raise RuntimeError("gradients across processes have no gradients of their own: leave create_graph out")


def _exchange(rows: torch.Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> torch.Tensor:
    out = rows.new_empty((sum(receive), *rows.shape[1:]))
    dist.all_to_all_single(out, rows.contiguous(), receive, send, group=group)
    return out


class Travel:
    """Rows under way between the ranks of a group, from `depart` to `arrive`.

    What is computed between start and arrival runs meanwhile, and so does its gradient: autograd takes the nodes of a
    backward last made first, so those in between lie between the return's start and its end.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup | None) -> None:
        self.send, self.receive, self.group = send, receive, group
        self.work: Any = None
        self.returning: torch.Tensor | None = None
        # the rows' graph holds this object: kept here they would hold each other, and never be freed

    def start(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        out = rows.new_empty((sum(receive), *rows.shape[1:]))
        self.work = dist.all_to_all_single(out, rows.contiguous(), receive, send, group=self.group, async_op=True)
        return out

    def wait(self) -> None:
        """Until what is under way is here; nothing is held any more."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()

    def depart(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows (sum of send, ...) leave; the result is for `arrive` alone."""
        out: torch.Tensor = _Depart.apply(rows, self)
        return out

    def arrive(self, rows: torch.Tensor) -> torch.Tensor:
        """The rows (sum of receive, ...), by rank; of what `depart` gave."""
        out: torch.Tensor = _Arrive.apply(rows, self)
        return out


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, travel: Travel) -> torch.Tensor:
        ctx.travel = travel
        return travel.start(rows, travel.send, travel.receive)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        # `grad` is where it started from: see _Arrive
        _refuse_second()
        travel = ctx.travel
        returned, travel.returning = travel.returning, None
        travel.wait()
        return returned, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, travel: Travel) -> torch.Tensor:
        ctx.travel = travel
        travel.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        _refuse_second()
        travel = ctx.travel
        travel.returning = travel.start(grad, travel.receive, travel.send)
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        out = part.new_empty((dist.get_world_size(group), *part.shape))
        dist.all_gather(list(out.unbind(0)), part.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        _refuse_second()
        ones = [1] * grad.shape[0]
        parts = _exchange(grad, ones, ones, ctx.group)  # what every rank has for this one's part
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        return parts.sum(0, dtype=wide).to(grad.dtype), None


class Ranks:
    """This process among those of `group` (None: all processes).

    Every process of the group makes the same calls, in the forward and in the backward, with tensors of the same shape.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    @torch.compiler.disable
    def gather(self, part: torch.Tensor) -> torch.Tensor:
        """(B, n, ...) of every rank side by side, (B, size * n, ...); gradients return to the giver of the part."""
        return _Gather.apply(part, self.group).transpose(0, 1).flatten(1, 2)

    @torch.compiler.disable
    def exchange(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Give the first send[0] rows to rank 0, the next send[1] to rank 1, ...; rows (n, ...) received, by rank.

        Gradients travel the other way.
        """
        travel = self.travel(send, receive)
        return travel.arrive(travel.depart(rows))

    def travel(self, send: list[int], receive: list[int]) -> Travel:
        """`exchange` in two halves, with time for other work between them."""
        return Travel(send, receive, self.group)

    @torch.no_grad()
    def total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over the ranks, without gradient."""
        part = part.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(part, group=self.group)
        return part
