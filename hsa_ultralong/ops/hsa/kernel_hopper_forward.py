"""A Gluon kernel for Hopper (compute capability 9.0): the forward of hsa_attention over lists.

A tile is 16 tokens times the 16 heads of one memory head. A producer warp copies keys, values and all tokens' weights
of the chunks in a tile's union (kernel_lists.py) into a ring of STAGES places, two at least. Each of four groups of
four warps has four tokens, 64 rows, and leaves out chunks that none of them chose. A warp's 16 rows are the heads of
one token, so it forms no exponentials of a chunk that this did not choose.

Barriers: `full` of a place, one arrival of the producer and the bytes that it copies; `empty`, one arrival of every
group, after its last product that reads the place. Every group waits for every place in order, also those that it
leaves out, so neither barrier is ever two phases ahead of anybody. It waits for a place before it leaves the one
before, while that one's last product runs.

A row's exponents count from its largest logit in the union's first chunk, not in each chunk. A sum not between 2**-100
and 2**120 makes its row NaN and `spoiled`; kernel_exact.py forms such tiles again. Measured: docs/kernels.md. Imported
only where it runs (plan.py). tests/ops/test_hopper_forward.py; host: test_hsa_triton.py.

Grid: any number of programs, which take tiles in turn; a program owns the rows of out and of spoiled (B, Hkv, tiles,
256) of its tiles. Needed: D = S = 64, G = 16, 16-bit numbers, no lengths, fewer than 2**31 numbers in q,
addresses at multiples of 16 bytes; every chunk once in a tile.
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

# the weight of a chunk that a token did not choose: a NaN that no weight is
_UNCHOSEN = gl.constexpr(-1)
# groups of a program, tokens of each, rows of a token
_GROUPS = gl.constexpr(4)
_TOKENS = gl.constexpr(4)
_HEADS = gl.constexpr(16)
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
def _next(place, phase, STAGES: gl.constexpr):
    """The place after this one, and the phase of its use."""
    is_last = place == STAGES - 1
    return gl.where(is_last, 0, place + 1), gl.where(is_last, phase ^ 1, phase)


@gluon.jit
def _bits_of(weights, slot, is_real):
    """Of a weight in fp32; no NaN is _UNCHOSEN."""
    w = gl.load(weights + slot, mask=is_real & (slot >= 0), other=0.0).to(gl.float32)
    bits = gl.where(w == w, w.to(gl.int32, bitcast=True), 0x7FC00000)
    return gl.where(is_real & (slot >= 0), bits, _UNCHOSEN)


@gluon.jit
def _produce(given, HKV, HR, STAGES: gl.constexpr, KV_BATCH: gl.constexpr):
    """One warp: keys, values and weights of all tiles' chunks into place after place."""
    k, v, weights, chunks, counts, slots, keys, values, ring, full, empty, T, C, K, U, first_tile, num_tiles, tiles = (
        given
    )
    TOKENS: gl.constexpr = _TOKENS * _GROUPS
    lanes: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    member = gl.arange(0, TOKENS, lanes)
    place = 0
    phase = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        local, kv_head, b, entry = _tile(number, num_tiles, HKV, HR)
        count = gl.load(counts + entry)
        own_chunks = chunks + entry.to(gl.int64) * U
        own_slots = slots + entry.to(gl.int64) * U * TOKENS + member
        token = (first_tile + local) * TOKENS + member
        is_real = token < T
        own_weights = weights + ((b * T + token) * HR + kv_head % HR) * K
        first_row = b * C if KV_BATCH else 0
        if count > 0:
            # slots two chunks ahead of their use, weights one
            chunk = gl.load(own_chunks)
            bits = _bits_of(own_weights, gl.load(own_slots).to(gl.int32), is_real)
            slot = gl.load(own_slots + gl.minimum(1, count - 1) * TOKENS).to(gl.int32)
            for u in range(count):
                bits1 = _bits_of(own_weights, slot, is_real)
                chunk1 = gl.load(own_chunks + gl.minimum(u + 1, count - 1))
                slot = gl.load(own_slots + gl.minimum(u + 2, count - 1) * TOKENS).to(gl.int32)
                bar = full.index(place)
                mbarrier.wait(empty.index(place), phase ^ 1)
                ring.index(place).store(bits)
                # all lanes have stored before one arrives
                gl.thread_barrier()
                mbarrier.expect(bar, 2 * 64 * 64 * 2)
                row = (first_row + chunk) * 64
                tma.async_copy_global_to_shared(k, [row, kv_head * 64], bar, keys.index(place))
                tma.async_copy_global_to_shared(v, [row, kv_head * 64], bar, values.index(place))
                chunk = chunk1
                bits = bits1
                place, phase = _next(place, phase, STAGES)


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
def _is_chosen(own):
    """Whether one of a group's four tokens chose a chunk; every thread has all four weights."""
    all_four: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1], [2]], lane_bases=[[0], [0], [0], [0], [0]], warp_bases=[[0], [0]], block_bases=[], shape=[4]
    )
    return gl.max((own.load(all_four) != _UNCHOSEN).to(gl.int32), 0) != 0


