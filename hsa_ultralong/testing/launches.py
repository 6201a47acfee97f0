"""What a call asks of a card and of the host, counted on CPU tensors without a card: kernels, torch's operations.

`host_work()` stands in for the driver as aot.py does, but lets Triton's own launch path run up to the driver: so its
binding of arguments, which short rows wait for, is counted too. Kernels write nothing. tests/ops/test_launches.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from hsa_ultralong.testing.aot import HOPPER, card_patches, driver_of, is_interpreting, replaced_functions


@dataclass
class HostWork:
    """In order: names of `kernels`, their `arguments`, torch's `operations`; and how many launches bound arguments."""

    kernels: list[str] = field(default_factory=list)
    arguments: list[tuple[Any, ...]] = field(default_factory=list)
    operations: list[str] = field(default_factory=list)
    bindings: int = 0

    def clear(self) -> None:
        for part in (self.kernels, self.arguments, self.operations):
            part.clear()
        self.bindings = 0


# Triton keeps what it compiled, so a kernel may have been made for an earlier count
_counting: list[HostWork] = []


class _Operations(TorchDispatchMode):
    def __init__(self, work: HostWork) -> None:
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.work.operations.append(func.name().removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


@contextmanager
def host_work() -> Iterator[HostWork]:
    """Count what the calls inside would launch on a Hopper card, forward and backward.

    Raises:
        RuntimeError: if the kernels are interpreted (TRITON_INTERPRET=1).
    """
    import triton
    from triton.compiler import CompiledKernel
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if is_interpreting(triton):
        raise RuntimeError("launches can be counted only with TRITON_INTERPRET=0")
    work = HostWork()
    bind = JITFunction.run

    class Kernel(CompiledKernel):
        module = function = packed_metadata = None

        def __init__(self, name: str) -> None:
            self.name = name

        def _init_handles(self) -> None:
            pass

        def launch_metadata(self, *_: Any) -> None:
            pass

        def run(self, *given: Any) -> None:
            # after three dimensions, the stream, the function, its metadata, those of the launch and two hooks
            _counting[-1].kernels.append(self.name)
            _counting[-1].arguments.append(given[9:])

    def compile_nothing(self: Any, key: Any, signature: Any, device: Any, *_: Any, **__: Any) -> Any:
        return self.device_caches[device][0].setdefault(key, Kernel(self.__name__))

    def count_binding(self: Any, *args: Any, **kwargs: Any) -> Any:
        work.bindings += 1
        return bind(self, *args, **kwargs)

    previous = driver._active
    driver.set_active(driver_of(HOPPER))
    _counting.append(work)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", compile_nothing))
            stack.enter_context(mock.patch.object(JITFunction, "run", count_binding))
            stack.enter_context(replaced_functions(HOPPER))
            for patch in card_patches(HOPPER):
                stack.enter_context(patch)
            stack.enter_context(_Operations(work))
            yield work
    finally:
        driver._active = previous
        _counting.remove(work)
