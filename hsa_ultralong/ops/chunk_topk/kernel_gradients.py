"""Gradients of kept products on a GPU: the K slopes of a token spread into a row of zeros, then matrix products.

A slope goes as the sum of two bf16 numbers, so that matrix units lose nothing that a plain rounding would lose: slopes
of a softmax sum to zero, and a vector common to all landmarks must cancel. One launch writes a block of rows,
(t, 2, C), and the landmarks twice below each other; blocks keep it bounded. No atomic additions. What is not finite
was never kept, but zero times it is not zero: landmarks are copied without it, and sums over queries that it spoiled
are formed again. Derivation: README.md.

Grids: spread_kernel (tokens of a block, then chunks in the first one, B * Hr), a program owns one row of `dense` or two
of `columns`; total_kernel (C / BC, R / BR, B * Hr), one tile of the sum. A token keeps a chunk once (chunk_topk
promises it): the stores of a row do not add.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsa_ultralong.ops._common import blocks, matmul_wide
from hsa_ultralong.ops._finite import spoil_of
from hsa_ultralong.ops._launch import PreparedLaunch, are_aligned
from hsa_ultralong.ops._triton import next_power_of_two
from hsa_ultralong.ops.chunk_topk.gradients import as_one_row

# scores that one block of rows stands for: 4 bytes each
BLOCK_ELEMENTS = 1 << 26


@triton.jit
def _finite(part):
    return tl.where(tl.abs(part.to(tl.float32)) < float("inf"), part, 0.0).to(part.dtype)


@triton.jit
def spread_kernel(
    indices, grad, factor, landmarks, dense, columns, T, start, count, K, C, HR, R, W,
    KP: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Row (b * HR + hr, t) of dense (B * HR, count, 2, W): high and low parts of factor * grad at the kept chunks, 0
    elsewhere. Programs from `count` on: rows chunk and W + chunk of columns (B * HR, 2 * W, R), what is finite of a
    landmark."""
    t = tl.program_id(0)
    part = tl.program_id(1).to(tl.int64)
    hr = part % HR
    b = part // HR
    if t < count:
        row = dense + (part * count + t) * (2 * W)
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
    else:
        number = t - count
        source = landmarks + ((b * C + number) * HR + hr) * R
        target = columns + (part * (2 * W) + number) * R
        exist = tl.where(number < C, R, 0)
        for begin in range(0, R, BR):
            dims = begin + tl.arange(0, BR)
            found = _finite(tl.load(source + dims, mask=dims < exist, other=0.0))
            tl.store(target + dims, found, mask=dims < R)
            tl.store(target + W * R + dims, found, mask=dims < R)


