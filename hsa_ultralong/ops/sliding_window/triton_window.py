"""Sliding-window attention as Triton kernels (kernel_window.py): forward, and gradients without atomic additions.

Choices of tiles were measured on an H100 (docs/kernels.md). Tested against reference.py under the interpreter and on a
GPU.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hsa_ultralong.ops._common import refuse_second_derivatives
from hsa_ultralong.ops._launch import are_aligned
from hsa_ultralong.ops._triton import (
    KERNEL_SIZES,
    check_compiled,
    next_power_of_two,
    num_processors,
    on_own_device,
    require_kernel_dtype,
    require_triton,
    runs_hopper_kernels,
)
from hsa_ultralong.ops.sliding_window import hopper_gradients, kernel_window

# rows (B * Tq * Hq) from which on kernel_window_hopper.py takes the forward where it runs; None: never
_HOPPER_ROWS: int | None = 65_536


class WindowLaunch(NamedTuple):
    """Rows of a tile (tokens * heads), keys of a block, warps and software-pipelining stages of one kernel."""

    rows: int
    keys: int
    warps: int
    stages: int


def launch_options(kind: str, dim: int, dtype: torch.dtype) -> WindowLaunch:
    """kind is "forward", "query" or "key"."""
    if dtype == torch.float32:
        return WindowLaunch(16, 32, 4, 1)
    if dim > 64:
        return WindowLaunch(64, 64, 4 if kind == "forward" else 8, 2)
    return WindowLaunch(64, 64, 4, 3)


class _Problem:
    """Contiguous operands and the arguments that every kernel takes; shapes as in api.sliding_window_attention."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        query_segments: torch.Tensor | None,
        key_segments: torch.Tensor | None,
        window: int,
        scale: float,
    ) -> None:
        # a compiled graph does not pass require_triton
        check_compiled()
        self.q, self.k, self.v = q.contiguous(), k.contiguous(), v.contiguous()
        self.batch, self.num_queries, self.heads, self.dim = q.shape
        self.num_keys, self.kv_heads = k.shape[1:3]
        self.group, self.window, self.scale = self.heads // self.kv_heads, window, scale
        self.has_segments = query_segments is not None
        # without segments some tensor of integers, which is not read
        parts = (self.q if part is None else part for part in (query_segments, key_segments))
        self.segments = tuple(part.contiguous() for part in parts)

    def sizes(self) -> tuple[int, int, int, float]:
        return self.num_queries, self.num_keys, self.window, self.scale * math.log2(math.e)

    def constants(self, options: WindowLaunch, group: int) -> dict[str, Any]:
        padded = next_power_of_two(group)
        tokens = max(1, options.rows // padded)
        return {
            # a matrix unit takes at least 16 rows
            "G": group, "GP": max(padded, 16 // tokens), "D": self.dim, "BT": tokens, "BN": options.keys,
            "HAS_SEGMENTS": self.has_segments, "PRECISION": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "STAGES": options.stages, "num_warps": options.warps,
        }  # fmt: skip

    def takes_hopper_forward(self) -> bool:
        """Whether kernel_window_hopper.py takes the forward of these operands, and runs here."""
        rows = self.batch * self.num_queries * self.heads
        if _HOPPER_ROWS is None or not _HOPPER_ROWS <= rows < 2**31 or self.q.dtype == torch.float32:
            return False
        is_fit = self.dim == 64 and self.group in (1, 2, 4, 8, 16) and are_aligned(self.q, self.k, self.v)
        is_fit &= self.q.dtype == self.k.dtype == self.v.dtype
        is_fit &= not self.has_segments or all(part.dtype == torch.int32 for part in self.segments)
        return is_fit and runs_hopper_kernels(self.q.device.index)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out, and lse (B, Tq, Hq) fp32."""
        out = torch.empty_like(self.q)
        lse = torch.empty(self.q.shape[:3], dtype=torch.float32, device=self.q.device)
        if self.takes_hopper_forward():
            from hsa_ultralong.ops.sliding_window.hopper_window import run_forward

            run_forward(self.q, self.k, self.v, self.segments, out, lse, self.sizes(), self.has_segments)
            return out, lse
        constants = self.constants(launch_options("forward", self.dim, self.q.dtype), self.group)
        kernel_window.forward_kernel[(-(-self.num_queries // constants["BT"]), self.kv_heads, self.batch)](
            self.q, self.k, self.v, *self.segments, out, lse, *self.sizes(), self.kv_heads, **constants
        )
        return out, lse

    def gradients(self, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """dq, dk, dv."""
        grad_out, out, lse = grad_out.contiguous(), out.contiguous(), lse.contiguous()
        if not hopper_gradients.takes(self, grad_out, out):
            grad_q, deltas = self._query_gradient(grad_out, out, lse)
            return grad_q, *self._key_gradients(grad_out, lse, deltas)
        hopper = hopper_gradients.HopperGradients(self, grad_out, out, lse)
        grad_q, deltas = hopper.queries()
        grad_k, grad_v = hopper.keys() if hopper.takes_keys else self._key_gradients(grad_out, lse, deltas)
        hopper.mend()
        return grad_q, grad_k, grad_v

    def _query_gradient(
        self, grad_out: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dq, and delta (B, Tq, Hq)."""
        grad_q, deltas = torch.empty_like(self.q), torch.empty_like(lse)
        constants = self.constants(launch_options("query", self.dim, self.q.dtype), self.group)
        kernel_window.query_gradient_kernel[(-(-self.num_queries // constants["BT"]), self.kv_heads, self.batch)](
            self.q, self.k, self.v, *self.segments, grad_out, out, lse, grad_q, deltas, *self.sizes(), self.scale,
            self.kv_heads, **constants,
        )  # fmt: skip
        return grad_q, deltas

    def _key_gradients(
        self, grad_out: torch.Tensor, lse: torch.Tensor, deltas: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """dk, dv."""
        options = launch_options("key", self.dim, self.q.dtype)
        blocks = -(-self.num_keys // options.keys)
        splits = self._splits(blocks * self.kv_heads * self.batch)
        shape = (splits, *self.k.shape)
        dtype = self.k.dtype if splits == 1 else torch.float32
        grad_k, grad_v = (torch.empty(shape, dtype=dtype, device=self.k.device) for _ in range(2))
        constants = self.constants(options, self.group // splits)
        kernel_window.key_gradient_kernel[(blocks, self.kv_heads * splits, self.batch)](
            self.q, self.k, self.v, *self.segments, grad_out, lse, deltas, grad_k, grad_v, *self.sizes(), self.scale,
            self.kv_heads, SPLITS=splits, **constants,
        )  # fmt: skip
        if splits == 1:
            return grad_k[0], grad_v[0]
        return grad_k.sum(0).to(self.k.dtype), grad_v.sum(0).to(self.k.dtype)

    def _splits(self, programs: int) -> int:
        """Shares of the heads, so that few keys still fill the device."""
        splits = 1
        while programs * splits < 2 * num_processors(self.q.device.index) and self.group % (2 * splits) == 0:
            splits *= 2
        return splits


@on_own_device
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _Problem(q, k, v, query_segments, key_segments, window, scale).forward()


@on_own_device
def _gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    grad_out: torch.Tensor,
    window: int,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    return _Problem(q, k, v, query_segments, key_segments, window, scale).gradients(grad_out, out, lse)


# Operators: selective checkpointing sees the first and keeps it (train/activations.py), and torch.compile takes both
# into the graph of a layer, which does not end at the kernels then.
_SCHEMA = "(Tensor q, Tensor k, Tensor v, Tensor? qs, Tensor? ks, SymInt window, float scale) -> (Tensor, Tensor)"
_GRADIENT_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor? qs, Tensor? ks, Tensor out, Tensor lse, Tensor grad_out, SymInt window, "
    "float scale) -> (Tensor, Tensor, Tensor)"
)
_operator = torch.library.custom_op("hsa_ultralong::sliding_window", _forward, mutates_args=(), schema=_SCHEMA)
_gradient_operator = torch.library.custom_op(
    "hsa_ultralong::sliding_window_gradients", _gradients, mutates_args=(), schema=_GRADIENT_SCHEMA
)


@_operator.register_fake
def _shapes(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Of out and lse; strides are those of contiguous tensors, as kernels write them."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@_gradient_operator.register_fake
def _gradient_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, window, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.options = (window, scale)
    # no zeros for lse, which nothing reads further on
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: torch.Tensor | None, *grad_lse: Any) -> tuple[Any, ...]:
    if grad_out is None:
        return (None,) * 7
    if not torch.compiler.is_compiling():
        refuse_second_derivatives("sliding_window_attention", "triton", "torch")
    gradients = _gradient_operator(*ctx.saved_tensors, grad_out, *ctx.options)
    return *gradients, None, None, None, None


_operator.register_autograd(_backward, setup_context=_keep)


def sliding_window_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    window: int,
    query_segments: torch.Tensor | None,
    key_segments: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Same result as sliding_window_reference, up to the rounding of the input dtype."""
    require_triton("sliding_window_attention", q)
    require_kernel_dtype("sliding_window_attention", q)
    if not (q.dtype == k.dtype == v.dtype) or q.shape[-1] not in KERNEL_SIZES or scale <= 0:
        raise ValueError(
            f'sliding_window_attention: impl="triton" takes head dimensions in {KERNEL_SIZES}, q, k and v of one dtype '
            f"and a positive scale; got D={q.shape[-1]}, {q.dtype}, {k.dtype}, {v.dtype}, scale={scale}"
        )
    window = min(window, k.shape[1])
    is_taught = torch.is_grad_enabled() and any(part.requires_grad for part in (q, k, v))
    run = _operator if is_taught or torch.compiler.is_compiling() else _forward
    return run(q, k, v, query_segments, key_segments, window, scale)[0]
