"""chunk_topk as Triton kernels: a streaming top-k, full coverage, and a scan for decoding; nothing of size T * C.

Tested against reference.py under the interpreter and on a GPU; derivation: README.md of this folder.

Grids, owners and promises stand in the kernels' files; the sizes that they need are checked and chosen here.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._triton import (
    HOPPER_MEMORY,
    next_power_of_two,
    require_kernel_dtype,
    require_triton,
    shared_memory,
)
from hsa_ultralong.ops.chunk_topk import kernel_decode, kernel_merge, kernel_select
from hsa_ultralong.ops.chunk_topk.gradients import product_gradients
from hsa_ultralong.ops.chunk_topk.kernel_gradients import spread_gradients
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

MOST_DIMENSIONS = 1024
MOST_KEPT = 256
# queries (tokens * heads * rows) up to which the landmarks are shared out over programs
_DECODE_QUERIES = 64
# K up to which blocks merge into sorted lists, and new candidates of a block that are inserted one by one
_MOST_INSERTED, _FEW = 32, 6
# shares of the landmarks that the last kernel of decoding chooses from
_MOST_SHARES = 4096
# the last kernel is compiled for so many, so that memories of any size meet few forms of it
_FORMS_OF_SHARES = (16, 512, _MOST_SHARES)
# dimensions that a kernel holds of a landmark at a time, and candidates that a scan may write, 8 bytes each
_SLAB, _SCAN_CANDIDATES = 256, 1 << 27
# dimensions up to which the streaming kernel loads landmarks ahead
_MOST_AHEAD = 512


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
    return DecodeOptions(tile=tile, stages=stages)


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
    options = decode_options(next_power_of_two(topk), dim, width, memory)
    found: dict[tuple[int, int], int] = {}
    count = topk + 1
    while count <= options.share * _MOST_SHARES:
        share = _share(count, options)
        found.setdefault((share, _form_of_shares(-(-count // share))), count)
        # the next size at which anything can change
        count = share * (-(-count // share)) + 1
    return sorted(found.values())


class _Problem:
    """Contiguous operands and the constants of every kernel; shapes as in api.chunk_topk."""

    def __init__(
        self, query: torch.Tensor, landmarks: torch.Tensor, visible: ChunkVisibility, keep: int, factor: torch.Tensor
    ) -> None:
        self.query, self.landmarks = query.contiguous(), landmarks.contiguous()
        self.batch, self.tokens, self.heads, self.dim = query.shape
        self.queries = self.batch * self.tokens * self.heads
        self.chunks, self.keep = landmarks.shape[1], keep
        # (Hr,) fp32 on the device: reading it here would wait for the device
        self.factor = factor.expand(self.heads).contiguous()
        places = (visible.query_segment, visible.query_position, visible.chunk_segment, visible.chunk_end)
        self.places = tuple(x.contiguous() for x in places)
        self.constants: dict[str, Any] = {
            "R": self.dim, "RP": max(16, next_power_of_two(self.dim)),
            "FOREIGN": kernel_select.FOREIGN_NUMBER[visible.foreign],
            "LANDMARK_ROWS": landmarks.shape[0] > 1, "CHUNK_ROWS": visible.chunk_segment.shape[0] > 1,
        }  # fmt: skip
        self.constants["RS"] = min(_SLAB, self.constants["RP"])
        self.precision = "ieee" if query.dtype == torch.float32 else "tf32"
        shape = (self.batch, self.tokens, self.heads, keep)
        self.indices = torch.empty(shape, dtype=torch.int32, device=query.device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=query.device)

    def operands(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.landmarks, *self.places, self.factor)

    def grid(self, tile: int) -> tuple[int, int, int]:
        return (-(-self.tokens // tile), self.heads, self.batch)

    def _tile(self, kind: str, kept: int) -> TileOptions:
        options = tile_options(
            kind, kept, self.queries, self.constants["RP"], self.landmarks.element_size(),
            shared_memory(self.query.device.index),
        )  # fmt: skip
        self.constants["RS"] = min(options.slab, self.constants["RP"])
        return options

    def cover(self) -> None:
        options = self._tile("cover", 0)
        kernel_select.cover_kernel[self.grid(options.tokens)](
            *self.operands(), self.indices, self.scores, self.tokens, self.chunks, self.keep, self.heads,
            BT=options.tokens, BC=options.chunks, PRECISION=self.precision, num_warps=options.warps, **self.constants,
        )  # fmt: skip

    def stream(self, noise_seed: int | None, noise_start: int) -> None:
        kept = next_power_of_two(self.keep)
        seed = (0 if noise_seed is None else noise_seed) & 0xFFFFFFFF
        is_merged = kept <= _MOST_INSERTED
        options = self._tile("merge" if is_merged else "stream", kept)
        kernel, more = kernel_select.select_kernel, {}
        if is_merged:
            kept, kernel = max(2, kept), kernel_merge.merge_select_kernel
            more = {"FEW": _FEW, "STAGES": 2 if self.constants["RP"] <= _MOST_AHEAD else 1}
        kernel[self.grid(options.tokens)](
            *self.operands(), self.indices, self.scores, self.tokens, self.chunks, self.keep, self.heads,
            seed - (1 << 32) * (seed >> 31), noise_start, BT=options.tokens, BC=max(options.chunks, kept), KP=kept,
            NOISE=noise_seed is not None, PRECISION=self.precision, num_warps=options.warps, **more, **self.constants,
        )  # fmt: skip
        if noise_seed is not None:
            kernel_select.kept_scores_kernel[(self.queries,)](
                self.query, self.landmarks, self.factor, self.indices, self.scores,
                self.tokens, self.chunks, self.keep, self.heads, R=self.dim, RP=self.constants["RP"],
                RS=self.constants["RS"], BK=16, LANDMARK_ROWS=self.constants["LANDMARK_ROWS"], num_warps=2,
            )  # fmt: skip

    def decode(self, row_scales: torch.Tensor | None = None) -> None:
        """row_scales (1 or B, C, Hr): of 8-bit landmarks."""
        device, kept = self.query.device, next_power_of_two(self.keep)
        width = self.landmarks.element_size()
        memory = shared_memory(device.index)
        options = decode_options(kept, self.constants["RP"], width, memory)
        tile = options.tile
        needed = _scan_bytes(tile, options.stages, self.constants["RP"], width)
        if needed > memory:
            raise ValueError(
                f'chunk_topk: impl="triton" for few queries of R={self.dim} in {self.landmarks.dtype} takes {needed:,} '
                f'bytes of shared memory, this card has {memory:,}; use bf16, fp16 or impl="auto"'
            )
        # queries that read the same landmarks are scored together
        is_shared = not (self.constants["LANDMARK_ROWS"] or self.constants["CHUNK_ROWS"])
        rows, queries = (1, self.batch * self.tokens) if is_shared else (self.batch, self.tokens)
        share = _share(self.chunks, options)
        shares = -(-self.chunks // share)
        # a single tile has nothing to load ahead
        stages = 1 if share == tile else options.stages
        padded = shares * share
        keys, lane_tops, share_tops = (
            torch.empty((self.queries, width), dtype=torch.int64, device=device)
            for width in (padded, shares * tile, shares)
        )
        at_once, scales = 16, self.factor  # scales of no use, but of the right kind
        if row_scales is not None:
            at_once, scales = 8, row_scales.contiguous()
            # products of 8-bit numbers take 32 dimensions at least
            self.constants["RP"] = max(32, self.constants["RP"])
        kernel_decode.scan_kernel[(shares, rows * self.heads, -(-queries // at_once))](
            *self.operands(), scales, keys, lane_tops, share_tops, self.chunks, self.heads, queries, padded,
            BQ=at_once, TILE=tile, SHARE=share, STAGES=stages, PRECISION=self.precision,
            HAS_SCALES=row_scales is not None, num_warps=options.scan_warps, **self.constants,
        )  # fmt: skip
        all_shares = _form_of_shares(shares)
        kept_shares = min(kept, all_shares)
        kept_lanes = min(kept, kept_shares * tile)
        kernel_decode.finish_kernel[(self.queries,)](
            keys, lane_tops, share_tops, self.indices, self.scores, shares, padded, self.keep, queries, self.heads,
            KP=min(kept, kept_lanes * (share // tile)), SHARES=all_shares, KS=kept_shares, KL=kept_lanes,
            SHARE=share, TILE=tile, num_warps=options.last_warps,
        )  # fmt: skip


def _solve(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    factor: torch.Tensor,
    visible: ChunkVisibility,
    keep: int,
    noise_seed: int | None,
    noise_start: int,
) -> _Problem:
    problem = _Problem(query, landmarks, visible, keep, factor)
    if keep == problem.chunks:
        problem.cover()
    else:
        problem.stream(noise_seed, noise_start)
    return problem


class _KeptScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        landmarks: torch.Tensor,
        factor: torch.Tensor,
        visible: ChunkVisibility,
        keep: int,
        noise_seed: int | None,
        noise_start: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        problem = _solve(query, landmarks, factor, visible, keep, noise_seed, noise_start)
        ctx.save_for_backward(query, landmarks, factor, problem.indices, problem.scores)
        ctx.mark_non_differentiable(problem.indices)
        return problem.indices, problem.scores

    @staticmethod
    def backward(ctx: Any, _: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        query, landmarks, factor, indices, scores = ctx.saved_tensors
        by_head = factor.expand(query.shape[2])  # (Hr,)
        grad_query = grad_landmarks = grad_factor = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            if query.dtype == torch.bfloat16:
                grad_query, grad_landmarks = spread_gradients(query, landmarks, indices, grad, by_head.contiguous())
            else:
                slopes = grad.masked_fill(indices < 0, 0.0) * by_head[:, None]
                grad_query, grad_landmarks = product_gradients(query, landmarks, indices, slopes)
        if ctx.needs_input_grad[2]:
            kept, by_head = indices >= 0, by_head[:, None]
            grad = torch.where(kept, grad, 0.0)
            products = torch.where(kept, scores, 0.0) / by_head
            grad_factor = (grad * products).sum((0, 1, 3))  # (Hr,)
            grad_factor = grad_factor.sum_to_size(factor.shape)
        return grad_query, grad_landmarks, grad_factor, None, None, None, None


@lru_cache(maxsize=16)
def _constant(number: float, device: torch.device) -> torch.Tensor:
    return torch.full((), number, dtype=torch.float32, device=device)


@torch.compiler.disable
def chunk_topk_triton(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    factor: torch.Tensor | float,
    noise_seed: int | None,
    noise_start: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same result as chunk_topk_reference; scores are products of the inputs as they are, accumulated in fp32."""
    require_triton("chunk_topk", query)
    require_kernel_dtype("chunk_topk", query)
    num_chunks = landmarks.shape[1]
    keep = min(topk, num_chunks)
    if query.dtype != landmarks.dtype or query.shape[-1] > MOST_DIMENSIONS or MOST_KEPT < keep < num_chunks:
        raise ValueError(
            f'chunk_topk: impl="triton" takes query and landmarks of one dtype, R up to {MOST_DIMENSIONS}, and K up to '
            f"{MOST_KEPT} or at least C; got {query.dtype}, {landmarks.dtype}, R={query.shape[-1]}, K={topk}, "
            f"C={num_chunks}"
        )
    factors = factor if isinstance(factor, torch.Tensor) else _constant(factor, query.device)
    factors = factors.to(torch.float32).reshape(-1)  # (1,) or (Hr,)
    if min(query.shape[:2]) == 0 or num_chunks == 0:
        shape = (*query.shape[:3], keep)
        empty = query.new_full(shape, -1, dtype=torch.int32)
        return empty, query.new_full(shape, -torch.inf, dtype=torch.float32)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, landmarks, factors))
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    is_decoding = not needs_gradient and noise_seed is None and queries <= _DECODE_QUERIES
    if is_decoding and keep < num_chunks:
        problem = _Problem(query, landmarks, visible, keep, factors)
        problem.decode()
        return problem.indices, problem.scores
    if not needs_gradient:
        problem = _solve(query, landmarks, factors, visible, keep, noise_seed, noise_start)
        return problem.indices, problem.scores
    return _KeptScores.apply(query, landmarks, factors, visible, keep, noise_seed, noise_start)


