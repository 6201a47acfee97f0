"""hsa_attention in plain torch over all chunks: the full-coverage path of warm-up and mid-training (K * S >= T).

A chunk's softmax never leaves its chunk, so tiles of queries x chunks simply add up: no running maximum. Weights are
spread to (B, T, Hr, C) with 0 where a chunk was not selected; logits live for one tile and are recomputed in the
backward. The two pointwise steps between the matmuls are compiled on a GPU. Tested against reference.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import accumulation_dtype, blocks, matmul_wide, may_be_nonfinite

# logits of one tile, in elements
_TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}


def _attention(logits: torch.Tensor, absent: torch.Tensor | None, scale: float) -> torch.Tensor:
    logits = logits * scale
    if absent is not None:
        logits = logits.masked_fill(absent, -torch.inf)
    return logits.softmax(-1)


def _chosen(part: torch.Tensor, selected: torch.Tensor | None) -> torch.Tensor:
    return part if selected is None else torch.where(selected, part, 0.0)


def _mix(
    logits: torch.Tensor,
    fused: torch.Tensor,
    absent: torch.Tensor | None,
    selected: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Softmax in every chunk times its fusion weight; logits (N, t, G, c, S), fused and selected (N, t, 1, c, 1)."""
    return _chosen(_attention(logits, absent, scale) * fused, selected).to(dtype)


