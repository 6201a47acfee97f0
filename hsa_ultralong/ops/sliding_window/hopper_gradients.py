"""Host part of the sliding window's gradients on Hopper: kernel_window_hopper_gradients.py, kernel_window_hopper_keys.py,
and the kernel that forms again what is not finite. Gluon is imported only where it runs.

Tested on a card alone: tests/ops/test_window_hopper_gradients.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl

from hsa_ultralong.ops._launch import are_aligned
from hsa_ultralong.ops._overlap import begin, overlap
from hsa_ultralong.ops._triton import num_processors, runs_hopper_kernels
from hsa_ultralong.ops.sliding_window.kernel_window import exact_key_gradient, exact_query_gradient

if TYPE_CHECKING:
    from hsa_ultralong.ops.sliding_window.triton_window import _Problem

# False: the kernels of kernel_window.py everywhere
IS_USED = True
# GROUPS of neighbouring tiles, or of blocks of keys, from which on these kernels take less time
QUERY_UNITS = 128
KEY_UNITS = 96
# constants of the two kernels
QUERY_OPTIONS = {"GROUPS": 2, "STAGES": 4, "REGISTERS": 240}
KEY_OPTIONS = {"GROUPS": 2, "STAGES": 8, "REGISTERS": 240}
# rows of a tile, keys of a block, head dimension
_SIZE = 64
# tiles and blocks that one program looks at for what is not finite
_SHARE = 16


@triton.jit
def _mend_tile(
    q, k, v, query_segments, key_segments, grad_out, out, lse, grad_q, number, num_queries, num_keys, window, scale,
    logit_scale, HKV, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dq of a tile's rows."""
    tiles = tl.cdiv(num_queries, BT)
    kv_head = number // tiles % HKV
    b = (number // tiles // HKV).to(tl.int64)
    first = number % tiles * BT
    dims = tl.arange(0, D)
    k += b * num_keys * (HKV * D) + kv_head * D
    v += b * num_keys * (HKV * D) + kv_head * D
    for one in range(first, tl.minimum(first + BT, num_queries)):
        mine = one
        if HAS_SEGMENTS:
            mine = tl.load(query_segments + b * num_queries + one)
        for head in range(0, G):
            exact_query_gradient(
                q, k, v, grad_out, out, lse, grad_q, (b * num_queries + one) * (HKV * G) + kv_head * G + head,
                one + num_keys - num_queries, mine, key_segments + b * num_keys, num_keys, window, HKV * D, dims, scale,
                logit_scale, D, BN, HAS_SEGMENTS,
            )  # fmt: skip


@triton.jit
def _mend_block(
    q, k, v, query_segments, key_segments, grad_out, lse, deltas, grad_k, grad_v, number, num_queries, num_keys, window,
    scale, logit_scale, HKV, G: tl.constexpr, D: tl.constexpr, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys."""
    blocks = tl.cdiv(num_keys, BN)
    kv_head = number // blocks % HKV
    b = (number // blocks // HKV).to(tl.int64)
    start = number % blocks * BN
    key = start + tl.arange(0, BN)
    exists = (key < num_keys)[:, None]
    owner = key
    if HAS_SEGMENTS:
        owner = tl.load(key_segments + b * num_keys + key, mask=key < num_keys, other=-3)
    place = ((b * num_keys + key) * HKV + kv_head)[:, None] * D + tl.arange(0, D)[None, :]
    first = tl.maximum(start + num_queries - num_keys, 0)
    stop = tl.minimum(start + BN - 1 + num_queries - num_keys + window, num_queries)
    sum_k, sum_v = exact_key_gradient(
        q, k, v, query_segments + b * num_queries, grad_out, lse, deltas, place, key, exists, owner, first, stop, b,
        kv_head, 0, num_queries, num_keys, window, scale, HKV, 1, G, D, BN, HAS_SEGMENTS,
    )  # fmt: skip
    tl.store(grad_k + place, (sum_k * logit_scale).to(grad_k.dtype.element_ty), mask=exists)
    tl.store(grad_v + place, sum_v.to(grad_v.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "window", "tiles", "blocks"])
def mend_kernel(
    q, k, v, query_segments, key_segments, grad_out, out, lse, deltas, grad_q, grad_k, grad_v, flags,
    num_queries, num_keys, window, scale, logit_scale, tiles, blocks, HKV, G: tl.constexpr, D: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, HAS_SEGMENTS: tl.constexpr, SHARE: tl.constexpr, OVERLAPS: tl.constexpr,
):  # fmt: skip
    """Tiles of dq, then blocks of dk and dv, of whose four flags one is set; a program looks at SHARE of both."""
    begin(OVERLAPS)
    programs = tl.num_programs(0)
    four = tl.arange(0, 4)
    places = tl.program_id(0) + tl.arange(0, SHARE) * programs
    is_one = (places < tiles + blocks)[:, None]
    found = tl.load(flags + places[:, None] * 4 + four[None, :], mask=is_one, other=0)
    if tl.max(tl.max(found, 1), 0) > 0:
        for number in range(tl.program_id(0), tiles + blocks, programs):
            if tl.max(tl.load(flags + number * 4 + four), 0) > 0:
                if number < tiles:
                    _mend_tile(
                        q, k, v, query_segments, key_segments, grad_out, out, lse, grad_q, number, num_queries,
                        num_keys, window, scale, logit_scale, HKV, G, D, BT, BN, HAS_SEGMENTS,
                    )  # fmt: skip
                else:
                    _mend_block(
                        q, k, v, query_segments, key_segments, grad_out, lse, deltas, grad_k, grad_v, number - tiles,
                        num_queries, num_keys, window, scale, logit_scale, HKV, G, D, BN, HAS_SEGMENTS,
                    )  # fmt: skip


def takes(problem: _Problem, grad_out: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether dq comes from these kernels."""
    q, k = problem.q, problem.k
    is_fit = problem.dim == _SIZE and problem.group in (1, 2, 4, 8, 16) and q.dtype in (torch.bfloat16, torch.float16)
    if not (IS_USED and is_fit and runs_hopper_kernels(q.device.index)):
        return False
    is_short = max(q.numel(), k.numel()) < 2**31
    return is_short and are_aligned(q, k, problem.v, grad_out, out) and query_units(problem) >= QUERY_UNITS


def query_units(problem: _Problem) -> int:
    tokens = QUERY_OPTIONS["GROUPS"] * _SIZE // problem.group
    return problem.batch * problem.kv_heads * -(-problem.num_queries // tokens)


def _described(tensor: torch.Tensor, box: list[int]) -> Any:
    """A contiguous (B, T, H, 64) for bulk copies of boxes; strides of dimensions of size one may be anything."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    shape = list(tensor.shape)
    return TensorDescriptor(tensor, shape, [math.prod(shape[i:]) for i in range(1, 5)], box, layout)


class HopperGradients:
    """The launches of one backward; every method launches one kernel."""

    def __init__(self, problem: _Problem, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
        self.problem, self.grad_out, self.out, self.lse = problem, grad_out, out, lse
        batch, heads = problem.batch, problem.kv_heads
        self.tiles = batch * heads * -(-problem.num_queries * problem.group // _SIZE)
        units = batch * heads * -(-problem.num_keys // (KEY_OPTIONS["GROUPS"] * _SIZE))
        self.takes_keys = units >= KEY_UNITS
        self.blocks = batch * heads * -(-problem.num_keys // _SIZE) if self.takes_keys else 0
        self.row_box = [1, _SIZE // problem.group, problem.group, _SIZE]
        self.key_box = [1, _SIZE, 1, _SIZE]
        q, k = problem.q, problem.k
        self.grad_q, self.deltas = torch.empty_like(q), torch.empty_like(lse)
        self.grad_k, self.grad_v = (torch.empty_like(k) for _ in range(2))
        self.norms = torch.empty(self.tiles, 2 * _SIZE, dtype=torch.float32, device=q.device)
        self.flags = torch.empty(self.tiles + self.blocks, 4, dtype=torch.int32, device=q.device)
        self.rows = [_described(x, self.row_box) for x in (q, grad_out, out, self.grad_q)]
        self.columns = [_described(x, self.key_box) for x in (k, problem.v)]
        self.constants = {"G": problem.group, "HAS_SEGMENTS": problem.has_segments, "num_warps": 4}

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dq, and delta (B, Tq, Hq)."""
        from hsa_ultralong.ops.sliding_window.kernel_window_hopper_gradients import query_gradient_kernel

        problem, total = self.problem, query_units(self.problem)
        num_queries, num_keys, window, scale = problem.sizes()
        query, upward, result, grad_q = self.rows
        query_gradient_kernel[(min(total, num_processors(problem.q.device.index)),)](
            query, *self.columns, *problem.segments, upward, result, self.lse, grad_q, self.deltas, self.norms,
            self.flags, num_queries, num_keys, window, total, scale, problem.scale, problem.kv_heads, **self.constants,
            **QUERY_OPTIONS,
        )  # fmt: skip
        return self.grad_q, self.deltas

    def keys(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv, after `queries`."""
        from triton.experimental.gluon import language as gl
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        from hsa_ultralong.ops.sliding_window.kernel_window_hopper_keys import key_gradient_kernel

        problem = self.problem
        plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
        norms = TensorDescriptor.from_tensor(self.norms, [1, 2 * _SIZE], plain)
        units = -(-problem.num_keys // (KEY_OPTIONS["GROUPS"] * _SIZE))
        key_gradient_kernel[(units, problem.kv_heads, problem.batch)](
            self.rows[0], *self.columns, *problem.segments, self.rows[1], norms,
            *(_described(x, self.key_box) for x in (self.grad_k, self.grad_v)), self.flags[self.tiles :],
            *problem.sizes(), problem.scale, problem.kv_heads, **self.constants, **KEY_OPTIONS,
        )  # fmt: skip
        return self.grad_k, self.grad_v

    def mend(self) -> None:
        """Form again what is not finite, after all other kernels."""
        problem = self.problem
        mend_kernel[(-(-(self.tiles + self.blocks) // _SHARE),)](
            problem.q, problem.k, problem.v, *problem.segments, self.grad_out, self.out, self.lse, self.deltas,
            self.grad_q, self.grad_k, self.grad_v, self.flags, *problem.sizes(), problem.scale, self.tiles, self.blocks,
            problem.kv_heads, D=_SIZE, BT=_SIZE // problem.group, BN=_SIZE, SHARE=_SHARE, **self.constants,
            **overlap(problem.q.device.index),
        )  # fmt: skip
