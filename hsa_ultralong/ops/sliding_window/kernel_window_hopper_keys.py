"""A Gluon kernel for Hopper: gradients of the sliding window's keys and values (kernel_window_hopper_gradients.py).

Grid (at most one program a processor); a program takes every so manieth GROUPS neighbouring blocks of 64 keys. A group
of four warps owns a block; products are transposed, so that its keys are rows and P and dZ are first operands as they
come. One warp copies the tiles of q, dO, lse and delta that see any of the blocks, which the groups share, and the next
blocks' keys; lse and delta of a tile lie one behind the other, as query_gradient_kernel wrote.

What a tile adds is formed with the products of the next one. lse and delta are read a tile, or the exponentials, ahead:
a load waits long beside the other group's products.
Needed: as there, and STAGES a power of two from 4 on. Tested: as there.
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

from hsa_ultralong.ops._gluon import begin_block
from hsa_ultralong.ops.sliding_window.kernel_window_hopper_gradients import (
    ROWS,
    TILE,
    exp2,
    flag,
    sees,
)


@gluon.jit
def _wait_full(full, place, STAGES: gl.constexpr):
    """Wait for the place-th tile of a ring; where it lies."""
    stage = place & (STAGES - 1)
    mbarrier.wait(full.index(stage), (place & STAGES) // STAGES)
    return stage


@gluon.jit
def _skip(full, empty, first, stop, STAGES: gl.constexpr):
    """Places of a ring that the other group alone reads."""
    for place in range(first, stop):
        mbarrier.arrive(empty.index(_wait_full(full, place, STAGES)))


@gluon.jit
def _split(number, steps, heads):
    """Number of a program's work among that of its row and key head, key head and row of the batch."""
    other = number // steps
    return number - other * steps, other % heads, other // heads


@gluon.jit
def _advance(step, head, b, by_step, by_head, by_b, steps, heads):
    """_split of the sum of two numbers from that of each, without divisions."""
    step += by_step
    head += by_head + (step >= steps).to(gl.int32)
    b += by_b + (head >= heads).to(gl.int32)
    return gl.where(step >= steps, step - steps, step), gl.where(head >= heads, head - heads, head), b


