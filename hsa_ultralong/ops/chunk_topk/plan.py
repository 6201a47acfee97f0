"""What chunk_topk's host code decides from shapes alone, once: tiles, grids, constants, launches of the kernels.

A plan holds no tensors; equal shapes, dtypes and devices share one (`plan_of`), and its launches bind no arguments
(ops/_launch.py). Called by triton_topk.py; how each choice was measured: docs/kernels.md. tests/ops/test_launches.py.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._launch import PreparedLaunch
from hsa_ultralong.ops._triton import HOPPER_MEMORY, next_power_of_two, runs_hopper_kernels, shared_memory, starts_early
from hsa_ultralong.ops.chunk_topk import kernel_decode, kernel_merge, kernel_select

# K up to which blocks merge into sorted lists, and new candidates of a block that are inserted one by one
_MOST_INSERTED, _FEW = 32, 6
# shares of the landmarks that the last kernel of decoding chooses from
_MOST_SHARES = 4096
# the last kernel is compiled for so many, so that memories of any size meet few forms of it
_FORMS_OF_SHARES = (16, 512, _MOST_SHARES)
# dimensions that a kernel holds of a landmark at a time
_SLAB = 256
# dimensions up to which the streaming kernel loads landmarks ahead
_MOST_AHEAD = 512
# whether kernel_hopper.py scans many landmarks on Hopper; its shares, which are programs, one a multiprocessor; chunks
# of a tile, of a copy, bytes of all tiles of a ring; dimensions of the landmarks and most K that it is meant for
_STREAMS, _STREAM_SHARES, _STREAM_TILE, _STREAM_BOX, _STREAM_RING = True, 128, 64, 32, 192 * 1024
_STREAM_DIMS, _STREAM_KEPT = (256, 512, 1024), 32
# warps of its programs and of choose_kernel; the best candidates of a share that the first lists for the second
_STREAM_WARPS, _CHOOSE_WARPS, _STREAM_LISTED = 4, 8, 4


class TileOptions(NamedTuple):
    """Tokens and landmarks of a tile, warps of its program, dimensions that it holds of both at a time."""

    tokens: int
    chunks: int
    warps: int
    slab: int = _SLAB


class DecodeOptions(NamedTuple):
    """Chunks of a tile; chunks that a program of the scan scores, of many chunks; programs wanted for fewer; its stages
    and warps, warps of the last kernel."""

    tile: int = 64
    share: int = 512
    programs: int = 512
    stages: int = 4
    scan_warps: int = 4
    last_warps: int = 16


def tile_options(kind: str, kept: int, queries: int, dim: int, width: int, memory: int) -> TileOptions:
    """Measured on an H200 (docs/kernels.md), smaller where a card has less shared memory.

    Args:
        kind: "cover", "stream" or "merge"; kept: the padded K of the latter two.
        dim: of a landmark, padded; width: bytes of a number; memory: bytes of shared memory that a program may use.
    """
    if kind == "merge":
        tokens, chunks = 64, max(32, kept)
        # all dimensions of the queries stay in shared memory; of the landmarks a slab, or all if they are loaded ahead
        held = chunks * (dim if dim <= _MOST_AHEAD else _SLAB)
        while tokens > 16 and (tokens * dim + held) * width + 2560 > memory:
            tokens //= 2
        return TileOptions(tokens, chunks, tokens // 16)
    if kind == "stream" and kept > 64:
        options = TileOptions(16, kept, 8)
    else:
        # few queries need small tiles to fill the device, many are faster in tiles that fit the wide matrix units;
        # those of a card before Hopper spill over wide landmarks
        is_large = kind == "stream" and queries > 16_384 and (dim <= _SLAB or memory >= HOPPER_MEMORY)
        options = TileOptions(64, 64, 8) if is_large else TileOptions(16, 64, 4)
    slab = min(_SLAB, dim)
    # the queries' first slab and the one in use
    while slab > 16 and (options.tokens * (1 + (slab < dim)) + options.chunks) * slab * width > memory:
        slab //= 2
    return options._replace(slab=slab)


def _scan_bytes(tile: int, stages: int, dim: int, width: int) -> int:
    """Shared memory of a program of the scan, at most: stages - 1 tiles of whole landmarks, and queries, ahead."""
    row = dim * width
    slab = row if width == 1 else min(dim, _SLAB) * width
    ahead = tile * (row + 8) + 16 * (row - slab)
    return (stages - 1) * ahead + 16 * slab + 64 * tile + (2048 if width == 4 and dim > _SLAB else 0)


def decode_options(kept: int, dim: int, width: int, memory: int) -> DecodeOptions:
    """Measured on an H200 (docs/kernels.md), fewer stages or smaller tiles where a card has less shared memory.

    Args:
        kept: the padded K. dim: of a landmark, padded; width: bytes of a number.
        memory: bytes of shared memory that a program may use.
    """
    # a stage of the pipeline holds whole landmarks
    tile, stages = (32, 3) if dim * width >= 1024 else (64 if kept <= 64 else 32, 4)
    while stages > 2 and _scan_bytes(tile, stages, dim, width) > memory:
        stages -= 1
    while tile > 16 and _scan_bytes(tile, stages, dim, width) > memory:
        tile //= 2
    return DecodeOptions(tile=tile, stages=stages, last_warps=32 if (dim, width) == (512, 2) else 16)


def _share(chunks: int, options: DecodeOptions) -> int:
    """Chunks that a program of the scan scores: few chunks are spread over the programs that the device runs at once,
    many are cut as coarsely as they need."""
    share = min(options.share, max(options.tile, next_power_of_two(-(-chunks // options.programs))))
    return max(share, next_power_of_two(-(-chunks // _MOST_SHARES)))


def _form_of_shares(shares: int) -> int:
    return next(count for count in _FORMS_OF_SHARES if count >= shares)


def chunks_of_all_forms(topk: int, dim: int, width: int, memory: int) -> list[int]:
    """Numbers of chunks that meet every form of the kernels of decoding, ascending; above the last there are no others
    up to _MOST_SHARES times DecodeOptions.share chunks, which is 134M tokens of chunks of 64.

    Args:
        dim: of a landmark, padded to a power of two; width: bytes of a number.
        memory: bytes of shared memory that a program may use on the card.
    """
    options = decode_options(max(2, next_power_of_two(topk)), dim, width, memory)
    found: dict[tuple[int, int], int] = {}
    count = topk + 1
    while count <= options.share * _MOST_SHARES:
        share = _share(count, options)
        found.setdefault((share, _form_of_shares(-(-count // share))), count)
        # the next size at which anything can change
        count = share * (-(-count // share)) + 1
    return sorted(found.values())


class TopkShapes(NamedTuple):
    """All that a plan follows from; `dtypes` are those of query, landmarks, the scales of 8-bit landmarks (None: there
    are none), then of what says who sees what; is_aligned that of ops/_launch.py for all operands."""

    query: torch.Size
    landmarks: torch.Size
    chunk_rows: int
    foreign: str
    dtypes: tuple[torch.dtype | None, ...]
    keep: int
    device: torch.device
    is_aligned: bool


class Scan(NamedTuple):
    """The two launches of decoding: widths of the candidates that the first leaves, and of room for the second, and
    both kernels' numbers."""

    scan: PreparedLaunch
    finish: PreparedLaunch
    widths: tuple[int, ...]
    scan_sizes: tuple[int, ...]
    finish_sizes: tuple[int, ...]


