"""Gradients of kept products, shared by the backends: blocks of tokens, each one (block, C) matrix at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hsa_ultralong.ops._common import accumulation_dtype, blocks, matmul_wide

# elements of one block
BLOCK_ELEMENTS = 1 << 24


def _parts(pairs: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """For bf16 operands the gradient as a sum of two bf16 numbers, so that its products run on matrix units without
    losing what a plain rounding would lose; otherwise itself."""
    if dtype != torch.bfloat16 or not pairs.is_cuda:
        return [pairs]
    high = pairs.to(dtype)
    return [high, (pairs - high.to(pairs.dtype)).to(dtype)]


def as_one_row(landmarks: torch.Tensor, *by_token: torch.Tensor) -> list[torch.Tensor]:
    """Tensors (B, T, ...) as (1, B * T, ...) where all rows share the landmarks, so that nothing is repeated by row."""
    return [part.flatten(0, 1)[None] if landmarks.shape[0] == 1 and part.shape[0] > 1 else part for part in by_token]


def product_gradients(
    query: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query and landmarks from `grad` (B, T, Hr, K) of the products at `indices`; -1 counts nothing.

    query (B, T, Hr, R), landmarks (1 or B, C, Hr, R). Nothing of size T * C is stored, and no atomic addition is used.
    """
    rows_shape = query.shape
    query, indices, grad = as_one_row(landmarks, query, indices, grad)
    batch, num_tokens, heads, dim = query.shape
    num_chunks = landmarks.shape[1]
    wide = accumulation_dtype(query.dtype)
    narrow = query.dtype if query.is_cuda and query.dtype == landmarks.dtype == torch.bfloat16 else wide
    multiply: Callable[..., torch.Tensor] = matmul_wide if narrow != wide else torch.matmul
    grad_query = torch.empty_like(query)
    grad_landmarks = torch.zeros(batch * heads, num_chunks, dim, dtype=wide, device=query.device)
    width = -(-(num_chunks + 1) // 8) * 8  # rows of 16 bytes, which matrix products need to be fast
    # what is not finite was never kept, and a product with its slope of zero would be no zero
    query, landmarks = (part.nan_to_num(0.0, 0.0, 0.0) for part in (query, landmarks))
    columns = landmarks.to(narrow).transpose(1, 2).flatten(0, 1)  # (B*Hr, C, R)
    for start, stop in blocks(num_tokens, max(1, BLOCK_ELEMENTS // max(1, batch * heads * num_chunks))):
        index = indices[:, start:stop].long()
        pairs = grad[:, start:stop].to(wide).masked_fill(index < 0, 0.0)
        # a column more than there are chunks takes the empty slots; other slots of a token hold different chunks
        index = index.masked_fill(index < 0, num_chunks)
        rows = query[:, start:stop].to(narrow).transpose(1, 2).flatten(0, 1)  # (B*Hr, t, R)
        found = torch.zeros(batch * heads, stop - start, dim, dtype=wide, device=query.device)
        for part in _parts(pairs, narrow):
            dense = part.new_zeros(*part.shape[:-1], width).scatter_(-1, index, part)[..., :num_chunks]
            dense = dense.transpose(1, 2).flatten(0, 1)  # (B*Hr, t, C)
            found += multiply(dense, columns)
            grad_landmarks += multiply(dense.transpose(1, 2), rows)
        grad_query[:, start:stop] = found.unflatten(0, (batch, heads)).transpose(1, 2)
    grad_landmarks = grad_landmarks.unflatten(0, (batch, heads)).transpose(1, 2)
    return grad_query.view(rows_shape), grad_landmarks.to(landmarks.dtype)
