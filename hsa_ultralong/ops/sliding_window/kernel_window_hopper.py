"""A Gluon kernel for Hopper (compute capability 9.0): the sliding window's forward, with bulk tensor copies,
asynchronous products and groups of warps that have work of their own.

A program takes tiles of GROUPS * 64 rows (neighbouring tokens times the G heads of one key head) in turn. Each of its
GROUPS groups of four warps owns 64 rows of a tile, whose queries stay in registers; a producer warp copies the blocks
of 64 keys and values that any row of the tile sees into a ring of STAGES places that all groups read, and the queries
of the next tile. Blocks begin at the first key of the tile's first row, so that of 64 neighbouring tokens only the
first block and the last one or two are masked. What lies outside of a row of the batch arrives as zeros and is masked.

A row whose sum is not finite gets NaN as lse, and is formed again by kernel_window_mend.py, which follows. No two
programs write one place: no atomics, and results repeat bit for bit.

Grid: (programs,), any number of them. Needed: D = 64, G of 1, 2, 4, 8 or 16, 16-bit numbers, int32 documents, fewer
than 2**31 rows, STAGES a power of two, addresses at multiples of 16 bytes. Imports gluon, so it is imported only where
it runs (hopper_window.py). Tests: tests/ops/test_window_hopper.py, on a CPU in a stand-in for the language.
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

_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_BOX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
# a document that no token is in
_NOWHERE = gl.constexpr(-3)


def described(tensor: torch.Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """A contiguous tensor (B, T, H, 64) of 16-bit numbers, of which boxes of tokens * heads = 64 rows are copied."""
    # a dimension of one place may have any stride
    plain = tensor.view(-1).view(tensor.shape)
    return TensorDescriptor.from_tensor(plain, [1, tokens, heads, 64], _BOX)


@gluon.jit
def _where_ordered(logits, low, high):
    """logits where low <= high, else -inf: as one instruction, for the compiler would keep all answers first."""
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.le.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r", [logits, low, high],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _where_equal(logits, left, right):
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.eq.s32 p, $2, $3; selp.f32 $0, $1, 0fFF800000, p; }", "=f,f,r,r", [logits, left, right],
        dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _log2(x):
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _reciprocal(x):
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _raise(top, local, scale):
    """Reference of a row's weights, and by what sums so far shrink: the highest logit where a thread of the warp found
    one that is 2**8 times as heavy as the reference so far, else that. (64, 4): the columns are threads of a row."""
    return gl.inline_asm_elementwise(
        """{ .reg .pred p, q; .reg .f32 a, b, c, d, x, y;
        mul.f32 a, $6, $8; mul.f32 b, $7, $9; add.f32 x, $4, 0f41000000; add.f32 y, $5, 0f41000000;
        setp.gt.f32 p, a, x; setp.gt.or.f32 p, b, y, p; vote.sync.any.pred p, p, 0xffffffff;
        mov.f32 $0, $4; mov.f32 $1, $5; mov.f32 $2, 0f3F800000; mov.f32 $3, 0f3F800000;
        @!p bra.uni same;
        shfl.sync.bfly.b32 c, a, 1, 31, 0xffffffff; shfl.sync.bfly.b32 d, b, 1, 31, 0xffffffff;
        max.f32 a, a, c; max.f32 b, b, d;
        shfl.sync.bfly.b32 c, a, 2, 31, 0xffffffff; shfl.sync.bfly.b32 d, b, 2, 31, 0xffffffff;
        max.f32 a, a, c; max.f32 b, b, d;
        setp.gt.f32 p, a, x; setp.gt.f32 q, b, y;
        selp.f32 $0, a, $0, p; selp.f32 $1, b, $1, q;
        sub.f32 c, $4, $0; sub.f32 d, $5, $1; ex2.approx.ftz.f32 $2, c; ex2.approx.ftz.f32 $3, d;
        same: }""",
        "=&f,=&f,=&f,=&f,f,f,f,f,f,f", [top, local, scale], dtype=(gl.float32, gl.float32), is_pure=True, pack=2,
    )  # fmt: skip


# multiplies 32 sums of a thread, unless all of the warp would be multiplied by 1; which of them are of its second row
# follows from the layout of a product
_SHRINK = gl.constexpr(
    "{ .reg .pred p; setp.neu.f32 p, $64, 0f3F800000; setp.neu.or.f32 p, $66, 0f3F800000, p; "
    "vote.sync.any.pred p, p, 0xffffffff; @!p bra.uni same; "
    + " ".join(f"mul.f32 ${i}, ${i}, ${64 + i};" for i in range(32))
    + " same: }"
)
_SHRINK_OPERANDS = gl.constexpr(",".join(["=f"] * 32 + [str(i) for i in range(32)] + ["f"] * 32))


@gluon.jit
def _split(tile, steps, heads):
    """Number of a tile among those of its row and key head, key head, row of the batch."""
    return tile % steps, tile // steps % heads, tile // steps // heads


@gluon.jit
def _advance(step, head, b, by_step, by_head, by_b, steps, heads):
    """_split of the sum of two tiles from that of each, without divisions."""
    step += by_step
    head += by_head + (step >= steps).to(gl.int32)
    b += by_b + (head >= heads).to(gl.int32)
    return gl.where(step >= steps, step - steps, step), gl.where(head >= heads, head - heads, head), b


@gluon.jit
def _blocks(step, sizes, TOKENS: gl.constexpr):
    """First of TOKENS tokens, the key at which block 0 begins, and from which block to which there are keys (at least
    one)."""
    num_queries, num_keys, window, _, _ = sizes
    first = step * TOKENS
    low = first + num_keys - num_queries - window + 1
    last = gl.minimum(first + TOKENS, num_queries) - 1 + num_keys - num_queries
    return first, low, gl.maximum(-low, 0) // 64, (last - low) // 64 + 1


@gluon.jit
def _produce(sources, shared, bars, sizes, G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr):
    """One warp: the queries of every group and the blocks of keys and values that any of them sees, tile after tile."""
    q, k, v = sources
    queries, _, keys, values = shared
    loaded, taken, full, empty = bars
    tokens: gl.constexpr = 64 // G
    count = 0
    turn = 0
    steps = gl.cdiv(sizes[0], GROUPS * tokens)
    step, head, b = _split(gl.program_id(0), steps, sizes[3])
    by_step, by_head, by_b = _split(gl.num_programs(0), steps, sizes[3])
    for _ in range(gl.program_id(0), sizes[4], gl.num_programs(0)):
        first, low, start, stop = _blocks(step, sizes, GROUPS * tokens)
        for group in gl.static_range(GROUPS):
            bar = loaded.index(group)
            mbarrier.wait(taken.index(group), turn ^ 1)
            mbarrier.expect(bar, 64 * 64 * 2)
            to_q = queries.index(group)._reinterpret(q.dtype, q.block_shape, q.layout)
            tma.async_copy_global_to_shared(q, [b, first + group * tokens, head * G, 0], bar, to_q)
        for block in range(start, stop):
            place = count & (STAGES - 1)
            bar = full.index(place)
            mbarrier.wait(empty.index(place), (count & STAGES) // STAGES ^ 1)
            mbarrier.expect(bar, 2 * 64 * 64 * 2)
            to_k = keys.index(place)._reinterpret(k.dtype, k.block_shape, k.layout)
            to_v = values.index(place)._reinterpret(v.dtype, v.block_shape, v.layout)
            tma.async_copy_global_to_shared(k, [b, low + block * 64, head, 0], bar, to_k)
            tma.async_copy_global_to_shared(v, [b, low + block * 64, head, 0], bar, to_v)
            count += 1
        turn ^= 1
        step, head, b = _advance(step, head, b, by_step, by_head, by_b, steps, sizes[3])


@gluon.jit
def _weigh(logits, top, total, scale, DTYPE: gl.constexpr):
    """Weights of a block relative to a reference; that, the running sums of each thread (64, 4), and by what sums so
    far shrink (64, 64)."""
    layout: gl.constexpr = logits.type.layout
    # a thread has two rows, and of each pairs of neighbouring columns
    parts = logits.reshape([64, 8, 4, 2])
    top, shrink = _raise(top, gl.max(gl.max(parts, 3), 1), scale)
    p = _exp2(parts * scale - gl.expand_dims(gl.expand_dims(top, 1), 3))
    total = total * shrink + gl.sum(gl.sum(p, 3), 1)
    wide = gl.expand_dims(gl.expand_dims(shrink, 1), 3).broadcast_to([64, 8, 4, 2]).reshape([64, 64])
    p = gl.convert_layout(p.reshape([64, 64]), layout, assert_trivial=True)
    return p.to(DTYPE), top, total, gl.convert_layout(wide, layout, assert_trivial=True)


@gluon.jit
def _shrink(acc, shrink):
    return gl.inline_asm_elementwise(_SHRINK, _SHRINK_OPERANDS, [acc, shrink], dtype=gl.float32, is_pure=True, pack=32)


@gluon.jit
def _owners(key_segments, key, num_keys, HAS_SEGMENTS: gl.constexpr):
    if HAS_SEGMENTS:
        return gl.load(key_segments + key, mask=(key >= 0) & (key < num_keys), other=_NOWHERE)
    return key


@gluon.jit
def _wait_full(bars, count, STAGES: gl.constexpr):
    """Wait for the count-th block of the ring; its place."""
    stage = count & (STAGES - 1)
    mbarrier.wait(bars[2].index(stage), (count & STAGES) // STAGES)
    return stage


@gluon.jit
def _release(bars, count, STAGES: gl.constexpr):
    mbarrier.arrive(bars[3].index(count & (STAGES - 1)))


@gluon.jit
def _add(acc, p, values):
    """acc and the weights p times the values of a block, under way."""
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=acc.type.layout, k_width=2)
    return warpgroup_mma(gl.convert_layout(p, operand), values, acc, is_async=True)


@gluon.jit
def _attend(
    acc, top, total, count, query, nothing, shared, bars, start, stop, keys_of_0, place, segment, key_segments,
    num_keys, scale, MASKED: gl.constexpr, HAS_SEGMENTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Add blocks start .. stop, of which the first is the count-th of the ring. The product of a block's values is
    under way until the logits of the next are there, and at the end."""
    _, _, keys, values = shared
    for block in range(start, stop):
        key = keys_of_0 + block * 64
        owner = _owners(key_segments, key, num_keys, HAS_SEGMENTS)
        stage = _wait_full(bars, count, STAGES)
        logits = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits, acc = warpgroup_mma_wait(0, deps=(logits, acc))
        _release(bars, count - 1, STAGES)
        if MASKED:
            logits = _where_ordered(logits, gl.expand_dims(key, 0), gl.expand_dims(place, 1))
        if HAS_SEGMENTS:
            logits = _where_equal(logits, gl.expand_dims(segment, 1), gl.expand_dims(owner, 0))
        p, top, total, shrink = _weigh(logits, top, total, scale, values.dtype)
        acc = _add(_shrink(acc, shrink), p, values.index(stage))
        count += 1
    return acc, top, total, count


