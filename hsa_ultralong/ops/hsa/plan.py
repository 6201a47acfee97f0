"""What hsa_attention's host code decides from shapes alone, once: tiles, grids, constants, launches of the kernels.

A plan holds no tensors. Equal shapes, dtypes and devices share one (`plan_of`), so a call of a shape that was seen
before does no arithmetic of its own and binds no arguments (ops/_launch.py): rows of 4K to 16K tokens wait for the host
otherwise. Called by triton_attention.py; how each choice was measured: docs/kernels.md. tests/ops/test_launches.py.
"""

from __future__ import annotations

import math
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._launch import PreparedLaunch
from hsa_ultralong.ops._overlap import overlap
from hsa_ultralong.ops._triton import (
    HOPPER_MEMORY,
    next_power_of_two,
    num_processors,
    runs_hopper_kernels,
    shared_memory,
)
from hsa_ultralong.ops.hsa import kernel_chunks, kernel_exact, kernel_tiles
from hsa_ultralong.ops.hsa.kernel_lists import FEWEST_SLOTS, CoverageMapPlan, InverseListPlan, TileListPlan

# slot maps of one launch; longer inputs take several
_LAUNCH_BYTES = 1 << 27
# lists that a forward leaves to its backward: those of short rows, which wait for launches
_KEPT_BYTES = 1 << 24
# logsumexp and delta of every row and slot that dq leaves to dk and dv; longer rows form them again
_NORM_BYTES = 1 << 29
# pairs of a row's tokens and slots from which on one pass takes all gradients on Hopper; bytes of what the pairs of a
# part of the tokens add to dq, which must be so many pairs for every chunk at least; a part is a multiple of so many
# tokens
_PARTED_PAIRS, _PARTS_BYTES, _PARTS_PAIRS, _PART_STEP = 1 << 16, 1 << 30, 128, 64
# groups of warps of a program on Hopper, places of each for rows under way, registers of a thread of theirs
_HOPPER = {"GROUPS": 2, "STAGES": 4, "REGISTERS": 240}
# whether the forward over lists has a kernel of its own on Hopper; pairs of a row from which on it is faster, tokens of
# its tiles, places of its ring, registers of a thread; numbers that a warp sorts in its lists
HOPPER_FORWARD = True
_HOPPER_PAIRS = 1 << 18
_HOPPER_TOKENS = 16
_HOPPER_FORWARD = {"STAGES": 12, "REGISTERS": 112}
_HOPPER_SORTED = 128
# slots whose shares in dq are added up at a time
_SUMMED_SLOTS = 8
# longest list that one program sorts: tokens of a tile * slots
_SORT_LIMIT = 4096
# tiles that one program looks at for what is not finite: few programs where there is none, enough where all are spoiled
_SPOILED_SHARE = 32
# a tile walks every chunk, without lists, when a token reads at least this share of them
_COVERAGE_SHARE = 0.6


class HSALaunch(NamedTuple):
    """Rows of a tile (tokens * heads), warps and software-pipelining stages of one kernel."""

    rows: int
    warps: int
    stages: int


def launch_options(kind: str, dim: int, size: int, dtype: torch.dtype, memory: int) -> HSALaunch:
    """Measured on an H200 (docs/kernels.md), smaller where a card has less shared memory; kind is "forward", "query",
    "memory" or "transposed", memory the bytes of shared memory that a program may use."""
    is_large = dim > 64 or size > 64
    if dtype == torch.float32:
        return HSALaunch(16, 8, 1) if is_large else HSALaunch(32, 8, 1)
    if kind in ("memory", "transposed"):
        if is_large:
            return HSALaunch(64 if dim + size < 256 or memory >= HOPPER_MEMORY else 32, 8, 1)
        return HSALaunch(128, 4, 2)
    if is_large:
        return HSALaunch(64, 8, 1)
    return HSALaunch(64, 4, 2)


