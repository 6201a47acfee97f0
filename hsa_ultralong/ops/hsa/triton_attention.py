"""hsa_attention as Triton kernels: tiles of neighbouring tokens that share chunks, inverse lists for the memory's
gradients, a path for full coverage and one for decoding. Derivation: README.md; how each choice was measured:
docs/kernels.md. Tested against reference.py under the interpreter and on a GPU.

Grids, owners and promises stand in the kernels' files; the sizes that they need are checked and chosen here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import refuse_second_derivatives
from hsa_ultralong.ops._launch import are_aligned
from hsa_ultralong.ops._triton import (
    KERNEL_SIZES,
    next_power_of_two,
    on_own_device,
    require_kernel_dtype,
    require_triton,
    shared_memory,
)
from hsa_ultralong.ops.hsa import kernel_decode
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.kernel_lists import TileLists
from hsa_ultralong.ops.hsa.plan import CoveredPass, HSAPlan, HSAShapes, ListedPass, TilePass, plan_of

# tokens up to which the slots of one token are shared out over programs
_DECODE_TOKENS = 64
# shared memory that the largest tiles, D = S = 128, take in fp32
_LARGEST_BYTES_FP32 = 163_840


class _Operands(NamedTuple):
    """Contiguous operands; shapes as in api.hsa_attention."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    weights: torch.Tensor
    lengths: torch.Tensor | None
    indices: torch.Tensor

    def plan(self, chunk_size: int, scale: float, causal: bool) -> HSAPlan:
        q, lengths = self.q, self.lengths
        sizes, kind = (None, None) if lengths is None else (lengths.shape, lengths.dtype)
        dtypes = (q.dtype, self.indices.dtype, self.weights.dtype, kind)
        return plan_of(
            HSAShapes(
                q.shape, self.k.shape, self.indices.shape, sizes, dtypes, q.device, chunk_size, scale, causal,
                are_aligned(*self),
            )
        )  # fmt: skip


# logsumexp and delta of every row and slot, (B, T, Hkv, K, G) in fp32 each; None where they are formed again
_Norms = tuple[torch.Tensor | None, torch.Tensor | None]


def _contiguous(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    lengths: torch.Tensor | None,
) -> _Operands:
    return _Operands(
        q.contiguous(), k.contiguous(), v.contiguous(), weights.contiguous(),
        None if lengths is None else lengths.contiguous(), indices.contiguous(),
    )  # fmt: skip


def _run_tiles(
    plan: HSAPlan,
    passes: list[TilePass],
    operands: _Operands,
    out: torch.Tensor,
    gradients: tuple[torch.Tensor | None, ...] = (),
    lists: TileLists | None = None,
) -> TileLists | None:
    """A kernel of kernel_tiles into `out`, which is dq where `gradients` are (dO, dw, norms, deltas); then mend spoiled
    tiles. Returns the lists of the last pass; `lists`: those of the only one, if they exist already."""
    grad_out, grad_weights, *norms = gradients or (None, None)
    written = (grad_out, out, grad_weights, *norms) if gradients else (out,)
    scales = (plan.scale_log2, plan.scale) if gradients else (plan.scale_log2,)
    for tile_pass in passes:
        found = tile_pass.lists(operands.indices) if lists is None else lists
        spoiled = torch.empty(tile_pass.num_spoiled, dtype=torch.bool, device=out.device)
        read = (*operands[:5], *found, spoiled)
        if tile_pass.hopper_tiles:
            _run_hopper_forward(plan, tile_pass, operands, (*found, spoiled, out))
        else:
            tile_pass.kernel(*read, *written, *tile_pass.sizes, *scales, *plan.heads)
        tile_pass.mend(
            *read, out, grad_out, grad_weights, *tile_pass.sizes, plan.scale_log2, plan.scale, *plan.heads
        )  # fmt: skip
        if lists is None and len(passes) == 1:
            lists = found
    return lists


def _run_hopper_forward(
    plan: HSAPlan, tile_pass: TilePass, operands: _Operands, rest: tuple[torch.Tensor | None, ...]
) -> None:
    """kernel_hopper_forward; `rest`: the lists, what says which rows are spoiled, and the output."""
    from hsa_ultralong.ops.hsa.kernel_hopper import described

    width, chunk = plan.kv_heads * plan.dim, (plan.size, plan.dim)
    memory = (described(x, width, chunk) for x in (operands.k, operands.v))
    sizes = (*tile_pass.sizes, tile_pass.hopper_tiles)
    tile_pass.kernel(operands.q, *memory, operands.weights, *rest, *sizes, plan.scale_log2, *plan.heads)


def _forward(plan: HSAPlan, operands: _Operands) -> tuple[torch.Tensor, TileLists | None]:
    """The output, and the lists where there is one launch."""
    out = torch.empty_like(operands.q)
    return out, _run_tiles(plan, plan.forward, operands, out)


def _query_gradients(
    plan: HSAPlan, operands: _Operands, grad_out: torch.Tensor, lists: TileLists | None, norms: _Norms
) -> tuple[torch.Tensor, torch.Tensor]:
    """dq, and dw as (B, T, Hkv, K) in fp32; fills `norms`."""
    grad_q = torch.empty_like(operands.q)
    shape = (plan.batch, plan.tokens, plan.kv_heads, plan.slots)
    grad_weights = torch.empty(shape, dtype=torch.float32, device=grad_q.device)
    _run_tiles(plan, plan.query, operands, grad_q, (grad_out, grad_weights, *norms), lists)
    return grad_q, grad_weights


def _memory_gradients(
    plan: HSAPlan, operands: _Operands, grad_out: torch.Tensor, lists: TileLists | None, norms: _Norms
) -> tuple[torch.Tensor, torch.Tensor]:
    """dk and dv; `norms` as filled by _query_gradients."""
    chosen = plan.memory
    grad_k, grad_v = torch.empty_like(operands.k), torch.empty_like(operands.v)
    partial = torch.empty(chosen.shape, dtype=torch.float32, device=grad_k.device)
    read = (*operands[:5], grad_out)
    if isinstance(chosen, ListedPass):
        _listed(plan, chosen, operands.indices, read, norms, partial, grad_k, grad_v)
    else:
        slots = (chosen.lists(operands.indices) if lists is None else lists).slots
        _covered(plan, chosen, slots, read, partial, grad_k, grad_v)
    return grad_k, grad_v


