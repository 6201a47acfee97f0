"""chunk_topk as Triton kernels: a streaming top-k, full coverage, and a scan for decoding; nothing of size T * C.

Tested against reference.py under the interpreter and on a GPU; derivation: README.md of this folder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._triton import next_power_of_two, num_processors, require_kernel_dtype, require_triton
from hsa_ultralong.ops.chunk_topk import kernel_select
from hsa_ultralong.ops.chunk_topk.gradients import product_gradients
from hsa_ultralong.ops.chunk_topk.visibility import ChunkVisibility

MOST_DIMENSIONS = 512
MOST_KEPT = 256
# queries (tokens * heads * rows) up to which the landmarks are shared out over programs, and the chunks from which
_DECODE_QUERIES = 64
_DECODE_CHUNKS = 512
# chunks of one program of the decoding scan, at most
_SCAN_SHARE = 1024


class TileOptions(NamedTuple):
    """Tokens and landmarks of a tile, and warps of its program."""

    tokens: int
    chunks: int
    warps: int


def tile_options(kind: str, kept: int, queries: int) -> TileOptions:
    """Measured on an H200 (docs/kernels.md); kind is "cover" or "stream", kept the padded K of the latter."""
    if kind == "stream" and kept > 64:
        return TileOptions(16, kept, 8)
    # few queries need small tiles to fill the device, many are faster in tiles that fit the wide matrix units
    return TileOptions(64, 64, 8) if kind == "stream" and queries > 16_384 else TileOptions(16, 64, 4)


class _Problem:
    """Contiguous operands and the constants of every kernel; shapes as in api.chunk_topk."""

    def __init__(self, query, landmarks, visible: ChunkVisibility, keep: int, factor: torch.Tensor) -> None:
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
        self.precision = "ieee" if query.dtype == torch.float32 else "tf32"
        shape = (self.batch, self.tokens, self.heads, keep)
        self.indices = torch.empty(shape, dtype=torch.int32, device=query.device)
        self.scores = torch.empty(shape, dtype=torch.float32, device=query.device)

    def operands(self) -> tuple[torch.Tensor, ...]:
        return (self.query, self.landmarks, *self.places, self.factor)

    def grid(self, tile: int) -> tuple[int, int, int]:
        return (-(-self.tokens // tile), self.heads, self.batch)

    def cover(self) -> None:
        options = tile_options("cover", 0, self.queries)
        kernel_select.cover_kernel[self.grid(options.tokens)](
            *self.operands(), self.indices, self.scores, self.tokens, self.chunks, self.keep, self.heads,
            BT=options.tokens, BC=options.chunks, PRECISION=self.precision, num_warps=options.warps, **self.constants,
        )  # fmt: skip

    def stream(self, noise_seed: int | None) -> None:
        kept = next_power_of_two(self.keep)
        options = tile_options("stream", kept, self.queries)
        seed = (0 if noise_seed is None else noise_seed) & 0xFFFFFFFF
        kernel_select.select_kernel[self.grid(options.tokens)](
            *self.operands(), self.indices, self.scores, self.tokens, self.chunks, self.keep, self.heads,
            seed - (1 << 32) * (seed >> 31), BT=options.tokens, BC=max(options.chunks, kept), KP=kept,
            NOISE=noise_seed is not None, PRECISION=self.precision, num_warps=options.warps, **self.constants,
        )  # fmt: skip
        if noise_seed is not None:
            kernel_select.kept_scores_kernel[(self.queries,)](
                self.query, self.landmarks, self.factor, self.indices, self.scores,
                self.tokens, self.chunks, self.keep, self.heads, R=self.dim, RP=self.constants["RP"], BK=16,
                LANDMARK_ROWS=self.constants["LANDMARK_ROWS"], num_warps=2,
            )  # fmt: skip

    def decode(self) -> None:
        kept = next_power_of_two(self.keep)
        rows, device = self.queries, self.query.device
        wanted = next_power_of_two(-(-self.chunks * rows // (2 * num_processors(device.index))))
        share = max(64, kept, min(_SCAN_SHARE, wanted))
        splits = -(-self.chunks // share)
        keys = torch.empty((rows, splits * share), dtype=torch.int64, device=device)
        lists = torch.empty((rows, splits, kept), dtype=torch.int64, device=device)
        kernel_select.scan_kernel[(splits, rows)](
            *self.operands(), keys, lists, self.tokens, self.chunks, self.heads, splits * share,
            BC=32 if self.constants["RP"] > 256 else 64, KP=kept, SHARE=share, STAGES=2, num_warps=8, **self.constants,
        )  # fmt: skip
        fan = max(2, _SCAN_SHARE // kept)
        while True:
            parts = -(-splits // fan)
            is_last = parts == 1
            width = next_power_of_two(min(splits, fan)) * kept
            merged = lists if is_last else torch.empty((rows, parts, kept), dtype=torch.int64, device=device)
            kernel_select.merge_kernel[(parts, rows)](
                lists, merged, self.indices, self.scores, splits, self.keep,
                KP=kept, WIDTH=width, LAST=is_last, num_warps=4,
            )  # fmt: skip
            if is_last:
                return
            lists, splits = merged, parts


class _KeptScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, landmarks, factor, visible: ChunkVisibility, keep: int, noise_seed: int | None):
        problem = _Problem(query, landmarks, visible, keep, factor)
        if keep == problem.chunks:
            problem.cover()
        else:
            problem.stream(noise_seed)
        ctx.save_for_backward(query, landmarks, factor, problem.indices, problem.scores)
        ctx.mark_non_differentiable(problem.indices)
        return problem.indices, problem.scores

    @staticmethod
    def backward(ctx, _, grad):
        query, landmarks, factor, indices, scores = ctx.saved_tensors
        kept = indices >= 0
        grad = torch.where(kept, grad, 0.0)
        by_head = factor.expand(query.shape[2])[:, None]  # (Hr, 1)
        grad_query = grad_landmarks = grad_factor = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            grad_query, grad_landmarks = product_gradients(query, landmarks, indices, grad * by_head)
        if ctx.needs_input_grad[2]:
            products = torch.where(kept, scores, 0.0) / by_head
            grad_factor = (grad * products).sum((0, 1, 3))  # (Hr,)
            grad_factor = grad_factor.sum_to_size(factor.shape)
        return grad_query, grad_landmarks, grad_factor, None, None, None


@torch.compiler.disable
def chunk_topk_triton(
    query: torch.Tensor,
    landmarks: torch.Tensor,
    visible: ChunkVisibility,
    *,
    topk: int,
    factor: torch.Tensor | float,
    noise_seed: int | None,
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
    factors = factor if isinstance(factor, torch.Tensor) else torch.full((), factor, device=query.device)
    factors = factors.to(torch.float32).reshape(-1)  # (1,) or (Hr,)
    if min(query.shape[:2]) == 0 or num_chunks == 0:
        shape = (*query.shape[:3], keep)
        empty = query.new_full(shape, -1, dtype=torch.int32)
        return empty, query.new_full(shape, -torch.inf, dtype=torch.float32)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (query, landmarks, factors))
    queries = query.shape[0] * query.shape[1] * query.shape[2]
    is_decoding = not needs_gradient and noise_seed is None and queries <= _DECODE_QUERIES
    if is_decoding and num_chunks >= max(_DECODE_CHUNKS, keep + 1):
        problem = _Problem(query, landmarks, visible, keep, factors)
        problem.decode()
        return problem.indices, problem.scores
    return _KeptScores.apply(query, landmarks, factors, visible, keep, noise_seed)
