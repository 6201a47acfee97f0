"""Launches that leave out Triton's binding of arguments: a kernel, its grid and its constants, called again and again.

`kernel[grid](...)` types and specialises every argument in Python at each call, 10 to 20 microseconds; short rows wait
for it. What it finds depends on the dtypes, on which numbers are 1 or multiples of 16, and on which addresses are
multiples of 16 bytes. A PreparedLaunch keeps what the first call compiled, so its owner promises that these stay: the
plans (ops/hsa/plan.py, ops/chunk_topk/plan.py) make one per set of shapes and dtypes. Imports triton: for
backends only. Tests: tests/ops/test_launches.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver

# what Triton tells addresses apart by; torch allocates at multiples of more
_ALIGNMENT = 16


def are_aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes; views may not."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits % _ALIGNMENT == 0


class PreparedLaunch:
    """A kernel on a grid with its constants; called with all arguments before them, in order.

    Args:
        kernel: a triton.jit function whose constexprs come last.
        grid: programs in one to three dimensions.
        is_kept: False where the caller cannot promise what stands above; every call then binds its arguments.
        constants: the constexprs, and options such as num_warps.
    """

    def __init__(self, kernel: Any, grid: tuple[int, ...], *, is_kept: bool = True, **constants: Any) -> None:
        self._kernel, self._constants, self._is_kept = kernel, constants, is_kept
        self._grid = (*grid, 1, 1)[:3]
        self._device = -1
        self._run: Callable[..., None] | None = None
        self._last: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> None:
        if self._run is not None:
            device = driver.active.get_current_device()
            if device == self._device:
                self._run(*arguments, *self._last, stream=driver.active.get_current_stream(device))
                return
        compiled = self._kernel[self._grid](*arguments, **self._constants)
        # the interpreter, and the recorder of testing/aot.py, compile nothing
        if self._is_kept and self._run is None and isinstance(compiled, CompiledKernel):
            self._last = tuple(self._constants[name] for name in self._kernel.arg_names[len(arguments) :])
            self._device = driver.active.get_current_device()
            self._run = compiled[self._grid]
