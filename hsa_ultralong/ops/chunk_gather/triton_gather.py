"""gather_chunks as one Triton kernel: a program copies a piece of one chunk from the address where its block lies.

Grid (n, ROW / PIECE): a program owns one piece of a row of `out`. Chunks are -1 (zeros) or below the number of chunks
in all blocks, which the caller promises: nothing is checked here. ChunkBlocks.add sees to blocks that the device can
read and to their addresses, ROW numbers a chunk in each. Tests: tests/ops/test_chunk_gather.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsa_ultralong.ops._triton import check_compiled, next_power_of_two, on_own_device
from hsa_ultralong.ops.chunk_gather.blocks import ChunkBlocks

_PIECE = 2048


@triton.jit(do_not_specialize=["most_blocks", "per_block"])
def gather_kernel(
    addresses, most_blocks, payload, scales, chunks, out, per_block, ROW,
    D: tl.constexpr, PIECE: tl.constexpr, HAS_SCALES: tl.constexpr, IS_FP8: tl.constexpr,
):  # fmt: skip
    """Row `slot` of out (n, ROW) from its chunk; `payload` and `scales` lend their types to the addresses. IS_FP8: the
    payload is the bytes of float8_e4m3fn, a type that cards before capability 8.9 do not know."""
    slot = tl.program_id(0).to(tl.int64)
    chunk = tl.load(chunks + slot).to(tl.int64)
    number = tl.maximum(chunk, 0)
    block, inside = number // per_block, number % per_block
    place = tl.program_id(1) * PIECE + tl.arange(0, PIECE)
    is_kept = (place < ROW) & (place * 0 + chunk >= 0)
    # blocks are allocations of their own, so they begin at multiples of 16 bytes
    source = tl.multiple_of(tl.load(addresses + block), 16).to(payload.dtype)
    found = tl.load(source + inside * ROW + place, mask=is_kept, other=0)
    if IS_FP8:
        bits = found.to(tl.int32)
        # exponent and digits at the places of fp32, whose exponents are 120 larger
        size = ((bits & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
        size = tl.where((bits & 0x7F) == 0x7F, float("nan"), size)
        found = tl.where(bits >= 0x80, -size, size)
    found = found.to(tl.float32)
    if HAS_SCALES:
        source = tl.multiple_of(tl.load(addresses + most_blocks + block), 16).to(scales.dtype)
        found *= tl.load(source + inside * (ROW // D) + place // D, mask=is_kept, other=0.0).to(tl.float32)
    tl.store(out + slot * ROW + place, found.to(out.dtype.element_ty), mask=place < ROW)


def gather_chunks_triton(blocks: ChunkBlocks, chunks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """See api.gather_chunks."""
    return _gather(chunks, blocks, dtype)


@on_own_device
def _gather(chunks: torch.Tensor, blocks: ChunkBlocks, dtype: torch.dtype) -> torch.Tensor:
    first = blocks.payloads[0]
    row, dim = first[0].numel(), first.shape[-1]
    out = torch.empty((len(chunks), *first.shape[1:]), dtype=dtype, device=chunks.device)
    if not len(chunks):
        return out
    check_compiled()
    piece = min(_PIECE, next_power_of_two(row))
    assert blocks.addresses is not None
    # only the types of these two arguments are used
    scales = blocks.scales[0] if blocks.scales else first
    is_fp8 = first.dtype == torch.float8_e4m3fn
    payload = first.view(torch.uint8) if is_fp8 else first
    gather_kernel[(len(chunks), -(-row // piece))](
        blocks.addresses, blocks.addresses.shape[1], payload, scales, chunks.contiguous(), out, blocks.per_block, row,
        D=dim, PIECE=piece, HAS_SCALES=bool(blocks.scales), IS_FP8=is_fp8, num_warps=4,
    )  # fmt: skip
    return out
