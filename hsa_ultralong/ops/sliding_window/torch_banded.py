"""Sliding-window attention on torch's SDPA: blocks of queries against the band of keys that they can see.

Memory and time are O(T * (block + W)); a short call (decoding, a prompt) is one SDPA call. Tested against reference.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hsa_ultralong.ops.sliding_window.mask import window_mask

_MIN_BLOCK = 64
_MAX_BLOCK = 1024
# a segment number that no token has: padded keys are seen by padded queries only
_NOWHERE = -3


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """q (N, Tq, Hq, D), k and v (N, Tk, Hkv, D), mask (1 or N, Tq, Tk) -> (N, Tq, Hq, D)."""
    group = q.shape[2] // k.shape[2]
    if group > 1 and q.device.type == "cpu":
        # the heads of a group as rows of one head: keys and values are not repeated
        rows = q.unflatten(2, (-1, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (N, Hkv, group * Tq, D)
        out = F.scaled_dot_product_attention(
            rows, k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask.repeat(1, group, 1)[:, None], scale=scale
        )
        return out.unflatten(2, (group, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    if group > 1:
        k, v = (x.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3) for x in (k, v))
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None], scale=scale
    )
    return out.transpose(1, 2)


def _band(tensor: torch.Tensor, left: int, num_blocks: int, block: int, reach: int, value: float) -> torch.Tensor:
    """Overlapping bands of block + reach entries of dim 1, (B, nb, block + reach, ...); `left` entries of padding
    (dropped entries if negative) put the first entry of the first band `reach` before the first query."""
    right = num_blocks * block + reach - left - tensor.shape[1]
    padded = F.pad(tensor, [0, 0] * (tensor.dim() - 2) + [left, right], value=value)
    return padded.unfold(1, block + reach, block).movedim(-1, 2)


def sliding_window_banded(
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
    batch, num_queries, _, _ = q.shape
    num_keys = k.shape[1]
    # a query reads block + W keys: a CPU gains from narrow bands, most where a group makes rows of them, a GPU from
    # large products
    narrow = _MIN_BLOCK if q.shape[2] > k.shape[2] else window // 2
    wanted = narrow if q.device.type == "cpu" else window
    block = min(_MAX_BLOCK, max(_MIN_BLOCK, -(-wanted // _MIN_BLOCK) * _MIN_BLOCK))
    if num_queries <= 2 * block:
        keep = min(num_keys, num_queries + window - 1)
        k, v = k[:, num_keys - keep :], v[:, num_keys - keep :]
        segments = None if key_segments is None else key_segments[:, num_keys - keep :]
        return _sdpa(q, k, v, window_mask(num_queries, keep, window, query_segments, segments, q.device), scale)
    # whole multiples of 8 keep every SDPA backend's alignment rules
    reach = -(-window // 8) * 8
    left = reach - (num_keys - num_queries)
    num_blocks = -(-num_queries // block)
    queries = _band(q, 0, num_blocks, block, 0, 0.0)  # (B, nb, block, Hq, D)
    keys, values = (_band(x, left, num_blocks, block, reach, 0.0) for x in (k, v))  # (B, nb, block + reach, Hkv, D)
    distance = torch.arange(block, device=q.device)[:, None] + reach - torch.arange(block + reach, device=q.device)
    mask = (distance >= 0) & (distance < window)  # (block, block + reach)
    if query_segments is None and left <= 0:
        # every band is full of real keys (a later segment of a long reading): one mask serves them all
        out = _sdpa(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask[None], scale)
        return out.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :num_queries]
    if query_segments is None or key_segments is None:
        query_segments = torch.zeros(1, num_queries, dtype=torch.int32, device=q.device)
        key_segments = torch.zeros(1, num_keys, dtype=torch.int32, device=q.device)
    query_bands = _band(query_segments, 0, num_blocks, block, 0, _NOWHERE)  # (B, nb, block)
    key_bands = _band(key_segments, left, num_blocks, block, reach, _NOWHERE)  # (B, nb, block + reach)
    # a token always sees itself, which also keeps padded rows finite
    mask = (mask & (query_bands[..., :, None] == key_bands[..., None, :])) | (distance == 0)
    mask = mask.expand(batch, -1, -1, -1).flatten(0, 1)  # (B*nb, block, block + reach)
    out = _sdpa(queries.flatten(0, 1), keys.flatten(0, 1), values.flatten(0, 1), mask, scale)
    return out.unflatten(0, (batch, num_blocks)).flatten(1, 2)[:, :num_queries]
