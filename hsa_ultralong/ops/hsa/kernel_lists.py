"""Who reads what, in the two orders that the Triton kernels walk: tiles of neighbouring tokens, and chunks.

Tile lists: for every tile of BT adjacent tokens the union of their selected chunks, and for each of these chunks the
slot that it has in each token's own list (-1: that token did not select it). Inverse lists: for every chunk the
(token, slot) pairs that selected it, cut into units of bounded length. Both stay on the device: sizes are bounded from
shapes alone, so nothing synchronises with the host. Letters: docs/architecture.md. Tests: tests/ops/test_hsa_triton.py.

Grids: _tile_lists_kernel (tiles of a launch, Hr, B), a program owns the list and the slot map of its tile;
_slot_map_kernel (tokens / BT, K / BK, B * Hr), entries that no other program writes, as a token selects a chunk once;
_inverse_kernel (blocks of BT tokens, Hr, B), launched twice: counts, then pairs at the places that a running sum gave.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

# keys larger than any real one: empty slots sort behind everything
_LAST_32 = tl.constexpr(2**31 - 1)
_LAST_64 = tl.constexpr(2**62)
# slots of a token that are sorted at least: fewer, as a short prompt's own chunks make them, need no form of their own
FEWEST_SLOTS = 16
# keys that one program of the counting sort takes; counts per pair beyond which a plain sort is used instead
_COUNTED_KEYS = 2048
_COUNTED_SHARE = 4


class TileLists(NamedTuple):
    """Chunks of every tile. For full coverage `chunks` and `counts` are None: chunk u of a tile is chunk u itself.

    chunks: (B, Hr, tiles, Umax) int32, the first counts[b, hr, tile] are set.
    counts: (B, Hr, tiles) int32.
    slots: (B, Hr, tiles, Umax, BT) int16 or int32, slot of chunk u in the list of a token, -1 = not selected;
        for full coverage (B, Hr, C, T).
    """

    chunks: torch.Tensor | None
    counts: torch.Tensor | None
    slots: torch.Tensor


class InverseLists(NamedTuple):
    """Pairs by chunk. N = Bk * Hr * C lists; a unit is a part of one list.

    pairs: (B*T*Hr*K,) int32 or int64, flat positions in `indices`, grouped by list.
    unit_ends: (N,) int32, number of units of the lists up to and including this one.
    pair_starts: (N + 1,) int32 or int64, first pair of every list, then the end of the last.
    unit_lists: (units,) int32, list of every unit; N for units that do not exist.
    unit_pairs: pairs of a full unit.
    """

    pairs: torch.Tensor
    unit_ends: torch.Tensor
    pair_starts: torch.Tensor
    unit_lists: torch.Tensor
    unit_pairs: int


def slot_dtype(slots: int) -> torch.dtype:
    return torch.int16 if slots < 2**15 else torch.int32


@triton.jit
def _sorted_chunks(indices, first_token, b, hr, T, K, HR, BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr):
    """Chunks of BT tokens in ascending order, each with its position (token * KP + slot), tokens in order within a
    chunk; and whether an entry is real, for empty slots come last."""
    N: tl.constexpr = BT * KP
    position = tl.arange(0, N)
    token = first_token + position // KP
    slot = position % KP
    is_real = (token < T) & (slot < K)
    chunk = tl.load(indices + ((b * T + token) * HR + hr) * K + slot, mask=is_real, other=-1)
    if WIDE:
        chunk = chunk.to(tl.int64)
        key = tl.sort(tl.where(chunk >= 0, chunk * N + position, _LAST_64))
        found = key < _LAST_64
    else:
        key = tl.sort(tl.where(chunk >= 0, chunk * N + position, _LAST_32))
        found = key < _LAST_32
    return key // N, (key % N).to(tl.int32), found


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _inverse_kernel(
    indices, counts, ends, pairs,
    T, K, HR, C, blocks, row_blocks,
    MEMORY_ROWS: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, FILL: tl.constexpr,
):  # fmt: skip
    """Counting sort of the pairs by list, in blocks of BT tokens: first how many pairs of a block each list gets, into
    counts (lists, blocks); then, with their running sum `ends`, the pairs to their places."""
    block = tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = BT * KP
    chunk, position, found = _sorted_chunks(indices, block * BT, b, hr, T, K, HR, BT, KP, WIDE)
    order = tl.arange(0, N)
    before = tl.gather(chunk, tl.maximum(order - 1, 0), 0)
    after = tl.gather(chunk, tl.minimum(order + 1, N - 1), 0)
    is_first = (order == 0) | (before != chunk)
    is_last = (order == N - 1) | (after != chunk)
    rank = order - tl.associative_scan(tl.where(is_first, order, 0), 0, _larger)
    row = b if MEMORY_ROWS else b * 0
    column = block if MEMORY_ROWS else b * row_blocks + block
    place = ((row * HR + hr) * C + chunk) * blocks + column
    if FILL:
        start = tl.load(ends + place - 1, mask=found & (place > 0), other=0)
        pair = ((b * T + block * BT + position // KP) * HR + hr) * K + position % KP
        tl.store(pairs + start + rank, pair.to(pairs.dtype.element_ty), mask=found)
    else:
        tl.store(counts + place, rank + 1, mask=found & is_last)


@triton.jit(do_not_specialize=["T", "K", "U", "first_tile", "num_tiles"])
def _tile_lists_kernel(
    indices, chunks, counts, slot_map,
    T, K, HR, U, first_tile, num_tiles,
    BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program sorts the selected chunks of BT tokens, drops repetitions and notes who selected what."""
    tile = tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = BT * KP
    chunk, position, found = _sorted_chunks(indices, (first_tile + tile) * BT, b, hr, T, K, HR, BT, KP, WIDE)
    order = tl.arange(0, N)
    before = tl.gather(chunk, tl.maximum(order - 1, 0), 0)
    is_first = (found & ((order == 0) | (before != chunk))).to(tl.int32)
    rank = tl.cumsum(is_first, 0) - 1
    count = tl.sum(is_first, 0)
    row = (b * HR + hr) * num_tiles + tile
    tl.store(counts + row, count)
    tl.store(chunks + row * U + rank, chunk.to(tl.int32), mask=is_first == 1)
    slot_map += row * U * BT
    for start in range(0, count * BT, N):
        tl.store(slot_map + start + order, tl.full((N,), -1, slot_map.dtype.element_ty), start + order < count * BT)
    tl.debug_barrier()
    tl.store(slot_map + rank * BT + position // KP, (position % KP).to(slot_map.dtype.element_ty), mask=found)


@triton.jit(do_not_specialize=["T", "K", "C"])
def _slot_map_kernel(
    indices, slot_map,
    T, K, HR, C,
    BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """slot_map[b, hr, indices[b, t, hr, k], t] = k."""
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    slot = tl.program_id(1) * BK + tl.arange(0, BK)
    b = (tl.program_id(2) // HR).to(tl.int64)
    hr = tl.program_id(2) % HR
    is_real = (token < T)[None, :] & (slot < K)[:, None]
    chunk = tl.load(indices + ((b * T + token[None, :]) * HR + hr) * K + slot[:, None], mask=is_real, other=-1)
    target = slot_map + ((b * HR + hr) * C + chunk) * T + token[None, :]
    value = tl.broadcast_to(slot[:, None], (BK, BT)).to(slot_map.dtype.element_ty)
    tl.store(target, value, mask=chunk >= 0)


def tile_lists(indices: torch.Tensor, tile_tokens: int, num_chunks: int, first_tile: int, num_tiles: int) -> TileLists:
    """Lists of `num_tiles` tiles from `first_tile` on; indices (B, T, Hr, K) int32 below num_chunks = C."""
    batch, num_tokens, heads, slots = indices.shape
    shape = (batch, heads, num_tiles)
    max_chunks = min(tile_tokens * slots, num_chunks)
    chunks = torch.empty(*shape, max_chunks, dtype=torch.int32, device=indices.device)
    counts = torch.empty(shape, dtype=torch.int32, device=indices.device)
    slot_map = torch.empty(*shape, max_chunks, tile_tokens, dtype=slot_dtype(slots), device=indices.device)
    padded = max(FEWEST_SLOTS, triton.next_power_of_2(slots))
    _tile_lists_kernel[(num_tiles, heads, batch)](
        indices, chunks, counts, slot_map,
        num_tokens, slots, heads, max_chunks, first_tile, num_tiles,
        BT=tile_tokens, KP=padded, WIDE=num_chunks * tile_tokens * padded >= 2**31,
        num_warps=max(1, min(8, tile_tokens * padded // 256)),
    )  # fmt: skip
    return TileLists(chunks, counts, slot_map)


def coverage_slots(indices: torch.Tensor, num_chunks: int) -> TileLists:
    """The slot map of full coverage, (B, Hr, C, T)."""
    batch, num_tokens, heads, slots = indices.shape
    shape = (batch, heads, num_chunks, num_tokens)
    slot_map = torch.full(shape, -1, dtype=slot_dtype(slots), device=indices.device)
    block_tokens, block_slots = 64, 16
    grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(slots, block_slots), batch * heads)
    _slot_map_kernel[grid](
        indices, slot_map, num_tokens, slots, heads, num_chunks, BT=block_tokens, BK=block_slots, num_warps=4
    )
    return TileLists(None, None, slot_map)


def _pairs_by_counting(indices: torch.Tensor, memory_batch: int, num_chunks: int, tile: int):
    """Pairs grouped by list, and the first pair of every list, by a counting sort over blocks of `tile` tokens."""
    batch, num_tokens, heads, slots = indices.shape
    row_blocks = triton.cdiv(num_tokens, tile)
    is_shared = memory_batch < batch
    lists, blocks = memory_batch * heads * num_chunks, row_blocks * (batch if is_shared else 1)
    counts = torch.zeros(lists * blocks, dtype=torch.int32, device=indices.device)
    pairs = torch.empty(indices.numel(), dtype=torch.int32, device=indices.device)
    padded = triton.next_power_of_2(slots)
    sizes = (num_tokens, slots, heads, num_chunks, blocks, row_blocks)
    constants = {
        "MEMORY_ROWS": not is_shared, "BT": tile, "KP": padded, "WIDE": num_chunks * tile * padded >= 2**31,
        "num_warps": 4,
    }  # fmt: skip
    grid = (row_blocks, heads, batch)
    _inverse_kernel[grid](indices, counts, counts, pairs, *sizes, FILL=False, **constants)
    ends = counts.cumsum(0, dtype=torch.int32)
    _inverse_kernel[grid](indices, counts, ends, pairs, *sizes, FILL=True, **constants)
    return pairs, torch.nn.functional.pad(ends.view(lists, blocks)[:, -1], (1, 0))


def _pairs_by_sorting(indices: torch.Tensor, memory_batch: int, num_chunks: int):
    """The same by a stable sort: pairs of a list stay in the order of their tokens, so sums repeat bit for bit."""
    batch, _, heads, _ = indices.shape
    lists, device = memory_batch * heads * num_chunks, indices.device
    head = torch.arange(heads, device=device, dtype=torch.int32).view(1, 1, -1, 1)
    row = torch.arange(batch, device=device, dtype=torch.int32).view(-1, 1, 1, 1) * (memory_batch > 1)
    key = torch.where(indices >= 0, indices + (row * heads + head) * num_chunks, -1).flatten()
    ordered, pairs = torch.sort(key.to(torch.int16) if lists < 2**15 else key, stable=True)
    if pairs.numel() < 2**31:
        pairs = pairs.to(torch.int32)
    boundaries = torch.arange(lists + 1, device=device, dtype=ordered.dtype)
    starts = torch.searchsorted(ordered, boundaries, out_int32=pairs.dtype == torch.int32)
    return pairs, starts


def inverse_lists(indices: torch.Tensor, memory_batch: int, num_chunks: int, unit_pairs: int) -> InverseLists:
    """Pairs by (memory row, retrieval head, chunk); indices (B, T, Hr, K) int32."""
    batch, num_tokens, heads, slots = indices.shape
    lists, device = memory_batch * heads * num_chunks, indices.device
    tile = _COUNTED_KEYS // triton.next_power_of_2(slots)
    matrix = lists * (-(-num_tokens // max(1, tile))) * (batch if memory_batch < batch else 1)
    if tile >= 1 and indices.numel() < 2**31 and matrix <= _COUNTED_SHARE * indices.numel():
        pairs, starts = _pairs_by_counting(indices, memory_batch, num_chunks, tile)
    else:
        pairs, starts = _pairs_by_sorting(indices, memory_batch, num_chunks)
    units = (starts.diff() + (unit_pairs - 1)) // unit_pairs
    ends = units.cumsum(0, dtype=torch.int32)
    most = lists + -(-pairs.numel() // unit_pairs)
    numbers = torch.arange(most, device=device, dtype=torch.int32)
    unit_lists = torch.searchsorted(ends, numbers, right=True, out_int32=True)
    return InverseLists(pairs, ends, starts, unit_lists, unit_pairs)
