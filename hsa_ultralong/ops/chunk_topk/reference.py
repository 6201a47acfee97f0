"""The specification of chunk_topk: scores, mask, noise and selection written out, fp64-capable, O(T * C) memory."""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import accumulation_dtype
from hsa_ultralong.ops.chunk_topk.noise import gumbel_noise
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility


def chunk_topk_reference(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    factor: torch.Tensor | float,
    noise_seed: int | torch.Tensor | None,
    noise_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """s[t, i] = factor * <query_t, landmark_i>; keep the K visible chunks of highest s (+ noise); newest first.

    A pair whose score is not finite counts as invisible.
    """
    dtype = accumulation_dtype(query.dtype)
    batch, num_tokens, heads, _ = query.shape
    num_chunks = landmarks.shape[1]
    keep = min(topk, num_chunks)
    landmarks = landmarks.expand(batch, -1, -1, -1)
    with torch.autocast(device_type=query.device.type, enabled=False):
        rows, columns = query.to(dtype), landmarks.to(dtype)
        ranking = torch.einsum("bthr,bchr->bthc", rows.detach(), columns.detach())  # (B, T, Hr, C)
        ranking = ranking * (factor.detach() if isinstance(factor, torch.Tensor) else factor)
        # zeros in place of what is not finite: gradients of the other pairs must not multiply it
        rows, columns = (torch.where(part.isfinite(), part, 0.0) for part in (rows, columns))
        products = torch.einsum("bthr,bchr->bthc", rows, columns)
    hidden = ~(visible.mask()[:, :, None] & ranking.isfinite())  # (B, T, Hr, C)
    if noise_seed is not None:
        stop = noise_start + num_tokens
        ranking = ranking + gumbel_noise(noise_seed, batch, noise_start, stop, heads, num_chunks, query.device)
    ranking = ranking.masked_fill(hidden, -torch.inf)
    # a stable sort prefers the lower index among equal scores
    chosen = ranking.sort(dim=-1, descending=True, stable=True).indices[..., :keep]  # (B, T, Hr, K)
    chosen = torch.where(ranking.gather(-1, chosen) == -torch.inf, -1, chosen)
    chosen = chosen.sort(dim=-1, descending=True).values
    products = products.gather(-1, chosen.clamp_min(0)).masked_fill(chosen < 0, 0.0)
    return chosen.to(torch.int32), (products * factor).masked_fill(chosen < 0, -torch.inf)
