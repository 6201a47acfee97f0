"""chunk_topk over 8-bit landmarks with one scale a row: half the bytes of a scan, for reading only (no gradients).

Scores are factor * scale * <query, payload> in fp32. The kernel multiplies 8-bit numbers as they are: it takes a query
as 16-bit fixed point, two digits with one step, so an element may be off by 1/65,024 of the query's largest. Used by
memory/tiers.py; tests/ops/test_chunk_topk_quantized.py.
"""

from __future__ import annotations

import torch

from hsa_ultralong.ops._common import blocks, choose_impl, require_shape
from hsa_ultralong.ops._triton import triton_runs_on
from hsa_ultralong.ops.chunk_topk.torch_blocked import _products, _select
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

# scores of a block of queries, and chunks widened at a time, where torch computes them
_BLOCK_ELEMENTS, _BLOCK_CHUNKS = 1 << 24, 1 << 16


@torch.no_grad()
def chunk_topk_quantized(
    query: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    scale: float | torch.Tensor | None = None,
    impl: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `topk` best visible chunks by landmarks payload * scales.

    Args:
        query: (B, T, Hr, R). payload: (1 or B, C, Hr, R) int8. scales: (1 or B, C, Hr), any float dtype.
        scale: as for chunk_topk. impl: "auto", "triton" or "torch".

    Returns:
        indices and scores (B, T, Hr, min(K, C)) in the form of chunk_topk.

    Raises:
        ValueError: on shapes or dtypes that do not fit.
    """
    batch, num_tokens, heads, dim = query.shape
    rows, num_chunks = payload.shape[:2]
    require_shape("payload", payload, (None, None, heads, dim))
    require_shape("scales", scales, (rows, num_chunks, heads))
    if payload.dtype != torch.int8:
        raise ValueError(f"payload must be int8, got {payload.dtype}")
    if topk < 1:
        raise ValueError(f"topk must be >= 1, got {topk}")
    keep = min(topk, num_chunks)
    factor = dim**-0.5 if scale is None else scale
    if not isinstance(factor, torch.Tensor):
        factor = torch.full((), factor, device=query.device)
    auto = "torch"
    if triton_runs_on(query) and query.dtype in (torch.bfloat16, torch.float16):
        auto = "triton" if keep < num_chunks else "torch"
    if choose_impl("chunk_topk_quantized", impl, ("triton", "torch"), auto) == "triton":
        from hsa_ultralong.ops.chunk_topk.triton_topk import scan_quantized

        return scan_quantized(query, payload, scales, visible, keep=keep, factor=factor)
    indices, scores = [], []
    by_head = factor[:, None] if factor.dim() == 1 else factor
    for start, stop in blocks(num_tokens, max(1, _BLOCK_ELEMENTS // max(1, batch * heads * num_chunks))):
        part = query[:, start:stop]
        products = torch.cat(
            [
                _products(part, payload[:, first:last].to(query.dtype))
                for first, last in blocks(num_chunks, _BLOCK_CHUNKS)
            ],
            dim=-1,
        )  # (B, t, Hr, C)
        products = products * scales.to(products.dtype).transpose(1, 2)[:, None]
        chosen = _select(products, visible.mask(start, stop), keep, by_head, None)
        found = (products.gather(-1, chosen.clamp_min(0)) * by_head).masked_fill(chosen < 0, -torch.inf)
        indices.append(chosen.to(torch.int32))
        scores.append(found)
    return torch.cat(indices, 1), torch.cat(scores, 1)
