"""The sliding window's gradients on Hopper: when its kernels run, and their launches.

dq by kernel_window_hopper_gradients.py, dk and dv by kernel_window_hopper_keys.py, and what is not finite once more by
kernel_window_mend.py. Gluon is imported only where it runs. Tests: tests/ops/test_window_hopper_gradients.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from hsa_ultralong.ops._launch import are_aligned
from hsa_ultralong.ops._overlap import overlap
from hsa_ultralong.ops._triton import num_processors, runs_hopper_kernels
from hsa_ultralong.ops.sliding_window.kernel_window_mend import mend_gradients_kernel

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
# sizes that the last block of keys of a tile of dq may have besides a whole block's
TAILS = (16, 32)
# rows of a tile, keys of a block, head dimension
_SIZE = 64
# tiles and blocks that one program looks at for what is not finite
_SHARE = 16


def takes(problem: _Problem, grad_out: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether dq comes from these kernels: not with segments, with which Triton 3.6 failed to compile them there."""
    q, k = problem.q, problem.k
    if not q.dtype == k.dtype == problem.v.dtype == grad_out.dtype:
        return False
    is_fit = problem.dim == _SIZE and problem.group in (1, 2, 4, 8, 16) and q.dtype in (torch.bfloat16, torch.float16)
    if problem.has_segments or not (IS_USED and is_fit and runs_hopper_kernels(q.device.index)):
        return False
    tiles = problem.batch * problem.kv_heads * -(-problem.num_queries * problem.group // _SIZE)
    is_short = max(q.numel(), k.numel(), tiles * 2 * _SIZE) < 2**31
    return is_short and are_aligned(q, k, problem.v, grad_out, out) and query_units(problem) >= QUERY_UNITS


def query_units(problem: _Problem) -> int:
    tokens = QUERY_OPTIONS["GROUPS"] * _SIZE // problem.group
    return problem.batch * problem.kv_heads * -(-problem.num_queries // tokens)


def tail_of(window: int, group: int) -> int:
    """Keys of the last block that a unit's tiles see, rounded up, where these are few; else 0: a block as others."""
    rest = (window + QUERY_OPTIONS["GROUPS"] * _SIZE // group - 1) % _SIZE
    return next((size for size in TAILS if 0 < rest <= size), 0)


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
        self.key_units = batch * heads * -(-problem.num_keys // (KEY_OPTIONS["GROUPS"] * _SIZE))
        self.takes_keys = self.key_units >= KEY_UNITS
        self.blocks = batch * heads * -(-problem.num_keys // _SIZE) if self.takes_keys else 0
        q, k = problem.q, problem.k
        self.grad_q, self.deltas = torch.empty_like(q), torch.empty_like(lse)
        self.grad_k, self.grad_v = (torch.empty_like(k) for _ in range(2))
        self.norms = torch.empty(self.tiles, 2 * _SIZE, dtype=torch.float32, device=q.device)
        self.flags = torch.empty(self.tiles + self.blocks, 4, dtype=torch.int32, device=q.device)
        self.constants = {"G": problem.group, "num_warps": 4}

    def _rows(self, *tensors: torch.Tensor) -> list[Any]:
        group = self.problem.group
        return [_described(x, [1, _SIZE // group, group, _SIZE]) for x in tensors]

    def _columns(self, *tensors: torch.Tensor) -> list[Any]:
        return [_described(x, [1, _SIZE, 1, _SIZE]) for x in tensors]

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dq, and delta (B, Tq, Hq)."""
        from hsa_ultralong.ops.sliding_window.kernel_window_hopper_gradients import query_gradient_kernel

        problem, total = self.problem, query_units(self.problem)
        num_queries, num_keys, window, scale = problem.sizes()
        query, upward, result, grad_q = self._rows(problem.q, self.grad_out, self.out, self.grad_q)
        query_gradient_kernel[(min(total, num_processors(problem.q.device.index)),)](
            query, *self._columns(problem.k, problem.v), upward, result, self.lse, grad_q, self.deltas, self.norms,
            self.flags, num_queries, num_keys, window, total, scale, problem.scale, problem.kv_heads,
            TAIL=tail_of(window, problem.group), **self.constants, **QUERY_OPTIONS,
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
        query, upward = self._rows(problem.q, self.grad_out)
        num_queries, num_keys, window, scale = problem.sizes()
        key_gradient_kernel[(min(self.key_units, num_processors(problem.q.device.index)),)](
            query, *self._columns(problem.k, problem.v), upward, norms, *self._columns(self.grad_k, self.grad_v),
            self.flags[self.tiles :], num_queries, num_keys, window, self.key_units, scale, problem.scale,
            problem.kv_heads, **self.constants, **KEY_OPTIONS,
        )  # fmt: skip
        return self.grad_k, self.grad_v

    def mend(self) -> None:
        """Form again what is not finite, after all other kernels."""
        problem = self.problem
        mend_gradients_kernel[(-(-(self.tiles + self.blocks) // _SHARE),)](
            problem.q, problem.k, problem.v, self.grad_out, self.out, self.lse, self.deltas, self.grad_q, self.grad_k,
            self.grad_v, self.flags, *problem.sizes(), problem.scale, self.tiles, self.blocks, problem.kv_heads,
            D=_SIZE, BT=_SIZE // problem.group, BN=_SIZE, SHARE=_SHARE, **self.constants,
            **overlap(problem.q.device.index),
        )  # fmt: skip
