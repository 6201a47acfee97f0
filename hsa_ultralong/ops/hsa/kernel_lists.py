"""Who reads what, in the two orders that the Triton kernels walk: tiles of neighbouring tokens, and chunks.

Tile lists: for every tile of BT adjacent tokens the union of their selected chunks, and for each of these chunks the
slot that it has in each token's own list (-1: that token did not select it). Inverse lists: for every chunk the
(token, slot) pairs that selected it, cut into units of bounded length. Both stay on the device: sizes are bounded from
shapes alone, so nothing synchronises with the host. Letters: docs/architecture.md. Tests: tests/ops/test_hsa_triton.py.

Grids: _tile_lists_kernel (tiles of a launch, Hr, B), a program owns the list and the slot map of its tile;
_slot_map_kernel (tokens / BT, K / BK, B * Hr), entries that no other program writes, as a token selects a chunk once;
_count_kernel and _fill_kernel (blocks of BT tokens, Hr, B): sorted keys and counts, a row of C for every program, then
pairs at the places that _offsets_kernel (C / BL, memory rows * Hr) and _units_kernel (one program) made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from hsa_ultralong.ops._launch import PreparedLaunch
from hsa_ultralong.ops._overlap import begin

# larger than any: empty slots come last
_LAST_32 = tl.constexpr(2**31 - 1)
_LAST_64 = tl.constexpr(2**62)
# slots of a token that are sorted at least: fewer have no form of their own
FEWEST_SLOTS = 16
# keys that one program of the counting sort takes, as few as there are chunks: fewer are sorted faster, but every
# program writes a count for every chunk. Counts per pair, and pairs, beyond which a plain sort serves: it has
# more launches, less work (docs/kernels.md)
_COUNTED_KEYS = (512, 2048)
_COUNTED_SHARE = 4
_COUNTED_PAIRS = 1 << 18
# lists, and blocks of tokens, that a program adds counts of at a time; lists that the last one takes at a time
_OFFSET_LISTS, _OFFSET_BLOCKS, _UNIT_LISTS = 8, 256, 1024


class TileLists(NamedTuple):
    """Chunks of every tile. For full coverage `chunks` and `counts` are None: chunk u of a tile is chunk u itself.

    chunks: (B, Hr, tiles, Umax) int32, the first counts[b, hr, tile] are set.
    counts: (B + 1, Hr, tiles) int32; the last row begins with 0 (kernel_hopper_forward.py).
    slots: (B, Hr, tiles, Umax, BT) int16 or int32, slot of chunk u in the list of a token, -1 = not selected;
        for full coverage (B, Hr, C, T).
    """

    chunks: torch.Tensor | None
    counts: torch.Tensor | None
    slots: torch.Tensor


class InverseLists(NamedTuple):
    """Pairs by chunk. N = Bk * Hr * C lists, so many for every part of the tokens; a unit is a piece of one list.

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
def _sorted_keys(indices, first_token, b, hr, T, K, HR, BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr):
    """Chunks of BT tokens in ascending order, each as chunk * N + its position (token * KP + slot), N = BT * KP, so
    tokens are in order within a chunk; empty slots come last, as the key that no chunk has."""
    N: tl.constexpr = BT * KP
    position = tl.arange(0, N)
    token = first_token + position // KP
    slot = position % KP
    is_real = (token < T) & (slot < K)
    chunk = tl.load(indices + ((b * T + token) * HR + hr) * K + slot, mask=is_real, other=-1)
    if WIDE:
        chunk = chunk.to(tl.int64)
        return tl.sort(tl.where(chunk >= 0, chunk * N + position, _LAST_64))
    return tl.sort(tl.where(chunk >= 0, chunk * N + position, _LAST_32))


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _ranks(key, N: tl.constexpr, LAST: tl.constexpr):
    """Of sorted keys, chunk * N + position: place of each within its chunk, and whether it is the last of it."""
    order = tl.arange(0, N)
    chunk = key // N
    is_first = (order == 0) | (tl.gather(chunk, tl.maximum(order - 1, 0), 0) != chunk)
    is_last = (order == N - 1) | (tl.gather(chunk, tl.minimum(order + 1, N - 1), 0) != chunk)
    rank = order - tl.associative_scan(tl.where(is_first, order, 0), 0, _larger)
    return rank, is_last, key < LAST


@triton.jit
def _group_of(block, b, hr, HR, part_blocks, MEMORY_ROWS: tl.constexpr):
    """Whose C lists a block of tokens adds to, (part, memory row, retrieval head), and its number among theirs."""
    group, number = b * 0 + block // part_blocks, b * 0 + block % part_blocks
    if MEMORY_ROWS:
        group = group * tl.num_programs(2) + b
    else:
        number += b * part_blocks
    return group * HR + hr, number


@triton.jit
def _count_kernel(
    indices, keys, counts,
    T, K, HR, C, blocks, row_blocks, part_blocks,
    MEMORY_ROWS: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Counting sort of the pairs by list, in blocks of BT tokens. First how many pairs of a block each list gets, into
    counts (parts * memory rows * HR, blocks, C), and its sorted pairs, into keys (B, HR, row blocks, BT * KP)."""
    begin(OVERLAPS)
    block = tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = BT * KP
    LAST: tl.constexpr = _LAST_64 if WIDE else _LAST_32
    key = _sorted_keys(indices, block * BT, b, hr, T, K, HR, BT, KP, WIDE)
    rank, is_last, found = _ranks(key, N, LAST)
    order = tl.arange(0, N)
    tl.store(keys + ((b * HR + hr) * row_blocks + block) * N + order, key)
    group, number = _group_of(block, b, hr, HR, part_blocks, MEMORY_ROWS)
    counts += (group * blocks + number) * C
    for first in range(0, C, N):
        tl.store(counts + first + order, tl.zeros((N,), tl.int32), mask=first + order < C)
    # other threads of this program wrote the zeros
    tl.debug_barrier()
    tl.store(counts + key // N, rank + 1, mask=found & is_last)


@triton.jit
def _fill_kernel(
    keys, counts, starts, pairs,
    T, K, HR, C, blocks, row_blocks, part_blocks,
    MEMORY_ROWS: tl.constexpr, BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Then, with what _offsets_kernel made of the counts, the pairs to their places."""
    begin(OVERLAPS)
    block = tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = BT * KP
    LAST: tl.constexpr = _LAST_64 if WIDE else _LAST_32
    key = tl.load(keys + ((b * HR + hr) * row_blocks + block) * N + tl.arange(0, N))
    rank, _, found = _ranks(key, N, LAST)
    chunk, position = key // N, (key % N).to(tl.int32)
    group, number = _group_of(block, b, hr, HR, part_blocks, MEMORY_ROWS)
    counts += (group * blocks + number) * C
    start = tl.load(starts + group * C + chunk, mask=found, other=0)
    start += tl.load(counts + chunk, mask=found, other=0)
    pair = ((b * T + block * BT + position // KP) * HR + hr) * K + position % KP
    tl.store(pairs + start + rank, pair.to(pairs.dtype.element_ty), mask=found)


@triton.jit
def _offsets_kernel(counts, totals, C, blocks, BB: tl.constexpr, BL: tl.constexpr, OVERLAPS: tl.constexpr):
    """Counts of BL lists become, in place, the number of their pairs in earlier blocks; totals (lists,) that in all."""
    begin(OVERLAPS)
    group = tl.program_id(1).to(tl.int64)
    chunk = tl.program_id(0) * BL + tl.arange(0, BL)
    counts += group * blocks * C
    before = tl.zeros((BL,), tl.int32)
    for start in range(0, blocks, BB):
        block = start + tl.arange(0, BB)
        exists = (block < blocks)[:, None] & (chunk < C)[None, :]
        place = counts + block.to(tl.int64)[:, None] * C + chunk[None, :]
        found = tl.load(place, mask=exists, other=0)
        # other threads of this program may read what this one writes
        tl.debug_barrier()
        tl.store(place, before[None, :] + tl.cumsum(found, 0) - found, mask=exists)
        before += tl.sum(found, 0)
    tl.store(totals + group * C + chunk, before, mask=chunk < C)


@triton.jit
def _units_kernel(
    totals, starts, unit_ends, unit_lists, lists, most, unit_pairs, BL: tl.constexpr, OVERLAPS: tl.constexpr
):  # fmt: skip
    """One program goes through the lists' totals: where their pairs begin, how many units they make, whose each is."""
    begin(OVERLAPS)
    pairs = tl.zeros((), starts.dtype.element_ty)
    units = tl.zeros((), tl.int32)
    for first in range(0, lists, BL):
        number = first + tl.arange(0, BL)
        total = tl.load(totals + number, mask=number < lists, other=0)
        wide = total.to(starts.dtype.element_ty)
        tl.store(starts + number, pairs + tl.cumsum(wide, 0) - wide, mask=number < lists)
        count = (total + unit_pairs - 1) // unit_pairs
        end = units + tl.cumsum(count, 0)
        tl.store(unit_ends + number, end, mask=number < lists)
        for turn in range(0, tl.max(count, 0)):
            tl.store(unit_lists + end - count + turn, number, mask=turn < count)
        pairs += tl.sum(wide, 0)
        units += tl.sum(count, 0)
    tl.store(starts + lists, pairs)
    for first in range(units, most, BL):
        unit = first + tl.arange(0, BL)
        tl.store(unit_lists + unit, tl.zeros((BL,), tl.int32) + lists, mask=unit < most)


@triton.jit(do_not_specialize=["T", "K", "U", "first_tile", "num_tiles"])
def _tile_lists_kernel(
    indices, chunks, counts, slot_map,
    T, K, HR, U, first_tile, num_tiles,
    BT: tl.constexpr, KP: tl.constexpr, WIDE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """One program sorts the selected chunks of BT tokens, drops repetitions and notes who selected what."""
    begin(OVERLAPS)
    tile = tl.program_id(0)
    hr = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    N: tl.constexpr = BT * KP
    key = _sorted_keys(indices, (first_tile + tile) * BT, b, hr, T, K, HR, BT, KP, WIDE)
    found = key < (_LAST_64 if WIDE else _LAST_32)
    chunk, position = key // N, (key % N).to(tl.int32)
    order = tl.arange(0, N)
    before = tl.gather(chunk, tl.maximum(order - 1, 0), 0)
    is_first = (found & ((order == 0) | (before != chunk))).to(tl.int32)
    rank = tl.cumsum(is_first, 0) - 1
    count = tl.sum(is_first, 0)
    row = (b * HR + hr) * num_tiles + tile
    tl.store(counts + row, count)
    tl.store(counts + tl.num_programs(2) * HR * num_tiles, 0, mask=row == 0)
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
    BT: tl.constexpr, BK: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """slot_map[b, hr, indices[b, t, hr, k], t] = k."""
    begin(OVERLAPS)
    token = tl.program_id(0) * BT + tl.arange(0, BT)
    slot = tl.program_id(1) * BK + tl.arange(0, BK)
    b = (tl.program_id(2) // HR).to(tl.int64)
    hr = tl.program_id(2) % HR
    is_real = (token < T)[None, :] & (slot < K)[:, None]
    chunk = tl.load(indices + ((b * T + token[None, :]) * HR + hr) * K + slot[:, None], mask=is_real, other=-1)
    target = slot_map + ((b * HR + hr) * C + chunk) * T + token[None, :]
    value = tl.broadcast_to(slot[:, None], (BK, BT)).to(slot_map.dtype.element_ty)
    tl.store(target, value, mask=chunk >= 0)


class TileListPlan:
    """Makes the lists of `num_tiles` tiles from `first_tile` on from indices of `shape` (B, T, Hr, K), below
    num_chunks = C; overlap as in ops/_overlap.py, is_kept as in ops/_launch.py. sorted_by_warp: numbers of a tile for
    every warp that sorts them."""

    def __init__(
        self,
        shape: Sequence[int],
        tile_tokens: int,
        num_chunks: int,
        first_tile: int,
        num_tiles: int,
        overlap: Mapping[str, bool],
        *,
        is_kept: bool = False,
        sorted_by_warp: int = 256,
    ) -> None:
        batch, num_tokens, heads, slots = shape
        self.most = min(tile_tokens * slots, num_chunks)
        self.counts = (batch + 1, heads, num_tiles)
        self.chunks = (batch, heads, num_tiles, self.most)
        self.slots = (*self.chunks, tile_tokens)
        self.dtype = slot_dtype(slots)
        self.sizes = (num_tokens, slots, heads, self.most, first_tile, num_tiles)
        padded = max(FEWEST_SLOTS, triton.next_power_of_2(slots))
        self.launch = PreparedLaunch(
            _tile_lists_kernel, (num_tiles, heads, batch), is_kept=is_kept, BT=tile_tokens, KP=padded,
            WIDE=num_chunks * tile_tokens * padded >= 2**31, **overlap,
            num_warps=max(1, min(8, tile_tokens * padded // sorted_by_warp)),
        )  # fmt: skip

    @property
    def num_bytes(self) -> int:
        return math.prod(self.slots) * self.dtype.itemsize + 4 * (math.prod(self.chunks) + math.prod(self.counts))

    def __call__(self, indices: torch.Tensor) -> TileLists:
        device = indices.device
        chunks = torch.empty(self.chunks, dtype=torch.int32, device=device)
        counts = torch.empty(self.counts, dtype=torch.int32, device=device)
        slots = torch.empty(self.slots, dtype=self.dtype, device=device)
        self.launch(indices, chunks, counts, slots, *self.sizes)
        return TileLists(chunks, counts, slots)


class CoverageMapPlan:
    """Makes the slot map of full coverage, (B, Hr, C, T), from indices of `shape` (B, T, Hr, K); is_kept as in
    ops/_launch.py."""

    def __init__(
        self, shape: Sequence[int], num_chunks: int, overlap: Mapping[str, bool], *, is_kept: bool = False
    ) -> None:
        batch, num_tokens, heads, slots = shape
        self.shape, self.dtype = (batch, heads, num_chunks, num_tokens), slot_dtype(slots)
        self.sizes = (num_tokens, slots, heads, num_chunks)
        block_tokens, block_slots = 64, 16
        grid = (triton.cdiv(num_tokens, block_tokens), triton.cdiv(slots, block_slots), batch * heads)
        self.launch = PreparedLaunch(
            _slot_map_kernel, grid, is_kept=is_kept, BT=block_tokens, BK=block_slots, num_warps=4, **overlap
        )

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __call__(self, indices: torch.Tensor) -> TileLists:
        slot_map = torch.full(self.shape, -1, dtype=self.dtype, device=indices.device)
        self.launch(indices, slot_map, *self.sizes)
        return TileLists(None, None, slot_map)


class InverseListPlan:
    """Makes the inverse lists of indices of `shape` (B, T, Hr, K) in a memory of `memory_batch` rows (1 or B) and
    num_chunks = C, cut into units of `unit_pairs`; with part_tokens, those of so many tokens of every row apart from
    those of the next, part by part. is_kept as in ops/_launch.py."""

    def __init__(
        self,
        shape: Sequence[int],
        memory_batch: int,
        num_chunks: int,
        unit_pairs: int,
        overlap: Mapping[str, bool],
        *,
        part_tokens: int | None = None,
        is_kept: bool = False,
    ) -> None:
        self.batch, num_tokens, self.heads, slots = shape
        self.memory_batch, self.num_chunks, self.unit_pairs = memory_batch, num_chunks, unit_pairs
        self.num_pairs = math.prod(shape)
        self.part_tokens = num_tokens if part_tokens is None else part_tokens
        self.parts = -(-num_tokens // self.part_tokens)
        self.lists = self.parts * memory_batch * self.heads * num_chunks
        self.units = self.lists + -(-self.num_pairs // unit_pairs)
        padded = triton.next_power_of_2(slots)
        least, most = _COUNTED_KEYS
        tile = min(most, max(least, triton.next_power_of_2(num_chunks))) // padded
        part_blocks = -(-self.part_tokens // max(1, tile))
        row_blocks = self.parts * part_blocks
        is_shared = memory_batch < self.batch
        self.blocks = part_blocks * (self.batch if is_shared else 1)
        is_short = self.num_pairs < 2**31
        is_dense = self.lists * self.blocks <= _COUNTED_SHARE * self.num_pairs
        is_whole = self.parts == 1 or (tile >= 1 and self.part_tokens % tile == 0)
        self.by_counting = tile >= 1 and is_whole and is_dense and self.num_pairs <= _COUNTED_PAIRS
        self.dtype = torch.int32 if is_short else torch.int64
        self.cut = PreparedLaunch(_units_kernel, (1,), is_kept=is_kept, BL=_UNIT_LISTS, num_warps=8, **overlap)
        if self.by_counting:
            self.sizes = (num_tokens, slots, self.heads, num_chunks, self.blocks, row_blocks, part_blocks)
            is_wide = num_chunks * tile * padded >= 2**31
            constants = {
                "MEMORY_ROWS": not is_shared, "BT": tile, "KP": padded, "WIDE": is_wide,
                "num_warps": max(1, min(4, tile * padded // 256)), "is_kept": is_kept, **overlap,
            }  # fmt: skip
            grid = (row_blocks, self.heads, self.batch)
            self.num_keys, self.key_dtype = math.prod(grid) * tile * padded, torch.int64 if is_wide else torch.int32
            self.count = PreparedLaunch(_count_kernel, grid, **constants)
            self.fill = PreparedLaunch(_fill_kernel, grid, **constants)
            programs = (triton.cdiv(num_chunks, _OFFSET_LISTS), self.parts * memory_batch * self.heads)
            step = min(_OFFSET_BLOCKS, triton.next_power_of_2(self.blocks))
            self.offset = PreparedLaunch(
                _offsets_kernel, programs, BB=step, BL=_OFFSET_LISTS, num_warps=4, is_kept=is_kept, **overlap
            )

    def __call__(self, indices: torch.Tensor) -> InverseLists:
        def empty(size: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.empty(size, dtype=dtype, device=indices.device)

        starts = empty(self.lists + 1, self.dtype)
        unit_ends, unit_lists = empty(self.lists), empty(self.units)
        cut = (starts, unit_ends, unit_lists, self.lists, self.units, self.unit_pairs)
        if not self.by_counting:
            pairs, totals = self._sorted(indices)
            self.cut(totals, *cut)
        else:
            pairs, totals, counts = empty(self.num_pairs), empty(self.lists), empty(self.lists * self.blocks)
            keys = empty(self.num_keys, self.key_dtype)
            self.count(indices, keys, counts, *self.sizes)
            self.offset(counts, totals, self.num_chunks, self.blocks)
            self.cut(totals, *cut)
            self.fill(keys, counts, starts, pairs, *self.sizes)
        return InverseLists(pairs, unit_ends, starts, unit_lists, self.unit_pairs)

    def _sorted(self, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs by list from a stable sort, which keeps those of a list in the order of their tokens, so that sums
        repeat bit for bit; and the pairs of every list."""
        device, dtype = indices.device, torch.int32
        head = torch.arange(self.heads, device=device, dtype=dtype).view(1, 1, -1, 1)
        row = torch.arange(self.batch, device=device, dtype=dtype).view(-1, 1, 1, 1) * (self.memory_batch > 1)
        if self.parts > 1:
            part = torch.arange(indices.shape[1], device=device, dtype=dtype).view(1, -1, 1, 1) // self.part_tokens
            row = row + part * self.memory_batch
        # empty slots behind all lists
        key = torch.where(indices >= 0, indices + (row * self.heads + head) * self.num_chunks, self.lists).flatten()
        ordered, pairs = torch.sort(key.to(torch.int16) if self.lists < 2**15 else key, stable=True)
        boundaries = torch.arange(self.lists + 1, device=device, dtype=ordered.dtype)
        totals = torch.searchsorted(ordered, boundaries).diff()
        return pairs.to(self.dtype), totals.to(dtype)
