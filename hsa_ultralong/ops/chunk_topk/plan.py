"""What chunk_topk's host code decides from shapes alone, once: tiles, grids, constants, launches of the kernels.

A plan holds no tensors; equal shapes, dtypes and devices share one (`plan_of`), and its launches bind no arguments
(ops/_launch.py). Called by triton_topk.py; how each choice was measured: docs/kernels.md. tests/ops/test_launches.py.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._launch import PreparedLaunch
from hsa_ultralong.ops._triton import next_power_of_two
from hsa_ultralong.ops.chunk_topk import kernel_decode, kernel_merge, kernel_select

# K up to which blocks merge into sorted lists, and new candidates of a block that are inserted one by one
_MOST_INSERTED, _FEW = 32, 6
# shares of the landmarks that the last kernel of decoding chooses from
_MOST_SHARES = 4096
# dimensions that a kernel holds of a landmark at a time
_SLAB = 256


class TileOptions(NamedTuple):
    """Tokens and landmarks of a tile, and warps of its program."""

    tokens: int
    chunks: int
    warps: int


class DecodeOptions(NamedTuple):
    """Chunks of a tile; chunks that a program of the scan scores, of many chunks; programs wanted for fewer; its stages
    and warps, warps of the last kernel."""

    tile: int = 64
    share: int = 512
    programs: int = 512
    stages: int = 4
    scan_warps: int = 4
    last_warps: int = 16


def tile_options(kind: str, kept: int, queries: int) -> TileOptions:
    """Measured on an H200 (docs/kernels.md); kind is "cover" or "stream", kept the padded K of the latter."""
    if kind == "merge":
        return TileOptions(64, max(32, kept), 4)
    if kind == "stream" and kept > 64:
        return TileOptions(16, kept, 8)
    # few queries need small tiles to fill the device, many are faster in tiles that fit the wide matrix units
    return TileOptions(64, 64, 8) if kind == "stream" and queries > 16_384 else TileOptions(16, 64, 4)


def decode_options(kept: int, landmark_bytes: int) -> DecodeOptions:
    """Measured on an H200 (docs/kernels.md); kept is the padded K."""
    if landmark_bytes >= 1024:
        # a stage of the pipeline holds whole landmarks
        return DecodeOptions(tile=32, stages=3)
    return DecodeOptions(tile=64 if kept <= 64 else 32)


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
    """The two launches of decoding: widths of the candidates that the first leaves, and both kernels' numbers."""

    scan: PreparedLaunch
    finish: PreparedLaunch
    widths: tuple[int, int, int]
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

    def _grid(self, tile: int) -> tuple[int, int, int]:
        return (-(-self.tokens // tile), self.heads, self.batch)

    @cached_property
    def cover(self) -> PreparedLaunch:
        options = tile_options("cover", 0, self.queries)
        return PreparedLaunch(
            kernel_select.cover_kernel, self._grid(options.tokens), BT=options.tokens, BC=options.chunks,
            num_warps=options.warps, **self.constants,
        )  # fmt: skip

    def _stream(self, use_noise: bool) -> PreparedLaunch:
        kept = next_power_of_two(self.keep)
        is_merged = kept <= _MOST_INSERTED
        options = tile_options("merge" if is_merged else "stream", kept, self.queries)
        kernel = kernel_select.select_kernel
        more: dict[str, Any] = {}
        if is_merged:
            kept, kernel = max(2, kept), kernel_merge.merge_select_kernel
            more = {"FEW": _FEW, "STAGES": 2 if self.dims["RP"] <= 512 else 1}
        return PreparedLaunch(
            kernel, self._grid(options.tokens), BT=options.tokens, BC=max(options.chunks, kept), KP=kept,
            NOISE=use_noise, num_warps=options.warps, **more, **self.constants,
        )  # fmt: skip

    @cached_property
    def stream(self) -> PreparedLaunch:
        return self._stream(False)

    @cached_property
    def noisy_stream(self) -> PreparedLaunch:
        return self._stream(True)

    @cached_property
    def kept_scores(self) -> PreparedLaunch:
        return PreparedLaunch(
            kernel_select.kept_scores_kernel, (self.queries,), is_kept=self.shapes.is_aligned, BK=16, num_warps=2,
            **self.rows, **self.dims,
        )  # fmt: skip

    @cached_property
    def decode(self) -> Scan:
        shapes, kept = self.shapes, next_power_of_two(self.keep)
        assert shapes.dtypes[1] is not None
        has_scales = shapes.dtypes[2] is not None
        options = decode_options(kept, self.dims["RP"] * shapes.dtypes[1].itemsize)
        tile = options.tile
        # queries that read the same landmarks are scored together
        is_shared = not (self.rows["LANDMARK_ROWS"] or self.constants["CHUNK_ROWS"])
        rows, queries = (1, self.batch * self.tokens) if is_shared else (self.batch, self.tokens)
        # few chunks are spread over the programs that the device runs at once, many are cut as coarsely as they need
        share = min(options.share, max(tile, next_power_of_two(-(-self.chunks // options.programs))))
        share = max(share, next_power_of_two(-(-self.chunks // _MOST_SHARES)))
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
        all_shares = next_power_of_two(shares)
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