def scan_quantized(
    query: torch.Tensor,
    payload: torch.Tensor,
    scales: torch.Tensor,
    visible: ChunkVisibility,
    *,
    keep: int,
    factor: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The decoding scan over 8-bit landmarks for any number of queries, a few at a time; see quantized.py."""
    require_triton("chunk_topk_quantized", query)
    require_kernel_dtype("chunk_topk_quantized", query)
    if query.shape[-1] > MOST_DIMENSIONS or keep > MOST_KEPT or keep >= payload.shape[1]:
        raise ValueError(
            f'chunk_topk_quantized: impl="triton" takes R up to {MOST_DIMENSIONS} and K up to {MOST_KEPT}, below C; '
            f"got R={query.shape[-1]}, K={keep}, C={payload.shape[1]}"
        )
    at_once = max(1, min(_DECODE_QUERIES, _SCAN_CANDIDATES // payload.shape[1]) // (query.shape[0] * query.shape[2]))
    found = []
    for start in range(0, query.shape[1], at_once):
        part = slice(start, start + at_once)
        segment, position = visible.query_segment[:, part], visible.query_position[:, part]
        seen = replace(visible, query_segment=segment, query_position=position)
        problem = _Problem(query[:, part], payload, seen, keep, factor.to(torch.float32).reshape(-1))
        problem.decode(scales)
        found.append((problem.indices, problem.scores))
    if len(found) == 1:
        return found[0]
    indices, scores = zip(*found, strict=True)
    return torch.cat(indices, 1), torch.cat(scores, 1)
