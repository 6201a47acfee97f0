"""A Gluon kernel for Hopper (compute capability 9.0): the forward of hsa_attention over lists.

A tile is 16 tokens times the 16 heads of one memory head. A producer warp copies keys, values and all tokens' weights
of the chunks in a tile's union (kernel_lists.py) into a ring of STAGES places, three at least. Each of four groups of
four warps has four tokens, 64 rows. A warp's 16 rows are the heads of one token, so it forms no exponentials of a
chunk that this did not choose. A group issues the logits of its next chunk right behind the values of this one.

A group passes by chunks that none of its tokens chose. Every place says how far on the group's next stop is: the next
chunk that it chose, or at most (STAGES - 1) // 2 on; a tile's first chunk is a stop of all. So the place after the
next, which a group waits for while it holds one, fits the ring. Barriers: `full`, one arrival of the producer and the
bytes that it copies, two for every place, by turns, or one that passed by would take the use before for the one that it
waits for; `empty` of a place, one arrival for every group: of the producer where it passes by, or its own after its
last product that reads the place.

A row's exponents count from its largest logit in the union's first chunk, not in each chunk. A sum not between 2**-100
and 2**120 makes its row NaN and `spoiled`; kernel_exact.py forms such tiles again. Measured: docs/kernels.md. Imported
only where it runs (plan.py). tests/ops/test_hopper_forward.py; host: test_hsa_triton.py.

Grid: any number of programs, which take tiles by tickets (TileLists.counts); a program owns the rows of out and of
spoiled (B, Hkv, tiles, 256) of its tiles. Needed: D = S = 64, G = 16, 16-bit numbers, no lengths, fewer than 2**31
numbers in q, addresses at multiples of 16 bytes; every chunk once in a tile.
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

from hsa_ultralong.ops._overlap import begin

# the weight of a chunk that a token did not choose: a NaN that no weight is
_UNCHOSEN = gl.constexpr(-1)
# groups of a program, tokens of each, rows of a token
_GROUPS = gl.constexpr(4)
_TOKENS = gl.constexpr(4)
_HEADS = gl.constexpr(16)
# of the 32 numbers of a place, after the weights: the tile's number and that of its chunks
_NUMBER = gl.constexpr(20)
# added to the distance of a group's next stop that is of another tile
_LAST = gl.constexpr(256)
# numbers of a 64 x 64 product that a thread holds; number e is of its row (e // 2) % 2
_HELD = 32


def _shares_of(narrow: str) -> str:
    """Assembly: 16 registers of two 16-bit shares each, of 32 logits, bounds, weights' bits and scales (bounds are two
    numbers, the others one). Zeros, and nothing formed, where the token did not choose the chunk."""
    half = _HELD // 2
    bounds, bits, scale = half + _HELD, f"${half + 2 * _HELD}", f"${half + 3 * _HELD}"
    of_row = [[e for e in range(_HELD) if e // 2 % 2 == row] for row in (0, 1)]
    lines = [
        ".reg .pred chosen, fits; .reg .f32 p<32>; .reg .f32 a<16>; .reg .f32 t, s0, s1, m0, m1, w;",
        f"setp.ne.s32 chosen, {bits}, -1;",
        "@!chosen bra.uni none;",
        f"mov.b32 w, {bits};",
    ]
    add = lines.append
    for row in (0, 1):
        add(f"mov.b32 m{row}, ${bounds + of_row[row][0]};")
    for e in range(_HELD):
        add(f"fma.rn.f32 p{e}, ${half + e}, {scale}, m{e // 2 % 2}; ex2.approx.ftz.f32 p{e}, p{e};")
    for row in (0, 1):
        names = [f"p{e}" for e in of_row[row]]
        while len(names) > 1:
            middle = len(names) // 2
            lines.extend(f"add.f32 a{i}, {names[i]}, {names[middle + i]};" for i in range(middle))
            names = [f"a{i}" for i in range(middle)]
        for lane in (1, 2):
            add(f"shfl.sync.bfly.b32 t, a0, {lane}, 31, -1; add.f32 a0, a0, t;")
        add(f"rcp.approx.ftz.f32 s{row}, a0; mul.f32 s{row}, s{row}, w;")
        add("setp.gt.f32 fits, a0, 0f0D800000;")  # 2**-100
        add("setp.lt.and.f32 fits, a0, 0f7B800000, fits;")  # 2**120
        add(f"selp.f32 s{row}, s{row}, 0f7FC00000, fits;")
    for pair in range(half):
        row = pair % 2
        for e in (2 * pair, 2 * pair + 1):
            add(f"mul.f32 p{e}, p{e}, s{row};")
        add(f"cvt.rn.{narrow}x2.f32 ${pair}, p{2 * pair + 1}, p{2 * pair};")
    lines += ["bra.uni done;", "none:", *(f"mov.b32 ${pair}, 0;" for pair in range(half)), "done:"]
    return "{ " + " ".join(lines) + " }"


_CONSTRAINTS = gl.constexpr(",".join(["=r"] * (_HELD // 2) + ["f"] * (2 * _HELD) + ["r"] * _HELD + ["f"] * _HELD))
_BF16 = gl.constexpr(_shares_of("bf16"))
_FP16 = gl.constexpr(_shares_of("f16"))


@gluon.jit
def _shares(logits, bounds, bits, scale, narrow: gl.constexpr):
    """w * softmax of (64, 64) logits as 16-bit numbers; bounds and bits (64,) by rows."""
    given = [logits, gl.expand_dims(bounds, 1), gl.expand_dims(bits, 1), scale]
    if narrow == gl.bfloat16:
        return gl.inline_asm_elementwise(_BF16, _CONSTRAINTS, given, dtype=gl.bfloat16, is_pure=False, pack=32)
    else:
        return gl.inline_asm_elementwise(_FP16, _CONSTRAINTS, given, dtype=gl.float16, is_pure=False, pack=32)


@gluon.jit
def _tile(number, num_tiles, HKV, HR):
    """Tile of its launch (late tokens see more chunks: they start), memory head, row and list of tile `number`."""
    local = num_tiles - 1 - number // HKV % num_tiles
    kv_head = number % HKV
    b = number // HKV // num_tiles
    return local, kv_head, b, (b * HR + kv_head % HR) * num_tiles + local


@gluon.jit
def _ticket(tickets):
    """The next tile that no program has taken, beyond those that they began with. One warp asks."""
    taken = gl.inline_asm_elementwise(
        "{ .reg .pred first; .reg .u32 lane; mov.u32 lane, %laneid; setp.eq.u32 first, lane, 0; mov.u32 $0, 0; "
        "@first atom.relaxed.gpu.global.add.u32 $0, [$1], 1; shfl.sync.idx.b32 $0, $0, 0, 31, -1; }",
        "=r,l", [tickets.to(gl.int64)], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return gl.num_programs(0) + taken


@gluon.jit
def _after(bar, phase, gap, STAGES: gl.constexpr):
    """The barrier of the place `gap` places on, and the phase of its use; there are two for every place."""
    moved = bar + gap
    is_over = moved >= 2 * STAGES
    return gl.where(is_over, moved - 2 * STAGES, moved), gl.where(is_over, phase ^ 1, phase)


@gluon.jit
def _place(bar, STAGES: gl.constexpr):
    return gl.where(bar >= STAGES, bar - STAGES, bar)


@gluon.jit
def _bits(weight, is_chosen):
    """Of a weight in fp32; no NaN is _UNCHOSEN."""
    w = weight.to(gl.float32)
    return gl.where(is_chosen, gl.where(w == w, w.to(gl.int32, bitcast=True), 0x7FC00000), _UNCHOSEN)


@gluon.jit
def _choices(slots, first, count, is_real, lane, TOKENS: gl.constexpr):
    """Of 32 chunks from `first` on: bit c of a lane is whether group lane % 4 chose chunk first + c."""
    rows: gl.constexpr = gl.BlockedLayout([1, TOKENS], [32, 1], [1, 1], [1, 0])
    chunk = gl.arange(0, 32, gl.SliceLayout(1, rows))
    token = gl.arange(0, TOKENS, gl.SliceLayout(0, rows))
    exists = gl.expand_dims(first + chunk < count, 1) & is_real
    slot = gl.load(slots + gl.expand_dims((first + chunk) * TOKENS, 1) + gl.expand_dims(token, 0), exists, other=-1)
    chosen = gl.expand_dims(1 << (token // _TOKENS), 0)
    group = gl.reduce(gl.where(slot >= 0, chosen, 0), 1, _either)
    found = lane * 0
    for i in gl.static_range(_GROUPS):
        bits = gl.sum(((group >> i) & 1) << chunk, 0)
        found = gl.where(lane % _GROUPS == i, bits, found)
    return found


@gluon.jit
def _either(a, b):
    return a | b


@gluon.jit
def _distance(choices, position):
    """From a chunk to the next that was chosen; 33 where there is none."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 t; shr.u32 t, $1, $2; shr.u32 t, t, 1; brev.b32 t, t; clz.b32 t, t; add.s32 $0, t, 1; }",
        "=r,r,r", [choices, position], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _produce(given, HKV, HR, STAGES: gl.constexpr, KV_BATCH: gl.constexpr):
    """One warp: keys, values and weights of all tiles' chunks into place after place, a place at least for every tile,
    and one that says that there are no more. It leaves places for the groups that pass by."""
    (
        k, v, weights, chunks, counts, slots, keys, values, ring, full, empty,
        T, C, K, U, first_tile, num_tiles, tiles,
    ) = given  # fmt: skip
    TOKENS: gl.constexpr = _TOKENS * _GROUPS
    FARTHEST: gl.constexpr = (STAGES - 1) // 2
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    lane = gl.arange(0, 2 * TOKENS, lanes)
    member = lane % TOKENS
    bar = 0
    phase = 0
    number = gl.program_id(0)
    while number < tiles:
        local, kv_head, b, entry = _tile(number, num_tiles, HKV, HR)
        found = gl.load(counts + entry)
        count = gl.maximum(found, 1)
        own_chunks = chunks + entry.to(gl.int64) * U
        of_tile = slots + entry.to(gl.int64) * U * TOKENS
        own_slots = of_tile + member
        token = (first_tile + local) * TOKENS + member
        is_real = (token < T) & (found > 0)
        own_weights = weights + ((b * T + token) * HR + kv_head % HR) * K
        first_row = b * C if KV_BATCH else 0
        # slots two chunks ahead of their use, weights one
        chunk = gl.load(own_chunks, mask=found > 0, other=0)
        slot = gl.load(own_slots, mask=is_real, other=-1).to(gl.int32)
        is_chosen = slot >= 0
        weight = gl.load(own_weights + slot, mask=is_chosen, other=0.0)
        slot = gl.load(own_slots + gl.minimum(1, count - 1) * TOKENS, mask=is_real, other=-1).to(gl.int32)
        choices = lane * 0
        following = lane * 0
        for u in range(count):
            if u % 32 == 0:
                choices = _choices(of_tile, u, count, found > 0, lane, TOKENS)
            is_chosen1 = slot >= 0
            weight1 = gl.load(own_weights + slot, mask=is_chosen1, other=0.0)
            chunk1 = gl.load(own_chunks + gl.minimum(u + 1, count - 1), mask=found > 0, other=0)
            slot = gl.load(own_slots + gl.minimum(u + 2, count - 1) * TOKENS, mask=is_real, other=-1).to(gl.int32)
            # of group lane % 4: does it stop here, and how far on is its next stop
            farthest = gl.minimum(FARTHEST, gl.minimum(count - u, 32 - u % 32))
            gap = gl.minimum(_distance(choices, lane * 0 + u % 32), farthest)
            passing = gl.sum(gl.where((lane < _GROUPS) & (following != u), 1, 0), 0)
            following = gl.where(following == u, u + gap, following)
            what = gl.where(lane < _NUMBER, gap + gl.where(u + gap == count, _LAST, 0), number)
            place = _place(bar, STAGES)
            # a place's uses are even and odd by turns
            mbarrier.wait(empty.index(place), gl.where(bar >= STAGES, 0, 1))
            ring.index(place).store(gl.where(lane < TOKENS, _bits(weight, is_chosen), what))
            # all lanes have stored before one arrives
            gl.thread_barrier()
            mbarrier.expect(full.index(bar), 2 * 64 * 64 * 2)
            row = (first_row + chunk) * 64
            tma.async_copy_global_to_shared(k, [row, kv_head * 64], full.index(bar), keys.index(place))
            tma.async_copy_global_to_shared(v, [row, kv_head * 64], full.index(bar), values.index(place))
            mbarrier.arrive(empty.index(place), count=1, pred=passing % 2 == 1)
            mbarrier.arrive(empty.index(place), count=2, pred=passing >= 2)
            chunk = chunk1
            weight = weight1
            is_chosen = is_chosen1
            bar, phase = _after(bar, phase, 1, STAGES)
        number = _ticket(counts + tiles // HKV * HR)
    place = _place(bar, STAGES)
    mbarrier.wait(empty.index(place), gl.where(bar >= STAGES, 0, 1))
    ring.index(place).store(gl.full((2 * TOKENS,), -1, gl.int32, lanes))
    gl.thread_barrier()
    mbarrier.arrive(full.index(bar))


@gluon.jit
def _rows(first_token, kv_head, b, T, HKV, layout: gl.constexpr):
    """Offsets of a group's 64 rows in q and out, and whether their tokens exist."""
    row = gl.arange(0, 64, layout)
    token = first_token + row // _HEADS
    return (((b * T + token) * HKV + kv_head) * _HEADS + row % _HEADS) * 64, token < T


@gluon.jit
def _queries(q, first_token, kv_head, b, T, HKV, layout: gl.constexpr):
    """(64, 64) of q."""
    start, exists = _rows(first_token, kv_head, b, T, HKV, gl.SliceLayout(1, layout))
    dims = gl.arange(0, 64, gl.SliceLayout(0, layout))
    return gl.load(q + gl.expand_dims(start, 1) + gl.expand_dims(dims, 0), mask=gl.expand_dims(exists, 1), other=0.0)


@gluon.jit
def _again(number):
    """The same, but what follows from it is formed anew: less is held during the loop between."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [number], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _said(ring, place, index: gl.constexpr):
    """One of the numbers of a place; every thread has it."""
    all_threads: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[], lane_bases=[[0], [0], [0], [0], [0]], warp_bases=[[0], [0]], block_bases=[], shape=[1]
    )
    return gl.max(ring.index(place).slice(index, 1).load(all_threads), 0)


@gluon.jit
def _stop(ring, full, bar, phase, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """What the place of a group's stop says of its next, waited for where it is of the same tile: its barrier, the
    phase and whether it is of another tile."""
    said = _said(ring, _place(bar, STAGES), _TOKENS * _GROUPS + GROUP)
    is_last = said >= _LAST
    next_bar, next_phase = _after(bar, phase, said % _LAST, STAGES)
    mbarrier.wait(full.index(next_bar), next_phase, pred=said < _LAST)
    return next_bar, next_phase, is_last


@gluon.jit
def _own_bits(place, GROUP: gl.constexpr, row_layout: gl.constexpr):
    """Weights' bits of a group's 64 rows; a warp's 16 rows are the heads of one token."""
    spread: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 8]], lane_bases=[[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warp_bases=[[1, 0], [2, 0]],
        block_bases=[], shape=[4, 16],
    )  # fmt: skip
    bits = place.slice(GROUP * _TOKENS, _TOKENS).load(gl.SliceLayout(1, spread))
    return gl.convert_layout(
        gl.expand_dims(bits, 1).broadcast_to([4, 16]).reshape([64]), row_layout, assert_trivial=True
    )


@gluon.jit
def _consume(given, HKV, HR, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: the rows of four tokens of every tile."""
    q, spoiled, out, all_queries, keys, values, ring, full, empty, T, first_tile, num_tiles, scale = given
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    narrow: gl.constexpr = keys.dtype
    loaded: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    queries = all_queries.index(GROUP)
    nothing = gl.zeros((64, 64), gl.float32, mma)
    bar = 0
    phase = 0
    mbarrier.wait(full.index(bar), phase)
    number = _said(ring, bar, _NUMBER)
    while number >= 0:
        local, kv_head, b, entry = _tile(number, num_tiles, HKV, 1)
        first_token = ((first_tile + local) * _GROUPS + GROUP) * _TOKENS
        queries.store(_queries(q, first_token, kv_head, b, T, HKV, loaded))
        # products read what was stored, after all four warps have
        fence_async_shared()
        gl.thread_barrier()
        acc = gl.zeros((64, 64), gl.float32, mma)
        key = keys.index(_place(bar, STAGES)).permute((1, 0))
        logits = warpgroup_mma(queries, key, nothing, use_acc=False, is_async=True)
        bits = _own_bits(ring.index(_place(bar, STAGES)), GROUP, row_layout)
        next_bar, next_phase, is_last = _stop(ring, full, bar, phase, GROUP, STAGES)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        bounds = -gl.max(logits, 1) * scale
        # or the first wait of the loop would get one, at every turn
        gl.thread_barrier()
        while not is_last:
            p = gl.convert_layout(_shares(logits, bounds, bits, scale, narrow), operand)
            # after the arrival below; here the warps meet anyway
            gl.thread_barrier()
            place = _place(bar, STAGES)
            next_place = _place(next_bar, STAGES)
            acc = warpgroup_mma(p, values.index(place), acc, is_async=True)
            key = keys.index(next_place).permute((1, 0))
            logits = warpgroup_mma(queries, key, nothing, use_acc=False, is_async=True)
            bits = _own_bits(ring.index(next_place), GROUP, row_layout)
            bar, phase = next_bar, next_phase
            next_bar, next_phase, is_last = _stop(ring, full, bar, phase, GROUP, STAGES)
            acc = warpgroup_mma_wait(1, deps=(acc,))
            # all four warps are done before one arrives
            gl.thread_barrier()
            mbarrier.arrive(empty.index(place))
            logits = warpgroup_mma_wait(0, deps=(logits,))
        p = gl.convert_layout(_shares(logits, bounds, bits, scale, narrow), operand)
        place = _place(bar, STAGES)
        acc = warpgroup_mma(p, values.index(place), acc, is_async=True)
        bar, phase = next_bar, next_phase
        mbarrier.wait(full.index(bar), phase)
        number1 = _said(ring, _place(bar, STAGES), _NUMBER)
        acc = warpgroup_mma_wait(0, deps=(acc,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(place))
        local, kv_head, b, entry = _tile(_again(number), num_tiles, HKV, 1)
        first_token = ((first_tile + local) * _GROUPS + GROUP) * _TOKENS
        start, exists = _rows(first_token, kv_head, b, T, HKV, row_layout)
        dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, mma)), 0)
        gl.store(out + gl.expand_dims(start, 1) + dims, acc.to(narrow), mask=gl.expand_dims(exists, 1))
        of_tile = spoiled + (((b * HKV + kv_head) * num_tiles + local) * _GROUPS + GROUP) * 64
        gl.store(of_tile + gl.arange(0, 64, row_layout), gl.sum(acc * 0.0, 1) != 0.0)
        number = number1


@gluon.jit(do_not_specialize=["T", "C", "K", "U", "first_tile", "num_tiles", "tiles"])
def hopper_forward_kernel(
    q, k, v, weights, chunks, counts, slots, spoiled, out,
    T, C, K, U, first_tile, num_tiles, tiles, scale, HKV, HR,
    KV_BATCH: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """out of `tiles` tiles, num_tiles of every row and memory head; k and v are descriptors of boxes of one chunk,
    `scale` holds log2(e)."""
    begin(OVERLAPS)
    narrow: gl.constexpr = k.dtype
    keys = gl.allocate_shared_memory(narrow, [STAGES, 64, 64], k.layout)
    values = gl.allocate_shared_memory(narrow, [STAGES, 64, 64], v.layout)
    queries = gl.allocate_shared_memory(narrow, [_GROUPS, 64, 64], k.layout)
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, 2 * _TOKENS * _GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=_GROUPS)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    copied = (
        k, v, weights, chunks, counts, slots, keys, values, ring, full, empty,
        T, C, K, U, first_tile, num_tiles, tiles,
    )  # fmt: skip
    read = (q, spoiled, out, queries, keys, values, ring, full, empty, T, first_tile, num_tiles, scale)
    gl.warp_specialize(
        [
            (_consume, (read, HKV, HR, 0, STAGES)),
            (_consume, (read, HKV, HR, 1, STAGES)),
            (_consume, (read, HKV, HR, 2, STAGES)),
            (_consume, (read, HKV, HR, 3, STAGES)),
            (_produce, (copied, HKV, HR, STAGES, KV_BATCH)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 32],
    )