def _listed(
    plan: HSAPlan,
    chosen: ListedPass,
    indices: torch.Tensor,
    read: tuple[torch.Tensor | None, ...],
    norms: _Norms,
    partial: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    lists = chosen.lists(indices)
    kernel = chosen.kernel if norms[0] is None else chosen.transposed
    kernel(
        *read, *norms, lists.pairs, lists.pair_starts, lists.unit_ends, lists.unit_lists, partial,
        *chosen.sizes, plan.scale_log2, *plan.heads,
    )  # fmt: skip
    chosen.total(partial, lists.unit_ends, None, grad_k, grad_v, *chosen.total_sizes, plan.scale, *plan.heads)


def _all_gradients(
    plan: HSAPlan, operands: _Operands, grad_out: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dw as (B, T, Hkv, K) in fp32, dk and dv of a long row, whose tokens come part by part."""
    q, indices, device = operands.q, operands.indices, grad_out.device
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.empty_like(operands.k), torch.empty_like(operands.v)
    shape = (plan.batch, plan.tokens, plan.kv_heads, plan.slots)
    grad_weights = torch.empty(shape, dtype=torch.float32, device=device)
    shares = torch.empty(plan.parts[0].shares, dtype=q.dtype, device=device)
    is_one = len(plan.parts) == 1
    sums = None if is_one else torch.empty((2, *grad_k.shape), dtype=torch.float32, device=device)
    lists = plan.part_lists(indices)
    found = (lists.pairs, lists.pair_starts, lists.unit_ends, lists.unit_lists)
    *read, tiles = _described(plan, operands, grad_out, shares)
    for part in plan.parts:
        partial = torch.empty(part.shape, dtype=torch.float32, device=device)
        part.kernel(*read, *found, partial, tiles, grad_weights, *part.sizes, plan.scale_log2, plan.scale, *plan.heads)
        part.total(partial, lists.unit_ends, sums, grad_k, grad_v, *part.total_sizes, plan.scale, *plan.heads)
        part.slot_sum(shares, indices, grad_q, grad_weights, *part.sum_sizes, *plan.heads)
    return grad_q, grad_weights, grad_k, grad_v


def _described(plan: HSAPlan, operands: _Operands, grad_out: torch.Tensor, shares: torch.Tensor) -> tuple[Any, ...]:
    """q, k, v, weights, dO and what pairs add to dq, as kernel_hopper.listed_gradient_kernel takes them."""
    from hsa_ultralong.ops.hsa.kernel_hopper import described

    q, k, v, weights, *_ = operands
    rows = (plan.group, plan.dim)
    chunk = (plan.size, plan.dim)
    return (
        described(q, plan.dim, rows), described(k, plan.kv_heads * plan.dim, chunk),
        described(v, plan.kv_heads * plan.dim, chunk), weights, described(grad_out, plan.dim, rows),
        described(shares, plan.dim, rows),
    )  # fmt: skip


def _covered(
    plan: HSAPlan,
    chosen: CoveredPass,
    slots: torch.Tensor,
    read: tuple[torch.Tensor | None, ...],
    partial: torch.Tensor,
    grad_k: torch.Tensor,
    grad_v: torch.Tensor,
) -> None:
    chosen.kernel(
        *read, slots, partial,
        plan.tokens, plan.chunks, plan.slots, chosen.splits, chosen.unit_tokens, plan.scale_log2, *plan.heads,
    )  # fmt: skip
    chosen.total(
        partial, grad_k, grad_v, plan.batch, plan.chunks, chosen.splits, chosen.unit_tokens, plan.scale, plan.kv_heads
    )


def _decode(plan: HSAPlan, operands: _Operands, first_chunk: int) -> torch.Tensor:
    """Forward for few tokens: slots shared out over programs, partial sums added. Indices count from first_chunk;
    those outside the memory are empty slots."""
    constants = plan.constants(16, 2)
    for name in ("BT", "is_kept"):
        del constants[name]
    constants["GP"] = max(16, next_power_of_two(plan.group))
    programs = plan.batch * plan.tokens * plan.kv_heads
    splits = max(1, min(plan.slots, 2 * plan.processors // programs))
    per_program = -(-plan.slots // splits)
    splits = -(-plan.slots // per_program)
    q = operands.q
    partial = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
    kernel_decode.decode_kernel[(plan.batch * plan.tokens, plan.kv_heads, splits)](
        q, operands.k, operands.v, operands.weights, operands.indices, operands.lengths, partial,
        plan.tokens, plan.chunks, plan.slots, per_program, first_chunk, plan.scale_log2, *plan.heads,
        KV_BATCH=plan.kv_batch > 1, num_warps=4, **constants,
    )  # fmt: skip
    return partial.sum(0).to(q.dtype)


class _TritonAttention(torch.autograd.Function):
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
        causal: bool,
    ) -> torch.Tensor:
        operands = _contiguous(q, k, v, indices, weights, chunk_lengths)
        plan = operands.plan(chunk_size, scale, causal)
        out, lists = _forward(plan, operands)
        kept = lists if plan.keeps_lists else None
        ctx.save_for_backward(q, k, v, indices, weights, chunk_lengths, *(kept or (None,) * 3))
        ctx.plan, ctx.has_lists = plan, kept is not None
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivatives("hsa_attention", "triton", "torch_gather")
        *saved, chunks, counts, slots = ctx.saved_tensors
        plan, weights = ctx.plan, saved[4]
        operands = _contiguous(*saved)
        lists = TileLists(chunks, counts, slots) if ctx.has_lists else None
        grad_out = grad_out.contiguous()
        if plan.shapes.is_aligned and not are_aligned(grad_out, *operands):
            plan = plan_of(plan.shapes._replace(is_aligned=False))
        grad_q = grad_weights = grad_k = grad_v = None
        needs_query = ctx.needs_input_grad[0] or ctx.needs_input_grad[4]
        needs_memory = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        is_parted = needs_query and needs_memory and plan.part_tokens > 0
        norms: _Norms = (None, None)
        if is_parted:
            grad_q, grad_weights, grad_k, grad_v = _all_gradients(plan, operands, grad_out)
        elif needs_query and needs_memory and plan.norms is not None:
            logsumexp = torch.empty(plan.norms, dtype=torch.float32, device=grad_out.device)
            norms = (logsumexp, torch.empty_like(logsumexp))
        if needs_query and not is_parted:
            grad_q, grad_weights = _query_gradients(plan, operands, grad_out, lists, norms)
        if needs_memory and not is_parted:
            grad_k, grad_v = _memory_gradients(plan, operands, grad_out, lists, norms)
        if grad_weights is not None:
            if weights.shape[2] < grad_weights.shape[2]:
                grad_weights = grad_weights.sum(2, keepdim=True)
            grad_weights = grad_weights.to(weights.dtype)
        return grad_q, grad_k, grad_v, None, grad_weights, None, None, None, None


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_size: int, scale: float) -> bool:
    """Whether the kernels take these operands (their device aside)."""
    is_plain = q.dtype == k.dtype == v.dtype
    return is_plain and q.shape[-1] in KERNEL_SIZES and chunk_size in KERNEL_SIZES and scale > 0


@torch.compiler.disable
@on_own_device
def hsa_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
    scale: float,
    first_chunk: int | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Same result as hsa_attention_reference, up to the rounding of the input dtype."""
    require_triton("hsa_attention", q)
    require_kernel_dtype("hsa_attention", q)
    if not _supports(q, k, v, chunk_size, scale):
        raise ValueError(
            f'hsa_attention: impl="triton" takes head dimension and chunk size in {KERNEL_SIZES}, q, k and v of '
            f"one dtype and a positive scale; got D={q.shape[-1]}, S={chunk_size}, {q.dtype}, {k.dtype}, {v.dtype}, "
            f"scale={scale}"
        )
    memory = shared_memory(q.device.index)
    if q.dtype == torch.float32 and q.shape[-1] + chunk_size == 256 and memory < _LARGEST_BYTES_FP32:
        raise ValueError(
            f'hsa_attention: impl="triton" in fp32 with D=128 and S=128 takes {_LARGEST_BYTES_FP32:,} bytes of shared '
            f'memory, this card has {memory:,}; use bf16, fp16 or impl="auto"'
        )
    # a plan of an integer would be that of the equal number, which Triton types otherwise
    scale = float(scale)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weights))
    is_few = q.shape[0] * q.shape[1] <= _DECODE_TOKENS
    if needs_gradient or not is_few:
        indices = within(indices, first_chunk, k.shape[1] // chunk_size)
    if needs_gradient:
        if chunk_lengths is not None and chunk_lengths.shape[0] > k.shape[0]:
            # the passes over chunks know lengths of a memory's rows alone
            k, v = (x.expand(q.shape[0], *x.shape[1:]) for x in (k, v))
        return _TritonAttention.apply(q, k, v, indices, weights, chunk_size, chunk_lengths, scale, causal)
    operands = _contiguous(q, k, v, indices, weights, chunk_lengths)
    plan = operands.plan(chunk_size, scale, causal)
    return _decode(plan, operands, first_chunk or 0) if is_few else _forward(plan, operands)[0]
