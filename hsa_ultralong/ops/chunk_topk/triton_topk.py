"""chunk_topk as Triton kernels: a streaming top-k, full coverage, and a scan for decoding; nothing of size T * C.

Tested against reference.py under the interpreter and on a GPU; derivation: README.md of this folder.

Grids, owners and promises stand in the kernels' files; the sizes that they need are checked and chosen here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import refuse_second_derivatives
from hsa_ultralong.ops._launch import are_aligned
from hsa_ultralong.ops._triton import on_own_device, require_kernel_dtype, require_triton
from hsa_ultralong.ops.chunk_topk.gradients import product_gradients
from hsa_ultralong.ops.chunk_topk.kernel_gradients import spread_gradients
from hsa_ultralong.ops.chunk_topk.plan import TopkPlan, TopkShapes, plan_of
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

MOST_DIMENSIONS = 1024
MOST_KEPT = 256
# queries (tokens * heads * rows) up to which the landmarks are shared out over programs
_DECODE_QUERIES = 64
# candidates that a scan may write, 8 bytes each
_SCAN_CANDIDATES = 1 << 27


class _Operands(NamedTuple):
    """Contiguous operands in the order of the kernels; shapes as in api.chunk_topk, factor (Hr,) fp32 on the device:
    reading it here would wait for the device."""

    query: torch.Tensor
    landmarks: torch.Tensor
    query_segment: torch.Tensor
    query_position: torch.Tensor
    chunk_segment: torch.Tensor
    chunk_end: torch.Tensor
    factor: torch.Tensor


def _plan(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    keep: int,
    factor: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> tuple[TopkPlan, _Operands]:
    """scales (1 or B, C, Hr), contiguous: of 8-bit landmarks."""
    operands = _Operands(
        query.contiguous(), landmarks.contiguous(), visible.query_segment.contiguous(),
        visible.query_position.contiguous(), visible.chunk_segment.contiguous(), visible.chunk_end.contiguous(),
        _by_head(factor, query.shape[2]),
    )  # fmt: skip
    kinds = (part.dtype for part in operands[2:6])
    shapes = TopkShapes(
        query.shape, landmarks.shape, visible.chunk_segment.shape[0], visible.foreign,
        (query.dtype, landmarks.dtype, None if scales is None else scales.dtype, *kinds), keep, query.device,
        are_aligned(*operands, scales),
    )  # fmt: skip
    return plan_of(shapes), operands


def _by_head(factor: torch.Tensor, heads: int) -> torch.Tensor:
    """A factor (1,) or (Hr,) as (Hr,), contiguous."""
    return (factor if factor.shape[0] == heads else factor.expand(heads)).contiguous()


def _signed(number: int) -> int:
    """The low 32 bits of a number as the kernels take them, an int32."""
    number &= 0xFFFFFFFF
    return number - (1 << 32) * (number >> 31)


def _results(plan: TopkPlan, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.empty(plan.out_shape, dtype=torch.int32, device=device)
    return indices, torch.empty(plan.out_shape, dtype=torch.float32, device=device)


def _solve(
    plan: TopkPlan, operands: _Operands, noise_seed: int | torch.Tensor | None, noise_start: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scores of any number of queries."""
    results = _results(plan, operands.query.device)
    if plan.keep == plan.chunks:
        plan.cover(*operands, *results, *plan.sizes)
    elif noise_seed is None:
        plan.stream(*operands, *results, *plan.sizes, 0, 0)
    else:
        if isinstance(noise_seed, torch.Tensor):
            plan.stored_noise_stream(*operands, *results, *plan.sizes, noise_seed, _signed(noise_start))
        else:
            plan.noisy_stream(*operands, *results, *plan.sizes, _signed(noise_seed), _signed(noise_start))
        plan.kept_scores(operands.query, operands.landmarks, operands.factor, *results, *plan.sizes)
    return results


