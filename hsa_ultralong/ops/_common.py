"""Small helpers shared by the operators: accumulation dtype, matmul with a wide result, choice of backend."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)
_announced: set[str] = set()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def answered_once(function: _Function) -> _Function:
    """torch.compile calls such a function while it traces and keeps the answer, which holds as long as the process."""
    marked: _Function = torch.compiler.assume_constant_result(function)
    return marked


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 stays fp64; everything else accumulates in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Products inside keep their dtypes. Entering torch.autocast takes microseconds, which short rows wait for: only
    where it is on."""
    is_on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type=device_type, enabled=False) if is_on else nullcontext()


def refuse_second_derivatives(op: str, impl: str, instead: str) -> None:
    """For the first line of a backward whose own gradients nobody formed: they would be wrong without a word.

    Raises:
        RuntimeError: the backward is to be differentiated (create_graph=True); names another `impl`.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f'{op}: impl="{impl}" has first derivatives only, and create_graph=True needs second ones: '
            f'use impl="{instead}"'
        )


def matmul_wide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Batched product (N, I, J) @ (N, J, L) whose result is never rounded to 16 bits: fp32 (or fp64) out."""
    wide = accumulation_dtype(a.dtype)
    with without_autocast(a.device.type):
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and a.dtype == b.dtype:
            return torch.bmm(a, b, out_dtype=wide)
        return torch.bmm(a.to(wide), b.to(wide))


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Add a @ b, (I, J) @ (J, L), to `total` (I, L) in fp32 (or fp64), in place; on a GPU within the product."""
    with without_autocast(a.device.type):
        if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16) and a.dtype == b.dtype:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        else:
            total += matmul_wide(a[None], b[None])[0]


def may_be_nonfinite(*tensors: torch.Tensor) -> bool:
    """False if all numbers are finite (true of their sum); True on other devices than a CPU, where reading the answer
    would wait for the device."""
    return any(not x.is_cpu or not all(map(math.isfinite, _extremes(x.detach()))) for x in tensors)


def _extremes(x: torch.Tensor) -> Sequence[torch.Tensor]:
    """Numbers that are finite only if all of x are; each dtype by its fastest pass on a CPU."""
    if x.numel() == 0:
        return ()
    return (x.sum(),) if x.dtype in (torch.float32, torch.float64) else x.aminmax()


def blocks(length: int, size: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of at most `size` that cover 0..length."""
    for start in range(0, length, size):
        yield start, min(start + size, length)


@answered_once
def _announce(op: str, auto: str) -> None:
    if op not in _announced:
        _announced.add(op)
        logger.info("%s: impl='auto' uses %r", op, auto)


def choose_impl(op: str, impl: str, supported: Sequence[str], auto: str) -> str:
    """Resolve `impl`: "auto" picks and logs its choice once; anything else must be supported, no silent fallback."""
    if impl == "auto":
        _announce(op, auto)
        return auto
    if impl not in supported:
        raise ValueError(f"{op}: impl={impl!r} is not available; choose one of {['auto', *supported]}")
    return impl


def require_shape(name: str, tensor: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Raise a ValueError naming what was required and what came; None matches any size."""
    actual = tuple(tensor.shape)
    if len(actual) != len(expected) or any(e is not None and e != a for e, a in zip(expected, actual, strict=False)):
        wanted = "(" + ", ".join("any" if e is None else str(e) for e in expected) + ")"
        raise ValueError(f"{name} must have shape {wanted}, got {actual}")
