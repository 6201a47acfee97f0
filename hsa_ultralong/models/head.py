"""The head and its loss: fused where the head is a plain linear layer, called in pieces where it is not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.nn.plain_linear import is_plain_linear
from hsa_ultralong.ops import linear_cross_entropy

# logits of one piece, in elements
_PIECE_ELEMENTS = 1 << 25


def _piece_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = head(hidden)  # (B, n, V)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


def head_loss(head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """Sum over tokens of -log softmax(head(hidden))[target], fp32 (fp64 kept), without storing all logits.

    Args:
        head: whatever stands as the head, with its hooks, adapters and quantisation.
        hidden: (B, T, M). targets: (B, T) int64, already shifted; -100 counts nothing.
        vocab_size: V, which says how many tokens a piece has.
    """
    if is_plain_linear(head):
        return linear_cross_entropy(hidden.flatten(0, 1), head.weight, targets.flatten())
    size = max(1, _PIECE_ELEMENTS // (vocab_size * hidden.shape[0]))
    total = hidden.new_zeros((), dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for piece, part in zip(hidden.split(size, 1), targets.split(size, 1), strict=True):
        if torch.is_grad_enabled():
            total = total + checkpoint(_piece_loss, head, piece, part, use_reentrant=False)
        else:
            total = total + _piece_loss(head, piece, part)
    return total
