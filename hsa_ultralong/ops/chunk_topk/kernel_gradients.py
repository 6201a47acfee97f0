"""Gradients of kept products on a GPU: the K slopes of a token spread into a row of zeros, then matrix products.

A slope goes as the sum of two bf16 numbers, so that matrix units lose nothing that a plain rounding would lose: slopes
of a softmax sum to zero, and a vector common to all landmarks must cancel. One launch writes a block of rows,
(t, 2, C); blocks keep it bounded. No atomic additions. What is not finite was never kept, but zero times it is not
zero: landmarks are copied without it, and sums over queries that it spoiled are formed again. Derivation: README.md.

Grids: spread_kernel (tokens of a block, B * Hr), a program owns one row of `dense`; total_kernel (C / BC, R / BR, B *
Hr), one tile of the sum. A token keeps a chunk once (chunk_topk promises it): the stores of a row do not add.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hsa_ultralong.ops._common import blocks, matmul_wide
from hsa_ultralong.ops._finite import spoil_of
from hsa_ultralong.ops._triton import next_power_of_two
from hsa_ultralong.ops.chunk_topk.gradients import as_one_row

# scores that one block of rows stands for: 4 bytes each
BLOCK_ELEMENTS = 1 << 26


@triton.jit
def spread_kernel(
    indices, grad, factor, dense, T, start, K, HR, W, KP: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """Row (b * HR + hr, t) of dense (B * HR, t, 2, W): high and low parts of factor * grad at the kept chunks, 0."""
    t = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    hr = part % HR
    b = part // HR
    row = dense + (part * tl.num_programs(0) + t) * (2 * W)
    for first in range(0, 2 * W, BW):
        place = first + tl.arange(0, BW)
        tl.store(row + place, tl.zeros((BW,), dense.dtype.element_ty), mask=place < 2 * W)
    slot = tl.arange(0, KP)
    entry = ((b * T + start + t) * HR + hr) * K + slot
    chunk = tl.load(indices + entry, mask=slot < K, other=-1)
    slope = tl.load(grad + entry, mask=slot < K, other=0.0) * tl.load(factor + hr)
    high = slope.to(dense.dtype.element_ty)
    low = (slope - high.to(tl.float32)).to(dense.dtype.element_ty)
    # other threads of this program wrote the zeros
    tl.debug_barrier()
    tl.store(row + chunk, high, mask=chunk >= 0)
    tl.store(row + W + chunk, low, mask=chunk >= 0)


@triton.jit
def _finite(part):
    return tl.where(tl.abs(part.to(tl.float32)) < float("inf"), part, 0.0).to(part.dtype)


@triton.jit
def total_kernel(
    high, low, dense, query, total, T, C, R, W, HR, part_step, query_step,
    ADD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """total (B, C, HR, R) = or += high + low (B * HR, C, R), the products of the slopes' two parts with the queries; a
    tile that is not finite is formed again from dense (B * HR, T, 2, W) and what is finite of query (B * HR, T, R)."""
    part = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0) * BC + tl.arange(0, BC)
    dims = tl.program_id(1) * BR + tl.arange(0, BR)
    exists = (chunk < C)[:, None] & (dims < R)[None, :]
    place = (part * C + chunk)[:, None] * R + dims[None, :]
    added = tl.load(high + place, mask=exists, other=0.0) + tl.load(low + place, mask=exists, other=0.0)
    if spoil_of(added) != 0.0:
        added = tl.zeros((BC, BR), tl.float32)
        for start in range(0, T, BT):
            token = start + tl.arange(0, BT)
            kept = (token < T)[:, None] & (chunk < C)[None, :]
            slopes = dense + (part * T + token)[:, None] * (2 * W) + chunk[None, :]
            seen = (token < T)[:, None] & (dims < R)[None, :]
            queries = query + part * part_step + token.to(tl.int64)[:, None] * query_step + dims[None, :]
            queries = _finite(tl.load(queries, mask=seen, other=0.0))
            for digit in tl.static_range(2):
                slope = tl.load(slopes + digit * W, mask=kept, other=0.0)
                added = tl.dot(tl.trans(slope), queries, added)
    total += ((part // HR * C + chunk) * HR + part % HR)[:, None] * R + dims[None, :]
    if ADD:
        added += tl.load(total, mask=exists, other=0.0)
    tl.store(total, added.to(total.dtype.element_ty), mask=exists)


def spread_gradients(
    query: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query (B, T, Hr, R) and landmarks (1 or B, C, Hr, R), both bf16, from those of the kept scores.

    indices, grad: (B, T, Hr, K) int32 and fp32; -1 counts nothing. factor: (Hr,) fp32.
    """
    rows_shape = query.shape
    query, indices, grad = (part.contiguous() for part in as_one_row(landmarks, query, indices, grad))
    batch, num_tokens, heads, dim = query.shape
    num_chunks = landmarks.shape[1]
    slots, parts = indices.shape[-1], batch * heads
    width = -(-num_chunks // 8) * 8  # rows of 16 bytes, which matrix products need to be fast
    columns = landmarks.nan_to_num(0.0, 0.0, 0.0).transpose(1, 2)  # (B, Hr, C, R)
    if width > num_chunks:
        columns = torch.nn.functional.pad(columns, (0, 0, 0, width - num_chunks))
    columns = torch.cat((columns, columns), dim=2).reshape(parts, 2 * width, dim)
    block = max(1, BLOCK_ELEMENTS // (parts * width))
    grad_query = torch.empty_like(query)
    kind = landmarks.dtype if block >= num_tokens else torch.float32
    grad_landmarks = torch.empty(landmarks.shape, dtype=kind, device=query.device)
    for start, stop in blocks(num_tokens, block):
        count = stop - start
        dense = torch.empty((parts, count, 2, width), dtype=query.dtype, device=query.device)
        spread_kernel[(count, parts)](
            indices, grad, factor, dense, num_tokens, start, slots, heads, width,
            KP=next_power_of_two(slots), BW=1024, num_warps=1,
        )  # fmt: skip
        read = query[:, start:stop].transpose(1, 2).reshape(parts, count, dim)  # (B * Hr, t, R)
        if parts == 1:
            torch.mm(dense.view(count, 2 * width), columns[0], out=grad_query[0, start:stop, 0])
        else:
            found = torch.bmm(dense.flatten(2), columns)  # (B * Hr, t, R)
            grad_query[:, start:stop] = found.unflatten(0, (batch, heads)).transpose(1, 2)
        high, low = (matmul_wide(dense[:, :, digit, :num_chunks].transpose(1, 2), read) for digit in (0, 1))
        total_kernel[(-(-num_chunks // 32), -(-dim // 64), parts)](
            high, low, dense, read, grad_landmarks, count, num_chunks, dim, width, heads, *read.stride()[:2],
            ADD=start > 0, BC=32, BR=64, BT=32, num_warps=4,
        )  # fmt: skip
    return grad_query.view(rows_shape), grad_landmarks.to(landmarks.dtype)
