"""The check of shapes that hsa_attention and joint_attention share."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import require_shape


def require_operands(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
) -> None:
    """Raise a ValueError where the operands do not fit each other; shapes as in api.hsa_attention."""
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, Hq, D), got {tuple(q.shape)}")
    batch, num_tokens, num_heads, dim = q.shape
    require_shape("k", k, (None, None, None, dim))
    require_shape("v", v, tuple(k.shape))
    kv_heads = k.shape[2]
    if k.shape[0] not in (1, batch):
        raise ValueError(f"k and v have batch {k.shape[0]}, required 1 or {batch}")
    if chunk_size < 1 or k.shape[1] % chunk_size:
        raise ValueError(f"k has {k.shape[1]} slots, required a multiple of chunk_size={chunk_size}")
    if num_heads % kv_heads:
        raise ValueError(f"q has {num_heads} heads, required a multiple of the {kv_heads} heads of k")
    require_shape("indices", indices, (batch, num_tokens, None, None))
    if indices.shape[2] not in (1, kv_heads):
        raise ValueError(f"indices have {indices.shape[2]} retrieval heads, required 1 or {kv_heads}")
    require_shape("weights", weights, tuple(indices.shape))
    if chunk_lengths is not None:
        require_shape("chunk_lengths", chunk_lengths, (None, k.shape[1] // chunk_size))
        if chunk_lengths.shape[0] not in (1, batch):
            raise ValueError(f"chunk_lengths have batch {chunk_lengths.shape[0]}, required 1 or {batch}")
