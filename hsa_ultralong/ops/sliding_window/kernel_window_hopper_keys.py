"""A Gluon kernel for Hopper: gradients of the sliding window's keys and values (kernel_window_hopper_gradients.py).

Grid (GROUPS blocks of 64 keys, Hkv, B). A group of four warps owns a block; products are transposed, so that its keys
are rows and P and dZ are first operands as they come. One warp copies the tiles of q, dO, lse and delta that see any of
the blocks, which the groups share; lse and delta of a tile lie one behind the other, as query_gradient_kernel wrote.
Needed and tested: as there.
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
from hsa_ultralong.ops.sliding_window.kernel_window_hopper_gradients import (
    ROWS,
    TILE,
    exp2,
    flag,
    sees,
    send,
    skip,
)


@gluon.jit
def _tokens_of(key, num_keys: gl.constexpr, num_queries, offset, window, BT: gl.constexpr):
    """Tiles of tokens that see some of num_keys keys: from which to which."""
    begin = gl.maximum(key - offset, 0) // BT
    stop = gl.minimum(key + num_keys - 1 - offset + window, num_queries)
    return begin, gl.maximum((gl.maximum(stop, 0) + BT - 1) // BT, begin)


@gluon.jit
def _key_produce(
    q, grad_out, norms, k, v, queries, upwards, rows, keys, values, loaded, full, empty,
    num_queries, num_keys, window, HKV, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: every group's keys, and the tiles of q, dO and norms that see them."""
    BT: gl.constexpr = ROWS // G
    shape: gl.constexpr = [1, BT, G, 64]
    block: gl.constexpr = [1, ROWS, 1, 64]
    dtype: gl.constexpr = q.dtype
    start = gl.program_id(0) * (GROUPS * ROWS)
    kv_head = gl.program_id(1)
    b = gl.program_id(2)
    for group in gl.static_range(GROUPS):
        bar = loaded.index(group)
        at = [b, start + group * ROWS, kv_head, 0]
        mbarrier.expect(bar, 2 * ROWS * 64 * 2)
        tma.async_copy_global_to_shared(k, at, bar, keys.index(group)._reinterpret(dtype, block, k.layout))
        tma.async_copy_global_to_shared(v, at, bar, values.index(group)._reinterpret(dtype, block, k.layout))
    begin, stop = _tokens_of(start, GROUPS * ROWS, num_queries, num_keys - num_queries, window, BT)
    first_row = (b * HKV + kv_head) * ((num_queries + BT - 1) // BT)
    for i in range(begin, stop):
        place = i - begin
        stage = place % STAGES
        bar = full.index(stage)
        mbarrier.wait(empty.index(stage), ((place // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, 2 * ROWS * 64 * 2 + 2 * ROWS * 4)
        at = [b, i * BT, kv_head * G, 0]
        tma.async_copy_global_to_shared(q, at, bar, queries.index(stage)._reinterpret(dtype, shape, q.layout))
        tma.async_copy_global_to_shared(grad_out, at, bar, upwards.index(stage)._reinterpret(dtype, shape, q.layout))
        tma.async_copy_global_to_shared(norms, [first_row + i, 0], bar, rows.index(stage))


@gluon.jit
def _chances(
    logits, slope, grad_k, grad_v, row, empty, before, is_later: gl.constexpr, first, key, offset, window, scale, zero,
    G: gl.constexpr, dtype: gl.constexpr,
):  # fmt: skip
    """P and dz of a tile, transposed, as operands, from its products underway; grad_k and grad_v as in _slopes."""
    mma: gl.constexpr = logits.type.tensor_type.layout
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    BT: gl.constexpr = ROWS // G
    norm = row._reinterpret(gl.float32, [2 * ROWS], plain)
    highest = norm.slice(0, ROWS).load(columns)
    logits, grad_k, grad_v = warpgroup_mma_wait(1, deps=(logits, grad_k, grad_v))
    if is_later:
        mbarrier.arrive(empty.index(before))
    p = exp2(logits * scale - gl.expand_dims(highest, 0))
    is_whole = (key + ROWS - 1 <= first + offset) & (first + BT + offset - window <= key)
    if not is_whole:
        token = first + gl.arange(0, ROWS, columns) // G
        own = key + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        p = gl.where(sees(gl.expand_dims(token + offset, 0), gl.expand_dims(own, 1), window), p, 0.0)
    delta = norm.slice(ROWS, ROWS).load(columns)
    begin_block(zero)
    slope, p = warpgroup_mma_wait(0, deps=(slope, p))
    dz = p * (slope - gl.expand_dims(delta, 0))
    return gl.convert_layout(p.to(dtype), operand), gl.convert_layout(dz.to(dtype), operand), grad_k, grad_v


@gluon.jit
def _key_consume(shared, GROUP: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: dk and dv of block GROUP of every GROUPS neighbouring ones."""
    (
        grad_k, grad_v, flags, queries, upwards, rows, keys, values, loaded, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, zero,
    ) = shared  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    BT: gl.constexpr = ROWS // G
    block: gl.constexpr = [1, ROWS, 1, 64]
    dtype: gl.constexpr = queries.dtype
    offset = num_keys - num_queries
    start = gl.program_id(0) * (GROUPS * ROWS)
    kv_head = gl.program_id(1)
    b = gl.program_id(2)
    key = start + GROUP * ROWS
    first, union_stop = _tokens_of(start, GROUPS * ROWS, num_queries, offset, window, BT)
    begin, stop = _tokens_of(key, ROWS, num_queries, offset, window, BT)
    begin = gl.minimum(begin, union_stop)
    stop = gl.maximum(gl.minimum(stop, union_stop), begin)
    nothing = gl.zeros((ROWS, 64), gl.float32, mma)
    sum_k = nothing
    sum_v = nothing
    mbarrier.wait(loaded.index(GROUP), 0)
    own_key = keys.index(GROUP).load(operand)
    own_value = values.index(GROUP).load(operand)
    skip(full, empty, 0, begin - first, STAGES)
    if begin < stop:
        place = begin - first
        stage = place % STAGES
        mbarrier.wait(full.index(stage), (place // STAGES) & 1)
        logits = warpgroup_mma(own_key, queries.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        slope = warpgroup_mma(own_value, upwards.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        p, dz, sum_k, sum_v = _chances(
            logits, slope, warpgroup_mma_init(nothing), warpgroup_mma_init(nothing), rows.index(stage), empty, stage,
            False, begin * BT, key, offset, window, scale, zero, G, dtype,
        )  # fmt: skip
        for i in range(begin + 1, stop):
            place += 1
            following = place % STAGES
            mbarrier.wait(full.index(following), (place // STAGES) & 1)
            added_v = warpgroup_mma(p, upwards.index(stage), sum_v, is_async=True)
            added_k = warpgroup_mma(dz, queries.index(stage), sum_k, is_async=True)
            query = queries.index(following).permute((1, 0))
            upward = upwards.index(following).permute((1, 0))
            logits = warpgroup_mma(own_key, query, nothing, use_acc=False, is_async=True)
            slope = warpgroup_mma(own_value, upward, nothing, use_acc=False, is_async=True)
            p, dz, sum_k, sum_v = _chances(
                logits, slope, added_k, added_v, rows.index(following), empty, stage, True, i * BT, key, offset, window,
                scale, zero, G, dtype,
            )  # fmt: skip
            stage = following
        added_v = warpgroup_mma(p, upwards.index(stage), sum_v, is_async=True)
        added_k = warpgroup_mma(dz, queries.index(stage), sum_k, is_async=True)
        sum_k, sum_v = warpgroup_mma_wait(0, deps=(added_k, added_v))
        mbarrier.arrive(empty.index(stage))
    skip(full, empty, stop - first, union_stop - first, STAGES)
    at = [b, key, kv_head, 0]
    send(grad_k, at, keys.index(GROUP), (sum_k * logit_scale).to(dtype), block)
    send(grad_v, at, values.index(GROUP), sum_v.to(dtype), block)
    blocks = (num_keys + ROWS - 1) // ROWS
    if key < num_keys:
        flag(flags + ((b * HKV + kv_head) * blocks + key // ROWS) * 4, sum_k + sum_v)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "window"])
def key_gradient_kernel(
    q, k, v, grad_out, norms, grad_k, grad_v, flags, num_queries, num_keys, window, scale, logit_scale, HKV,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv and flags of blocks of 64 keys; q, k, v, grad_out, norms, grad_k and grad_v are descriptors."""
    dtype: gl.constexpr = q.dtype
    keys = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    values = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    queries = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    upwards = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], norms.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(loaded.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=GROUPS)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    zero = num_queries >> 31
    shared = (
        grad_k, grad_v, flags, queries, upwards, rows, keys, values, loaded, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, zero,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_key_consume, (shared, 0, GROUPS, G, STAGES)),
            (_key_consume, (shared, 1, GROUPS, G, STAGES)),
            (_key_produce, (
                q, grad_out, norms, k, v, queries, upwards, rows, keys, values, loaded, full, empty,
                num_queries, num_keys, window, HKV, GROUPS, G, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