@gluon.jit
def _tokens_of(key, num_keys: gl.constexpr, num_queries, offset, window, BT: gl.constexpr):
    """Tiles of tokens that see some of num_keys keys: from which to which."""
    begin = gl.maximum(key - offset, 0) // BT
    stop = gl.minimum(key + num_keys - 1 - offset + window, num_queries)
    return begin, gl.maximum((gl.maximum(stop, 0) + BT - 1) // BT, begin)


@gluon.jit
def _key_produce(
    q, grad_out, norms, k, v, queries, upwards, rows, keys, values, loaded, taken, full, empty,
    num_queries, num_keys, window, HKV, total, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: every group's keys, and the tiles of q, dO and norms that see them."""
    BT: gl.constexpr = ROWS // G
    shape: gl.constexpr = [1, BT, G, 64]
    block: gl.constexpr = [1, ROWS, 1, 64]
    dtype: gl.constexpr = q.dtype
    turn = 0
    place = 0
    steps = gl.cdiv(num_keys, GROUPS * ROWS)
    step, kv_head, b = _split(gl.program_id(0), steps, HKV)
    by_step, by_head, by_b = _split(gl.num_programs(0), steps, HKV)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        start = step * (GROUPS * ROWS)
        for group in gl.static_range(GROUPS):
            bar = loaded.index(group)
            mbarrier.wait(taken.index(group), turn ^ 1)
            mbarrier.expect(bar, 2 * ROWS * 64 * 2)
            at = [b, start + group * ROWS, kv_head, 0]
            tma.async_copy_global_to_shared(k, at, bar, keys.index(group)._reinterpret(dtype, block, k.layout))
            tma.async_copy_global_to_shared(v, at, bar, values.index(group)._reinterpret(dtype, block, k.layout))
        begin, stop = _tokens_of(start, GROUPS * ROWS, num_queries, num_keys - num_queries, window, BT)
        first_row = (b * HKV + kv_head) * ((num_queries + BT - 1) // BT)
        for i in range(begin, stop):
            stage = place & (STAGES - 1)
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), (place & STAGES) // STAGES ^ 1)
            mbarrier.expect(bar, 2 * ROWS * 64 * 2 + 2 * ROWS * 4)
            at = [b, i * BT, kv_head * G, 0]
            to_q = queries.index(stage)._reinterpret(dtype, shape, q.layout)
            to_upward = upwards.index(stage)._reinterpret(dtype, shape, q.layout)
            tma.async_copy_global_to_shared(q, at, bar, to_q)
            tma.async_copy_global_to_shared(grad_out, at, bar, to_upward)
            tma.async_copy_global_to_shared(norms, [first_row + i, 0], bar, rows.index(stage))
            place += 1
        turn ^= 1
        step, kv_head, b = _advance(step, kv_head, b, by_step, by_head, by_b, steps, HKV)


@gluon.jit
def _norm(rows, stage, START: gl.constexpr, columns: gl.constexpr):
    """lse (START 0) or delta (START 64) of a tile's rows, read here and not where they are used."""
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    norm = rows.index(stage)._reinterpret(gl.float32, [2 * ROWS], plain).slice(START, ROWS).load(columns)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [norm], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _chances(logits, highest, first, key, offset, window, scale, BT: gl.constexpr, G: gl.constexpr):
    """P of a tile, transposed."""
    mma: gl.constexpr = logits.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    p = exp2(logits * scale - gl.expand_dims(highest, 0))
    is_whole = (key + ROWS - 1 <= first + offset) & (first + BT + offset - window <= key)
    if not is_whole:
        token = first + gl.arange(0, ROWS, columns) // G
        own = key + gl.arange(0, ROWS, gl.SliceLayout(1, mma))
        p = gl.where(sees(gl.expand_dims(token + offset, 0), gl.expand_dims(own, 1), window), p, 0.0)
    return p


@gluon.jit
def _operand(x, dtype: gl.constexpr):
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=x.type.layout, k_width=2)
    return gl.convert_layout(x.to(dtype), operand, assert_trivial=True)


@gluon.jit
def _sums(
    own_key, own_value, shared, sizes, place, begin, stop, key, nothing, G: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """dk, not yet scaled, and dv of a block of keys from tiles begin .. stop, of which the first is the place-th of the
    ring."""
    queries, upwards, rows, full, empty = shared
    offset, window, scale, zero = sizes
    mma: gl.constexpr = nothing.type.layout
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    BT: gl.constexpr = ROWS // G
    dtype: gl.constexpr = queries.dtype
    stage = _wait_full(full, place, STAGES)
    highest = _norm(rows, stage, 0, columns)
    logits = warpgroup_mma(own_key, queries.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    slope = warpgroup_mma(own_value, upwards.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
    following = _wait_full(full, gl.where(begin + 1 < stop, place + 1, place), STAGES)
    logits = warpgroup_mma_wait(1, deps=(logits,))
    delta = _norm(rows, stage, ROWS, columns)
    now_highest = highest
    highest = _norm(rows, following, 0, columns)
    p = _chances(logits, now_highest, begin * BT, key, offset, window, scale, BT, G)
    slope, p = warpgroup_mma_wait(0, deps=(slope, p))
    sum_k = nothing
    sum_v = nothing
    for i in range(begin + 1, stop):
        place += 1
        p_operand = _operand(p, dtype)
        dz = _operand(p * (slope - gl.expand_dims(delta, 0)), dtype)
        sum_v = warpgroup_mma(p_operand, upwards.index(stage), sum_v, is_async=True)
        sum_k = warpgroup_mma(dz, queries.index(stage), sum_k, is_async=True)
        query = queries.index(following).permute((1, 0))
        upward = upwards.index(following).permute((1, 0))
        logits = warpgroup_mma(own_key, query, nothing, use_acc=False, is_async=True)
        slope = warpgroup_mma(own_value, upward, nothing, use_acc=False, is_async=True)
        # what was read a tile before; the last one waits for its own tile again
        mbarrier.arrive(empty.index((place - 2) & (STAGES - 1)), pred=i > begin + 1)
        later = _wait_full(full, gl.where(i + 1 < stop, place + 1, place), STAGES)
        logits, sum_k, sum_v = warpgroup_mma_wait(1, deps=(logits, sum_k, sum_v))
        delta = _norm(rows, following, ROWS, columns)
        now_highest = highest
        highest = _norm(rows, later, 0, columns)
        stage = following
        following = later
        p = _chances(logits, now_highest, i * BT, key, offset, window, scale, BT, G)
        begin_block(zero)
        slope, p = warpgroup_mma_wait(0, deps=(slope, p))
    sum_v = warpgroup_mma(_operand(p, dtype), upwards.index(stage), sum_v, is_async=True)
    dz = _operand(p * (slope - gl.expand_dims(delta, 0)), dtype)
    sum_k = warpgroup_mma(dz, queries.index(stage), sum_k, is_async=True)
    mbarrier.arrive(empty.index((place - 1) & (STAGES - 1)), pred=begin + 1 < stop)
    sum_k, sum_v = warpgroup_mma_wait(0, deps=(sum_k, sum_v))
    mbarrier.arrive(empty.index(stage))
    return sum_k, sum_v


@gluon.jit
def _key_consume(
    shared, GROUP: gl.constexpr, GROUPS: gl.constexpr, G: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Four warps: dk and dv of block GROUP of every GROUPS neighbouring ones."""
    (
        grad_k, grad_v, flags, queries, upwards, rows, keys, values, sent, loaded, taken, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, total, zero,
    ) = shared  # fmt: skip
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    BT: gl.constexpr = ROWS // G
    block: gl.constexpr = [1, ROWS, 1, 64]
    dtype: gl.constexpr = queries.dtype
    offset = num_keys - num_queries
    nothing = gl.zeros((ROWS, 64), gl.float32, mma)
    turn = 0
    base = 0
    steps = gl.cdiv(num_keys, GROUPS * ROWS)
    step, kv_head, b = _split(gl.program_id(0), steps, HKV)
    by_step, by_head, by_b = _split(gl.num_programs(0), steps, HKV)
    for _ in range(gl.program_id(0), total, gl.num_programs(0)):
        start = step * (GROUPS * ROWS)
        key = start + GROUP * ROWS
        first, union_stop = _tokens_of(start, GROUPS * ROWS, num_queries, offset, window, BT)
        begin, stop = _tokens_of(key, ROWS, num_queries, offset, window, BT)
        begin = gl.minimum(begin, union_stop)
        stop = gl.maximum(gl.minimum(stop, union_stop), begin)
        mbarrier.wait(loaded.index(GROUP), turn)
        own_key = keys.index(GROUP).load(operand)
        own_value = values.index(GROUP).load(operand)
        mbarrier.arrive(taken.index(GROUP))
        _skip(full, empty, base, base + begin - first, STAGES)
        sum_k = nothing
        sum_v = nothing
        if begin < stop:
            sum_k, sum_v = _sums(
                own_key, own_value, (queries, upwards, rows, full, empty), (offset, window, scale, zero),
                base + begin - first, begin, stop, key, nothing, G, STAGES,
            )  # fmt: skip
        _skip(full, empty, base + stop - first, base + union_stop - first, STAGES)
        at = [b, key, kv_head, 0]
        sent_k = sent.index(2 * GROUP)
        sent_v = sent.index(2 * GROUP + 1)
        # what was sent before has left
        tma.store_wait(0)
        gl.thread_barrier()
        sent_k.store((sum_k * logit_scale).to(dtype))
        sent_v.store(sum_v.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(grad_k, at, sent_k._reinterpret(dtype, block, grad_k.layout))
        tma.async_copy_shared_to_global(grad_v, at, sent_v._reinterpret(dtype, block, grad_v.layout))
        blocks = (num_keys + ROWS - 1) // ROWS
        if key < num_keys:
            flag(flags + ((b * HKV + kv_head) * blocks + key // ROWS) * 4, sum_k + sum_v)
        base += union_stop - first
        turn ^= 1
        step, kv_head, b = _advance(step, kv_head, b, by_step, by_head, by_b, steps, HKV)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "window", "total"])
def key_gradient_kernel(
    q, k, v, grad_out, norms, grad_k, grad_v, flags, num_queries, num_keys, window, total, scale, logit_scale, HKV,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """dk, dv and flags of blocks of 64 keys; q, k, v, grad_out, norms, grad_k and grad_v are descriptors."""
    dtype: gl.constexpr = q.dtype
    keys = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    values = gl.allocate_shared_memory(dtype, [GROUPS, 64, 64], TILE)
    sent = gl.allocate_shared_memory(dtype, [2 * GROUPS, 64, 64], TILE)
    queries = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    upwards = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], TILE)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 128], norms.layout)
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
        grad_k, grad_v, flags, queries, upwards, rows, keys, values, sent, loaded, taken, full, empty,
        num_queries, num_keys, window, scale, logit_scale, HKV, total, zero,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_key_consume, (shared, 0, GROUPS, G, STAGES)),
            (_key_consume, (shared, 1, GROUPS, G, STAGES)),
            (_key_produce, (
                q, grad_out, norms, k, v, queries, upwards, rows, keys, values, loaded, taken, full, empty,
                num_queries, num_keys, window, HKV, total, GROUPS, G, STAGES,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip
