"""joint_attention as Triton kernels: a matrix of biases, lists of chunks and of tiles, forward and gradients.

All sizes follow from shapes, and the host reads no number of the device: calls may be captured in a CUDA graph.
Imports triton; called by joint.py where impl="triton". tests/ops/test_hsa_joint_triton.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import refuse_second_derivatives
from hsa_ultralong.ops._triton import (
    HOPPER_MEMORY,
    KERNEL_SIZES,
    next_power_of_two,
    num_processors,
    on_own_device,
    require_kernel_dtype,
    require_triton,
    shared_memory,
)
from hsa_ultralong.ops.hsa import kernel_joint

_LOG2_E = math.log2(math.e)
# shared memory that the largest tiles, D = S = 128, take in fp32
_LARGEST_BYTES_FP32 = 163_840
# programs of dk and dv for each multiprocessor, below which the tiles of a chunk are shared out over several
_PROGRAMS = 4
# fewest tiles of such a share
_SHARE_TILES = 8


class JointLaunch(NamedTuple):
    """Rows of a tile (tokens * heads), warps and software-pipelining stages of all three kernels."""

    rows: int
    warps: int
    stages: int


def joint_launch(dim: int, size: int, dtype: torch.dtype, memory: int) -> JointLaunch:
    """Tiles as hsa_attention has them (plan.py); memory: bytes of shared memory that a program may use."""
    is_large = dim > 64 or size > 64
    if dtype == torch.float32:
        return JointLaunch(16, 8 if is_large else 4, 1)
    if is_large:
        return JointLaunch(64 if dim + size < 256 or memory >= HOPPER_MEMORY else 32, 8, 1)
    return JointLaunch(64, 4, 2)


def spread_bias(indices: torch.Tensor, bias: torch.Tensor, num_chunks: int, width: int) -> torch.Tensor:
    """Bias of every slot (B, T, Hr, K) -> (B, Hr, C + 1, width) fp32 to base 2, -inf where a token has not chosen the
    chunk; chunk C takes the empty slots."""
    batch, _, heads, _ = indices.shape
    spread = torch.full((batch, heads, num_chunks + 1, width), -torch.inf, dtype=torch.float32, device=bias.device)
    return spread.scatter_(2, _chunks_first(indices, num_chunks), (bias.float() * _LOG2_E).permute(0, 2, 3, 1))


def _chunks_first(indices: torch.Tensor, num_chunks: int) -> torch.Tensor:
    """(B, T, Hr, K) -> (B, Hr, K, T) int64, empty slots as chunk C."""
    return torch.where(indices < 0, num_chunks, indices).long().permute(0, 2, 3, 1)


def list_met(is_met: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the true among (..., N) in order, (..., N + 1) int32 whose rest is undefined, and how many, (...)."""
    count = is_met.shape[-1]
    ends = is_met.cumsum(-1, dtype=torch.int32)
    # what is not met goes behind the end
    places = torch.where(is_met, ends - 1, count).long()
    lists = torch.empty((*is_met.shape[:-1], count + 1), dtype=torch.int32, device=is_met.device)
    numbers = torch.arange(count, dtype=torch.int32, device=is_met.device).expand(is_met.shape)
    return lists.scatter_(-1, places, numbers), ends[..., -1].contiguous()


class _Problem:
    """Contiguous operands and what every kernel takes."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        bias: torch.Tensor,
        lengths: torch.Tensor | None,
        chunk_size: int,
    ) -> None:
        self.q, self.k, self.v, self.indices = q.contiguous(), k.contiguous(), v.contiguous(), indices
        self.lengths = None if lengths is None else lengths.contiguous()
        self.batch, self.tokens, heads, dim = q.shape
        self.kv_batch, slots, self.kv_heads, _ = k.shape
        self.chunks, group = slots // chunk_size, heads // self.kv_heads
        rows, warps, stages = joint_launch(dim, chunk_size, q.dtype, shared_memory(q.device.index))
        padded = next_power_of_two(group)
        tile = max(1, rows // padded)
        self.tiles = -(-self.tokens // tile)
        self.scale = dim**-0.5
        self.sizes = (self.tokens, self.chunks, self.scale * _LOG2_E)
        self.heads = (self.kv_heads, indices.shape[2])
        self.constants: dict[str, Any] = {
            "KV_BATCH": self.kv_batch > 1, "LENGTH_BATCH": lengths is not None and lengths.shape[0] > 1,
            "G": group, "GP": max(padded, 16 // tile), "D": dim, "S": chunk_size, "BT": tile,
            "HAS_LENGTHS": lengths is not None, "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
            "STAGES": stages, "num_warps": warps,
        }  # fmt: skip
        self.bias = spread_bias(indices, bias, self.chunks, self.tiles * tile)
        # (B, Hr, C, tiles); a weight that is no number is read, and seen in what comes out
        self.is_met = self.bias[:, :, :-1].unflatten(-1, (self.tiles, tile)).amax(-1) != -torch.inf
        self.grid = (self.tiles, self.kv_heads, self.batch)
        self.read = (self.q, self.k, self.v, self.bias, self.lengths)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output, and mass (B, T, Hq) fp32."""
        out = torch.empty_like(self.q)
        mass = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        kernel_joint.joint_forward_kernel[self.grid](
            *self.read, *list_met(self.is_met.transpose(2, 3)), out, mass, *self.sizes, *self.heads, **self.constants
        )
        return out, mass

    def query_gradients(
        self,
        out: torch.Tensor,
        mass: torch.Tensor,
        grad_out: torch.Tensor,
        grad_mass: torch.Tensor | None,
        needs_bias: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """dq, the gradient of the bias (B, T, Hr, K) if it is wanted, and deltas (B, T, Hq) fp32."""
        grad_q, deltas = torch.empty_like(self.q), torch.empty_like(mass)
        shape = (self.batch, self.kv_heads, *self.bias.shape[2:])
        spread = torch.empty(shape, dtype=torch.float32, device=mass.device) if needs_bias else None
        kernel_joint.joint_query_gradient_kernel[self.grid](
            *self.read, *list_met(self.is_met.transpose(2, 3)), out, mass, grad_out, grad_mass, grad_q, spread, deltas,
            *self.sizes, self.scale, *self.heads, **self.constants,
        )  # fmt: skip
        if spread is None:
            return grad_q, None, deltas
        index = _chunks_first(self.indices, self.chunks).expand(-1, self.kv_heads, -1, -1)  # (B, Hkv, K, T)
        grad_bias = spread.gather(2, index).permute(0, 3, 1, 2)  # (B, T, Hkv, K)
        # what stands there for an empty slot was never written
        grad_bias = torch.where(self.indices < 0, 0.0, grad_bias)
        if self.indices.shape[2] < self.kv_heads:
            grad_bias = grad_bias.sum(2, keepdim=True)
        return grad_q, grad_bias, deltas

    def memory_gradients(
        self, mass: torch.Tensor, grad_out: torch.Tensor, deltas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv; where there are few chunks, several programs share the tiles of each."""
        programs = self.chunks * self.kv_heads * self.kv_batch
        wanted = -(-_PROGRAMS * num_processors(self.q.device.index) // programs)
        splits = max(1, min(wanted, self.tiles // _SHARE_TILES))
        dtype = torch.float32 if splits > 1 else self.k.dtype
        grad_k, grad_v = (torch.empty((splits, *self.k.shape), dtype=dtype, device=deltas.device) for _ in range(2))
        kernel_joint.joint_memory_gradient_kernel[(self.chunks * splits, self.kv_heads, self.kv_batch)](
            *self.read, *list_met(self.is_met), mass, grad_out, deltas, grad_k, grad_v, *self.sizes, self.scale,
            self.tiles, self.batch // self.kv_batch, splits, *self.heads, **self.constants,
        )  # fmt: skip
        if splits == 1:
            return grad_k[0], grad_v[0]
        return grad_k.sum(0).to(self.k.dtype), grad_v.sum(0).to(self.k.dtype)


class _JointAttention(torch.autograd.Function):
    """Bias and lists are made again in the backward: kept, they would be as large as the logits of one key a chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        indices: torch.Tensor,
        bias: torch.Tensor,
        lengths: torch.Tensor | None,
        chunk_size: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, mass = _Problem(q, k, v, indices, bias, lengths, chunk_size).forward()
        ctx.save_for_backward(q, k, v, indices, bias, lengths, out, mass)
        ctx.chunk_size = chunk_size
        # most callers read one memory and leave the mass
        ctx.set_materialize_grads(False)
        return out, mass

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor | None, grad_mass: torch.Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivatives("joint_attention", "triton", "torch")
        q, k, v, indices, bias, lengths, out, mass = ctx.saved_tensors
        if grad_out is None and grad_mass is None:
            return (None,) * 7
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out.contiguous()
        grad_mass = None if grad_mass is None else grad_mass.contiguous()
        problem = _Problem(q, k, v, indices, bias, lengths, ctx.chunk_size)
        grad_q, grad_bias, deltas = problem.query_gradients(out, mass, grad_out, grad_mass, ctx.needs_input_grad[4])
        grad_k = grad_v = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_k, grad_v = problem.memory_gradients(mass, grad_out, deltas)
        return grad_q, grad_k, grad_v, None, grad_bias, None, None


@torch.compiler.disable
@on_own_device
def joint_attention_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    indices: torch.Tensor,
    bias: torch.Tensor,
    *,
    chunk_size: int,
    chunk_lengths: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Same result as joint_attention_torch, up to the rounding of the input dtype."""
    require_triton("joint_attention", q)
    require_kernel_dtype("joint_attention", q)
    dim, dtypes = q.shape[-1], (q.dtype, k.dtype, v.dtype)
    if len(set(dtypes)) > 1 or dim not in KERNEL_SIZES or chunk_size not in KERNEL_SIZES:
        raise ValueError(
            f'joint_attention: impl="triton" takes head dimension and chunk size in {KERNEL_SIZES} and q, k and v of '
            f'one dtype; got D={dim}, S={chunk_size}, {q.dtype}, {k.dtype}, {v.dtype}; use impl="auto"'
        )
    memory = shared_memory(q.device.index)
    if q.dtype == torch.float32 and dim + chunk_size == 256 and memory < _LARGEST_BYTES_FP32:
        raise ValueError(
            f'joint_attention: impl="triton" in fp32 with D=128 and S=128 takes {_LARGEST_BYTES_FP32:,} bytes of '
            f'shared memory, this card has {memory:,}; use bf16, fp16 or impl="auto"'
        )
    arguments = (q, k, v, indices, bias, chunk_lengths, chunk_size)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, bias)):
        return _JointAttention.apply(*arguments)
    return _Problem(*arguments).forward()