@gluon.jit
def _consume(given, HKV, HR, GROUP: gl.constexpr, STAGES: gl.constexpr):
    """Four warps: the rows of four tokens of every tile."""
    q, counts, spoiled, out, keys, values, ring, full, empty, T, first_tile, num_tiles, tiles, scale = given
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, mma)
    # a warp's 16 rows are the heads of one token
    spread: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 8]], lane_bases=[[0, 0], [0, 0], [0, 1], [0, 2], [0, 4]], warp_bases=[[1, 0], [2, 0]],
        block_bases=[], shape=[4, 16],
    )  # fmt: skip
    narrow: gl.constexpr = keys.dtype
    nothing = gl.zeros((64, 64), gl.float32, mma)
    place = 0
    phase = 0
    for number in range(gl.program_id(0), tiles, gl.num_programs(0)):
        local, kv_head, b, entry = _tile(number, num_tiles, HKV, HR)
        first_token = ((first_tile + local) * _GROUPS + GROUP) * _TOKENS
        count = gl.load(counts + entry)
        queries = _queries(q, first_token, kv_head, b, T, HKV, operand)
        acc = gl.zeros((64, 64), gl.float32, mma)
        bounds = gl.zeros((64,), gl.float32, row_layout)
        is_own = False
        if count > 0:
            mbarrier.wait(full.index(place), phase)
            key = keys.index(place).permute((1, 0))
            logits = warpgroup_mma(queries, key, nothing, use_acc=False, is_async=True)
            logits = warpgroup_mma_wait(0, deps=(logits,))
            bounds = -gl.max(logits, 1) * scale
            is_own = _is_chosen(ring.index(place).slice(GROUP * _TOKENS, _TOKENS))
        for u in range(count):
            # is the next place ours? asked while a product runs
            next_place, next_phase = _next(place, phase, STAGES)
            if is_own:
                key = keys.index(place).permute((1, 0))
                logits = warpgroup_mma(queries, key, nothing, use_acc=False, is_async=True)
                bits = ring.index(place).slice(GROUP * _TOKENS, _TOKENS).load(gl.SliceLayout(1, spread))
                bits = gl.convert_layout(
                    gl.expand_dims(bits, 1).broadcast_to([4, 16]).reshape([64]), row_layout, assert_trivial=True
                )
                logits = warpgroup_mma_wait(0, deps=(logits,))
                p = _shares(logits, bounds, bits, scale, narrow)
                acc = warpgroup_mma(gl.convert_layout(p, operand), values.index(place), acc, is_async=True)
                mbarrier.wait(full.index(next_place), next_phase, pred=u + 1 < count)
                is_own = _is_chosen(ring.index(next_place).slice(GROUP * _TOKENS, _TOKENS))
                acc = warpgroup_mma_wait(0, deps=(acc,))
            else:
                mbarrier.wait(full.index(next_place), next_phase, pred=u + 1 < count)
                is_own = _is_chosen(ring.index(next_place).slice(GROUP * _TOKENS, _TOKENS))
            # all four warps are done before one arrives
            gl.thread_barrier()
            mbarrier.arrive(empty.index(place))
            place = next_place
            phase = next_phase
        start, exists = _rows(first_token, kv_head, b, T, HKV, row_layout)
        dims = gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, mma)), 0)
        gl.store(out + gl.expand_dims(start, 1) + dims, acc.to(narrow), mask=gl.expand_dims(exists, 1))
        of_tile = spoiled + (((b * HKV + kv_head) * num_tiles + local) * _GROUPS + GROUP) * 64
        gl.store(of_tile + gl.arange(0, 64, row_layout), gl.sum(acc * 0.0, 1) != 0.0)


@gluon.jit(do_not_specialize=["T", "C", "K", "U", "first_tile", "num_tiles", "tiles"])
def hopper_forward_kernel(
    q, k, v, weights, chunks, counts, slots, spoiled, out,
    T, C, K, U, first_tile, num_tiles, tiles, scale, HKV, HR,
    KV_BATCH: gl.constexpr, STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """out of `tiles` tiles, num_tiles of every row and memory head; k and v are descriptors of boxes of one chunk,
    `scale` holds log2(e)."""
    narrow: gl.constexpr = k.dtype
    keys = gl.allocate_shared_memory(narrow, [STAGES, 64, 64], k.layout)
    values = gl.allocate_shared_memory(narrow, [STAGES, 64, 64], v.layout)
    ring = gl.allocate_shared_memory(gl.int32, [STAGES, _TOKENS * _GROUPS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=_GROUPS)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    copied = (
        k, v, weights, chunks, counts, slots, keys, values, ring, full, empty, T, C, K, U, first_tile, num_tiles, tiles,
    )  # fmt: skip
    read = (q, counts, spoiled, out, keys, values, ring, full, empty, T, first_tile, num_tiles, tiles, scale)
    gl.warp_specialize(
        [
            (_consume, (read, HKV, HR, 0, STAGES)),
            (_consume, (read, HKV, HR, 1, STAGES)),
            (_consume, (read, HKV, HR, 2, STAGES)),
            (_consume, (read, HKV, HR, 3, STAGES)),
            (_produce, (copied, HKV, HR, STAGES, KV_BATCH)),
        ],
        [4, 4, 4, 1],
        [REGISTERS, REGISTERS, REGISTERS, 24],
    )