def pairs_of_unit(num_pairs: int, tile_tokens: int, processors: int) -> int:
    """Pairs of a full unit of dk and dv: many units for every processor, but each of many tiles."""
    return max(32 * tile_tokens, next_power_of_two(num_pairs // (8 * processors)))


class HSAShapes(NamedTuple):
    """All that a plan follows from; `dtypes` are those of q, indices, weights and lengths, is_aligned that of
    ops/_launch.py for all operands."""

    q: torch.Size
    k: torch.Size
    indices: torch.Size
    lengths: torch.Size | None
    dtypes: tuple[torch.dtype | None, ...]
    device: torch.device
    chunk_size: int
    scale: float
    causal: bool
    is_aligned: bool


class TilePass(NamedTuple):
    """One launch of a kernel of kernel_tiles.py over some of the tiles, with what makes their lists and what mends
    spoiled tiles; `sizes` are the numbers that both take, num_spoiled the rows of all tiles, hopper_tiles their number
    in a launch of kernel_hopper_forward.py."""

    lists: TileListPlan | CoverageMapPlan
    kernel: PreparedLaunch
    mend: PreparedLaunch
    sizes: tuple[int, ...]
    num_spoiled: int
    hopper_tiles: int = 0


class ListedPass(NamedTuple):
    """dk and dv by inverse lists: `shape` of the workspace, `sizes` of the first kernel, which is `transposed` where dq
    left norms."""

    lists: InverseListPlan
    kernel: PreparedLaunch
    transposed: PreparedLaunch
    total: PreparedLaunch
    shape: tuple[int, ...]
    sizes: tuple[int, ...]
    total_sizes: tuple[int, ...]


class PartPass(NamedTuple):
    """All gradients that `tokens` tokens of every row from `first` on bring: shapes of the workspace and of what pairs
    add to dq (one more, which nobody reads), numbers of the three kernels."""

    first: int
    tokens: int
    kernel: PreparedLaunch
    slot_sum: PreparedLaunch
    total: PreparedLaunch
    shape: tuple[int, ...]
    shares: tuple[int, ...]
    sizes: tuple[int, ...]
    sum_sizes: tuple[int, ...]
    total_sizes: tuple[int, ...]


class CoveredPass(NamedTuple):
    """dk and dv of full coverage: `shape` of the workspace, splits of a chunk's tokens and tokens of each."""

    lists: CoverageMapPlan
    kernel: PreparedLaunch
    total: PreparedLaunch
    shape: tuple[int, ...]
    splits: int
    unit_tokens: int


class HSAPlan:
    """Sizes and launches for operands of some shapes; letters as in docs/architecture.md."""

    def __init__(self, shapes: HSAShapes) -> None:
        self.shapes, self.scale, self.causal = shapes, shapes.scale, shapes.causal
        self.batch, self.tokens, heads, self.dim = shapes.q
        self.dtype, self.size = shapes.dtypes[0], shapes.chunk_size
        self.kv_batch, self.chunks, self.kv_heads = shapes.k[0], shapes.k[1] // self.size, shapes.k[2]
        self.group = heads // self.kv_heads
        self.list_heads, self.slots = shapes.indices[2:]
        self.heads = (self.kv_heads, self.list_heads)
        self.covers = self.slots >= _COVERAGE_SHARE * self.chunks
        self.scale_log2 = self.scale * math.log2(math.e)
        self.processors = num_processors(shapes.device.index)
        self.shared_bytes = shared_memory(shapes.device.index)
        self.overlap = overlap(shapes.device.index)

    def tile(self, rows: int) -> tuple[int, int]:
        """(tokens of a tile, padded heads); few enough tokens that one program can sort their chunks."""
        padded = next_power_of_two(self.group)
        tokens = max(1, rows // padded)
        if not self.covers:
            tokens = min(tokens, max(1, _SORT_LIMIT // max(FEWEST_SLOTS, next_power_of_two(self.slots))))
        # a matrix unit takes at least 16 rows
        return tokens, max(padded, 16 // tokens)

    def constants(self, rows: int, stages: int) -> dict[str, Any]:
        tokens, padded = self.tile(rows)
        lengths = self.shapes.lengths
        return {
            "G": self.group, "GP": padded, "D": self.dim, "S": self.size, "BT": tokens,
            "LENGTH_BATCH": lengths is not None and lengths[0] > 1, "HAS_LENGTHS": lengths is not None,
            "PRECISION": "ieee" if self.dtype == torch.float32 else "tf32", "STAGES": stages,
            "is_kept": self.shapes.is_aligned,
        }  # fmt: skip

    def _options(self, kind: str) -> HSALaunch:
        assert self.dtype is not None
        return launch_options(kind, self.dim, self.size, self.dtype, self.shared_bytes)

    def _launches(self, tile_tokens: int) -> list[tuple[int, int]]:
        """(first tile, number of tiles) of launches whose slot maps fit the workspace."""
        tiles = -(-self.tokens // tile_tokens)
        if self.covers:
            return [(0, tiles)]
        widest = min(tile_tokens * self.slots, self.chunks)
        per_tile = self.batch * self.list_heads * widest * (2 * tile_tokens + 4)
        step = max(1, _LAUNCH_BYTES // per_tile)
        return [(first, min(step, tiles - first)) for first in range(0, tiles, step)]

    def _passes(self, kind: str, kernel: Any) -> list[TilePass]:
        options = self._options(kind)
        constants = self.constants(options.rows, options.stages)
        flags = {"KV_BATCH": self.kv_batch > 1, "COVERAGE": self.covers, "CAUSAL": self.causal, **self.overlap}
        mending = {name: value for name, value in constants.items() if name not in ("GP", "PRECISION", "STAGES")}
        rows = constants["BT"] * constants["GP"]
        passes = []
        for first, count in self._launches(constants["BT"]):
            lists = self._coverage if self.covers else self._tile_lists(constants["BT"], first, count)
            widest = lists.most if isinstance(lists, TileListPlan) else 0
            grid = (count, self.kv_heads, self.batch)
            sizes = (self.tokens, self.chunks, self.slots, widest, first, count)
            launch = PreparedLaunch(kernel, grid, num_warps=options.warps, **flags, **constants)
            shares = (-(-count // _SPOILED_SHARE), self.kv_heads, self.batch)
            mend = PreparedLaunch(
                kernel_exact.spoiled_tiles_kernel, shares, **flags, **mending, M=rows, SHARE=_SPOILED_SHARE
            )
            passes.append(TilePass(lists, launch, mend, sizes, self.batch * self.kv_heads * count * rows))
        return passes

    def _hopper_passes(self) -> list[TilePass]:
        from hsa_ultralong.ops.hsa.kernel_hopper_forward import hopper_forward_kernel

        tokens, rows = _HOPPER_TOKENS, _HOPPER_TOKENS * self.group
        flags = {"KV_BATCH": self.kv_batch > 1}
        constants = self.constants(rows, 1)
        mending = {name: value for name, value in constants.items() if name not in ("GP", "PRECISION", "STAGES")}
        mending |= {"COVERAGE": False, "CAUSAL": self.causal, "M": rows, **flags, **self.overlap}
        share = max(1, _SPOILED_SHARE * 64 // rows)
        passes = []
        for first, count in self._launches(tokens):
            lists = self._tile_lists(tokens, first, count, sorted_by_warp=_HOPPER_SORTED)
            tiles = count * self.kv_heads * self.batch
            grid = (min(tiles, self.processors),)
            launch = PreparedLaunch(
                hopper_forward_kernel, grid, num_warps=4, is_kept=self.shapes.is_aligned, **flags, **self.overlap,
                **_HOPPER_FORWARD,
            )  # fmt: skip
            shares = (-(-count // share), self.kv_heads, self.batch)
            mend = PreparedLaunch(kernel_exact.spoiled_tiles_kernel, shares, SHARE=share, **mending)
            sizes = (self.tokens, self.chunks, self.slots, lists.most, first, count)
            passes.append(TilePass(lists, launch, mend, sizes, tiles * rows, tiles))
        return passes

    def _tile_lists(self, tile_tokens: int, first: int, count: int, **options: int) -> TileListPlan:
        shape, is_kept = self.shapes.indices, self.shapes.is_aligned
        return TileListPlan(shape, tile_tokens, self.chunks, first, count, self.overlap, is_kept=is_kept, **options)

    @cached_property
    def _coverage(self) -> CoverageMapPlan:
        return CoverageMapPlan(self.shapes.indices, self.chunks, self.overlap, is_kept=self.shapes.is_aligned)

    @cached_property
    def forward(self) -> list[TilePass]:
        if self.takes_hopper_forward:
            return self._hopper_passes()
        return self._passes("forward", kernel_tiles.forward_kernel)

    @cached_property
    def query(self) -> list[TilePass]:
        return self._passes("query", kernel_tiles.query_gradient_kernel)

    @cached_property
    def keeps_lists(self) -> bool:
        """Whether the backward finds the lists of the forward: it reads them, they are small and its tiles the same."""
        if self.part_tokens or self.takes_hopper_forward:
            return False
        if len(self.forward) > 1 or self.forward[0].lists.num_bytes > _KEPT_BYTES:
            return False
        return self.covers or self.tile(self._options("forward").rows) == self.tile(self._options("query").rows)

    @cached_property
    def norms(self) -> tuple[int, ...] | None:
        """Shape of the logsumexp and of the delta that dq leaves to dk and dv, (B, T, Hkv, K, G); None: it does not."""
        shape = (self.batch, self.tokens, self.kv_heads, self.slots, self.group)
        return None if self.covers or 8 * math.prod(shape) > _NORM_BYTES else shape

    @cached_property
    def memory(self) -> ListedPass | CoveredPass:
        options = self._options("memory")
        constants = {**self.constants(options.rows, options.stages), "num_warps": options.warps, **self.overlap}
        return self._covered(constants) if self.covers else self._listed(constants)

    def _listed(self, constants: dict[str, Any]) -> ListedPass:
        is_kept = self.shapes.is_aligned
        other = self._options("transposed")
        unit_pairs = pairs_of_unit(math.prod(self.shapes.indices), constants["BT"], self.processors)
        lists = InverseListPlan(
            self.shapes.indices, self.kv_batch, self.chunks, unit_pairs, self.overlap, is_kept=is_kept
        )
        shares = self.kv_heads // self.list_heads
        grid = (lists.units, shares)
        return ListedPass(
            lists,
            PreparedLaunch(kernel_chunks.listed_memory_gradient_kernel, grid, **constants),
            PreparedLaunch(
                kernel_chunks.listed_memory_gradient_kernel, grid,
                **self.constants(other.rows, other.stages), num_warps=other.warps, **self.overlap,
            ),
            PreparedLaunch(
                kernel_chunks.listed_sum_kernel, (lists.lists, shares), is_kept=is_kept, D=self.dim, S=self.size,
                GROUPS=1, ADDS=False, IS_LAST=True, num_warps=8, **self.overlap,
            ),
            (*grid, 2, self.size, self.dim),
            (self.chunks, self.slots, lists.lists, unit_pairs),
            (0, lists.lists, self.chunks),
        )  # fmt: skip

    @cached_property
    def part_tokens(self) -> int:
        """Tokens of every row whose gradients come from one pass over their pairs; 0 where two passes take less, where
        the one is not there, and where rows are so long that a part has few pairs for a chunk."""
        pairs = self.tokens * self.list_heads * self.slots
        if self.covers or pairs < _PARTED_PAIRS or not self.takes_hopper:
            return 0
        assert self.dtype is not None
        token_bytes = self.batch * self.kv_heads * self.slots * self.group * self.dim * self.dtype.itemsize
        # blocks of tokens that are counted for lists lie in one part
        most = _PARTS_BYTES // token_bytes // _PART_STEP * _PART_STEP
        lists = self.kv_batch * self.list_heads * self.chunks
        if not most or most * self.batch * self.list_heads * self.slots < _PARTS_PAIRS * lists:
            return 0
        step = -(-self.tokens // -(-self.tokens // most))
        return min(-(-step // _PART_STEP) * _PART_STEP, self.tokens)

    @cached_property
    def part_lists(self) -> InverseListPlan:
        """Of all parts, one after the other."""
        batch, _, heads, slots = self.shapes.indices
        pairs = batch * self.part_tokens * heads * slots
        unit_pairs = pairs_of_unit(pairs, self.tile(self._options("memory").rows)[0], self.processors)
        return InverseListPlan(
            self.shapes.indices, self.kv_batch, self.chunks, unit_pairs, self.overlap, part_tokens=self.part_tokens,
            is_kept=self.shapes.is_aligned,
        )  # fmt: skip

    @cached_property
    def parts(self) -> list[PartPass]:
        step = self.part_tokens
        return [self._part(number, min(step, self.tokens - number * step)) for number in range(self.part_lists.parts)]

    def _part(self, number: int, tokens: int) -> PartPass:
        from hsa_ultralong.ops.hsa.kernel_hopper import listed_gradient_kernel

        lists, is_kept, first = self.part_lists, self.shapes.is_aligned, number * self.part_tokens
        of_part, shares = lists.lists // lists.parts, self.kv_heads // self.list_heads
        units = of_part + -(-self.batch * tokens * self.list_heads * self.slots // lists.unit_pairs)
        pairs = self.batch * tokens * self.kv_heads * self.slots
        place = (first, tokens, self.tokens)
        return PartPass(
            first, tokens,
            PreparedLaunch(
                listed_gradient_kernel, (units, shares), num_warps=4, K=self.slots, HAS_ROWS=self.batch > 1,
                is_kept=is_kept, **_HOPPER,
            ),
            PreparedLaunch(
                kernel_chunks.slot_sum_kernel, (self.batch * tokens, self.kv_heads), G=self.group,
                N=next_power_of_two(self.group * self.dim), KP=next_power_of_two(self.slots), STEP=_SUMMED_SLOTS,
                D=self.dim, num_warps=4, is_kept=is_kept, **self.overlap,
            ),
            PreparedLaunch(
                kernel_chunks.listed_sum_kernel, (of_part, shares), D=self.dim, S=self.size, GROUPS=_HOPPER["GROUPS"],
                ADDS=number > 0, IS_LAST=number == lists.parts - 1, num_warps=8, is_kept=is_kept, **self.overlap,
            ),
            (units, shares, _HOPPER["GROUPS"], 2, self.size, self.dim),
            (pairs + 1, self.group, self.dim),
            (number, *place, self.chunks, of_part, lists.unit_pairs, pairs),
            (*place, self.slots),
            (number, of_part, self.chunks),
        )  # fmt: skip

    @cached_property
    def takes_hopper(self) -> bool:
        """Whether the kernels of kernel_hopper.py take these shapes, and run here."""
        shapes = self.shapes
        is_fit = self.dim == self.size == 64 and self.group == 16 and shapes.lengths is None and shapes.is_aligned
        is_narrow = self.dtype in (torch.bfloat16, torch.float16)
        is_short = max(math.prod(shapes.q), self.batch * self.tokens * self.kv_heads * self.slots) < 2**31
        return is_fit and is_narrow and is_short and runs_hopper_kernels(shapes.device.index)

    @cached_property
    def takes_hopper_forward(self) -> bool:
        """Whether kernel_hopper_forward.py takes the forward; one program sorts a tile's list."""
        pairs = self.tokens * self.list_heads * self.slots
        if not HOPPER_FORWARD or self.covers or pairs < _HOPPER_PAIRS or not self.takes_hopper:
            return False
        return _HOPPER_TOKENS * max(FEWEST_SLOTS, next_power_of_two(self.slots)) <= _SORT_LIMIT

    def _covered(self, constants: dict[str, Any]) -> CoveredPass:
        tile_tokens = constants["BT"]
        programs = self.batch * self.kv_heads * self.chunks
        wanted = -(-8 * self.processors // programs)
        splits = max(1, min(wanted, self.tokens // (32 * tile_tokens)))
        unit_tokens = -(-self.tokens // (splits * tile_tokens)) * tile_tokens
        splits = -(-self.tokens // unit_tokens)
        flags = {"KV_BATCH": self.kv_batch > 1, "CAUSAL": self.causal}
        return CoveredPass(
            self._coverage,
            PreparedLaunch(
                kernel_chunks.covered_memory_gradient_kernel, (self.chunks * splits, self.kv_heads, self.batch),
                **flags, **constants,
            ),
            PreparedLaunch(
                kernel_chunks.covered_sum_kernel, (self.chunks, self.kv_heads, self.kv_batch),
                is_kept=self.shapes.is_aligned, D=self.dim, S=self.size, BT=tile_tokens, num_warps=8, **flags,
                **self.overlap,
            ),
            (self.batch, self.kv_heads, self.chunks, splits, 2, self.size, self.dim),
            splits,
            unit_tokens,
        )  # fmt: skip


@lru_cache(maxsize=256)
def plan_of(shapes: HSAShapes) -> HSAPlan:
    """The one plan of these shapes."""
    return HSAPlan(shapes)
