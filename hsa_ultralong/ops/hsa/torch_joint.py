"""joint_attention in plain torch, the specification of its kernels: blockwise in T, in fp32 (fp64 for fp64), recomputed
in the backward. Called by joint.py; tests/ops/test_hsa_joint.py.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.ops._common import accumulation_dtype, blocks

# logits of one block of tokens, in elements
_BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
# up to so many chunks for each one chosen, all are multiplied; beyond, those chosen are gathered
_DENSE_RATIO = 8


def joint_attention_torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As joint.joint_attention, with the logarithms of the weights, (B, T, Hr, K), -inf in empty slots; K, C, T > 0."""
    num_chunks = k.shape[1] // chunk_size
    is_dense = num_chunks <= _DENSE_RATIO * indices.shape[-1]
    read = (num_chunks if is_dense else indices.shape[-1] * q.shape[-1]) * chunk_size
    budget = _BLOCK_ELEMENTS.get(q.device.type, 1 << 24)
    size = max(1, budget // (q.shape[0] * q.shape[2] * read))
    block = _dense_block if is_dense else _gathered_block
    parts = []
    for start, stop in blocks(q.shape[1], size):
        # what these tokens may have chosen; no less than a chunk, which nobody has chosen then
        count = max(1, stop // chunk_size) if causal and is_dense else num_chunks
        keys, values = (part[:, : count * chunk_size] for part in (k, v))
        lengths = None if chunk_lengths is None else chunk_lengths[:, :count]
        operands = q[:, start:stop], keys, values, indices[:, start:stop], bias[:, start:stop], chunk_size, lengths
        if torch.is_grad_enabled():
            parts.append(checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(block(*operands))
    out, mass = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return out.to(q.dtype), mass


def _attend(logits: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention and logsumexp of logits (B, t, Hkv, G, N), and which tokens have no chunk, (B, t, Hr, 1)."""
    is_lone = (indices < 0).all(-1)[..., None]  # (B, t, Hr, 1)
    logits = logits.masked_fill(is_lone[..., None], 0.0)
    return logits.softmax(-1), logits.logsumexp(-1).masked_fill(is_lone, -torch.inf), is_lone


def _dense_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By the product of all queries and keys; what was not chosen has a bias of -inf."""
    wide, count = accumulation_dtype(q.dtype), k.shape[1] // chunk_size
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(wide).unflatten(2, (k.shape[2], -1))  # (B, t, Hkv, G, D)
        keys, values = (part.to(wide).expand(q.shape[0], -1, -1, -1) for part in (k, v))
        # a column more takes the empty slots
        spread = bias.new_full((*bias.shape[:-1], count + 1), -torch.inf)
        spread = spread.scatter(-1, torch.where(indices < 0, count, indices).long(), bias)[..., :count]
        spread = spread.repeat_interleave(chunk_size, -1)[:, :, :, None]  # (B, t, Hr, 1, N)
        logits = torch.einsum("bthgd,bnhd->bthgn", queries, keys) * q.shape[-1] ** -0.5 + spread
        if chunk_lengths is not None:
            absent = torch.arange(chunk_size, device=q.device) >= chunk_lengths[..., None]  # (1 or B, C, S)
            logits = logits.masked_fill(absent.flatten(1)[:, None, None, None], -torch.inf)
        attention, mass, is_lone = _attend(logits, indices)
        out = torch.einsum("bthgn,bnhd->bthgd", attention, values).masked_fill(is_lone[..., None], 0.0)
    return out.flatten(2, 3), mass.flatten(2, 3)


def _gathered_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """By gathering the chosen chunks: for selections that leave most out."""
    wide, kv_heads = accumulation_dtype(q.dtype), k.shape[2]
    index = indices.long().clamp_min(0).expand(-1, -1, kv_heads, -1)  # (B, t, Hkv, K)
    rows = torch.arange(q.shape[0], device=q.device).view(-1, 1, 1, 1) % k.shape[0]
    heads = torch.arange(kv_heads, device=q.device).view(1, 1, -1, 1)
    with torch.autocast(q.device.type, enabled=False):
        queries = q.to(wide).unflatten(2, (kv_heads, -1))  # (B, t, Hkv, G, D)
        keys, values = (
            part.unflatten(1, (-1, chunk_size))[rows, index, :, heads].to(wide) for part in (k, v)
        )  # (B, t, Hkv, K, S, D)
        logits = torch.einsum("bthgd,bthksd->bthgks", queries, keys) * q.shape[-1] ** -0.5
        logits = logits + bias[:, :, :, None, :, None]
        if chunk_lengths is not None:
            lengths = chunk_lengths.expand(q.shape[0], -1)[rows, index]  # (B, t, Hkv, K)
            absent = torch.arange(chunk_size, device=q.device) >= lengths[..., None]
            logits = logits.masked_fill(absent[:, :, :, None], -torch.inf)
        attention, mass, is_lone = _attend(logits.flatten(4), indices)
        out = torch.einsum("bthgn,bthnd->bthgd", attention, values.flatten(3, 4)).masked_fill(is_lone[..., None], 0.0)
    return out.flatten(2, 3), mass.flatten(2, 3)
