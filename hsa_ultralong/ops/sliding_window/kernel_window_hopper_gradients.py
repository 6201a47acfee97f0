"""A Gluon kernel for Hopper (compute capability 9.0): dq of the sliding window, with bulk tensor copies, asynchronous
products and groups of warps that have work of their own; and what kernel_window_hopper_keys.py shares with it.

A tile is 64 / G neighbouring tokens times the G heads of one key head = 64 rows, row r token r // G and head r % G.
GROUPS groups of four warps work beside one warp that copies into a ring of STAGES places, which the groups share. What
stays is in registers as the first operand of a product, and so is dZ: a product reads one tile of shared memory. A
group starts the next two products behind that of this block, and the other group's arithmetic runs beside them.

Grid (at most one program a processor); a program takes every so manieth GROUPS neighbouring tiles. It owns their rows
of dq and delta, lse and delta of a tile one behind the other for the other kernel, and flags of 16 rows each that tell
sums that are not finite, which hopper_gradients.py forms again.
Needed: no segments, D = 64, G a divisor of 64, 16-bit numbers, contiguous, addresses at multiples of 16 bytes, 32-bit
offsets. Tested on a card alone: tests/ops/test_window_hopper_gradients.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from hsa_ultralong.ops._gluon import begin_block

TILE = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
# rows of a tile, keys of a block
ROWS = gl.constexpr(64)


@gluon.jit
def exp2(x):
    """Without the care for what is smaller than any number of 16 bits."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _tiles_of(number, num_queries, HKV, TOKENS: gl.constexpr):
    """First of TOKENS tokens, key head and row of the batch of a program's work."""
    count = (num_queries + TOKENS - 1) // TOKENS
    other = number // count
    return (number - other * count) * TOKENS, other % HKV, other // HKV


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
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        first, kv_head, b = _tiles_of(number, num_queries, HKV, GROUPS * BT)
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
            stage = place % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((place // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, 2 * ROWS * 64 * 2)
            tma.async_copy_global_to_shared(
                k, [b, key, kv_head, 0], bar, keys.index(stage)._reinterpret(dtype, block, k.layout)
            )
            tma.async_copy_global_to_shared(
                v, [b, key, kv_head, 0], bar, values.index(stage)._reinterpret(dtype, block, k.layout)
            )
            place += 1
        turn ^= 1


@gluon.jit
def skip(full, empty, first, stop, STAGES: gl.constexpr):
    """Places of a ring that the other group alone reads."""
    for place in range(first, stop):
        stage = place % STAGES
        mbarrier.wait(full.index(stage), (place // STAGES) & 1)
        mbarrier.arrive(empty.index(stage))


@gluon.jit
def sees(place, key, window):
    """mask.window_mask without segments, broadcast."""
    return (place - key).to(gl.uint32) < window.to(gl.uint32)


@gluon.jit
def _slopes(
    logits, slope, grad, empty, before, is_later: gl.constexpr, key, first, highest, delta, place, window, scale, zero,
    KEYS: gl.constexpr, BT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """dz of KEYS keys as an operand, from its products underway; grad is that of the block before, underway too."""
    mma: gl.constexpr = logits.type.tensor_type.layout
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    across: gl.constexpr = gl.SliceLayout(1, mma)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=grad.type.tensor_type.layout, k_width=2)
    highest = gl.convert_layout(highest, across, assert_trivial=True)
    delta = gl.convert_layout(delta, across, assert_trivial=True)
    logits, grad = warpgroup_mma_wait(1, deps=(logits, grad))
    if is_later:
        mbarrier.arrive(empty.index(before))
    p = exp2(logits * scale - gl.expand_dims(highest, 1))
    begin_block(zero)
    slope, p = warpgroup_mma_wait(0, deps=(slope, p))
    dz = p * (slope - gl.expand_dims(delta, 1))
    is_whole = (key + KEYS - 1 <= first) & (first + BT - window <= key)
    if not is_whole:
        column = key + gl.arange(0, KEYS, columns)
        own = gl.convert_layout(place, across, assert_trivial=True)
        dz = gl.where(sees(gl.expand_dims(own, 1), gl.expand_dims(column, 0), window), dz, 0.0)
    return gl.convert_layout(dz.to(dtype), operand, assert_trivial=True), grad


@gluon.jit
def _tail(
    dz, grad, query, upward, keys, values, full, empty, stage, place, key, first, highest, delta, own, window, scale,
    zero, STAGES: gl.constexpr, TAIL: gl.constexpr, BT: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """grad with dz of the block before, and dz and place of a last block of which TAIL keys are seen."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, TAIL, 16])
    nothing = gl.zeros((ROWS, TAIL), gl.float32, mma)
    last = place % STAGES
    mbarrier.wait(full.index(last), (place // STAGES) & 1)
    added = warpgroup_mma(dz, keys.index(stage), grad, is_async=True)
    few_keys = keys.index(last).slice(0, TAIL).permute((1, 0))
    few_values = values.index(last).slice(0, TAIL).permute((1, 0))
    logits = warpgroup_mma(query, few_keys, nothing, use_acc=False, is_async=True)
    slope = warpgroup_mma(upward, few_values, nothing, use_acc=False, is_async=True)
    dz, grad = _slopes(
        logits, slope, added, empty, stage, True, key, first, highest, delta, own, window, scale, zero, TAIL, BT,
        dtype,
    )  # fmt: skip
    added = warpgroup_mma(dz, keys.index(last).slice(0, TAIL), grad, is_async=True)
    grad = warpgroup_mma_wait(0, deps=(added,))
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
    spoil = gl.convert_layout(gl.sum(sums * 0.0, 1).reshape([4, 16]), spread, assert_trivial=True)
    four = gl.arange(0, 4, gl.SliceLayout(1, spread))
    gl.store(flags + four, (gl.sum(spoil, 1) != 0.0).to(gl.int32))


@gluon.jit
def _highest(lse, number, total, rows, num_queries, HKV, GROUP: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr):
    """lse of a tile's rows, infinite where there is no token."""
    start, kv_head, b = _tiles_of(number, num_queries, HKV, GROUPS * (ROWS // G))
    token = start + GROUP * (ROWS // G) + rows // G
    row = (b * num_queries + token) * (HKV * G) + kv_head * G + rows % G
    return gl.load(lse + row, mask=(token < num_queries) & (number < total), other=float("inf"))


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
    shared, GROUP: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr, TAIL: gl.constexpr
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
    highest = _highest(lse, gl.program_id(0), total, rows, num_queries, HKV, GROUP, GROUPS, G)
    turn = 0
    base = 0
    for number in range(gl.program_id(0), total, gl.num_programs(0)):
        start, kv_head, b = _tiles_of(number, num_queries, HKV, GROUPS * BT)
        first = start + GROUP * BT
        token = first + rows // G
        row = (b * num_queries + token) * (HKV * G) + kv_head * G + rows % G
        own = token + offset
        low, union_stop, blocks, begin, stop = _blocks_of(start, first, GROUPS, BT, num_queries, offset, window)
        mbarrier.wait(loaded.index(GROUP), turn)
        query = queries.index(GROUP).load(operand)
        upward = upwards.index(GROUP).load(operand)
        result = results.index(GROUP).load(operand)
        mbarrier.arrive(taken.index(GROUP))
        following_highest = _highest(lse, number + gl.num_programs(0), total, rows, num_queries, HKV, GROUP, GROUPS, G)
        delta = gl.sum(upward.to(gl.float32) * result.to(gl.float32), 1)
        delta = gl.convert_layout(delta, gl.SliceLayout(1, mma), assert_trivial=True)
        skip(full, empty, base, base + begin, STAGES)
        place = base + begin
        stage = place % STAGES
        mbarrier.wait(full.index(stage), (place // STAGES) & 1)
        logits = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        slope = warpgroup_mma(upward, values.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        tile = (b * HKV + kv_head) * ((num_queries + BT - 1) // BT) + first // BT
        gl.store(deltas + row, delta, mask=token < num_queries)
        gl.store(norms + 2 * ROWS * tile + rows, highest, mask=first < num_queries)
        gl.store(norms + 2 * ROWS * tile + ROWS + rows, delta, mask=first < num_queries)
        dz, grad = _slopes(
            logits, slope, warpgroup_mma_init(nothing), empty, stage, False, low + begin * ROWS, first + offset,
            highest, delta, own, window, scale, zero, ROWS, BT, dtype,
        )  # fmt: skip
        is_short = (TAIL > 0) & (stop == blocks) & (begin < stop - 1) & (union_stop - low <= (blocks - 1) * ROWS + TAIL)
        for i in range(begin, gl.where(is_short, stop - 2, stop - 1)):
            place += 1
            following = place % STAGES
            mbarrier.wait(full.index(following), (place // STAGES) & 1)
            added = warpgroup_mma(dz, keys.index(stage), grad, is_async=True)
            logits = warpgroup_mma(query, keys.index(following).permute((1, 0)), nothing, use_acc=False, is_async=True)
            value = values.index(following).permute((1, 0))
            slope = warpgroup_mma(upward, value, nothing, use_acc=False, is_async=True)
            dz, grad = _slopes(
                logits, slope, added, empty, stage, True, low + (i + 1) * ROWS, first + offset, highest, delta, own,
                window, scale, zero, ROWS, BT, dtype,
            )  # fmt: skip
            stage = following
        if is_short:
            grad = _tail(
                dz, grad, query, upward, keys, values, full, empty, stage, place + 1, low + (stop - 1) * ROWS,
                first + offset, highest, delta, own, window, scale, zero, STAGES, TAIL if TAIL > 0 else 16, BT, dtype,
            )  # fmt: skip
        else:
            added = warpgroup_mma(dz, keys.index(stage), grad, is_async=True)
            grad = warpgroup_mma_wait(0, deps=(added,))
            mbarrier.arrive(empty.index(stage))
        skip(full, empty, base + stop, base + blocks, STAGES)
        send(grad_q, [b, first, kv_head * G, 0], sent.index(GROUP), (grad * logit_scale).to(dtype), shape)
        if first < num_queries:
            flag(flags + tile * 4, grad)
        highest = following_highest
        base += blocks
        turn ^= 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "window", "total"])
def query_gradient_kernel(
    q, k, v, grad_out, out, lse, grad_q, deltas, norms, flags,
    num_queries, num_keys, window, total, scale, logit_scale, HKV,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, TAIL: gl.constexpr,
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
            (_query_consume, (shared, 0, GROUPS, G, STAGES, TAIL)),
            (_query_consume, (shared, 1, GROUPS, G, STAGES, TAIL)),
            (_query_produce, (
                q, grad_out, out, k, v, queries, upwards, results, keys, values, loaded, taken, full, empty,
                num_queries, num_keys, window, HKV, total, GROUPS, G, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
