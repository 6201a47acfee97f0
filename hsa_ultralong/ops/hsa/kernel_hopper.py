"""A Gluon kernel for Hopper (compute capability 9.0): all gradients in one pass over the pairs of inverse lists, with
bulk tensor copies, asynchronous products and groups of warps that have work of their own.

A program is a unit: one chunk, whose keys and values stay in shared memory. GROUPS groups of four warps take every
GROUPS-th tile of four pairs times 16 heads = 64 rows; beside each a producer warp copies the rows of q and dO of its
tiles into a ring of STAGES places, and sends out what the pairs add to dq. P and dZ go through shared memory as
operands of dV and dK, dZ is in registers for dQ. Rows behind the last pair of a unit repeat it with weight 0; their
share of dq goes to the place behind all pairs. How much faster that is: docs/kernels.md. Imports gluon, so it is
imported only where it runs (plan.py). tests/ops/test_hopper.py; the host's part, with a stand-in, test_hsa_triton.py.

Grid: (units of a part, Hkv / Hr); a program owns GROUPS places of the workspace, and of shares and dw those of its
pairs. The sums follow on the same stream: listed_sum_kernel and slot_sum_kernel of kernel_chunks.py.
Needed: D = S = 64, G = 16, 16-bit numbers, no lengths, fewer than 2**31 pairs, addresses at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hsa_ultralong.ops._gluon import begin_block

_TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


def described(tensor: torch.Tensor, width: int, box: tuple[int, int]) -> TensorDescriptor:
    """A contiguous tensor of 16-bit numbers as rows of `width`, of which boxes of `box` are copied."""
    return TensorDescriptor.from_tensor(tensor.view(-1, width), list(box), _TILE)


# pairs of a tile, and rows of each
_PAIRS = gl.constexpr(4)
_HEADS = gl.constexpr(16)


@gluon.jit
def _opaque(x, zero):
    """x + lane * zero: one number for all lanes, which the assembler does not see; it moves what a warp loads from one
    address to a uniform register at once, and waits there for the load."""
    return gl.inline_asm_elementwise(
        "{ .reg .u32 lane; mov.u32 lane, %laneid; mad.lo.u32 $0, lane, $2, $1; }", "=r,r,r", [x, zero],
        dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _unit(unit_lists, unit_ends, pair_starts, part, lists, unit_pairs):
    """List of this program's unit among those of the part and its pairs first .. stop; none where no unit exists."""
    unit = gl.program_id(0) + gl.load(unit_ends + part * lists - 1, mask=part > 0, other=0)
    exists = unit < gl.load(unit_ends + (part + 1) * lists - 1)
    number = gl.load(unit_lists + unit, mask=exists, other=part * lists)
    before = gl.load(unit_ends + number - 1, mask=number > 0, other=0)
    first = gl.load(pair_starts + number) + (unit - before) * unit_pairs
    stop = gl.minimum(first + unit_pairs, gl.load(pair_starts + number + 1))
    return number - part * lists, first, gl.where(exists, stop, first)


@gluon.jit
def _operand_row(pairs, place, stop, kv_head, HKV, HR, K: gl.constexpr):
    """First row of a pair's heads in q and dO, (B * T * Hkv * G, D)."""
    return (gl.load(pairs + gl.minimum(place, stop - 1)) // (K * HR) * HKV + kv_head) * _HEADS


@gluon.jit
def _share_row(
    pairs, place, stop, none, kv_head, first_token, part_tokens, T, HKV, HR, K: gl.constexpr, HAS_ROWS: gl.constexpr
):
    """First row of what a pair adds to dq, (B * part_tokens * Hkv * K * G, D); behind the last pair that of `none`."""
    pair = gl.load(pairs + gl.minimum(place, stop - 1))
    token = pair // (K * HR) - first_token
    if HAS_ROWS:
        token -= pair // (K * HR) // T * (T - part_tokens)
    return gl.where(place < stop, (token * HKV + kv_head) * K + pair % K, none) * _HEADS


@gluon.jit
def _produce(
    q, grad_out, k, v, shares, pairs, pair_starts, unit_ends, unit_lists, keys, values, queries, upwards, slopes,
    loaded, full, empty, ready, free,
    part, first_token, part_tokens, T, C, lists, unit_pairs, none, HKV, HR,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, K: gl.constexpr, HAS_ROWS: gl.constexpr,
):  # fmt: skip
    """One warp: the rows of tile i in, what tile i - (STAGES - 1) adds to dq out."""
    number, first, stop = _unit(unit_lists, unit_ends, pair_starts, part, lists, unit_pairs)
    kv_head = number // C % HR + gl.program_id(1) * HR
    if first < stop:
        if GROUP == 0:
            row = (number // C // HR * C + number % C) * 64
            mbarrier.expect(loaded, 2 * 64 * 64 * 2)
            tma.async_copy_global_to_shared(k, [row, kv_head * 64], loaded, keys)
            tma.async_copy_global_to_shared(v, [row, kv_head * 64], loaded, values)
        start = first + _PAIRS * GROUP
        tiles = gl.maximum(stop - start + (_PAIRS * GROUPS - 1), 0) // (_PAIRS * GROUPS)
        behind = start
        row0 = _operand_row(pairs, start, stop, kv_head, HKV, HR, K)
        row1 = _operand_row(pairs, start + 1, stop, kv_head, HKV, HR, K)
        row2 = _operand_row(pairs, start + 2, stop, kv_head, HKV, HR, K)
        row3 = _operand_row(pairs, start + 3, stop, kv_head, HKV, HR, K)
        for i in range(tiles + STAGES - 1):
            if i < tiles:
                start += _PAIRS * GROUPS
                next0 = _operand_row(pairs, start, stop, kv_head, HKV, HR, K)
                next1 = _operand_row(pairs, start + 1, stop, kv_head, HKV, HR, K)
                next2 = _operand_row(pairs, start + 2, stop, kv_head, HKV, HR, K)
                next3 = _operand_row(pairs, start + 3, stop, kv_head, HKV, HR, K)
                place = GROUP * STAGES + i % STAGES
                bar = full.index(place)
                mbarrier.wait(empty.index(place), ((i // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, 2 * 64 * 64 * 2)
                to_q = queries.index(place)
                to_o = upwards.index(place)
                tma.async_copy_global_to_shared(q, [row0, 0], bar, to_q.slice(0, 16))
                tma.async_copy_global_to_shared(q, [row1, 0], bar, to_q.slice(16, 16))
                tma.async_copy_global_to_shared(q, [row2, 0], bar, to_q.slice(32, 16))
                tma.async_copy_global_to_shared(q, [row3, 0], bar, to_q.slice(48, 16))
                tma.async_copy_global_to_shared(grad_out, [row0, 0], bar, to_o.slice(0, 16))
                tma.async_copy_global_to_shared(grad_out, [row1, 0], bar, to_o.slice(16, 16))
                tma.async_copy_global_to_shared(grad_out, [row2, 0], bar, to_o.slice(32, 16))
                tma.async_copy_global_to_shared(grad_out, [row3, 0], bar, to_o.slice(48, 16))
                row0 = next0
                row1 = next1
                row2 = next2
                row3 = next3
            if i >= STAGES - 1:
                own0 = _share_row(pairs, behind, stop, none, kv_head, first_token, part_tokens, T, HKV, HR, K, HAS_ROWS)
                own1 = _share_row(
                    pairs, behind + 1, stop, none, kv_head, first_token, part_tokens, T, HKV, HR, K, HAS_ROWS
                )
                own2 = _share_row(
                    pairs, behind + 2, stop, none, kv_head, first_token, part_tokens, T, HKV, HR, K, HAS_ROWS
                )
                own3 = _share_row(
                    pairs, behind + 3, stop, none, kv_head, first_token, part_tokens, T, HKV, HR, K, HAS_ROWS
                )
                behind += _PAIRS * GROUPS
                tile = slopes.index(GROUP)
                mbarrier.wait(ready.index(GROUP), (i - (STAGES - 1)) & 1)
                tma.async_copy_shared_to_global(shares, [own0, 0], tile.slice(0, 16))
                tma.async_copy_shared_to_global(shares, [own1, 0], tile.slice(16, 16))
                tma.async_copy_shared_to_global(shares, [own2, 0], tile.slice(32, 16))
                tma.async_copy_shared_to_global(shares, [own3, 0], tile.slice(48, 16))
                tma.store_wait(0)
                mbarrier.arrive(free.index(GROUP))


@gluon.jit
def _consume(
    weights, pairs, pair_starts, unit_ends, unit_lists, partial, grad_weights, keys, values, queries, upwards,
    chances, slopes, loaded, full, empty, ready, free,
    part, C, lists, unit_pairs, none, scale, logit_scale, HKV, HR,
    GROUP: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """Four warps: dK, dV, shares of dq and dw of every GROUPS-th tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    column_layout: gl.constexpr = gl.SliceLayout(0, mma)
    # a warp's 16 rows are the heads of one pair
    spread: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 8]], lane_bases=[[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warp_bases=[[1, 0], [2, 0]],
        block_bases=[], shape=[4, 16],
    )  # fmt: skip
    dtype: gl.constexpr = keys.dtype
    number, first, stop = _unit(unit_lists, unit_ends, pair_starts, part, lists, unit_pairs)
    kv_head = number // C % HR + gl.program_id(1) * HR
    zero = none >> 31
    pair4 = _opaque(gl.arange(0, 4, gl.SliceLayout(1, spread)), zero)
    rows = gl.arange(0, 64, row_layout)
    dims = gl.arange(0, 64, column_layout)
    grad_k = gl.zeros((64, 64), gl.float32, mma)
    grad_v = gl.zeros((64, 64), gl.float32, mma)
    nothing = gl.zeros((64, 64), gl.float32, mma)
    chance = chances.index(GROUP)
    slope_tile = slopes.index(GROUP)
    if first < stop:
        place = 0
        start = first + _PAIRS * GROUP
        last = stop - 1
        pair = gl.load(pairs + gl.minimum(start + pair4, last))
        w = gl.load(weights + pair).to(gl.float32)
        own = (pair // (K * HR) * HKV + kv_head) * K + pair % K
        pair1 = gl.load(pairs + gl.minimum(start + _PAIRS * GROUPS + pair4, last))
        mbarrier.wait(loaded, 0)
        gl.thread_barrier()
        while start < stop:
            stage = GROUP * STAGES + place % STAGES
            w1 = gl.load(weights + pair1).to(gl.float32)
            own1 = (pair1 // (K * HR) * HKV + kv_head) * K + pair1 % K
            pair1 = gl.load(pairs + gl.minimum(start + 2 * _PAIRS * GROUPS + pair4, last))
            mbarrier.wait(full.index(stage), (place // STAGES) & 1)
            query = queries.index(stage)
            upward = upwards.index(stage)
            logits = warpgroup_mma(query, keys.permute((1, 0)), nothing, use_acc=False, is_async=True)
            slope = warpgroup_mma(upward, values.permute((1, 0)), nothing, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(1, deps=(logits,))
            top = gl.max(logits, 1) * scale
            p = gl.exp2(logits * scale - gl.expand_dims(top, 1))
            inverse = _reciprocal(gl.sum(p, 1))
            begin_block(zero)
            slope, p = warpgroup_mma_wait(0, deps=(slope, p))
            delta = gl.sum(p * slope, 1) * inverse
            real = gl.where(start + pair4 < stop, w, 0.0)
            wide = gl.convert_layout(
                gl.expand_dims(real, 1).broadcast_to([4, 16]).reshape([64]), row_layout, assert_trivial=True
            )
            share = wide * inverse
            # one multiplication and addition for each of slope - delta times the share
            dz = (p * (slope * gl.expand_dims(share, 1) - gl.expand_dims(delta * share, 1))).to(dtype)
            chance.store((p * gl.expand_dims(share, 1)).to(dtype))
            # what the tile before adds to dq has left
            mbarrier.wait(free.index(GROUP), (place & 1) ^ 1)
            slope_tile.store(dz)
            fence_async_shared()
            gl.thread_barrier()
            added = warpgroup_mma(gl.convert_layout(dz, operand), keys, nothing, use_acc=False, is_async=True)
            grad_v = warpgroup_mma(chance.permute((1, 0)), upward, grad_v, is_async=True)
            grad_k = warpgroup_mma(slope_tile.permute((1, 0)), query, grad_k, is_async=True)
            heads = gl.convert_layout(delta.reshape([4, 16]), spread, assert_trivial=True)
            gl.store(grad_weights + own, gl.sum(heads, 1), mask=start + pair4 < stop)
            grad_v, grad_k, added = warpgroup_mma_wait(0, deps=(grad_v, grad_k, added))
            mbarrier.arrive(empty.index(stage))
            slope_tile.store((added * logit_scale).to(dtype))
            fence_async_shared()
            mbarrier.arrive(ready.index(GROUP))
            w = w1
            own = own1
            start += _PAIRS * GROUPS
            place += 1
        target = (gl.program_id(0).to(gl.int64) * gl.num_programs(1) + gl.program_id(1)) * GROUPS + GROUP
        target = partial + target * (2 * 64 * 64) + gl.expand_dims(rows * 64, 1) + gl.expand_dims(dims, 0)
        gl.store(target, grad_k)
        gl.store(target + 64 * 64, grad_v)


@gluon.jit(do_not_specialize=["part", "first_token", "part_tokens", "T", "C", "lists", "unit_pairs", "none"])
def listed_gradient_kernel(
    q, k, v, weights, grad_out, pairs, pair_starts, unit_ends, unit_lists, partial, shares, grad_weights,
    part, first_token, part_tokens, T, C, lists, unit_pairs, none, scale, logit_scale, HKV, HR,
    K: gl.constexpr, HAS_ROWS: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """Gradients of one unit; q, grad_out and shares are descriptors of boxes of 16 rows, k and v of chunks."""
    dtype: gl.constexpr = q.dtype
    keys = gl.allocate_shared_memory(dtype, [64, 64], k.layout)
    values = gl.allocate_shared_memory(dtype, [64, 64], v.layout)
    queries = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, 64, 64], q.layout)
    upwards = gl.allocate_shared_memory(dtype, [GROUPS * STAGES, 64, 64], q.layout)
    chances = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], q.layout)
    slopes = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], q.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [GROUPS * STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    mbarrier.init(loaded, count=1)
    for i in gl.static_range(GROUPS):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=1)
    for i in gl.static_range(GROUPS * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_consume, (
                weights, pairs, pair_starts, unit_ends, unit_lists, partial, grad_weights, keys, values, queries,
                upwards, chances, slopes, loaded, full, empty, ready, free, part, C, lists, unit_pairs, none, scale,
                logit_scale, HKV, HR, 0, GROUPS, STAGES, K,
            )),
            (_consume, (
                weights, pairs, pair_starts, unit_ends, unit_lists, partial, grad_weights, keys, values, queries,
                upwards, chances, slopes, loaded, full, empty, ready, free, part, C, lists, unit_pairs, none, scale,
                logit_scale, HKV, HR, 1, GROUPS, STAGES, K,
            )),
            (_produce, (
                q, grad_out, k, v, shares, pairs, pair_starts, unit_ends, unit_lists, keys, values, queries, upwards,
                slopes, loaded, full, empty, ready, free, part, first_token, part_tokens, T, C, lists, unit_pairs, none,
                HKV, HR, 0, GROUPS, STAGES, K, HAS_ROWS,
            )),
            (_produce, (
                q, grad_out, k, v, shares, pairs, pair_starts, unit_ends, unit_lists, keys, values, queries, upwards,
                slopes, loaded, full, empty, ready, free, part, first_token, part_tokens, T, C, lists, unit_pairs, none,
                HKV, HR, 1, GROUPS, STAGES, K, HAS_ROWS,
            )),
        ],
        [4, 1, 1],
        [REGISTERS, 24, 24],
    )  # fmt: skip
