"""hsa_attention in plain torch by gathering the selected chunks, blockwise in T, recomputed in the backward.

Cost per token is K * S keys whatever the number of chunks: the path for decoding and for sparse selections. Where many
tokens read the same chunks, a CPU's forward gathers each of these once for several tokens (`_tiles`).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import accumulation_dtype, blocks, matmul_wide

# gathered keys of one block of tokens, in elements
_BLOCK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 28}
# pairs of a token and a chunk on a CPU: from how many on chunks are gathered once for several tokens, how many a chunk
# must have on average, and the most of a tile
_FEWEST_PAIRS, _FEWEST_SHARED, _LARGEST_TILE = 1024, 3, 32
# keys and queries of tiles that are read together: they stay in a core's caches
_TILE_ELEMENTS = 1 << 19


def _rows(tensor: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """(Bk, C*S, Hkv, D) -> (Bk*Hkv*C, S*D), one row per chunk and head."""
    return tensor.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 2)


def _filled(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks (B, t, Hr, K) int64 in which empty slots, whose weight is 0, repeat one of the token's own, so that they
    read nothing that it does not read; and (B, t, Hr) which tokens have none: they read chunk 0 with queries of zeros.
    """
    highest = indices.amax(-1, keepdim=True)
    filled = torch.where(indices < 0, highest, indices).clamp_min(0)
    return filled.long(), highest[..., 0] < 0


def _row_index(index: torch.Tensor, kv_batch: int, kv_heads: int, num_chunks: int) -> torch.Tensor:
    """Row of each chunk (B, t, Hr, K) in `_rows`, (B, t, Hkv, K) int64."""
    batch = torch.arange(index.shape[0], device=index.device).view(-1, 1, 1, 1)
    if kv_batch == 1:
        batch = torch.zeros_like(batch)
    head = torch.arange(kv_heads, device=index.device).view(1, 1, -1, 1)
    return (batch * kv_heads + head) * num_chunks + index.expand(-1, -1, kv_heads, -1)


def _attention(
    queries: torch.Tensor, keys: torch.Tensor, absent: torch.Tensor | None, scale: float, shape: tuple[int, int]
) -> torch.Tensor:
    """Softmax inside every gathered chunk, (N, G, K, S) in the accumulation dtype; N = B * t * Hkv."""
    slots, chunk_size = shape
    logits = matmul_wide(queries, keys.transpose(1, 2)).mul_(scale).unflatten(-1, (slots, chunk_size))
    if absent is not None:
        logits = logits.masked_fill(absent[:, None], -torch.inf)
    return logits.softmax(-1)


def _absent(
    chunk_lengths: torch.Tensor | None, index: torch.Tensor, kv_heads: int, chunk_size: int
) -> torch.Tensor | None:
    """True where a gathered key slot holds no token (short chunks), (N, K, S), or None; index (B, t, Hr, K)."""
    if chunk_lengths is None:
        return None
    lengths = chunk_lengths.expand(index.shape[0], -1).gather(1, index.flatten(1)).view_as(index)  # (B, t, Hr, K)
    lengths = lengths.expand(-1, -1, kv_heads, -1).flatten(0, 2)  # (N, K)
    absent = torch.arange(chunk_size, device=lengths.device) >= lengths[..., None]
    # where the answer is at hand, whole chunks save the passes that a mask takes
    return None if absent.is_cpu and not absent.any() else absent


