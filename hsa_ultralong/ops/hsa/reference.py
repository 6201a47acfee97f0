"""The specification of hsa_attention: equations 3 and 4 of the paper (sec. 2.2) written out, fp64-capable."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import accumulation_dtype


def hsa_attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """O_t = sum_i w_i * softmax(scale * q_t k_i^T) v_i over the selected chunks i, each with its own softmax.

    What is not read (empty slots, keys beyond a chunk's length) is replaced, not multiplied by zero.
    """
    dtype = accumulation_dtype(q.dtype)
    batch, num_tokens, num_heads, dim = q.shape
    kv_heads, slots = k.shape[2], indices.shape[-1]
    if slots == 0:
        return q * 0
    group = num_heads // kv_heads
    keys = k.to(dtype).unflatten(1, (-1, chunk_size)).expand(batch, -1, -1, -1, -1)  # (B, C, S, Hkv, D)
    values = v.to(dtype).unflatten(1, (-1, chunk_size)).expand(batch, -1, -1, -1, -1)
    index = indices.long().clamp_min(0).expand(-1, -1, kv_heads, -1)  # (B, T, Hkv, K)
    fused = weights.to(dtype).masked_fill(indices < 0, 0.0).expand(-1, -1, kv_heads, -1)  # (B, T, Hkv, K)
    rows = torch.arange(batch, device=q.device)[:, None, None, None]
    heads = torch.arange(kv_heads, device=q.device)[None, None, :, None]
    empty = (indices < 0).expand(-1, -1, kv_heads, -1)[..., None]  # (B, T, Hkv, K, 1)
    absent = torch.zeros_like(empty).expand(*empty.shape[:-1], chunk_size)  # (B, T, Hkv, K, S)
    if chunk_lengths is not None:
        length = chunk_lengths.expand(batch, -1)[rows, index]  # (B, T, Hkv, K)
        absent = torch.arange(chunk_size, device=q.device) >= length[..., None]
    picked_keys, picked_values = (
        part[rows, index, :, heads].masked_fill((empty | absent)[..., None], 0.0) for part in (keys, values)
    )  # (B, T, Hkv, K, S, D)
    queries = q.to(dtype).unflatten(2, (kv_heads, group))  # (B, T, Hkv, G, D)
    logits = scale * torch.einsum("bthgd,bthksd->bthgks", queries, picked_keys)
    logits = logits.masked_fill(absent[:, :, :, None], -torch.inf).masked_fill(empty[:, :, :, None], 0.0)
    attention = logits.softmax(-1)
    out = torch.einsum("bthk,bthgks,bthksd->bthgd", fused, attention, picked_values)
    return out.flatten(2, 3).to(q.dtype)  # (B, T, Hq, D)
