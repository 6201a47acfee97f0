"""Sliding-window attention on torch's flex_attention: compiled once per kind of call, for training on a GPU.

Which blocks of 128 x 128 a window touches is arithmetic, so the mask is built without looking at any pair of tokens.
Tested against reference.py on a GPU (tests/ops/test_gpu.py); flex_attention has no backward on a CPU.
"""

from __future__ import annotations

from copy import copy
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

_BLOCK = 128


# kinds of call that get a graph of their own; later ones share one of any shape, which is about 1.4 times slower
_OWN_GRAPHS = 24
_kinds: set[Any] = set()


def _any_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | None, scale: float, is_grouped: bool
) -> torch.Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)


def _one_shape(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask | None, scale: float, is_grouped: bool
) -> torch.Tensor:
    return flex_attention(q, k, v, block_mask=mask, scale=scale, enable_gqa=is_grouped)


@lru_cache(maxsize=2)
def _compiled(function: Any, is_dynamic: bool) -> Any:
    return torch.compile(function, dynamic=is_dynamic)


def _graph(kind: Any) -> Any:
    """The compiled function for calls of this kind; a recompilation limit of torch's must never be met."""
    if kind not in _kinds and len(_kinds) >= _OWN_GRAPHS:
        return _compiled(_any_shape, True)
    _kinds.add(kind)
    return _compiled(_one_shape, False)


def _rule(offset: int, window: int, query_segments: torch.Tensor | None, key_segments: torch.Tensor | None) -> Any:
    """flex_attention's question: does query `row` see key `column`?"""

    def in_window(b: Any, h: Any, row: Any, column: Any) -> Any:
        distance = row + offset - column
        return (distance >= 0) & (distance < window)

    if query_segments is None or key_segments is None:
        return in_window

    def in_document(b: Any, h: Any, row: Any, column: Any) -> Any:
        return in_window(b, h, row, column) & (query_segments[b, row] == key_segments[b, column])

    return in_document


def touched_blocks(
    num_queries: int, num_keys: int, window: int, has_documents: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per block of queries, (1, 1, rows) and (1, 1, rows, columns) int32: number and list of the key blocks that need
    the rule, then of those that every query sees whole (none with documents)."""
    rows, columns = -(-num_queries // _BLOCK), -(-num_keys // _BLOCK)
    first = torch.arange(rows, dtype=torch.int32, device=device) * _BLOCK + (num_keys - num_queries)
    last = (first + _BLOCK).clamp_max(num_keys) - 1  # key positions of the block's first and last query
    low, high = (first - window + 1).clamp_min(0) // _BLOCK, last // _BLOCK
    whole_low = (last - window + _BLOCK).clamp_min(0) // _BLOCK
    whole_high = (first + 1) // _BLOCK - 1
    most = min(columns, (window + 2 * _BLOCK - 2) // _BLOCK + 1)
    column = low[:, None] + torch.arange(most, dtype=torch.int32, device=device)  # (rows, most)
    exists = column <= high[:, None]
    is_whole = exists & (column >= whole_low[:, None]) & (column <= whole_high[:, None])
    if has_documents:
        is_whole = torch.zeros_like(is_whole)

    def listed(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        indices = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        indices[:, :most] = torch.where(chosen, column, 0).gather(1, order)
        return chosen.sum(1, dtype=torch.int32)[None, None], indices[None, None]

    return (*listed(exists & ~is_whole), *listed(is_whole))


@lru_cache(maxsize=4)
def _plan(num_queries: int, num_keys: int, window: int, has_documents: bool, device: torch.device) -> BlockMask:
    lists = touched_blocks(num_queries, num_keys, window, has_documents, device)
    lengths = (num_queries, num_keys)
    return BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=_BLOCK, seq_lengths=lengths)


def window_block_mask(
    num_queries: int, num_keys: int, window: int, query_segments: Any, key_segments: Any, device: torch.device
) -> BlockMask:
    """flex_attention's mask of a window; its lists of blocks are kept from call to call."""
    mask = copy(_plan(num_queries, num_keys, window, query_segments is not None, device))
    mask.mask_mod = _rule(num_keys - num_queries, window, query_segments, key_segments)
    return mask


@torch.compiler.disable
def sliding_window_flex(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Same result as sliding_window_reference."""
    if not q.is_cuda:
        raise ValueError(f'sliding_window_attention: impl="flex" needs CUDA tensors, got {q.device}; use impl="torch"')
    mask = window_block_mask(q.shape[1], k.shape[1], window, query_segments, key_segments, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    kind = (q.shape, k.shape, q.dtype, window, query_segments is None, torch.is_grad_enabled() and q.requires_grad)
    with torch._dynamo.config.patch(recompile_limit=4 * _OWN_GRAPHS):
        out = _graph(kind)(q, k, v, mask, scale, q.shape[1] != k.shape[1])
    return out.transpose(1, 2)  # (B, Tq, Hq, D)