class TopkPlan:
    """Sizes and launches for operands of some shapes; letters as in docs/architecture.md."""

    def __init__(self, shapes: TopkShapes) -> None:
        self.shapes, self.keep, self.chunks = shapes, shapes.keep, shapes.landmarks[1]
        self.batch, self.tokens, self.heads, self.dim = shapes.query
        self.queries = self.batch * self.tokens * self.heads
        self.out_shape = (self.batch, self.tokens, self.heads, self.keep)
        self.sizes = (self.tokens, self.chunks, self.keep, self.heads)
        padded = max(16, next_power_of_two(self.dim))
        self.rows: dict[str, Any] = {"LANDMARK_ROWS": shapes.landmarks[0] > 1}
        self.dims: dict[str, Any] = {"R": self.dim, "RP": padded, "RS": min(_SLAB, padded)}
        self.constants: dict[str, Any] = {
            "FOREIGN": kernel_select.FOREIGN_NUMBER[shapes.foreign], "CHUNK_ROWS": shapes.chunk_rows > 1,
            "PRECISION": "ieee" if shapes.dtypes[0] == torch.float32 else "tf32", "is_kept": shapes.is_aligned,
            **self.rows, **self.dims,
        }  # fmt: skip

    def _tile(self, kind: str, kept: int) -> tuple[TileOptions, dict[str, Any]]:
        """The tile of a kernel, and its constants."""
        shapes, padded = self.shapes, self.dims["RP"]
        assert shapes.dtypes[1] is not None
        width, memory = shapes.dtypes[1].itemsize, shared_memory(shapes.device.index)
        options = tile_options(kind, kept, self.queries, padded, width, memory)
        return options, {**self.constants, "RS": min(options.slab, padded)}

    def _grid(self, tile: int) -> tuple[int, int, int]:
        return (-(-self.tokens // tile), self.heads, self.batch)

    @cached_property
    def cover(self) -> PreparedLaunch:
        options, constants = self._tile("cover", 0)
        return PreparedLaunch(
            kernel_select.cover_kernel, self._grid(options.tokens), BT=options.tokens, BC=options.chunks,
            num_warps=options.warps, **constants,
        )  # fmt: skip

    def _stream(self, noise: str) -> PreparedLaunch:
        kept = next_power_of_two(self.keep)
        is_merged = kept <= _MOST_INSERTED
        options, constants = self._tile("merge" if is_merged else "stream", kept)
        kernel = kernel_select.select_kernel
        more: dict[str, Any] = {}
        if is_merged:
            kept, kernel = max(2, kept), kernel_merge.merge_select_kernel
            more = {"FEW": _FEW, "STAGES": 2 if self.dims["RP"] <= _MOST_AHEAD else 1}
        return PreparedLaunch(
            kernel, self._grid(options.tokens), BT=options.tokens, BC=max(options.chunks, kept), KP=kept,
            NOISE=kernel_select.NOISE_NUMBER[noise], num_warps=options.warps, **more, **constants,
        )  # fmt: skip

    @cached_property
    def stream(self) -> PreparedLaunch:
        return self._stream("none")

    @cached_property
    def noisy_stream(self) -> PreparedLaunch:
        return self._stream("given")

    @cached_property
    def stored_noise_stream(self) -> PreparedLaunch:
        """noisy_stream with an int64 tensor () as its seed."""
        return self._stream("stored")

    @cached_property
    def kept_scores(self) -> PreparedLaunch:
        return PreparedLaunch(
            kernel_select.kept_scores_kernel, (self.queries,), is_kept=self.shapes.is_aligned, BK=16, num_warps=2,
            **self.rows, **self.dims,
        )  # fmt: skip

    @property
    def _readers(self) -> tuple[int, int]:
        """Queries that read the same landmarks are scored together: rows of the landmarks, queries of each."""
        is_shared = not (self.rows["LANDMARK_ROWS"] or self.constants["CHUNK_ROWS"])
        return (1, self.batch * self.tokens) if is_shared else (self.batch, self.tokens)

    @property
    def stream_tile(self) -> tuple[int, int]:
        """Chunks of a tile of kernel_hopper.py, and of a copy."""
        tile = min(_STREAM_TILE, 32_768 // self.dim)
        return tile, min(tile, _STREAM_BOX)

    @cached_property
    def takes_stream(self) -> bool:
        """Whether the scan of kernel_hopper.py takes these shapes, and runs here."""
        shapes = self.shapes
        is_narrow = shapes.dtypes[1] in (torch.bfloat16, torch.float16) and shapes.dtypes[2] is None
        if not (_STREAMS and is_narrow and self.dim in _STREAM_DIMS and self.keep <= _STREAM_KEPT):
            return False
        rows = max(shapes.landmarks[0], shapes.chunk_rows)
        is_long = _STREAM_SHARES * self.stream_tile[0] <= self.chunks < (2**31 - 2**20) // rows
        is_plain = set(shapes.dtypes[3:]) == {torch.int32} and shapes.is_aligned
        # a bulk copy begins at a multiple of 16 bytes, also of the places of a later row
        is_plain = is_plain and (not self.constants["CHUNK_ROWS"] or self.chunks % 4 == 0)
        return is_long and is_plain and runs_hopper_kernels(shapes.device.index)

    @cached_property
    def streamed(self) -> Scan:
        """Decoding where takes_stream says so."""
        from hsa_ultralong.ops.chunk_topk.kernel_hopper import stream_scan_kernel

        (tile, box), shares, kept = self.stream_tile, _STREAM_SHARES, max(16, next_power_of_two(self.keep))
        rows, queries = self._readers
        tiles, limit, is_early = -(-self.chunks // tile), 4 * _STREAM_KEPT, starts_early(self.shapes.device.index)
        scan = PreparedLaunch(
            stream_scan_kernel, (shares, rows * self.heads, -(-queries // 16)), R=self.dim, BQ=16, TILE=tile,
            BOX=box, SHARES=shares, STAGES=_STREAM_RING // (2 * self.dim * tile), LISTED=_STREAM_LISTED,
            FOREIGN=self.constants["FOREIGN"], CHUNK_ROWS=self.constants["CHUNK_ROWS"], **self.rows,
            num_warps=_STREAM_WARPS, OVERLAPS=is_early, launch_pdl=is_early,
        )  # fmt: skip
        finish = PreparedLaunch(
            kernel_decode.choose_kernel, (self.queries,), KP=kept, SHARES=shares, TILE=tile, LISTED=_STREAM_LISTED,
            LIMIT=limit, num_warps=_CHOOSE_WARPS, OVERLAPS=is_early, launch_pdl=is_early,
        )  # fmt: skip
        return Scan(
            scan, finish, (tiles * tile, shares * tile, (_STREAM_LISTED + 1) * shares, 2 * limit),
            (self.chunks, self.heads, queries, tiles * tile, tiles),
            (self.chunks, self.keep, -(-tiles // shares), tiles * tile, queries, self.heads),
        )  # fmt: skip

    @cached_property
    def decode(self) -> Scan:
        # one best candidate alone is none of tl.topk's forms
        shapes, kept = self.shapes, max(2, next_power_of_two(self.keep))
        assert shapes.dtypes[1] is not None
        has_scales = shapes.dtypes[2] is not None
        width, memory = shapes.dtypes[1].itemsize, shared_memory(shapes.device.index)
        options = decode_options(kept, self.dims["RP"], width, memory)
        tile = options.tile
        needed = _scan_bytes(tile, options.stages, self.dims["RP"], width)
        if needed > memory:
            raise ValueError(
                f'chunk_topk: impl="triton" for few queries of R={self.dim} in {shapes.dtypes[1]} takes {needed:,} '
                f'bytes of shared memory, this card has {memory:,}; use bf16, fp16 or impl="auto"'
            )
        rows, queries = self._readers
        share = _share(self.chunks, options)
        shares = -(-self.chunks // share)
        padded = shares * share
        constants, at_once = self.constants, 16
        if has_scales:
            # products of 8-bit numbers take 32 dimensions at least
            at_once, constants = 8, {**constants, "RP": max(32, self.dims["RP"])}
        # a single tile has nothing to load ahead
        scan = PreparedLaunch(
            kernel_decode.scan_kernel, (shares, rows * self.heads, -(-queries // at_once)), BQ=at_once, TILE=tile,
            SHARE=share, STAGES=1 if share == tile else options.stages, HAS_SCALES=has_scales,
            num_warps=options.scan_warps, **constants,
        )  # fmt: skip
        all_shares = _form_of_shares(shares)
        kept_shares = min(kept, all_shares)
        kept_lanes = min(kept, kept_shares * tile)
        finish = PreparedLaunch(
            kernel_decode.finish_kernel, (self.queries,), is_kept=shapes.is_aligned,
            KP=min(kept, kept_lanes * (share // tile)), SHARES=all_shares, KS=kept_shares, KL=kept_lanes,
            SHARE=share, TILE=tile, num_warps=options.last_warps,
        )  # fmt: skip
        return Scan(
            scan, finish, (padded, shares * tile, shares), (self.chunks, self.heads, queries, padded),
            (shares, padded, self.keep, queries, self.heads),
        )  # fmt: skip


@lru_cache(maxsize=256)
def plan_of(shapes: TopkShapes) -> TopkPlan:
    """The one plan of these shapes."""
    return TopkPlan(shapes)
