"""The specification of sliding_window_attention: one dense masked softmax, fp64-capable."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import accumulation_dtype
from hsa_ultralong.ops.sliding_window.mask import window_mask


def sliding_window_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    dtype = accumulation_dtype(q.dtype)
    group = q.shape[2] // k.shape[2]
    keys, values = (x.to(dtype).repeat_interleave(group, 2) for x in (k, v))  # (B, Tk, Hq, D)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.to(dtype), keys) * scale
    mask = window_mask(q.shape[1], k.shape[1], window, query_segments, key_segments, q.device)
    attention = logits.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", attention, values).to(q.dtype)