@gluon.jit
def _pass_by(bars, count, number, STAGES: gl.constexpr):
    """Blocks that others see: let them go."""
    for _ in range(number):
        _wait_full(bars, count, STAGES)
        _release(bars, count, STAGES)
        count += 1
    return count


@gluon.jit
def _finish(acc, top, total, out, places, is_real, result, b, first, head):
    """Write 64 rows of lse, to `places`, and of out, by way of `result` in shared memory."""
    mma: gl.constexpr = acc.type.layout
    dtype: gl.constexpr = result.dtype
    spoil = gl.sum(acc, 1) * 0.0
    sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, mma), assert_trivial=True)
    highest = gl.convert_layout(gl.max(top, 1), gl.SliceLayout(1, mma), assert_trivial=True)
    logsum = gl.where(sums == 0.0, float("-inf"), highest + _log2(sums)) + spoil
    gl.store(places, logsum, mask=is_real)
    inverse = _reciprocal(gl.where(sums == 0.0, 1.0, sums))
    # the last tile has left
    tma.store_wait(0)
    gl.thread_barrier()
    result.store((acc * gl.expand_dims(inverse, 1)).to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    source = result._reinterpret(dtype, out.block_shape, out.layout)
    tma.async_copy_shared_to_global(out, [b, first, head, 0], source)


@gluon.jit
def _consume(
    places, shared, bars, sizes, GROUP: gl.constexpr, G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
    HAS_SEGMENTS: gl.constexpr,
):  # fmt: skip
    """Four warps: out and lse of the GROUP-th 64 rows of every tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    out, lse, query_segments, key_segments, scale = places
    queries, results, keys, values = shared
    loaded, taken, _, _ = bars
    num_queries, num_keys, window, heads, tiles = sizes
    tokens: gl.constexpr = 64 // G
    rows = gl.arange(0, 64, gl.SliceLayout(1, mma))
    columns = gl.arange(0, 64, gl.SliceLayout(0, mma))
    nothing = gl.zeros((64, 64), gl.float32, mma)
    parts: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, nothing.reshape([64, 8, 4, 2]).type.layout))
    # the lowest number stands for what no row has seen: less would make zeros times infinity
    lowest = gl.full((64, 4), -3.4028234663852886e38, gl.float32, parts)
    offset = num_keys - num_queries
    count = 0
    turn = 0
    steps = gl.cdiv(sizes[0], GROUPS * tokens)
    step, head, b = _split(gl.program_id(0), steps, sizes[3])
    by_step, by_head, by_b = _split(gl.num_programs(0), steps, sizes[3])
    for _ in range(gl.program_id(0), tiles, gl.num_programs(0)):
        first, low, start, stop = _blocks(step, sizes, GROUPS * tokens)
        first += GROUP * tokens
        token = first + rows // G
        place = token + offset
        row = (b.to(gl.int64) * num_queries + token) * (heads * G) + head * G + rows % G
        segment = token
        owners = key_segments
        if HAS_SEGMENTS:
            segment = gl.load(query_segments + b.to(gl.int64) * num_queries + token, mask=token < num_queries, other=-2)
            owners += b.to(gl.int64) * num_keys
        # the blocks that these rows see, of which the first is masked, and behind `whole` the others; at least one,
        # also where no row is real
        mine = gl.maximum(start, gl.minimum(GROUP * tokens // 64, stop - 1))
        last = gl.minimum(first + tokens, num_queries) - 1 + offset
        end = gl.minimum(gl.maximum((last - low) // 64, mine) + 1, stop)
        whole = gl.minimum(gl.maximum((first + offset + 1 - low) // 64, mine + 1), end)
        if GROUP * tokens >= 64:
            count = _pass_by(bars, count, mine - start, STAGES)
        mbarrier.wait(loaded.index(GROUP), turn)
        query = queries.index(GROUP).load(operand)
        gl.thread_barrier()
        mbarrier.arrive(taken.index(GROUP))
        keys_of_0 = low + columns
        key = keys_of_0 + mine * 64
        owner = _owners(owners, key, num_keys, HAS_SEGMENTS)
        stage = _wait_full(bars, count, STAGES)
        logits = warpgroup_mma(query, keys.index(stage).permute((1, 0)), nothing, use_acc=False, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        low_key = gl.maximum(place - window + 1, 0)
        logits = _where_ordered(logits, gl.expand_dims(low_key, 1), gl.expand_dims(key, 0))
        if HAS_SEGMENTS:
            logits = _where_equal(logits, gl.expand_dims(segment, 1), gl.expand_dims(owner, 0))
        if first + offset < low + mine * 64 + 63:
            logits = _where_ordered(logits, gl.expand_dims(key, 0), gl.expand_dims(place, 1))
        p, top, total, _ = _weigh(logits, lowest, gl.zeros_like(lowest), scale, values.dtype)
        acc = _add(nothing, p, values.index(stage))
        acc, top, total, count = _attend(
            acc, top, total, count + 1, query, nothing, shared, bars, mine + 1, whole, keys_of_0, place, segment,
            owners, num_keys, scale, False, HAS_SEGMENTS, STAGES,
        )  # fmt: skip
        acc, top, total, count = _attend(
            acc, top, total, count, query, nothing, shared, bars, whole, end, keys_of_0, place, segment,
            owners, num_keys, scale, True, HAS_SEGMENTS, STAGES,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=(acc,))
        _release(bars, count - 1, STAGES)
        count = _pass_by(bars, count, stop - end, STAGES)
        _finish(acc, top, total, out, lse + row, token < num_queries, results.index(GROUP), b, first, head * G)
        turn ^= 1
        step, head, b = _advance(step, head, b, by_step, by_head, by_b, steps, sizes[3])
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_queries", "num_keys", "window", "HKV", "tiles"])
def window_forward_kernel(
    q, k, v, out, lse, query_segments, key_segments, num_queries, num_keys, window, HKV, tiles, scale,
    G: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr, HAS_SEGMENTS: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out and lse as kernel_window.forward_kernel; q, k, v and out are descriptors of boxes of 64 rows."""
    queries = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, 64], _ROWS)
    results = gl.allocate_shared_memory(q.dtype, [GROUPS, 64, 64], _ROWS)
    keys = gl.allocate_shared_memory(q.dtype, [STAGES, 64, 64], _ROWS)
    values = gl.allocate_shared_memory(q.dtype, [STAGES, 64, 64], _ROWS)
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
    shared = (queries, results, keys, values)
    bars = (loaded, taken, full, empty)
    sizes = (num_queries, num_keys, window, HKV, tiles)
    places = (out, lse, query_segments, key_segments, scale)
    gl.warp_specialize(
        [
            (_consume, (places, shared, bars, sizes, 0, G, GROUPS, STAGES, HAS_SEGMENTS)),
            (_consume, (places, shared, bars, sizes, 1, G, GROUPS, STAGES, HAS_SEGMENTS)),
            (_consume, (places, shared, bars, sizes, 2, G, GROUPS, STAGES, HAS_SEGMENTS)),
            (_produce, ((q, k, v), shared, bars, sizes, G, GROUPS, STAGES)),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )
