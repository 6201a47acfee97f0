"""A Gluon kernel for Hopper (compute capability 9.0): dq of the sliding window, with bulk tensor copies, asynchronous
products and groups of warps that have work of their own; and what kernel_window_hopper_keys.py shares with it.

A tile is 64 / G neighbouring tokens times the G heads of one key head = 64 rows, row r token r // G and head r % G.
GROUPS groups of four warps work beside one warp that copies into a ring of STAGES places, which the groups share. What
stays is in registers as the first operand of a product, and so is dZ: a product reads one tile of shared memory. What
a block adds to dq, dP of the next block and the logits of the one behind it are formed beside the exponentials of the
next block, and beside the other group's arithmetic.

Grid (at most one program a processor); a program takes every so manieth GROUPS neighbouring tiles. It owns their rows
of dq and delta, lse and delta of a tile one behind the other for the other kernel, and flags of 16 rows each that tell
sums that are not finite, which hopper_gradients.py forms again.
Needed: no segments, D = 64, G a divisor of 64, 16-bit numbers, contiguous, addresses at multiples of 16 bytes, 32-bit
offsets, STAGES a power of two from 4 on. Tested on a card alone: tests/ops/test_window_hopper_gradients.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from hsa_ultralong.ops._gluon import advance, begin_block, split

TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# rows of a tile, keys of a block
ROWS = gl.constexpr(64)


@gluon.jit
def exp2(x):
    """Without the care for what is smaller than any number of 16 bits."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _keys_of(first, tokens, num_queries, offset, window):
    """Keys that the tokens see: from where to where."""
    stop = gl.minimum(first + tokens, num_queries) + offset
    return gl.maximum(first + offset - window + 1, 0), stop


@gluon.jit
def _query_produce(
    q, grad_out, out, k, v, queries, upwards, results, keys, values, loaded, taken, full, empty,
    num_queries, num_keys, window, HKV, total, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: tiles of q, dO and out, and the blocks of keys that they see."""
    BT: gl.constexpr = ROWS // G
    shape: gl.constexpr = [1, BT, G, 64]
    block: gl.constexpr = [1, ROWS, 1, 64]
    dtype: gl.constexpr = q.dtype
    offset = num_keys - num_queries
    turn = 0
    place = 0
    steps = gl.cdiv(num_queries, GROUPS * BT)
    step, kv_head, b = split(gl.program_id(0), steps, HKV)
    by_step, by_head, by_b = split(gl.num_programs(0), steps, HKV)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        first = step * (GROUPS * BT)
        for group in gl.static_range(GROUPS):
            bar = loaded.index(group)
            mbarrier.wait(taken.index(group), turn ^ 1)
            mbarrier.expect(bar, 3 * ROWS * 64 * 2)
            at = [b, first + group * BT, kv_head * G, 0]
            tma.async_copy_global_to_shared(q, at, bar, queries.index(group)._reinterpret(dtype, shape, q.layout))
            tma.async_copy_global_to_shared(
                grad_out, at, bar, upwards.index(group)._reinterpret(dtype, shape, q.layout)
            )
            tma.async_copy_global_to_shared(out, at, bar, results.index(group)._reinterpret(dtype, shape, q.layout))
        low, stop = _keys_of(first, GROUPS * BT, num_queries, offset, window)
        for key in range(low, stop, ROWS):
            stage = place & (STAGES - 1)
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (place & STAGES) // STAGES ^ 1)
            mbarrier.expect(bar, 2 * ROWS * 64 * 2)
            tma.async_copy_global_to_shared(
                k, [b, key, kv_head, 0], bar, keys.index(stage)._reinterpret(dtype, block, k.layout)
            )
            tma.async_copy_global_to_shared(
                v, [b, key, kv_head, 0], bar, values.index(stage)._reinterpret(dtype, block, k.layout)
            )
            place += 1
        turn ^= 1
        step, kv_head, b = advance(step, kv_head, b, by_step, by_head, by_b, steps, HKV)


@gluon.jit
def wait_full(full, place, STAGES: gl.constexpr):
    """Wait for the place-th tile of a ring; where it lies."""
    stage = place & (STAGES - 1)
    mbarrier.wait(full.index(stage), (place & STAGES) // STAGES)
    return stage


@gluon.jit
def skip(full, empty, first, stop, STAGES: gl.constexpr):
    """Places of a ring that the other group alone reads."""
    for place in range(first, stop):
        stage = wait_full(full, place, STAGES)
        mbarrier.arrive(empty.index(stage))


@gluon.jit
def sees(place, key, window):
    """mask.window_mask without segments, broadcast."""
    return (place - key).to(gl.uint32) < window.to(gl.uint32)


@gluon.jit
def _scaled(logits, scale, highest):
    """Exponents of P, formed before the product that writes into the registers of the logits."""
    return gl.inline_asm_elementwise(
        "{ .reg .f32 a; neg.f32 a, $3; fma.rn.f32 $0, $1, $2, a; }", "=f,f,f,f", [logits, scale, highest],
        dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _masked(dz, key, first, place, window, KEYS: gl.constexpr, BT: gl.constexpr):
    """dz of KEYS keys, zero where a row does not see one."""
    mma: gl.constexpr = dz.type.layout
    is_whole = (key + KEYS - 1 <= first) & (first + BT - window <= key)
    if not is_whole:
        column = key + gl.arange(0, KEYS, gl.SliceLayout(0, mma))
        own = gl.convert_layout(place, gl.SliceLayout(1, mma), assert_trivial=True)
        dz = gl.where(sees(gl.expand_dims(own, 1), gl.expand_dims(column, 0), window), dz, 0.0)
    return dz


@gluon.jit
def _operand(dz, parent: gl.constexpr, dtype: gl.constexpr):
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=parent, k_width=2)
    return gl.convert_layout(dz.to(dtype), operand, assert_trivial=True)


@gluon.jit
def _block(
    logits, grad, dz, shared, sizes, place, last_place, first_place, key, own, highest, delta, query, upward,
    HAS_GRAD: gl.constexpr, IS_LAST: gl.constexpr, STAGES: gl.constexpr, BT: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """dz of the place-th block of the ring, grad with that of the block before, where it has one, and
    the logits of the block behind it, whose product runs beside the exponentials of this one."""
    keys, values, full, empty = shared
    window, scale, zero, tile = sizes
    mma: gl.constexpr = logits.type.layout
    dtype: gl.constexpr = keys.dtype
    if HAS_GRAD:
        grad = warpgroup_mma(_operand(dz, mma, dtype), keys.index((place - 1) & (STAGES - 1)), grad, is_async=True)
    value = values.index(place & (STAGES - 1)).permute((1, 0))
    slope = warpgroup_mma(upward, value, gl.zeros((ROWS, 64), gl.float32, mma), use_acc=False, is_async=True)
    power = _scaled(logits, scale, gl.expand_dims(highest, 1))
    if not IS_LAST:
        following = keys.index(gl.minimum(place + 1, last_place) & (STAGES - 1)).permute((1, 0))
        nothing = gl.zeros((ROWS, 64), gl.float32, mma)
        logits = warpgroup_mma(query, following, nothing, use_acc=False, is_async=True)
        if SPLIT:
            begin_block(zero)
    p = exp2(power)
    begin_block(zero)
    if HAS_GRAD:
        mbarrier.arrive(empty.index((place - 2) & (STAGES - 1)), pred=place - 2 >= first_place)
    if not IS_LAST:
        wait_full(full, gl.minimum(place + 2, last_place), STAGES)
    if IS_LAST:
        slope, grad, p = warpgroup_mma_wait(0, deps=(slope, grad, p))
    elif HAS_GRAD:
        slope, grad, p = warpgroup_mma_wait(1, deps=(slope, grad, p))
    else:
        slope, p = warpgroup_mma_wait(1, deps=(slope, p))
    dz = _masked(p * (slope - gl.expand_dims(delta, 1)), key, tile, own, window, ROWS, BT)
    if not IS_LAST:
        begin_block(zero)
        logits, dz = warpgroup_mma_wait(0, deps=(logits, dz))
    return logits, grad, dz


@gluon.jit
def _tail(
    dz, grad, query, upward, shared, sizes, place, first_place, key, own, highest, delta, STAGES: gl.constexpr,
    TAIL: gl.constexpr, BT: gl.constexpr,
):  # fmt: skip
    """grad with dz of the block before and of a last one, the place-th of the ring, of which TAIL keys are seen."""
    keys, values, full, empty = shared
    window, scale, zero, tile = sizes
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TAIL, 16])
    across: gl.constexpr = gl.SliceLayout(1, mma)
    parent: gl.constexpr = grad.type.layout
    dtype: gl.constexpr = keys.dtype
    nothing = gl.zeros((ROWS, TAIL), gl.float32, mma)
    last = wait_full(full, place, STAGES)
    before = (place - 1) & (STAGES - 1)
    few_keys = keys.index(last).slice(0, TAIL).permute((1, 0))
    few_values = values.index(last).slice(0, TAIL).permute((1, 0))
    logits = warpgroup_mma(query, few_keys, nothing, use_acc=False, is_async=True)
    slope = warpgroup_mma(upward, few_values, nothing, use_acc=False, is_async=True)
    added = warpgroup_mma(_operand(dz, parent, dtype), keys.index(before), grad, is_async=True)
    mbarrier.arrive(empty.index((place - 2) & (STAGES - 1)), pred=place - 2 >= first_place)
    logits = warpgroup_mma_wait(2, deps=(logits,))
    highest = gl.convert_layout(highest, across, assert_trivial=True)
    delta = gl.convert_layout(delta, across, assert_trivial=True)
    p = exp2(logits * scale - gl.expand_dims(highest, 1))
    begin_block(zero)
    slope, p = warpgroup_mma_wait(1, deps=(slope, p))
    slope = _masked(p * (slope - gl.expand_dims(delta, 1)), key, tile, own, window, TAIL, BT)
    dz = _operand(slope, parent, dtype)
    added = warpgroup_mma(dz, keys.index(last).slice(0, TAIL), added, is_async=True)
    grad = warpgroup_mma_wait(0, deps=(added,))
    mbarrier.arrive(empty.index(before))
    mbarrier.arrive(empty.index(last))
    return grad


@gluon.jit
def send(target, at, tile, values, shape: gl.constexpr):
    """A group's tile to global memory, as far as rows exist; what it sent before has left its place."""
    tma.store_wait(0)
    gl.thread_barrier()
    tile.store(values)
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(target, at, tile._reinterpret(values.dtype, shape, target.layout))


@gluon.jit
def flag(flags, sums):
    """(4,): one of 16 rows, a warp's, is not all finite."""
    spread: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 8]], lane_bases=[[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warp_bases=[[1, 0], [2, 0]],
        block_bases=[], shape=[4, 16],
    )  # fmt: skip
    spoil = gl.convert_layout((gl.sum(sums, 1) * 0.0).reshape([4, 16]), spread, assert_trivial=True)
    four = gl.arange(0, 4, gl.SliceLayout(1, spread))
    gl.store(flags + four, (gl.sum(spoil, 1) != 0.0).to(gl.int32))


@gluon.jit
def _highest(lse, first, kv_head, b, is_one, rows, num_queries, HKV, G: gl.constexpr):
    """lse of a tile's rows, infinite where there is no token."""
    token = first + rows // G
    row = (b * num_queries + token) * (HKV * G) + kv_head * G + rows % G
    return gl.load(lse + row, mask=(token < num_queries) & is_one, other=float("inf"))


@gluon.jit
def _keep(place, highest, delta, is_one):
    """lse and delta of a tile's rows, one behind the other."""
    gl.store(place, highest, mask=is_one)
    gl.store(place + ROWS, delta, mask=is_one)


@gluon.jit
def _blocks_of(start, first, GROUPS: gl.constexpr, BT: gl.constexpr, num_queries, offset, window):
    """Keys and number of blocks of a unit's tiles, and which of the blocks the tile from `first` on sees; one without
    tokens takes the last, and writes nothing."""
    low, union_stop = _keys_of(start, GROUPS * BT, num_queries, offset, window)
    own_low, own_stop = _keys_of(first, BT, num_queries, offset, window)
    blocks = (union_stop - low + ROWS - 1) // ROWS
    begin = gl.minimum((own_low - low) // ROWS, blocks - 1)
    return low, union_stop, blocks, begin, gl.maximum((own_stop - low + ROWS - 1) // ROWS, begin + 1)


@gluon.jit
def _query_consume(
    shared, GROUP: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """Four warps: dq of tile GROUP of every GROUPS neighbouring tiles."""
    (
        grad_q, lse, deltas, norms, flags, queries, upwards, results, keys, values, sent, loaded, taken, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, total, zero,
    ) = shared  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    BT: gl.constexpr = ROWS // G
    shape: gl.constexpr = [1, BT, G, 64]
    dtype: gl.constexpr = queries.dtype
    offset = num_keys - num_queries
    rows = gl.arange(0, ROWS, gl.SliceLayout(1, mma))
    nothing = gl.zeros((ROWS, 64), gl.float32, mma)
    steps = gl.cdiv(num_queries, GROUPS * BT)
    step, kv_head, b = split(gl.program_id(0), steps, HKV)
    by_step, by_head, by_b = split(gl.num_programs(0), steps, HKV)
    highest = _highest(lse, step * (GROUPS * BT) + GROUP * BT, kv_head, b, True, rows, num_queries, HKV, G)
    ring = (keys, values, full, empty)
    turn = 0
    base = 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        start = step * (GROUPS * BT)
        first = start + GROUP * BT
        token = first + rows // G
        row = (b * num_queries + token) * (HKV * G) + kv_head * G + rows % G
        low, union_stop, blocks, begin, stop = _blocks_of(start, first, GROUPS, BT, num_queries, offset, window)
        skip(full, empty, base, base + begin, STAGES)
        is_short = (TAIL > 0) & (stop == blocks) & (begin < stop - 1) & (union_stop - low <= (blocks - 1) * ROWS + TAIL)
        first_place = base + begin
        last_place = base + stop - gl.where(is_short, 2, 1)
        mbarrier.wait(loaded.index(GROUP), turn)
        query = queries.index(GROUP).load(operand)
        first_keys = keys.index(wait_full(full, first_place, STAGES)).permute((1, 0))
        logits = warpgroup_mma(query, first_keys, nothing, use_acc=False, is_async=True)
        upward = upwards.index(GROUP).load(operand)
        result = results.index(GROUP).load(operand)
        mbarrier.arrive(taken.index(GROUP))
        step, next_head, next_b = advance(step, kv_head, b, by_step, by_head, by_b, steps, HKV)
        following_highest = _highest(
            lse, step * (GROUPS * BT) + GROUP * BT, next_head, next_b, number + gl.num_programs(0) < total, rows,
            num_queries, HKV, G,
        )  # fmt: skip
        delta = gl.sum(upward.to(gl.float32) * result.to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, mma), assert_trivial=True)
        tile = (b * HKV + kv_head) * ((num_queries + BT - 1) // BT) + first // BT
        gl.store(deltas + row, delta, mask=token < num_queries)
        _keep(norms + 2 * ROWS * tile + rows, highest, delta, first < num_queries)
        wait_full(full, gl.minimum(first_place + 1, last_place), STAGES)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        sizes = (window, scale, zero, first + offset)
        key = low + begin * ROWS
        own = token + offset
        logits, grad, dz = _block(
            logits, nothing, nothing, ring, sizes, first_place, last_place, first_place, key, own, highest, delta,
            query, upward, False, False, STAGES, BT, SPLIT,
        )  # fmt: skip
        for place in range(first_place + 1, last_place):
            logits, grad, dz = _block(
                logits, grad, dz, ring, sizes, place, last_place, first_place, key + (place - first_place) * ROWS, own,
                highest, delta, query, upward, True, False, STAGES, BT, SPLIT,
            )  # fmt: skip
        if last_place > first_place:
            _, grad, dz = _block(
                logits, grad, dz, ring, sizes, last_place, last_place, first_place,
                key + (last_place - first_place) * ROWS, own, highest, delta, query, upward, True, True, STAGES, BT,
                SPLIT,
            )  # fmt: skip
        if is_short:
            grad = _tail(
                dz, grad, query, upward, ring, sizes, last_place + 1, first_place, low + (stop - 1) * ROWS, own,
                highest, delta, STAGES, TAIL if TAIL > 0 else 16, BT,
            )  # fmt: skip
        else:
            before = keys.index(last_place & (STAGES - 1))
            added = warpgroup_mma(_operand(dz, mma, dtype), before, grad, is_async=True)
            mbarrier.arrive(empty.index((last_place - 1) & (STAGES - 1)), pred=last_place > first_place)
            grad = warpgroup_mma_wait(0, deps=(added,))
            mbarrier.arrive(empty.index(last_place & (STAGES - 1)))
        skip(full, empty, base + stop, base + blocks, STAGES)
        send(grad_q, [b, first, kv_head * G, 0], sent.index(GROUP), (grad * logit_scale).to(dtype), shape)
        if first < num_queries:
            flag(flags + tile * 4, grad)
        highest, kv_head, b = following_highest, next_head, next_b
        base += blocks
        turn ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "window", "total"])
def query_gradient_kernel(
    q, k, v, grad_out, out, lse, grad_q, deltas, norms, flags,
    num_queries, num_keys, window, total, scale, logit_scale, HKV,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, TAIL: gl.constexpr,
    SPLIT: gl.constexpr,
):  # fmt: skip
    """dq, deltas, norms and flags of tiles; q, k, v, grad_out, out and grad_q are descriptors."""
    dtype: gl.constexpr = q.dtype
    queries = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    upwards = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    results = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    sent = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    values = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    loaded = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(taken.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    zero = num_queries >> 31
    shared = (
        grad_q, lse, deltas, norms, flags, queries, upwards, results, keys, values, sent, loaded, taken, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, total, zero,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_query_consume, (shared, 0, GROUPS, G, STAGES, TAIL, SPLIT)),
            (_query_consume, (shared, 1, GROUPS, G, STAGES, TAIL, SPLIT)),
            (_query_produce, (
                q, grad_out, out, k, v, queries, upwards, results, keys, values, loaded, taken, full, empty,
                num_queries, num_keys, window, HKV, total, GROUPS, G, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
