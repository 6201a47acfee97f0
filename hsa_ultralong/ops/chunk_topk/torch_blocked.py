"""chunk_topk in plain torch, blockwise in T: no (T, C) tensor outlives its block, gradients touch the K kept pairs.

The forward finds indices under no_grad and returns the raw products of the kept pairs in fp32; the backward scatters
their gradient into one (block, C) matrix at a time and multiplies. Tested against reference.py.
"""

from __future__ import annotations

from typing import Any

import torch

from hsa_ultralong.ops._common import accumulation_dtype, blocks, matmul_wide
from hsa_ultralong.ops.chunk_topk.gradients import product_gradients
from hsa_ultralong.ops.chunk_topk.noise import gumbel_noise
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

# scores of one block of queries: 16M elements are 64 MB in fp32
_BLOCK_ELEMENTS = 1 << 24


def _products(query: torch.Tensor, landmarks: torch.Tensor) -> torch.Tensor:
    """<query, landmark> of a block, (B, t, Hr, C) fp32; a shared memory (batch 1) is one product for all rows."""
    batch, num_tokens, heads, dim = query.shape
    if landmarks.shape[0] == 1:
        rows = query.permute(2, 0, 1, 3).reshape(heads, batch * num_tokens, dim)  # (Hr, B*t, R)
        out = matmul_wide(rows, landmarks[0].permute(1, 2, 0))  # (Hr, B*t, C)
        return out.view(heads, batch, num_tokens, -1).permute(1, 2, 0, 3)  # (B, t, Hr, C)
    rows = query.transpose(1, 2).reshape(batch * heads, num_tokens, dim)  # (B*Hr, t, R)
    columns = landmarks.permute(0, 2, 3, 1).reshape(batch * heads, dim, -1)  # (B*Hr, R, C)
    return matmul_wide(rows, columns).view(batch, heads, num_tokens, -1).transpose(1, 2)  # (B, t, Hr, C)


def _topk_lowest_index(ranking: torch.Tensor, keep: int) -> torch.Tensor:
    """Indices of the `keep` largest values, ties to the lower index: torch.topk alone leaves ties open."""
    if ranking.dtype != torch.float32:
        return ranking.sort(dim=-1, descending=True, stable=True).indices[..., :keep]
    # order-preserving map of fp32 to int32 in the high word, complemented index in the low word; + 0.0 removes -0.0
    bits = (ranking + 0.0).view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64) << 32
    index = torch.arange(ranking.shape[-1], device=ranking.device, dtype=torch.int64)
    return (ordered | (0x7FFFFFFF - index)).topk(keep, dim=-1).indices


def _select(
    products: torch.Tensor, mask: torch.Tensor, keep: int, factor: torch.Tensor, noise: torch.Tensor | None
) -> torch.Tensor:
    """Kept chunks of a block, (B, t, Hr, K) int64, newest first, -1 where empty; none whose score is not finite."""
    num_chunks = products.shape[-1]
    # one pass over the block; a comparison with NaN is false
    ranking = (products * factor).nan_to_num_(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf)
    if keep == num_chunks:
        index = torch.arange(num_chunks, device=products.device)
        chosen = torch.where(mask[:, :, None] & (ranking > -torch.inf), index, -1)
        return chosen.sort(dim=-1, descending=True).values
    if noise is not None:
        ranking = ranking + noise
    ranking = ranking.masked_fill(~mask[:, :, None], -torch.inf)
    chosen = _topk_lowest_index(ranking, keep)
    chosen = torch.where(ranking.gather(-1, chosen) == -torch.inf, -1, chosen)
    return chosen.sort(dim=-1, descending=True).values


class _SelectedProducts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        landmarks: torch.Tensor,
        visible: ChunkVisibility,
        keep: int,
        factor: torch.Tensor,
        noise_seed: int | torch.Tensor | None,
        noise_start: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, num_tokens, heads, _ = query.shape
        num_chunks = landmarks.shape[1]
        shape = (batch, num_tokens, heads, keep)
        indices = torch.empty(shape, dtype=torch.int32, device=query.device)
        selected = torch.empty(shape, dtype=accumulation_dtype(query.dtype), device=query.device)
        for start, stop in blocks(num_tokens, max(1, _BLOCK_ELEMENTS // max(1, batch * heads * num_chunks))):
            products = _products(query[:, start:stop], landmarks)
            noise = None
            if noise_seed is not None and keep < num_chunks:
                places = noise_start + start, noise_start + stop
                noise = gumbel_noise(noise_seed, batch, *places, heads, num_chunks, query.device)
            chosen = _select(products, visible.mask(start, stop), keep, factor, noise)
            indices[:, start:stop] = chosen
            selected[:, start:stop] = products.gather(-1, chosen.clamp_min(0)).masked_fill(chosen < 0, 0.0)
        ctx.save_for_backward(query, landmarks, indices)
        ctx.mark_non_differentiable(indices)
        return indices, selected

    @staticmethod
    def backward(ctx: Any, _: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, landmarks, indices = ctx.saved_tensors
        return *product_gradients(query, landmarks, indices, grad), None, None, None, None, None


@torch.compiler.disable
def chunk_topk_torch(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    factor: torch.Tensor | float,
    noise_seed: int | torch.Tensor | None,
    noise_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same result as chunk_topk_reference; peak extra memory is one block of scores."""
    keep = min(topk, landmarks.shape[1])
    plain = factor.detach() if isinstance(factor, torch.Tensor) else factor
    with torch.autocast(device_type=query.device.type, enabled=False):
        indices, products = _SelectedProducts.apply(query, landmarks, visible, keep, plain, noise_seed, noise_start)
        scores = (products * factor).masked_fill(indices < 0, -torch.inf)
    return indices, scores
