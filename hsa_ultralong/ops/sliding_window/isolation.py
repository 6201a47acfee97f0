"""Keep what is not finite inside the rows that read it: zeros in its place, NaN in the rows whose window holds it.

Attention multiplies every value of a block, also by a weight of zero, and zero times NaN is NaN: without this one bad
token would reach its whole block, the tokens before it and other documents among them. Used by api.py on a CPU, where
looking whether there is anything costs nothing; tests/ops/test_window_nonfinite.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from hsa_ultralong.ops._common import blocks, may_be_nonfinite

# pairs of a token and a key of its window that are looked at together
_BLOCK_PAIRS = 1 << 24


def _bad_rows(*tensors: torch.Tensor) -> torch.Tensor:
    """(B, T, H, D) -> (B, T): a number of the row is not finite."""
    return torch.stack([~x.isfinite().flatten(2).all(-1) for x in tensors]).any(0)


def rows_that_read(
    is_bad: torch.Tensor,
    num_queries: int,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
) -> torch.Tensor:
    """(B, Tq) bool: the window of a token, as mask.window_mask has it, holds a key of is_bad (B, Tk)."""
    batch, num_keys = is_bad.shape
    window = min(window, num_keys)
    offset = num_keys - num_queries
    found = torch.zeros((batch, num_queries), dtype=torch.bool, device=is_bad.device)
    for start, stop in blocks(num_queries, max(1, _BLOCK_PAIRS // (batch * window))):
        first, last = start + offset - window + 1, stop + offset
        near = F.pad(is_bad[:, max(0, first) : last], (max(0, -first), 0)).unfold(1, window, 1)  # (B, t, W)
        if query_segments is not None and key_segments is not None:
            owners = F.pad(key_segments[:, max(0, first) : last], (max(0, -first), 0)).unfold(1, window, 1)
            near = near & (owners == query_segments[:, start:stop, None])
        found[:, start:stop] = near.any(-1)
    return found


class _Gate(torch.autograd.Function):
    """Identity; rows of the gradient that are not finite become zero and are noted for `_Noted`."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, steep: Any) -> torch.Tensor:
        ctx.steep = steep
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        if may_be_nonfinite(grad):
            is_bad = _bad_rows(grad)
            ctx.steep.append(is_bad)
            grad = grad.masked_fill(is_bad[..., None, None], 0.0)
        return grad, None


class _Noted(torch.autograd.Function):
    """Identity on the queries; the gradient of rows noted by `_Gate` is NaN."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, steep: Any) -> torch.Tensor:
        ctx.steep = steep
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        for is_bad in ctx.steep:
            grad = grad.masked_fill(is_bad[..., None, None], torch.nan)
        ctx.steep.clear()
        return grad, None


def isolated(
    backend: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """backend(q, k, v, ...) where rows that are, or whose window holds, what is not finite are NaN and all others do
    not depend on it; so are the gradients."""
    places: dict[str, Any] = {"window": window, "query_segments": query_segments, "key_segments": key_segments}
    needs_gradient = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    steep: list[torch.Tensor] = []
    rows = None
    if may_be_nonfinite(q, k, v):
        is_bad_query, is_bad = _bad_rows(q), _bad_rows(k, v)
        rows = (rows_that_read(is_bad, q.shape[1], **places) | is_bad_query)[..., None, None]
        q = q.masked_fill(is_bad_query[..., None, None], 0.0)
        k, v = (part.masked_fill(is_bad[..., None, None], 0.0) for part in (k, v))
    if needs_gradient:
        q = _Noted.apply(q, steep)
    out = backend(q, k, v, **places, scale=scale)
    out = _Gate.apply(out, steep) if needs_gradient else out
    return out if rows is None else out.masked_fill(rows, torch.nan)