@triton.jit
def total_kernel(
    products, dense, query, total, T, C, R, W, HR, part_step, query_step,
    ADD: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """total (B, C, HR, R) = or += the two halves of products (B * HR, 2 * W, R), of the slopes' two parts with the
    queries; a tile that is not finite is formed again from dense (B * HR, T, 2, W) and what is finite of query (B * HR,
    T, R)."""
    part = tl.program_id(2).to(tl.int64)
    chunk = tl.program_id(0) * BC + tl.arange(0, BC)
    dims = tl.program_id(1) * BR + tl.arange(0, BR)
    exists = (chunk < C)[:, None] & (dims < R)[None, :]
    place = products + (part * (2 * W) + chunk)[:, None] * R + dims[None, :]
    added = tl.load(place, mask=exists, other=0.0) + tl.load(place + W * R, mask=exists, other=0.0)
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


class _Block(NamedTuple):
    """Tokens start .. start + num_tokens: both launches, and the numbers of the first."""

    start: int
    num_tokens: int
    spread: PreparedLaunch
    total: PreparedLaunch
    sizes: tuple[int, ...]


class _SpreadPlan:
    """Sizes and launches for a query (B, T, Hr, R), landmarks (B, C, Hr, R) and K slots; blocks of at most
    `block_elements` scores."""

    def __init__(self, query: torch.Size, num_chunks: int, slots: int, block_elements: int, is_kept: bool) -> None:
        batch, num_tokens, heads, dim = query
        self.parts, self.num_chunks, self.heads, self.dim = batch * heads, num_chunks, heads, dim
        self.width = width = -(-num_chunks // 8) * 8  # rows of 16 bytes, which matrix products need to be fast
        block = max(1, block_elements // (self.parts * width))
        total_grid = (-(-num_chunks // 32), -(-dim // 64), self.parts)
        self.blocks = []
        for start, stop in blocks(num_tokens, block):
            count = stop - start
            spread = PreparedLaunch(
                spread_kernel, (count + (0 if start else width), self.parts), is_kept=is_kept,
                KP=next_power_of_two(slots), BW=1024, BR=min(256, next_power_of_two(dim)), num_warps=1,
            )  # fmt: skip
            total = PreparedLaunch(
                total_kernel, total_grid, is_kept=is_kept, ADD=start > 0, BC=32, BR=64, BT=32, num_warps=4
            )
            sizes = (num_tokens, start, count, slots, num_chunks, heads, dim, width)
            self.blocks.append(_Block(start, count, spread, total, sizes))


@lru_cache(maxsize=64)
def _plan_of(
    query: torch.Size, num_chunks: int, slots: int, block_elements: int, is_kept: bool, *_: object
) -> _SpreadPlan:
    """The one plan of these shapes; what else the launches depend on (dtypes, the device) comes last."""
    return _SpreadPlan(query, num_chunks, slots, block_elements, is_kept)


def spread_gradients(
    query: torch.Tensor, landmarks: torch.Tensor, indices: torch.Tensor, grad: torch.Tensor, factor: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of query (B, T, Hr, R) and landmarks (1 or B, C, Hr, R), both bf16, from those of the kept scores.

    indices, grad: (B, T, Hr, K) int32 and fp32; -1 counts nothing. factor: (Hr,) fp32.
    """
    rows_shape, dtype, device = query.shape, query.dtype, query.device
    query, indices, grad = (part.contiguous() for part in as_one_row(landmarks, query, indices, grad))
    landmarks = landmarks.contiguous()
    batch, num_tokens, heads, dim = query.shape
    is_kept = are_aligned(query, landmarks, indices, grad, factor)
    plan = _plan_of(
        query.shape, landmarks.shape[1], indices.shape[-1], BLOCK_ELEMENTS, is_kept, dtype, grad.dtype, device
    )
    parts, width = plan.parts, plan.width
    columns = torch.empty((parts, 2 * width, dim), dtype=landmarks.dtype, device=device)
    kind = landmarks.dtype if len(plan.blocks) == 1 else torch.float32
    grad_landmarks = torch.empty(landmarks.shape, dtype=kind, device=device)
    # (B * Hr, T, R)
    rows = query.view(parts, num_tokens, dim) if heads == 1 else query.transpose(1, 2).reshape(parts, num_tokens, dim)
    grad_query = torch.empty_like(rows)
    for block in plan.blocks:
        dense = torch.empty((parts, block.num_tokens, 2 * width), dtype=dtype, device=device)
        block.spread(indices, grad, factor, landmarks, dense, columns, *block.sizes)
        part = slice(block.start, block.start + block.num_tokens)
        read, target = (rows, grad_query) if len(plan.blocks) == 1 else (rows[:, part], grad_query[:, part])
        torch.bmm(dense, columns, out=target)  # (B * Hr, t, R)
        products = matmul_wide(dense.transpose(1, 2), read)  # (B * Hr, 2 * W, R)
        block.total(
            products, dense, read, grad_landmarks, block.num_tokens, plan.num_chunks, dim, width, heads,
            *read.stride()[:2],
        )  # fmt: skip
    if heads > 1:
        grad_query = grad_query.unflatten(0, (batch, heads)).transpose(1, 2).contiguous()
    return grad_query.view(rows_shape), grad_landmarks.to(landmarks.dtype)
