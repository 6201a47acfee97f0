"""Head and loss in slices of tokens: the gradient is formed beside the loss, so logits live for one slice only."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from hsa_ultralong.ops._common import accumulation_dtype, add_product, blocks, matmul_wide, refuse_second_derivatives

# logits of one slice, in elements
_SLICE_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}
# tokens of a slice at least on a GPU: every slice is added to the gradient of the whole weight
_LEAST_TOKENS = 4096
# the vocabulary is padded to a multiple of this: rows of logits that do not begin at multiples of 16 bytes take matrix
# kernels of a third of the speed (docs/kernels.md)
_ALIGNMENT = 64


def _loss_and_slope(
    logits: torch.Tensor, labels: torch.Tensor, ignore_index: int, vocab_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss of a slice and d loss / d logits in `dtype`; columns from vocab_size on are padding."""
    if logits.shape[-1] > vocab_size:
        logits = logits.masked_fill(torch.arange(logits.shape[-1], device=logits.device) >= vocab_size, -torch.inf)
    kept = labels != ignore_index
    target = labels.clamp_min(0)[:, None]
    # by hand: compiled it is faster than logsumexp (docs/kernels.md)
    top = logits.amax(-1, keepdim=True)
    norm = top + (logits - top).exp().sum(-1, keepdim=True).log()
    loss = (norm - logits.gather(-1, target)).squeeze(-1).where(kept, 0.0).sum()
    hit = torch.arange(logits.shape[-1], device=logits.device) == target
    slope = ((logits - norm).exp() - hit.to(logits.dtype)) * kept[:, None]
    return loss, slope.to(dtype)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    # the vocabulary stays a constant, so that rows are known to be aligned
    return torch.compile(_loss_and_slope)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, ignore_index: int
    ) -> torch.Tensor:
        wide = accumulation_dtype(hidden.dtype)
        step = _compiled() if hidden.is_cuda else _loss_and_slope
        needs_gradient = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        vocab_size = weight.shape[0]
        head = F.pad(weight.to(hidden.dtype), (0, 0, 0, -vocab_size % _ALIGNMENT))  # (V', M)
        grad_weight = torch.zeros(head.shape, dtype=wide, device=weight.device) if needs_gradient else None
        size = max(1, _SLICE_ELEMENTS.get(hidden.device.type, 1 << 24) // len(head))
        if hidden.is_cuda:
            size = max(size, _LEAST_TOKENS)
        for start, stop in blocks(hidden.shape[0], size):
            # ignored rows may hold anything
            rows = hidden[start:stop].masked_fill((labels[start:stop] == ignore_index)[:, None], 0.0)
            logits = matmul_wide(rows[None], head.T[None])[0]  # (n, V')
            loss, slope = step(logits, labels[start:stop], ignore_index, vocab_size, hidden.dtype)
            total += loss
            if grad_hidden is not None and grad_weight is not None:
                grad_hidden[start:stop] = slope @ head
                add_product(grad_weight, slope.T, rows)
        ctx.save_for_backward(grad_hidden, None if grad_weight is None else grad_weight[:vocab_size])
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("linear_cross_entropy", "torch", "reference")
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.weight_dtype), None, None


@torch.compiler.disable
def linear_cross_entropy_chunked(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, ignore_index: int
) -> torch.Tensor:
    """Same result as linear_cross_entropy_reference."""
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        return _ChunkedLoss.apply(hidden, weight, labels, ignore_index)
