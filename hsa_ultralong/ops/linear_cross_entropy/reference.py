"""The specification of linear_cross_entropy: all logits at once, fp64-capable."""

from __future__ import annotations

import torch.nn.functional as F

from hsa_ultralong.ops._common import accumulation_dtype


def linear_cross_entropy_reference(hidden, weight, labels, *, ignore_index):
    dtype = accumulation_dtype(hidden.dtype)
    logits = hidden.to(dtype) @ weight.to(dtype).T  # (N, V)
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")