def _mix_backward(
    logits: torch.Tensor,
    grad_attention: torch.Tensor,
    fused: torch.Tensor,
    absent: torch.Tensor | None,
    selected: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mixed attention again, the gradient of the logits, and that of the fusion weight summed over G, (N, t, c)."""
    attention = _attention(logits, absent, scale)
    delta = (attention * grad_attention).sum(-1, keepdim=True)
    grad_logits = _chosen(attention * (grad_attention - delta) * fused * scale, selected)
    return _chosen(attention * fused, selected).to(dtype), grad_logits.to(dtype), delta.sum((2, 4))


class _Isolated(NamedTuple):
    """Operands with zeros for what is not finite and for key slots without a token, which is what keeps it inside the
    pairs that read it: NaN stands in the weight of a chosen chunk instead, and pairs that were not chosen count 0."""

    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    selected: torch.Tensor


def _isolate(
    k: torch.Tensor,
    v: torch.Tensor,
    weights: torch.Tensor,
    indices: torch.Tensor,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
) -> _Isolated:
    """weights (B, T, Hr, C) per chunk; the result's weights are (B, T, Hkv, C)."""
    kv_heads, num_chunks = k.shape[2], weights.shape[-1]
    is_present = torch.ones((1, num_chunks, chunk_size), dtype=torch.bool, device=k.device)
    if chunk_lengths is not None:
        is_present = torch.arange(chunk_size, device=k.device) < chunk_lengths[..., None]
    is_present = is_present.flatten(1)[..., None, None]  # (1 or B, C*S, 1, 1)
    is_bad = is_present & ~(k.isfinite() & v.isfinite())
    is_bad = is_bad.unflatten(1, (num_chunks, chunk_size)).any(-1).any(2).transpose(1, 2)  # (1 or B, Hkv, C)
    k, v = (torch.where(is_present, part.nan_to_num(0.0, 0.0, 0.0), 0.0) for part in (k, v))
    # a column more takes the empty slots
    selected = torch.zeros(*indices.shape[:-1], num_chunks + 1, dtype=torch.bool, device=k.device)
    selected.scatter_(-1, torch.where(indices < 0, num_chunks, indices).long(), True)
    selected = selected[..., :num_chunks]  # (B, T, Hr, C)
    weights = weights.expand(-1, -1, kv_heads, -1).masked_fill(selected & is_bad[:, None], torch.nan)
    return _Isolated(k, v, weights, selected)


@lru_cache(maxsize=4)
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def _pointwise(function: Callable[..., Any], is_cuda: bool) -> Callable[..., Any]:
    return _compiled(function) if is_cuda else function


class _Tiles:
    """Geometry of one call: rows are (token, query head of the group), columns (chunk, slot), batch is (B, Hkv)."""

    selected: torch.Tensor | None = None

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weights: torch.Tensor,
        chunk_size: int,
        chunk_lengths: torch.Tensor | None,
        causal: bool,
    ) -> None:
        self.batch, self.num_tokens, num_heads, self.dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = num_heads // self.kv_heads
        self.size, self.causal, self.is_cuda = chunk_size, causal, q.is_cuda
        self.q, self.k, self.v, self.weights, self.lengths = q, k, v, weights, chunk_lengths
        budget = _TILE_ELEMENTS.get(q.device.type, 1 << 24) // (self.batch * num_heads)
        columns = min(weights.shape[-1] * chunk_size, max(chunk_size, 4096))
        self.tile_chunks = max(1, columns // chunk_size)
        self.tile_tokens = max(16, min(2048, budget // (self.tile_chunks * chunk_size)))

    def pairs(self) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """Token ranges, each with the chunk ranges that it may read."""
        for start, stop in blocks(self.num_tokens, self.tile_tokens):
            limit = min(self.weights.shape[-1], stop // self.size) if self.causal else self.weights.shape[-1]
            yield (start, stop), list(blocks(limit, self.tile_chunks))

    def rows(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """(B, T, Hq, D) -> (B*Hkv, t*G, D)."""
        part = tensor[:, start:stop].unflatten(2, (self.kv_heads, self.group))
        return part.transpose(1, 2).flatten(2, 3).flatten(0, 1)

    def unrows(self, rows: torch.Tensor) -> torch.Tensor:
        """(B*Hkv, t*G, D) -> (B, t, Hq, D)."""
        return rows.view(self.batch, self.kv_heads, -1, self.group, self.dim).transpose(1, 2).flatten(2, 3)

    def columns(self, tensor: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """(1 or B, C*S, Hkv, D) -> (B*Hkv, c*S, D)."""
        part = tensor[:, first * self.size : last * self.size].transpose(1, 2)
        return part.expand(self.batch, -1, -1, -1).flatten(0, 1)

    def isolate(self, indices: torch.Tensor) -> None:
        """Keep what is not finite inside the pairs that read it."""
        self.k, self.v, self.weights, self.selected = _isolate(
            self.k, self.v, self.weights, indices, self.size, self.lengths
        )

    def pair(self, by_pair: torch.Tensor, start: int, stop: int, first: int, last: int) -> torch.Tensor:
        """A tile of a tensor (B, T, Hr or Hkv, C), (B*Hkv, t, 1, c, 1)."""
        part = by_pair[:, start:stop, :, first:last].transpose(1, 2).expand(-1, self.kv_heads, -1, -1)
        return part.reshape(self.batch * self.kv_heads, stop - start, 1, last - first, 1)

    def masks(self, start: int, stop: int, first: int, last: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Key slots without a token, and pairs that were chosen; None for all there and for no need to know."""
        selected = None if self.selected is None else self.pair(self.selected, start, stop, first, last)
        return self.absent(first, last), selected

    def absent(self, first: int, last: int) -> torch.Tensor | None:
        """True at key slots without a token, (1 or B*Hkv, 1, 1, c, S)."""
        if self.lengths is None:
            return None
        part = self.lengths[:, first:last].expand(self.batch, -1).repeat_interleave(self.kv_heads, 0)
        return (torch.arange(self.size, device=part.device) >= part[..., None])[:, None, None]

    def unfold(self, tile: torch.Tensor) -> torch.Tensor:
        """(N, t*G, c*S) -> (N, t, G, c, S)."""
        return tile.unflatten(1, (-1, self.group)).unflatten(-1, (-1, self.size))


class _DenseAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        weights: torch.Tensor,
        indices: torch.Tensor,
        chunk_size: int,
        chunk_lengths: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, weights, indices, chunk_lengths)
        ctx.options = (chunk_size, scale, causal)
        tiles = _Tiles(q, k, v, weights, chunk_size, chunk_lengths, causal)
        ctx.is_isolated = may_be_nonfinite(q, k, v)
        if ctx.is_isolated:
            tiles.isolate(indices)
        mix = _pointwise(_mix, q.is_cuda)
        out = torch.empty_like(q)
        for (start, stop), chunk_ranges in tiles.pairs():
            rows = tiles.rows(q, start, stop)
            total = torch.zeros(rows.shape, dtype=accumulation_dtype(q.dtype), device=q.device)
            for first, last in chunk_ranges:
                logits = tiles.unfold(matmul_wide(rows, tiles.columns(tiles.k, first, last).transpose(1, 2)))
                fused = tiles.pair(tiles.weights, start, stop, first, last)
                mixed = mix(logits, fused, *tiles.masks(start, stop, first, last), scale, v.dtype)
                total += matmul_wide(mixed.flatten(3).flatten(1, 2), tiles.columns(tiles.v, first, last))
            out[:, start:stop] = tiles.unrows(total)
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, weights, indices, chunk_lengths = ctx.saved_tensors
        chunk_size, scale, causal = ctx.options
        tiles = _Tiles(q, k, v, weights, chunk_size, chunk_lengths, causal)
        clean_q, clean_grad = q, grad_out
        if ctx.is_isolated or may_be_nonfinite(grad_out):
            tiles.isolate(indices)
            clean_q, clean_grad = (part.nan_to_num(0.0, 0.0, 0.0) for part in (q, grad_out))
        mix_backward = _pointwise(_mix_backward, q.is_cuda)
        wide = accumulation_dtype(q.dtype)
        grad_q, grad_weights = torch.empty_like(q), torch.zeros_like(weights)
        shape = (tiles.batch * tiles.kv_heads, k.shape[1], tiles.dim)
        grad_k = torch.zeros(shape, dtype=wide, device=q.device)
        grad_v = torch.zeros_like(grad_k)
        for (start, stop), chunk_ranges in tiles.pairs():
            rows, grad = tiles.rows(q, start, stop), tiles.rows(grad_out, start, stop)
            clean_rows, clean = tiles.rows(clean_q, start, stop), tiles.rows(clean_grad, start, stop)
            total = torch.zeros(rows.shape, dtype=wide, device=q.device)
            for first, last in chunk_ranges:
                keys, values = tiles.columns(tiles.k, first, last), tiles.columns(tiles.v, first, last)
                logits = tiles.unfold(matmul_wide(rows, keys.transpose(1, 2)))
                grad_attention = tiles.unfold(matmul_wide(grad, values.transpose(1, 2)))
                fused = tiles.pair(tiles.weights, start, stop, first, last)
                masks = tiles.masks(start, stop, first, last)
                mixed, grad_logits, grad_fused = mix_backward(logits, grad_attention, fused, *masks, scale, q.dtype)
                mixed, grad_logits = mixed.flatten(3).flatten(1, 2), grad_logits.flatten(3).flatten(1, 2)
                columns = slice(first * chunk_size, last * chunk_size)
                grad_v[:, columns] += matmul_wide(mixed.transpose(1, 2), clean)
                grad_k[:, columns] += matmul_wide(grad_logits.transpose(1, 2), clean_rows)
                total += matmul_wide(grad_logits, keys)
                per_head = grad_fused.unflatten(0, (tiles.batch, tiles.kv_heads)).transpose(1, 2)  # (B, t, Hkv, c)
                if weights.shape[2] == 1:
                    per_head = per_head.sum(2, keepdim=True)
                grad_weights[:, start:stop, :, first:last] = per_head
            grad_q[:, start:stop] = tiles.unrows(total)
        return grad_q, _fold(grad_k, k, tiles), _fold(grad_v, v, tiles), grad_weights, None, None, None, None, None


def _fold(columns: torch.Tensor, like: torch.Tensor, tiles: _Tiles) -> torch.Tensor:
    """(B*Hkv, C*S, D) -> the shape and dtype of `like`, summed over the batch for a shared memory."""
    full = columns.unflatten(0, (tiles.batch, tiles.kv_heads)).transpose(1, 2)  # (B, C*S, Hkv, D)
    if like.shape[0] == 1:
        full = full.sum(0, keepdim=True)
    return full.to(like.dtype)


def spread_weights(indices: torch.Tensor, weights: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """Weights per selected slot -> weights per chunk, (B, T, Hr, C), 0 where not selected; differentiable."""
    kept = weights.masked_fill(indices < 0, 0.0)
    dense = kept.new_zeros(*kept.shape[:-1], num_chunks)
    return dense.scatter_add(-1, indices.long().clamp_min(0), kept)


@torch.compiler.disable
def hsa_attention_dense(
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
    """Same result as hsa_attention_reference at a cost of T * C * S whatever K; memory O(T * C + tile)."""
    dense = spread_weights(indices, weights, k.shape[1] // chunk_size)
    return _DenseAttention.apply(q, k, v, dense, indices, chunk_size, chunk_lengths, scale, causal)
