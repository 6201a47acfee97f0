"""Which keys a token sees: shared by the reference and the backends of sliding_window."""

from __future__ import annotations

import torch


def window_mask(
    num_queries: int,
    num_keys: int,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    device: torch.device | None,
) -> torch.Tensor:
    """(1 or B, Tq, Tk) bool: the last `window` keys up to the token's own, of its own segment."""
    query = torch.arange(num_queries, device=device)[:, None] + (num_keys - num_queries)
    distance = query - torch.arange(num_keys, device=device)[None]  # (Tq, Tk)
    mask = ((distance >= 0) & (distance < window))[None]
    if query_segments is not None and key_segments is not None:
        mask = mask & (query_segments[:, :, None] == key_segments[:, None, :])
    return mask