def _gather(tensor: torch.Tensor, chunk_size: int, row_index: torch.Tensor) -> torch.Tensor:
    """Chunks of (1 or B, C*S, Hkv, D) at row_index (B, t, Hkv, K) of `_rows`, (B*t*Hkv, K*S, D), copying no others."""
    kv_heads, dim = tensor.shape[2:]
    slots = row_index.shape[-1]
    if kv_heads == 1:
        picked = _rows(tensor, chunk_size).index_select(0, row_index.flatten())  # (B*t*K, S*D)
    else:
        by_chunk = tensor.unflatten(1, (-1, chunk_size))  # (1 or B, C, S, Hkv, D)
        num_chunks = by_chunk.shape[1]
        row, chunk = row_index // num_chunks, row_index % num_chunks
        picked = by_chunk[row // kv_heads, chunk, :, row % kv_heads]  # (B, t, Hkv, K, S, D)
    return picked.reshape(-1, slots * chunk_size, dim)


class _Problem(NamedTuple):
    """The operands of one call; shapes as in api.hsa_attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    indices: torch.Tensor
    weights: torch.Tensor
    chunk_lengths: torch.Tensor | None
    chunk_size: int
    scale: float

    def blocks(self) -> Iterator[tuple[int, int]]:
        budget = _BLOCK_ELEMENTS.get(self.q.device.type, 1 << 24)
        per_token = self.q.shape[0] * self.k.shape[2] * self.indices.shape[-1] * self.chunk_size * self.q.shape[-1]
        return blocks(self.q.shape[1], max(1, budget // max(1, per_token)))


class _Block:
    """The gathered operands of tokens start..stop: N = B * t * Hkv problems of G queries against K chunks."""

    def __init__(self, problem: _Problem, start: int, stop: int) -> None:
        q, k, v, indices, weights, chunk_lengths, size, scale = problem
        kv_heads, slots = k.shape[2], indices.shape[-1]
        num_chunks = k.shape[1] // size
        index, is_lone = _filled(indices[:, start:stop])
        self.is_lone = is_lone.expand(-1, -1, kv_heads).reshape(-1, 1, 1)  # (N, 1, 1)
        self.row_index = _row_index(index, k.shape[0], kv_heads, num_chunks)  # (B, t, Hkv, K)
        self.keys, self.values = (_gather(x, size, self.row_index) for x in (k, v))  # (N, K*S, D)
        self.queries = self.rows(q[:, start:stop])
        wide = accumulation_dtype(q.dtype)
        fused = weights[:, start:stop].to(wide).masked_fill(indices[:, start:stop] < 0, 0.0)
        self.fused = fused.expand(-1, -1, kv_heads, -1).reshape(-1, slots)  # (N, K)
        absent = _absent(chunk_lengths, index, kv_heads, size)
        if absent is not None:
            for part in (self.keys, self.values):
                part.masked_fill_(absent.flatten(1)[..., None], 0.0)
        self.attention = _attention(self.queries, self.keys, absent, scale, (slots, size))

    def rows(self, part: torch.Tensor) -> torch.Tensor:
        """(B, t, Hq, D) -> (N, G, D), zeros for tokens without chunks."""
        kv_heads = self.row_index.shape[2]
        return part.unflatten(2, (kv_heads, -1)).flatten(0, 2).masked_fill(self.is_lone, 0.0)

    def result(self, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """(N, G, D) -> the shape of `like`, (B, t, Hq, D), zeros for tokens without chunks."""
        return part.masked_fill_(self.is_lone, 0.0).view(like.shape)

    def mixed(self) -> torch.Tensor:
        """Attention times fusion weight in the dtype of the values, (N, G, K*S)."""
        return (self.attention * self.fused[:, None, :, None]).flatten(2).to(self.values.dtype)


class _Tiles(NamedTuple):
    """Pairs of a problem (one of the B * t * Hkv with G queries) and a chunk that it reads, in tiles of one chunk.

    pairs: (P,) int64 numbers in (N, K), those of a chunk together. places: (P,) int64, where each stands in the tiles.
    rows: (tiles,) int64, which chunk each reads, as `_row_index` counts. size: places of a tile.
    """

    pairs: torch.Tensor
    places: torch.Tensor
    rows: torch.Tensor
    size: int


def _tiles(row_index: torch.Tensor, is_empty: torch.Tensor) -> _Tiles | None:
    """The tiles of chunks (N, K), or None where so few tokens share them that gathering slot by slot is as good."""
    pairs = (~is_empty).flatten().nonzero()[:, 0]
    if len(pairs) < _FEWEST_PAIRS:
        return None
    rows, order = row_index.flatten()[pairs].sort(stable=True)
    chunks, counts = rows.unique_consecutive(return_counts=True)
    shared = len(pairs) // len(chunks)
    if shared < _FEWEST_SHARED:
        return None
    size = min(_LARGEST_TILE, 1 << shared.bit_length() - 1)
    tiles = (counts + size - 1) // size
    first_pair, first_tile = counts.cumsum(0) - counts, tiles.cumsum(0) - tiles
    number = torch.repeat_interleave(counts)  # (P,), which of the chunks
    places = first_tile[number] * size + torch.arange(len(pairs)) - first_pair[number]
    return _Tiles(pairs[order], places, torch.repeat_interleave(chunks, tiles), size)


def _attend_tiles(problem: _Problem, out: torch.Tensor) -> bool:
    """Write the result of all tokens to `out` (B, T, Hq, D), chunk by chunk; False, and nothing written, where too few
    tokens share them."""
    q, k, v, indices, weights, chunk_lengths, size, scale = problem
    kv_heads, slots, num_chunks, wide = k.shape[2], indices.shape[-1], k.shape[1] // size, accumulation_dtype(q.dtype)
    index = indices.long().clamp_min(0)
    row_index = _row_index(index, k.shape[0], kv_heads, num_chunks)  # (B, T, Hkv, K)
    found = _tiles(row_index, (indices < 0).expand_as(row_index))
    if found is None:
        return False
    queries = q.unflatten(2, (kv_heads, -1)).flatten(0, 2)  # (N, G, D)
    fused = weights.to(wide).expand_as(row_index).flatten()  # (N * K,)
    result = queries.new_zeros(queries.shape, dtype=wide)
    lengths = None
    if chunk_lengths is not None and not bool((chunk_lengths == size).all()):
        lengths = chunk_lengths.long()[:, None].expand(k.shape[0], kv_heads, -1).flatten()  # of the rows
    at_once = max(1, _TILE_ELEMENTS // (size * q.shape[-1] + found.size * queries[0].numel()))
    # the pairs of a block of tiles stand together
    bounds = torch.arange(0, len(found.rows) + at_once, at_once).clamp_max(len(found.rows)) * found.size
    cuts = torch.searchsorted(found.places, bounds).tolist()
    for number, (first, last) in enumerate(pairwise(cuts)):
        rows = found.rows[number * at_once : (number + 1) * at_once]
        pairs, places = found.pairs[first:last], found.places[first:last] - number * at_once * found.size
        problems = pairs // slots
        asked = queries.new_zeros((len(rows) * found.size, *queries.shape[1:]))
        shares = fused.new_zeros(len(asked))
        asked[places], shares[places] = queries[problems], fused[pairs]
        keys, values = (_gather(x, size, rows[:, None]) for x in (k, v))  # (tiles, S, D)
        absent = None
        if lengths is not None:
            absent = (torch.arange(size) >= lengths[rows][:, None])[:, None]  # (tiles, 1, S)
            for part in (keys, values):
                part.masked_fill_(absent.transpose(1, 2), 0.0)
        asked = asked.view(len(rows), -1, q.shape[-1])
        attention = _attention(asked, keys, absent, scale, (1, size))  # (tiles, size * G, 1, S)
        mixed = attention[:, :, 0] * shares.repeat_interleave(queries.shape[1]).view(*asked.shape[:2], 1)
        part = matmul_wide(mixed.to(v.dtype), values).view(-1, *queries.shape[1:])
        result.index_add_(0, problems, part[places])
    out.copy_(result.view(out.shape))
    return True


class _GatherAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        chunk_size: int,
        chunk_lengths: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, indices, weights, chunk_lengths)
        ctx.chunk_size, ctx.scale = chunk_size, scale
        problem = _Problem(q, k, v, indices, weights, chunk_lengths, chunk_size, scale)
        out = torch.empty_like(q)
        if q.is_cpu and _attend_tiles(problem, out):
            return out
        for start, stop in problem.blocks():
            block = _Block(problem, start, stop)
            out[:, start:stop] = block.result(matmul_wide(block.mixed(), block.values), out[:, start:stop])
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, indices, weights, chunk_lengths = ctx.saved_tensors
        problem = _Problem(q, k, v, indices, weights, chunk_lengths, ctx.chunk_size, ctx.scale)
        wide = accumulation_dtype(q.dtype)
        grad_keys = torch.zeros(_rows(k, ctx.chunk_size).shape, dtype=wide, device=q.device)
        grad_values = torch.zeros_like(grad_keys)
        grad_q, grad_weights = torch.empty_like(q), torch.zeros_like(weights)
        for start, stop in problem.blocks():
            block = _Block(problem, start, stop)
            grad = block.rows(grad_out[:, start:stop])  # (N, G, D)
            row = block.row_index.flatten()
            flat = (row.numel(), grad_keys.shape[1])
            grad_values.index_add_(0, row, matmul_wide(block.mixed().transpose(1, 2), grad).view(flat))
            grad_attention = matmul_wide(grad, block.values.transpose(1, 2)).view_as(block.attention)  # (N, G, K, S)
            delta = (block.attention * grad_attention).sum(-1, keepdim=True)  # (N, G, K, 1)
            grad_fused = delta.sum((1, 3)).view(block.row_index.shape)  # (B, t, Hkv, K)
            if weights.shape[2] == 1:
                grad_fused = grad_fused.sum(2, keepdim=True)
            grad_weights[:, start:stop] = grad_fused.masked_fill(problem.indices[:, start:stop] < 0, 0.0)
            grad_logits = block.attention * (grad_attention - delta) * block.fused[:, None, :, None] * ctx.scale
            grad_logits = grad_logits.flatten(2).to(q.dtype)  # (N, G, K*S)
            grad_q[:, start:stop] = block.result(matmul_wide(grad_logits, block.keys), grad_q[:, start:stop])
            grad_keys.index_add_(0, row, matmul_wide(grad_logits.transpose(1, 2), block.queries).view(flat))
        grad_k, grad_v = _unrows(grad_keys, k, ctx.chunk_size), _unrows(grad_values, v, ctx.chunk_size)
        return grad_q, grad_k, grad_v, None, grad_weights, None, None, None


def _unrows(rows: torch.Tensor, like: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """Inverse of `_rows`."""
    kv_batch, _, kv_heads, dim = like.shape
    return rows.view(kv_batch, kv_heads, -1, chunk_size, dim).permute(0, 2, 3, 1, 4).reshape(like.shape).to(like.dtype)


@torch.compiler.disable
def hsa_attention_gather(
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
    """Same result as hsa_attention_reference; extra memory is one block of gathered chunks."""
    if indices.is_cpu:
        indices, weights = _without_empty(indices, weights)
    return _GatherAttention.apply(q, k, v, indices, weights, chunk_size, chunk_lengths, scale)


def _without_empty(indices: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and weights (B, t, Hr, K) with as few slots as the token with most chunks needs: where one of several
    memories is read, most slots are another's. For a CPU, where the number is at hand."""
    is_empty = indices < 0
    most = max(1, indices.shape[-1] - int(is_empty.sum(-1).min()))
    if most == indices.shape[-1]:
        return indices, weights
    kept = is_empty.to(torch.uint8).argsort(dim=-1, stable=True)[..., :most]
    return indices.gather(-1, kept), weights.gather(-1, kept)
