"""Independent statements of what the operators and modules must compute, slow and in fp64.

They share no code with `ops`: each is written from the formula in docs/architecture.md, token by token where possible.
"""

from __future__ import annotations

import math

import torch


def naive_hsa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Fact 2, one token, head and chunk at a time; shapes as in hsa_attention."""
    batch, num_tokens, num_heads, dim = q.shape
    group = num_heads // k.shape[2]
    scale = 1 / math.sqrt(dim) if scale is None else scale
    rows = []
    for b in range(batch):
        memory = 0 if k.shape[0] == 1 else b
        for t in range(num_tokens):
            for h in range(num_heads):
                head = h // group
                retrieval_head = 0 if indices.shape[2] == 1 else head
                total = q.new_zeros(dim)
                for slot, chunk in enumerate(indices[b, t, retrieval_head].tolist()):
                    if chunk < 0:
                        continue
                    length = chunk_size
                    if chunk_lengths is not None:
                        length = int(chunk_lengths[0 if chunk_lengths.shape[0] == 1 else b, chunk])
                    part = slice(chunk * chunk_size, chunk * chunk_size + length)
                    attention = (k[memory, part, head] @ q[b, t, h] * scale).softmax(0)
                    total = total + weights[b, t, retrieval_head, slot] * (attention @ v[memory, part, head])
                rows.append(total)
    return torch.stack(rows).view(batch, num_tokens, num_heads, dim)


def chunk_logsumexp(q: torch.Tensor, k: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """lse_i(t, head) of fact 3: (B, T, Hq, C)."""
    keys = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bthd,bnhd->bthn", q, keys) / math.sqrt(q.shape[-1])
    return logits.unflatten(-1, (-1, chunk_size)).logsumexp(-1)


def dense_chunk_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor,
    chunk_size: int,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """One softmax over all keys of the visible chunks (B, T, C), plus `bias` (B, T, Hq, C); 0 where none is visible."""
    group = q.shape[2] // k.shape[2]
    keys, values = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    logits = torch.einsum("bthd,bnhd->bthn", q, keys) / math.sqrt(q.shape[-1])
    if bias is not None:
        logits = logits + bias.repeat_interleave(chunk_size, -1)
    hidden = ~visible[:, :, None].repeat_interleave(chunk_size, -1)  # (B, T, 1, C*S)
    attention = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("bthn,bnhd->bthd", attention, values)


def stick_breaking_weights(scores: torch.Tensor) -> torch.Tensor:
    """w_k = sigmoid(s_k) * prod over j < k of (1 - sigmoid(s_j)), by a loop; -inf is an empty slot."""
    left, parts = torch.ones_like(scores[..., 0]), []
    for k in range(scores.shape[-1]):
        probability = scores[..., k].sigmoid()
        parts.append(left * probability)
        left = left * (1 - probability)
    return torch.stack(parts, -1)


def is_chunk_visible(segment: int, position: int, chunk_segment: int, end: int, foreign: str) -> bool:
    """The rule of ChunkVisibility in words of one case each."""
    if segment == -1 or chunk_segment == -2:
        return False
    if chunk_segment == -1:
        return True
    if chunk_segment == segment:
        return end <= position
    return foreign == "past"


def max_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute difference, in fp64."""
    return float((actual.double() - exact.double()).abs().max())
