"""hsa_attention as Triton kernels: tiles of neighbouring tokens that share chunks, inverse lists for the memory's
gradients, a path for full coverage and one for decoding. Derivation: README.md; how each choice was measured:
docs/kernels.md. Tested against reference.py under the interpreter and on a GPU.

Grids, owners and promises stand in the kernels' files; the sizes that they need are checked and chosen here.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._triton import (
    HOPPER_MEMORY,
    KERNEL_SIZES,
    next_power_of_two,
    num_processors,
    require_kernel_dtype,
    require_triton,
    shared_memory,
)
from hsa_ultralong.ops.hsa import kernel_chunks, kernel_decode, kernel_exact, kernel_tiles
from hsa_ultralong.ops.hsa.indices import within
from hsa_ultralong.ops.hsa.kernel_lists import FEWEST_SLOTS, TileLists, coverage_slots, inverse_lists, tile_lists

# slot maps of one launch; longer inputs take several
_LAUNCH_BYTES = 1 << 27
# longest list that one program sorts: tokens of a tile * slots
_SORT_LIMIT = 4096
# a tile walks every chunk, without lists, when a token reads at least this share of them
_COVERAGE_SHARE = 0.6
# tokens up to which the slots of one token are shared out over programs
_DECODE_TOKENS = 64
# shared memory of the largest tiles, D = S = 128, in fp32
_LARGEST_BYTES_FP32 = 163_840


class HSALaunch(NamedTuple):
    """Rows of a tile (tokens * heads), warps and software-pipelining stages of one kernel."""

    rows: int
    warps: int
    stages: int


def launch_options(kind: str, dim: int, size: int, dtype: torch.dtype, memory: int) -> HSALaunch:
    """Measured on an H200 (docs/kernels.md), smaller where a card has less shared memory; kind is "forward", "query" or
    "memory", memory the bytes of shared memory that a program may use."""
    is_large = dim > 64 or size > 64
    if dtype == torch.float32:
        return HSALaunch(16, 8, 1) if is_large else HSALaunch(32, 8, 1)
    if kind == "memory":
        if is_large:
            return HSALaunch(64 if dim + size < 256 or memory >= HOPPER_MEMORY else 32, 8, 1)
        return HSALaunch(128, 4, 2)
    if is_large:
        return HSALaunch(64, 8, 1)
    return HSALaunch(64, 4, 2)


class _Problem:
    """Contiguous operands and the arguments that every kernel takes; shapes as in api.hsa_attention."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        lengths: torch.Tensor | None,
        chunk_size: int,
        scale: float,
        causal: bool,
    ) -> None:
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.indices, self.weights = indices.contiguous(), weights.contiguous()
        self.lengths = None if lengths is None else lengths.contiguous()
        self.batch, self.tokens, heads, self.dim = q.shape
        self.size, self.scale, self.causal = chunk_size, scale, causal
        self.memory = shared_memory(q.device.index)
        self.kv_batch, self.chunks, self.kv_heads = k.shape[0], k.shape[1] // chunk_size, k.shape[2]
        self.group = heads // self.kv_heads
        self.list_heads, self.slots = indices.shape[2:]
        self.covers = self.slots >= _COVERAGE_SHARE * self.chunks
        self.scale_log2 = scale * math.log2(math.e)

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
        return {
            "G": self.group, "GP": padded, "D": self.dim, "S": self.size, "BT": tokens,
            "LENGTH_BATCH": self.lengths is not None and self.lengths.shape[0] > 1,
            "HAS_LENGTHS": self.lengths is not None,
            "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32", "STAGES": stages,
        }  # fmt: skip

    def launches(self, tile_tokens: int) -> list[tuple[int, int]]:
        """(first tile, number of tiles) of launches whose slot maps fit the workspace."""
        tiles = -(-self.tokens // tile_tokens)
        if self.covers:
            return [(0, tiles)]
        widest = min(tile_tokens * self.slots, self.chunks)
        per_tile = self.batch * self.list_heads * widest * (2 * tile_tokens + 4)
        step = max(1, _LAUNCH_BYTES // per_tile)
        return [(first, min(step, tiles - first)) for first in range(0, tiles, step)]

    def lists(self, tile_tokens: int, first: int, count: int) -> TileLists:
        if self.covers:
            return coverage_slots(self.indices, self.chunks)
        return tile_lists(self.indices, tile_tokens, self.chunks, first, count)

    def _tiles(self, kernel: Any, kind: str, out: torch.Tensor, gradients: tuple[torch.Tensor, ...] = ()) -> None:
        """A kernel of kernel_tiles into `out`, which is dq where `gradients` are (dO, dw); then mend spoiled tiles."""
        options = launch_options(kind, self.dim, self.size, self.q.dtype, self.memory)
        constants = self.constants(options.rows, options.stages)
        flags = {"KV_BATCH": self.kv_batch > 1, "COVERAGE": self.covers, "CAUSAL": self.causal}
        mending = {name: value for name, value in constants.items() if name not in ("GP", "PRECISION", "STAGES")}
        grad_out, grad_weights = gradients or (None, None)
        written = (grad_out, out, grad_weights) if gradients else (out,)
        scales = (self.scale_log2, self.scale) if gradients else (self.scale_log2,)
        for first, count in self.launches(constants["BT"]):
            lists = self.lists(constants["BT"], first, count)
            grid = (count, self.kv_heads, self.batch)
            spoiled = torch.empty(self.batch * self.kv_heads * count, dtype=torch.int32, device=self.q.device)
            read = (
                self.q,
                self.k,
                self.v,
                self.weights,
                self.lengths,
                lists.chunks,
                lists.counts,
                lists.slots,
                spoiled,
            )
            widest = 0 if lists.chunks is None else lists.chunks.shape[-1]
            sizes = (self.tokens, self.chunks, self.slots, widest, first, count)
            heads = (self.kv_heads, self.list_heads)
            kernel[grid](*read, *written, *sizes, *scales, *heads, num_warps=options.warps, **flags, **constants)
            kernel_exact.spoiled_tiles_kernel[grid](
                *read, out, grad_out, grad_weights, *sizes, self.scale_log2, self.scale, *heads, **flags, **mending
            )

    def forward(self) -> torch.Tensor:
        out = torch.empty_like(self.q)
        self._tiles(kernel_tiles.forward_kernel, "forward", out)
        return out

    def query_gradients(self, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dq, and dw as (B, T, Hkv, K) in fp32."""
        grad_q = torch.empty_like(self.q)
        shape = (self.batch, self.tokens, self.kv_heads, self.slots)
        grad_weights = torch.zeros(shape, dtype=torch.float32, device=self.q.device)
        self._tiles(kernel_tiles.query_gradient_kernel, "query", grad_q, (grad_out, grad_weights))
        return grad_q, grad_weights

    def memory_gradients(self, grad_out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv."""
        options = launch_options("memory", self.dim, self.size, self.q.dtype, self.memory)
        constants = self.constants(options.rows, options.stages)
        return (self._covered if self.covers else self._listed)(grad_out, constants, options.warps)

    def _listed(
        self, grad_out: torch.Tensor, constants: dict[str, Any], warps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_k, grad_v = torch.empty_like(self.k), torch.empty_like(self.v)
        processors = num_processors(self.q.device.index)
        unit_pairs = max(32 * constants["BT"], next_power_of_two(self.indices.numel() // (8 * processors)))
        lists = inverse_lists(self.indices, self.kv_batch, self.chunks, unit_pairs)
        shares = self.kv_heads // self.list_heads
        number, units = lists.unit_ends.shape[0], lists.unit_lists.shape[0]
        shape = (units, shares, 2, self.size, self.dim)
        partial = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        kernel_chunks.listed_memory_gradient_kernel[(units, shares)](
            self.q, self.k, self.v, self.weights, self.lengths, grad_out,
            lists.pairs, lists.pair_starts, lists.unit_ends, lists.unit_lists, partial,
            self.chunks, self.slots, number, unit_pairs, self.scale_log2, self.kv_heads, self.list_heads,
            num_warps=warps, **constants,
        )  # fmt: skip
        kernel_chunks.listed_sum_kernel[(number, shares)](
            partial, lists.unit_ends, grad_k, grad_v, self.chunks, self.scale, self.kv_heads, self.list_heads,
            D=self.dim, S=self.size, num_warps=8,
        )  # fmt: skip
        return grad_k, grad_v

    def _covered(
        self, grad_out: torch.Tensor, constants: dict[str, Any], warps: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        grad_k, grad_v = torch.empty_like(self.k), torch.empty_like(self.v)
        tile_tokens = constants["BT"]
        programs = self.batch * self.kv_heads * self.chunks
        wanted = -(-8 * num_processors(self.q.device.index) // programs)
        splits = max(1, min(wanted, self.tokens // (32 * tile_tokens)))
        unit_tokens = -(-self.tokens // (splits * tile_tokens)) * tile_tokens
        splits = -(-self.tokens // unit_tokens)
        shape = (self.batch, self.kv_heads, self.chunks, splits, 2, self.size, self.dim)
        partial = torch.empty(shape, dtype=torch.float32, device=self.q.device)
        slot_map = coverage_slots(self.indices, self.chunks).slots
        kernel_chunks.covered_memory_gradient_kernel[(self.chunks * splits, self.kv_heads, self.batch)](
            self.q, self.k, self.v, self.weights, self.lengths, grad_out, slot_map, partial,
            self.tokens, self.chunks, self.slots, splits, unit_tokens, self.scale_log2,
            self.kv_heads, self.list_heads, KV_BATCH=self.kv_batch > 1, CAUSAL=self.causal,
            num_warps=warps, **constants,
        )  # fmt: skip
        kernel_chunks.covered_sum_kernel[(self.chunks, self.kv_heads, self.kv_batch)](
            partial, grad_k, grad_v, self.batch, self.chunks, splits, unit_tokens, self.scale, self.kv_heads,
            KV_BATCH=self.kv_batch > 1, D=self.dim, S=self.size, BT=tile_tokens, CAUSAL=self.causal, num_warps=8,
        )  # fmt: skip
        return grad_k, grad_v

    def decode(self, first_chunk: int = 0) -> torch.Tensor:
        """Forward for few tokens: slots shared out over programs, partial sums added. Indices count from first_chunk;
        those outside the memory are empty slots."""
        constants = self.constants(16, 2)
        del constants["BT"]
        constants["GP"] = max(16, next_power_of_two(self.group))
        programs = self.batch * self.tokens * self.kv_heads
        splits = max(1, min(self.slots, 2 * num_processors(self.q.device.index) // programs))
        per_program = -(-self.slots // splits)
        splits = -(-self.slots // per_program)
        partial = torch.empty((splits, *self.q.shape), dtype=torch.float32, device=self.q.device)
        kernel_decode.decode_kernel[(self.batch * self.tokens, self.kv_heads, splits)](
            self.q, self.k, self.v, self.weights, self.indices, self.lengths, partial,
            self.tokens, self.chunks, self.slots, per_program, first_chunk, self.scale_log2, self.kv_heads,
            self.list_heads, KV_BATCH=self.kv_batch > 1, num_warps=4, **constants,
        )  # fmt: skip
        return partial.sum(0).to(self.q.dtype)


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        weights: torch.Tensor,
        chunk_size: int,
        chunk_lengths: torch.Tensor | None,
        scale: float,
        causal: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, indices, weights, chunk_lengths)
        ctx.options = (chunk_size, scale, causal)
        return _Problem(q, k, v, indices, weights, chunk_lengths, chunk_size, scale, causal).forward()

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        q, k, v, indices, weights, chunk_lengths = ctx.saved_tensors
        problem = _Problem(q, k, v, indices, weights, chunk_lengths, *ctx.options)
        grad_out = grad_out.contiguous()
        grad_q = grad_weights = grad_k = grad_v = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[4]:
            grad_q, grad_weights = problem.query_gradients(grad_out)
            if weights.shape[2] < grad_weights.shape[2]:
                grad_weights = grad_weights.sum(2, keepdim=True)
            grad_weights = grad_weights.to(weights.dtype)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_k, grad_v = problem.memory_gradients(grad_out)
        return grad_q, grad_k, grad_v, None, grad_weights, None, None, None, None


def _supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, chunk_size: int, scale: float) -> bool:
    """Whether the kernels take these operands (their device aside)."""
    is_plain = q.dtype == k.dtype == v.dtype
    return is_plain and q.shape[-1] in KERNEL_SIZES and chunk_size in KERNEL_SIZES and scale > 0


@torch.compiler.disable
def hsa_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
    scale: float,
    first_chunk: int | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Same result as hsa_attention_reference, up to the rounding of the input dtype."""
    require_triton("hsa_attention", q)
    require_kernel_dtype("hsa_attention", q)
    if not _supports(q, k, v, chunk_size, scale):
        raise ValueError(
            f'hsa_attention: impl="triton" takes head dimension and chunk size in {KERNEL_SIZES}, q, k and v of '
            f"one dtype and a positive scale; got D={q.shape[-1]}, S={chunk_size}, {q.dtype}, {k.dtype}, {v.dtype}, "
            f"scale={scale}"
        )
    memory = shared_memory(q.device.index)
    if q.dtype == torch.float32 and q.shape[-1] + chunk_size == 256 and memory < _LARGEST_BYTES_FP32:
        raise ValueError(
            f'hsa_attention: impl="triton" in fp32 with D=128 and S=128 takes {_LARGEST_BYTES_FP32:,} bytes of shared '
            f'memory, this card has {memory:,}; use bf16, fp16 or impl="auto"'
        )
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, weights))
    if not needs_gradient and q.shape[0] * q.shape[1] <= _DECODE_TOKENS:
        return _Problem(q, k, v, indices, weights, chunk_lengths, chunk_size, scale, causal).decode(first_chunk or 0)
    indices = within(indices, first_chunk, k.shape[1] // chunk_size)
    return _TritonAttention.apply(q, k, v, indices, weights, chunk_size, chunk_lengths, scale, causal)
