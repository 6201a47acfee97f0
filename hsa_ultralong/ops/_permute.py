"""Rows in another order, each as often as wanted, with a gradient that is gathered as well.

The gradient of an index adds rows where they collide: on a GPU by atomics or after a sort, in an order of its own. Here
the caller knows where the copies of every row went. Called by nn/moe.py, distributed/experts.py; tests/nn/test_moe.py.
"""

from __future__ import annotations

from typing import Any

import torch


class _TakenRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, index: torch.Tensor, places: torch.Tensor, copies: int, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.copies, ctx.dtype = copies, rows.dtype
        return rows.to(dtype).index_select(0, index)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        (places,) = ctx.saved_tensors
        grad = grad.index_select(0, places)
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(1, dtype=ctx.dtype)
        return grad.to(ctx.dtype), None, None, None, None


def take_rows(
    rows: torch.Tensor, index: torch.Tensor, places: torch.Tensor, *, copies: int = 1, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """rows[index] in `dtype` (None: that of `rows`), every row `copies` times.

    Args:
        rows: (N, M).
        index: (N * copies,) int64, which row stands where.
        places: (N * copies,) int64, where the copies of row 0 stand, of row 1, ...; index[places] = 0, 0, .., 1, 1, ..
    """
    out: torch.Tensor = _TakenRows.apply(rows, index, places, copies, rows.dtype if dtype is None else dtype)
    return out


def inverse(order: torch.Tensor) -> torch.Tensor:
    """The permutation that undoes `order` (N,) int64."""
    return torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
