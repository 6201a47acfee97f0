"""Attention in chosen chunks by one softmax, and the scores that choose them from compressed keys.

Called by moba.py, nsa.py and infllm.py; tests/baselines/test_selected.py.
"""

from __future__ import annotations

import torch
from torch.utils.checkpoint import checkpoint

from hsa_ultralong.baselines.attention import repeated, sdpa
from hsa_ultralong.ops._common import accumulation_dtype

# numbers of a mask, of scores or of gathered keys that exist at once
_ELEMENTS = 1 << 26
# reading all keys under a mask is as fast as gathering the chosen ones up to this many times as many; of a CPU
# docs/log.md, 2026-11-28
_DENSE_RATIO = {"cpu": 32, "cuda": 8}
_DENSE_MIN_TOKENS = 16


def selected_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, *, chunk_size: int, impl: str = "torch"
) -> torch.Tensor:
    """One softmax over the keys up to a token's own in the chunks that it has chosen.

    impl="triton": kernels that read the chunks that some token of a tile has chosen (triton_selected.py), but for few
    tokens. "torch", with gradients or where few chunks are left out: all keys under a mask, O(T N) time, pieces of
    queries that run again in the backward, so that O(T N) numbers never exist. Otherwise, and for few tokens, the
    chosen chunks are gathered, O(T K S).

    Args:
        q: (B, T, Hq, D), the last T of N tokens. k, v: (B, N, Hkv, D).
        chosen: (B, T, Hs, K) chunks, each at most once, -1 for none; Hs = 1, Hkv or Hq. The token's own is among them.

    Returns:
        (B, T, Hq, D).
    """
    new, total, slots = q.shape[1], k.shape[1], chosen.shape[-1] * chunk_size
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if impl == "triton" and new >= _DENSE_MIN_TOKENS:
        from hsa_ultralong.baselines.triton_selected import selected_attention_triton  # imports triton

        return selected_attention_triton(q, k, v, chosen, chunk_size=chunk_size)
    ratio = _DENSE_RATIO.get(q.device.type, 4) if new >= _DENSE_MIN_TOKENS else 1
    if not needs_grad and total > ratio * slots:
        size = max(1, _ELEMENTS // (q.shape[0] * max(chosen.shape[2], k.shape[2]) * slots * q.shape[-1]))
        pieces = [_gathered(a, k, v, b, chunk_size, total - new + n) for a, b, n in _pieces(q, chosen, size)]
        return torch.cat(pieces, 1)
    size = max(64, min(1024, _ELEMENTS // (q.shape[0] * chosen.shape[2] * total)))
    parts = []
    for part, wanted, first in _pieces(q, chosen, size):
        reach = total - new + first + part.shape[1]
        inputs = (part, k[:, :reach], v[:, :reach], wanted, chunk_size)
        if needs_grad:
            parts.append(checkpoint(_masked, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_masked(*inputs))
    return torch.cat(parts, 1)


def _pieces(q: torch.Tensor, chosen: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
    """Pieces of queries with what they chose, and the number of the first query."""
    starts = range(0, q.shape[1], size)
    return list(zip(q.split(size, 1), chosen.split(size, 1), starts, strict=True))


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """All N keys under a mask; q: the last of N tokens."""
    total, count = k.shape[1], -(-k.shape[1] // chunk_size)
    is_chosen = torch.zeros(*chosen.shape[:-1], count + 1, dtype=torch.bool, device=q.device)
    is_chosen.scatter_(-1, torch.where(chosen < 0, count, chosen).long(), True)
    mask = is_chosen[..., :count].repeat_interleave(chunk_size, -1)[..., :total]  # (B, t, Hs, N)
    places = torch.arange(total, device=q.device)
    mask = mask & (places <= places[-q.shape[1] :, None])[:, None]
    mask = mask.transpose(1, 2).repeat_interleave(q.shape[2] // mask.shape[2], 1)  # (B, Hq, t, N)
    return sdpa(q, k, v, mask)


def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chosen: torch.Tensor, chunk_size: int, start: int
) -> torch.Tensor:
    """The keys of the chosen chunks alone; start: place of the first query."""
    batch, new, num_heads, dim = q.shape
    heads = max(chosen.shape[2], k.shape[2])
    chosen = chosen.expand(-1, -1, heads, -1) if chosen.shape[2] == 1 else chosen
    chosen = chosen.repeat_interleave(heads // chosen.shape[2], 2)
    places = (chosen[..., None] * chunk_size + torch.arange(chunk_size, device=q.device)).flatten(-2)  # (B, t, Hs, K S)
    own = torch.arange(start, start + new, device=q.device)[:, None, None]
    mask = (places >= 0) & (places <= own)
    row = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    head = (torch.arange(heads, device=q.device) * k.shape[2] // heads).view(-1, 1)
    where = (row, places.clamp(0, k.shape[1] - 1).long(), head)
    queries = q.unflatten(2, (heads, num_heads // heads))  # (B, t, Hs, g, D)
    wide = accumulation_dtype(q.dtype)
    scores = (queries @ k[where].mT).to(wide) * dim**-0.5  # (B, t, Hs, g, K S)
    weights = scores.masked_fill(~mask[..., None, :], -torch.inf).softmax(-1)
    return (weights.to(v.dtype) @ v[where]).flatten(2, 3)


@torch.no_grad()
def choose_by_compressed(
    q: torch.Tensor,
    compressed: torch.Tensor,
    *,
    start: int,
    size: int,
    stride: int,
    chunk_size: int,
    topk: int,
    num_initial: int,
    num_local: int,
    pool: str,
) -> torch.Tensor:
    """Chunks that a token reads: the first ones, its own and those before, and those that its compressed attention
    weighs most.

    The weights of a token on the blocks before it, softmax over blocks, summed over the query heads of a key-value
    head, become scores of chunks: "sum" over the strides that a block and a chunk share, or "max" over the blocks that
    share any. O(T N / stride) time, in pieces.

    Args:
        q: (B, T, Hq, D) from place `start` on. compressed: (B, C, Hkv, D), block i of tokens i * stride .. + size.
        topk: K, chunks in all; num_initial and num_local (the token's own among them) count first.

    Returns:
        (B, T, Hkv, K) int64, distinct, -1 for none.
    """
    count = compressed.shape[1]
    if count == 0:
        t = torch.arange(start, start + q.shape[1], device=q.device)
        none = q.new_zeros(*q.shape[:2], compressed.shape[2], 0)
        return _choose(none, t // chunk_size, topk, num_initial, num_local)
    piece = max(1, _ELEMENTS // max(1, q.shape[0] * q.shape[2] * count))
    parts = []
    for first in range(0, q.shape[1], piece):
        part = q[:, first : first + piece]
        t = torch.arange(start + first, start + first + part.shape[1], device=q.device)  # (t,)
        scores = _chunk_scores(part, compressed, t, size=size, stride=stride, chunk_size=chunk_size, pool=pool)
        parts.append(_choose(scores, t // chunk_size, topk, num_initial, num_local))
    return torch.cat(parts, 1)


def _chunk_scores(
    q: torch.Tensor, compressed: torch.Tensor, t: torch.Tensor, *, size: int, stride: int, chunk_size: int, pool: str
) -> torch.Tensor:
    """(B, t, Hkv, number of chunks with a block) scores."""
    count, heads = compressed.shape[1], compressed.shape[2]
    ends = torch.arange(count, device=q.device) * stride + size
    keys = repeated(compressed, q.shape[2])
    logits = (q.transpose(1, 2) @ keys.permute(0, 2, 3, 1)).to(accumulation_dtype(q.dtype)) * q.shape[-1] ** -0.5
    weights = logits.masked_fill(ends > t[:, None] + 1, -torch.inf).softmax(-1).nan_to_num(0.0)  # (B, Hq, t, C)
    weights = weights.unflatten(1, (heads, -1)).sum(2).transpose(1, 2)  # (B, t, Hkv, C)
    # strides that a block covers, and a chunk has
    covered, per_chunk = size // stride, chunk_size // stride
    padded = torch.nn.functional.pad(weights, (covered - 1, covered - 1))
    spans = padded.unfold(-1, covered, 1)  # blocks that cover each stride, (B, t, Hkv, C + covered - 1, covered)
    by_stride = spans.sum(-1) if pool == "sum" else spans.amax(-1)
    missing = -by_stride.shape[-1] % per_chunk
    by_chunk = torch.nn.functional.pad(by_stride, (0, missing)).unflatten(-1, (-1, per_chunk))
    return by_chunk.sum(-1) if pool == "sum" else by_chunk.amax(-1)


def _choose(scores: torch.Tensor, own: torch.Tensor, topk: int, num_initial: int, num_local: int) -> torch.Tensor:
    """The chunks chosen at once and the best of the others before them: scores (B, t, Hkv, J), own (t,)."""
    batch, new, heads, count = scores.shape
    initial = torch.arange(num_initial, device=scores.device).expand(new, -1)
    local = own[:, None] - torch.arange(num_local, device=scores.device)
    # local ones first; what is local is not named a second time
    initial = torch.where(initial <= own[:, None] - num_local, initial, -1)
    fixed = torch.cat((local.clamp_min(-1), initial), 1)[:, :topk]  # (t, F)
    fixed = fixed[None, :, None].expand(batch, -1, heads, -1)
    rest = min(topk - fixed.shape[-1], count)
    if rest < 1:
        return fixed
    chunk = torch.arange(count, device=scores.device)
    is_open = (chunk >= num_initial) & (chunk <= own[:, None] - num_local)  # (t, J)
    # chunks that share their best block tie: the first one, however many tokens come at once
    best = scores.masked_fill(~is_open[None, :, None], -torch.inf).sort(dim=-1, descending=True, stable=True)
    values, indices = best.values[..., :rest], best.indices[..., :rest]
    return torch.cat((fixed, torch.where(values > -torch.inf, indices, -1)), -1)