def _decode(
    plan: TopkPlan, operands: _Operands, scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and scores of few queries; scales of 8-bit landmarks."""
    if plan.takes_stream:
        return _decode_stream(plan, operands)
    device, chosen = operands.query.device, plan.decode
    results = _results(plan, device)
    keys, lane_tops, share_tops = (
        torch.empty((plan.queries, width), dtype=torch.int64, device=device) for width in chosen.widths
    )
    # scales of no use, but of the right kind
    row_scales = operands.factor if scales is None else scales
    chosen.scan(*operands, row_scales, keys, lane_tops, share_tops, *chosen.scan_sizes)
    chosen.finish(keys, lane_tops, share_tops, *results, *chosen.finish_sizes)
    return results


def _decode_stream(plan: TopkPlan, operands: _Operands) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over many landmarks on Hopper."""
    from hsa_ultralong.ops.chunk_topk.kernel_hopper import described

    device, chosen = operands.query.device, plan.streamed
    results = _results(plan, device)
    *left, spare = (torch.empty((plan.queries, width), dtype=torch.int64, device=device) for width in chosen.widths)
    query, landmarks, segment, position, chunk_segment, chunk_end, factor = operands
    read = described(landmarks, chunk_segment, chunk_end, plan.stream_tile)
    chosen.scan(*read, query, segment, position, factor, *left, *chosen.scan_sizes)
    chosen.finish(*left, spare, *results, *chosen.finish_sizes)
    return results


class _KeptScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        landmarks: torch.Tensor,
        factor: torch.Tensor,
        visible: ChunkVisibility,
        keep: int,
        noise_seed: int | torch.Tensor | None,
        noise_start: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        indices, scores = _solve(*_plan(query, landmarks, visible, keep, factor), noise_seed, noise_start)
        ctx.save_for_backward(query, landmarks, factor, indices, scores)
        ctx.mark_non_differentiable(indices)
        # no zeros for the indices
        ctx.set_materialize_grads(False)
        return indices, scores

    @staticmethod
    def backward(ctx: Any, _: Any, grad: torch.Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives("chunk_topk", "triton", "torch")
        query, landmarks, factor, indices, scores = ctx.saved_tensors
        grad_query = grad_landmarks = grad_factor = None
        if grad is not None and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            by_head = _by_head(factor, query.shape[2])
            if query.dtype == torch.bfloat16:
                grad_query, grad_landmarks = spread_gradients(query, landmarks, indices, grad, by_head)
            else:
                slopes = grad.masked_fill(indices < 0, 0.0) * by_head[:, None]
                grad_query, grad_landmarks = product_gradients(query, landmarks, indices, slopes)
        if grad is not None and ctx.needs_input_grad[2]:
            kept, by_head = indices >= 0, factor.expand(query.shape[2])[:, None]  # (Hr, 1)
            products = torch.where(kept, scores, 0.0) / by_head
            grad_factor = (torch.where(kept, grad, 0.0) * products).sum((0, 1, 3))  # (Hr,)
            grad_factor = grad_factor.sum_to_size(factor.shape)
        return grad_query, grad_landmarks, grad_factor, None, None, None, None


@lru_cache(maxsize=64)
def _constant(number: float, heads: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.full((heads,), number, dtype=torch.float32, device=device)


@torch.compiler.disable
@on_own_device
def chunk_topk_triton(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    factor: torch.Tensor | float,
    noise_seed: int | torch.Tensor | None,
    noise_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same result as chunk_topk_reference; scores are products of the inputs as they are, accumulated in fp32."""
    require_triton("chunk_topk", query)
    require_kernel_dtype("chunk_topk", query)
    num_chunks = landmarks.shape[1]
    keep = min(topk, num_chunks)
    if query.dtype != landmarks.dtype or query.shape[-1] > MOST_DIMENSIONS or MOST_KEPT < keep < num_chunks:
        raise ValueError(
            f'chunk_topk: impl="triton" takes query and landmarks of one dtype, R up to {MOST_DIMENSIONS}, and K up to '
            f"{MOST_KEPT} or at least C; got {query.dtype}, {landmarks.dtype}, R={query.shape[-1]}, K={topk}, "
            f"C={num_chunks}"
        )
    if isinstance(factor, torch.Tensor):
        factors = factor.to(torch.float32).reshape(-1)  # (1,) or (Hr,)
    else:
        factors = _constant(factor, query.shape[2], query.device)
    if min(query.shape[:2]) == 0 or num_chunks == 0:
        shape = (*query.shape[:3], keep)
        empty = query.new_full(shape, -1, dtype=torch.int32)
        return empty, query.new_full(shape, -torch.inf, dtype=torch.float32)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, landmarks, factors))
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    is_decoding = not needs_gradient and noise_seed is None and queries <= _DECODE_QUERIES
    if needs_gradient:
        return _KeptScores.apply(query, landmarks, factors, visible, keep, noise_seed, noise_start)
    plan, operands = _plan(query, landmarks, visible, keep, factors)
    if is_decoding and keep < num_chunks:
        return _decode(plan, operands)
    return _solve(plan, operands, noise_seed, noise_start)


@on_own_device
def scan_quantized(
    query: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor,
    visible: ChunkVisibility,
    *,
    keep: int,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoding scan over 8-bit landmarks for any number of queries, a few at a time; see quantized.py."""
    require_triton("chunk_topk_quantized", query)
    require_kernel_dtype("chunk_topk_quantized", query)
    if query.shape[-1] > MOST_DIMENSIONS or keep > MOST_KEPT or keep >= payload.shape[1]:
        raise ValueError(
            f'chunk_topk_quantized: impl="triton" takes R up to {MOST_DIMENSIONS} and K up to {MOST_KEPT}, below C; '
            f"got R={query.shape[-1]}, K={keep}, C={payload.shape[1]}"
        )
    at_once = max(1, min(_DECODE_QUERIES, _SCAN_CANDIDATES // payload.shape[1]) // (query.shape[0] * query.shape[2]))
    factor, scales = factor.to(torch.float32).reshape(-1), scales.contiguous()
    found = []
    for start in range(0, query.shape[1], at_once):
        part = slice(start, start + at_once)
        segment, position = visible.query_segment[:, part], visible.query_position[:, part]
        seen = replace(visible, query_segment=segment, query_position=position)
        found.append(_decode(*_plan(query[:, part], payload, seen, keep, factor, scales), scales))
    if len(found) == 1:
        return found[0]
    indices, scores = zip(*found, strict=True)
    return torch.cat(indices, 1), torch.cat(scores, 1)
