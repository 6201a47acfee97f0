"""The specification of linear_cross_entropy: all logits at once, fp64-capable."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hsa_ultralong.ops._common import accumulation_dtype


def linear_cross_entropy_reference(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, *, ignore_index: int
) -> torch.Tensor:
    dtype = accumulation_dtype(hidden.dtype)
    # ignored rows are replaced, not multiplied by zero: they may hold anything
    rows = torch.where((labels != ignore_index)[:, None], hidden.to(dtype), 0.0)
    logits = rows @ weight.to(dtype).T  # (N, V)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
