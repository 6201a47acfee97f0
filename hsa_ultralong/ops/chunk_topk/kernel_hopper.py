"""A Gluon kernel for Hopper (compute capability 9.0): the scan of many landmarks for few queries as one stream of bulk
tensor copies, which hardly pauses between the first landmark and the last.

The programs, all at work at once, are the shares; each takes every SHARES-th tile of TILE chunks, so that chunks which
lie together, and are often chosen together, fall to different ones. A ring holds STAGES tiles in slabs of 64
dimensions, which one warp fills; a tile that has been multiplied makes place for another before its candidates are
formed. Products are those of kernel_decode.scan_kernel, instruction by instruction, so scores are the same bit for bit.
choose_kernel of kernel_decode.py follows, on the same stream. How much faster that is: docs/kernels.md. Imports gluon,
so it is imported only where it runs (plan.py). tests/ops/test_decode_hopper.py; the host's part, with a stand-in,
test_chunk_topk_triton.py.

Grid: (SHARES, rows of the landmarks * Hr, queries / BQ). Needed: R a multiple of 64, 16-bit numbers, at least one tile
for every share, fewer than 2**31 chunks of all rows, addresses at multiples of 16 bytes.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, mma_v2, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from hsa_ultralong.ops._overlap import begin
from hsa_ultralong.ops.chunk_topk.kernel_select import _WORST, _pack, _visible

# dimensions of a slab: 128 bytes, as far as the copies spread rows over the banks of shared memory
SLAB = 64
_SLAB = gl.constexpr(SLAB)
_ROWS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
_PLACES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)


def described(
    landmarks: torch.Tensor, chunk_segment: torch.Tensor, chunk_end: torch.Tensor, tile: tuple[int, int]
) -> tuple[TensorDescriptor, TensorDescriptor, TensorDescriptor]:
    """Contiguous landmarks (rows, C, Hr, R) of 16-bit numbers as one row of Hr * R a chunk, of which a copy takes a
    slab of a box of chunks; segments and ends (rows, C) int32 as one row, of which it takes a tile.

    tile: chunks of a tile and of a box."""
    rows, chunks, heads, dim = landmarks.shape
    places = (TensorDescriptor.from_tensor(x.view(-1), [tile[0]], _PLACES) for x in (chunk_segment, chunk_end))
    return TensorDescriptor.from_tensor(landmarks.view(rows * chunks, heads * dim), [tile[1], SLAB], _ROWS), *places


@gluon.jit
def _produce(
    landmarks, chunk_segment, chunk_end, ring, segments, ends, full, empty, C, HR, tiles,
    R: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
    LANDMARK_ROWS: gl.constexpr, CHUNK_ROWS: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """One warp: the landmarks of a share and who owns their chunks, tile by tile, into the ring."""
    SLABS: gl.constexpr = R // _SLAB
    begin(OVERLAPS)
    part = gl.program_id(1)
    column = part % HR * R
    start = gl.program_id(0) * TILE
    row = start
    steps = (tiles - gl.program_id(0) + SHARES - 1) // SHARES
    if LANDMARK_ROWS:
        row += part // HR * C
    if CHUNK_ROWS:
        start += part // HR * C
    for i in range(steps):
        place = i % STAGES
        bar = full.index(place)
        mbarrier.wait(empty.index(place), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, SLABS * TILE * _SLAB * 2 + 2 * TILE * 4)
        # a few landmarks whole, then the next: pages of memory are read at once
        for first in gl.static_range(0, TILE, BOX):
            for slab in gl.static_range(SLABS):
                target = ring.index(place * SLABS + slab).slice(first, BOX)
                tma.async_copy_global_to_shared(landmarks, [row + first, column + slab * _SLAB], bar, target)
        tma.async_copy_global_to_shared(chunk_segment, [start], bar, segments.index(place))
        tma.async_copy_global_to_shared(chunk_end, [start], bar, ends.index(place))
        row += SHARES * TILE
        start += SHARES * TILE


@gluon.jit
def _consume(
    query, query_segment, query_position, factor, keys, lane_tops, share_tops,
    ring, held, segments, ends, full, empty, C, HR, queries, padded_chunks, tiles,
    R: gl.constexpr, BQ: gl.constexpr, TILE: gl.constexpr, SHARES: gl.constexpr, STAGES: gl.constexpr,
    WARPS: gl.constexpr, LISTED: gl.constexpr, FOREIGN: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """The other warps: products of the tiles, and their candidates."""
    SLABS: gl.constexpr = R // _SLAB
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, WARPS], instr_shape=[16, 8])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=mma, k_width=2)
    right: gl.constexpr = gl.DotOperandLayout(operand_index=1, parent=mma, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, mma)
    loading: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    begin(OVERLAPS)
    share = gl.program_id(0)
    part = gl.program_id(1)  # (row of the landmarks, head)
    hr = part % HR
    b = (part // HR).to(gl.int64)
    number = gl.program_id(2) * BQ + gl.arange(0, BQ, gl.SliceLayout(1, loading))
    dims = gl.arange(0, _SLAB, gl.SliceLayout(0, loading))
    source = query + gl.expand_dims(((b * queries + number) * HR + hr) * R, 1) + gl.expand_dims(dims, 0)
    for slab in gl.static_range(SLABS):
        held.index(slab).store(gl.load(source + slab * _SLAB, mask=gl.expand_dims(number < queries, 1), other=0.0))
    scale = gl.load(factor + hr)
    number = gl.program_id(2) * BQ + gl.arange(0, BQ, gl.SliceLayout(1, mma))
    is_real = number < queries
    segment = gl.expand_dims(gl.load(query_segment + b * queries + number, mask=is_real, other=-1), 1)
    position = gl.expand_dims(gl.load(query_position + b * queries + number, mask=is_real, other=0), 1)
    token = part.to(gl.int64) * queries + number
    lane = gl.arange(0, TILE, columns)
    keys += gl.expand_dims(token * padded_chunks, 1) + gl.expand_dims(lane, 0)
    start = share * TILE
    best = gl.full((BQ, TILE), _WORST, gl.int64, mma)
    second = gl.full((BQ, TILE), _WORST, gl.int64, mma)
    gl.thread_barrier()
    steps = (tiles - share + SHARES - 1) // SHARES
    for i in range(steps):
        place = i % STAGES
        mbarrier.wait(full.index(place), (i // STAGES) & 1)
        products = gl.zeros((BQ, TILE), gl.float32, mma)
        for slab in gl.static_range(SLABS):
            tile = ring.index(place * SLABS + slab).permute((1, 0)).load(right)
            products = mma_v2(held.index(slab).load(left), tile, products)
        owner = gl.where(start + lane < C, segments.index(place).load(columns), -2)
        end = ends.index(place).load(columns)
        mbarrier.arrive(empty.index(place))
        mask = _visible(segment, position, gl.expand_dims(owner, 0), gl.expand_dims(end, 0), FOREIGN)
        found = _pack(products * scale, gl.expand_dims(start + lane, 0), mask)
        gl.store(keys + start, found, mask=gl.expand_dims(is_real, 1))
        second = gl.maximum(second, gl.minimum(best, found))
        best = gl.maximum(best, found)
        start += SHARES * TILE
    target = lane_tops + gl.expand_dims((token * SHARES + share) * TILE, 1) + gl.expand_dims(lane, 0)
    gl.store(target, best, mask=gl.expand_dims(is_real, 1))
    # the best of the share, of which a lane has two; what is behind the second of a lane is not above it
    share_tops += token * ((LISTED + 1) * SHARES) + share
    taken = gl.zeros((BQ, TILE), gl.int32, mma)
    others = gl.full((BQ, TILE), _WORST, gl.int64, mma)
    for place in gl.static_range(LISTED):
        top = gl.max(best, 1)
        gl.store(share_tops + place * SHARES, top, mask=is_real)
        is_top = best == gl.expand_dims(top, 1)
        others = gl.where(is_top & (taken == 1), best, others)
        best = gl.where(is_top, gl.where(taken == 1, _WORST, second), best)
        taken = gl.where(is_top, 1, taken)
    gl.store(share_tops + LISTED * SHARES, gl.max(gl.maximum(best, others), 1), mask=is_real)


@gluon.jit(do_not_specialize=["C", "queries", "tiles"])
def stream_scan_kernel(
    landmarks, chunk_segment, chunk_end, query, query_segment, query_position, factor,
    keys, lane_tops, share_tops, C, HR, queries, padded_chunks, tiles,
    R: gl.constexpr, BQ: gl.constexpr, TILE: gl.constexpr, BOX: gl.constexpr, SHARES: gl.constexpr,
    STAGES: gl.constexpr, LISTED: gl.constexpr, FOREIGN: gl.constexpr, LANDMARK_ROWS: gl.constexpr,
    CHUNK_ROWS: gl.constexpr, OVERLAPS: gl.constexpr,
):  # fmt: skip
    """Candidates (rows of the landmarks, HR, queries, padded_chunks) of a share for BQ of the `queries` tokens that
    share the landmarks; the best at every lane (chunk modulo TILE); the LISTED best of the share, and a candidate that
    none of its others is above."""
    WARPS: gl.constexpr = gl.num_warps()
    SLABS: gl.constexpr = R // _SLAB
    dtype: gl.constexpr = landmarks.dtype
    ring = gl.allocate_shared_memory(dtype, [STAGES * SLABS, TILE, _SLAB], landmarks.layout)
    held = gl.allocate_shared_memory(dtype, [SLABS, BQ, _SLAB], landmarks.layout)
    segments = gl.allocate_shared_memory(gl.int32, [STAGES, TILE], chunk_segment.layout)
    ends = gl.allocate_shared_memory(gl.int32, [STAGES, TILE], chunk_end.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    # bulk copies signal these barriers
    fence_async_shared()
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (_consume, (
                query, query_segment, query_position, factor, keys, lane_tops, share_tops, ring, held, segments, ends,
                full, empty, C, HR, queries, padded_chunks, tiles, R, BQ, TILE, SHARES, STAGES, WARPS, LISTED,
                FOREIGN, OVERLAPS,
            )),
            (_produce, (
                landmarks, chunk_segment, chunk_end, ring, segments, ends, full, empty, C, HR, tiles, R, TILE, BOX,
                SHARES, STAGES, LANDMARK_ROWS, CHUNK_ROWS, OVERLAPS,
            )),
        ],
        [1],
        [24],
    )  # fmt: skip
