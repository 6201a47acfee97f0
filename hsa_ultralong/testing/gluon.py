"""Run a file of kernels in Gluon on the CPU, in torch, with any Triton: a thread for each group of warps, bulk copies
that arrive late, asynchronous products that are formed when they are waited for.

It finds wrong indices, masks and phases of barriers, waits that miss and waits without end; not what a card alone does:
layouts, fences, registers. Functions of inline assembly must be replaced by the caller (`functions`). It knows what
ops/sliding_window/kernel_window_hopper.py uses of the language, no more. tests/ops/test_window_hopper.py.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

# seconds after which a wait counts as one without end; how late a copy may arrive
_PATIENCE, _LATENESS = 30.0, 1e-3
_IMPORTS = re.compile(r"^from triton\.experimental\S* import (\([^)]*\)|[^(\n]*)\n", re.MULTILINE)
# layouts of tensors, which have none here; numbers of a program are Python's
_LAYOUTS = re.compile(r"\w+(\.reshape\([^()]*\))?\.type\.layout|(?<=\bb)\.to\(gl\.int64\)|(?<=\))\.to\(gl\.int32\)")


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still waits for."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._phase = self._count = self._left = self._bytes = 0

    def init(self, count: int) -> None:
        self._count = self._left = count

    def change(self, arrivals: int, size: int) -> None:
        with self._condition:
            self._left -= arrivals
            self._bytes += size
            assert self._left >= 0, "a group arrived twice in a phase"
            if self._left == self._bytes == 0:
                self._phase, self._left = self._phase + 1, self._count
                self._condition.notify_all()

    def wait(self, parity: int) -> None:
        with self._condition:
            assert self._condition.wait_for(lambda: self._phase & 1 != parity, _PATIENCE), "a wait without end"


class Shared:
    """A tensor in shared memory, or a list of barriers."""

    def __init__(self, data: Any, is_transposed: bool = False) -> None:
        self.data, self.is_transposed = data, is_transposed

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    def index(self, place: Any) -> Any:
        return self.data[place] if isinstance(self.data, list) else Shared(self.data[int(place)])

    def permute(self, order: tuple[int, int]) -> Shared:
        return Shared(self.data, True)

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: None) -> Shared:
        return Shared(self.data.view(shape))

    def load(self, layout: None) -> torch.Tensor:
        return self.data.clone()

    def store(self, value: torch.Tensor) -> None:
        self.data.copy_(value)


class Pointer:
    def __init__(self, data: torch.Tensor, offset: Any = 0) -> None:
        self.data, self.offset = data, offset

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.data, self.offset + offset)


class Descriptor:
    """A tensor of which boxes are copied; they may reach beyond it, where zeros are read and nothing is written."""

    layout = None

    def __init__(self, data: torch.Tensor, block_shape: list[int], *_: Any) -> None:
        self.data, self.block_shape, self.dtype = data, block_shape, data.dtype

    from_tensor = classmethod(lambda cls, *arguments: cls(*arguments))

    def places(self, coordinates: list[int]) -> tuple[Any, Any]:
        """What lies inside of a box at these coordinates: places in the tensor, and in the box."""
        inner, outer = [], []
        for first, length, size in zip(coordinates, self.block_shape, self.data.shape, strict=True):
            begin, end = max(first, 0), max(min(first + length, size), max(first, 0))
            outer.append(slice(begin, end))
            inner.append(slice(begin - first, end - first))
        return tuple(outer), tuple(inner)


class _Product:
    def __init__(self, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self._operands, self.value = (a, b, acc, use_acc), None

    def form(self) -> None:
        a, b, acc, use_acc = self._operands
        left = (a.data if isinstance(a, Shared) else a).float()
        right = (b.data.T if b.is_transposed else b.data).float()
        self.value = left @ right + ((acc.value if isinstance(acc, _Product) else acc) if use_acc else 0.0)


class _Function:
    """What gluon.jit makes: called by other functions, or launched on a grid of one dimension."""

    def __init__(self, function: Callable[..., Any], owner: GluonStandIn) -> None:
        self._function, self._owner = function, owner

    def __call__(self, *arguments: Any, **constants: Any) -> Any:
        return self._function(*arguments, **constants)

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, num_warps: int, **constants: Any) -> None:
            self._owner.programs = grid[0]
            pointed = [Pointer(x.view(-1)) if isinstance(x, torch.Tensor) else x for x in arguments]
            for self._owner.program in range(grid[0]):
                self._function(*pointed, **constants)

        return launch


class GluonStandIn:
    """`names` of a file as its module has them, with kernels that run here.

    Args:
        file: the module's source.
        functions: by name, what stands in for functions of inline assembly, on whole tensors.
    """

    def __init__(self, file: str | Path, functions: dict[str, Callable[..., Any]]) -> None:
        self.program, self.programs = 0, 1
        self._threads, self._errors = threading.local(), list[BaseException]()
        self.names: dict[str, Any] = {
            "__name__": "gluon_stand_in", "gl": _language(self), "mbarrier": _barriers(), "tma": _copies(),
            "gluon": SimpleNamespace(jit=self._jit), "TensorDescriptor": Descriptor,
            "fence_async_shared": lambda: None, "warpgroup_mma": self._product, "warpgroup_mma_wait": self._wait,
        }  # fmt: skip
        text = _LAYOUTS.sub(lambda found: "None" if "layout" in found[0] else "", Path(file).read_text("utf-8"))
        # lines stay where they are: Triton's interpreter reads the file again
        text = _IMPORTS.sub(lambda found: "\n" * found[0].count("\n"), text)
        exec(compile(text, str(file), "exec"), self.names)
        self.names.update(functions)

    def _jit(self, function: Any = None, **_: Any) -> Any:
        return self._jit if function is None else _Function(function, self)

    def _product(self, a: Any, b: Any, acc: Any, *, use_acc: bool = True, is_async: bool = False) -> _Product:
        pending = self._threads.__dict__.setdefault("pending", [])
        pending.append(_Product(a, b, acc, use_acc))
        return pending[-1]

    def _wait(self, left: int, deps: tuple[Any, ...]) -> Any:
        pending = self._threads.pending
        while len(pending) > left:
            pending.pop(0).form()
        values = tuple(x.value if isinstance(x, _Product) else x for x in deps)
        assert all(x is not None for x in values), "a product is used before it was waited for"
        return values[0] if len(values) == 1 else values

    def specialize(self, parts: list[Any], warps: list[int], registers: list[int]) -> None:
        def run(function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
            try:
                function(*arguments)
            except BaseException as error:
                self._errors.append(error)

        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._errors:
            raise self._errors[0]


def _barriers() -> SimpleNamespace:
    return SimpleNamespace(
        MBarrierLayout=lambda: None, init=lambda bar, count: bar.init(count),
        expect=lambda bar, size: bar.change(1, size), arrive=lambda bar: bar.change(1, 0),
        wait=lambda bar, parity: bar.wait(int(parity)),
    )  # fmt: skip


def _copies() -> SimpleNamespace:
    def read(source: Descriptor, coordinates: list[int], bar: Barrier, target: Shared) -> None:
        box = target.data
        assert list(box.shape) == source.block_shape
        box.fill_(float("nan"))

        def arrive() -> None:
            time.sleep(random.random() * _LATENESS)
            outer, inner = source.places(coordinates)
            box.zero_()
            box[inner] = source.data[outer]
            bar.change(0, -box.numel() * box.element_size())

        threading.Thread(target=arrive).start()

    def write(target: Descriptor, coordinates: list[int], source: Shared) -> None:
        outer, inner = target.places(coordinates)
        target.data[outer] = source.data[inner]

    return SimpleNamespace(
        async_copy_global_to_shared=read, async_copy_shared_to_global=write, store_wait=lambda count: None
    )


def _load(pointer: Pointer, mask: Any = None, other: float = 0) -> torch.Tensor:
    place = torch.as_tensor(pointer.offset)
    mask = torch.ones_like(place, dtype=torch.bool) if mask is None else mask
    found = pointer.data[torch.where(mask, place, 0)]
    return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
    pointer.data[pointer.offset[mask]] = value[mask].to(pointer.data.dtype)


def _either(numbers: Callable[..., Any], tensors: Callable[..., Any]) -> Callable[..., Any]:
    def choose(*given: Any) -> Any:
        if any(isinstance(x, torch.Tensor) for x in given):
            return tensors(*map(torch.as_tensor, given))
        return numbers(*given)

    return choose


def _allocate(dtype: torch.dtype, shape: list[int], layout: None) -> Shared:
    if dtype == torch.int64:
        return Shared([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, float("nan"), dtype=dtype))


def _language(owner: GluonStandIn) -> SimpleNamespace:
    layouts = ("SliceLayout", "DotOperandLayout", "NVMMADistributedLayout", "NVMMASharedLayout")
    return SimpleNamespace(
        **dict.fromkeys(layouts, lambda *_, **__: None), constexpr=lambda x: x, static_range=range,
        float32=torch.float32, int64=torch.int64, int32=torch.int32,
        arange=lambda first, stop, layout: torch.arange(first, stop),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype), zeros_like=torch.zeros_like,
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        cdiv=lambda a, b: -(-a // b), maximum=_either(max, torch.maximum), minimum=_either(min, torch.minimum),
        where=_either(lambda condition, a, b: a if condition else b, torch.where),
        # as on a card, where NaN is never the largest
        max=lambda x, axis: torch.where(x.isnan(), float("-inf"), x).amax(axis), sum=torch.sum,
        expand_dims=torch.unsqueeze, convert_layout=lambda x, *_, **__: x, load=_load, store=_store,
        allocate_shared_memory=_allocate, thread_barrier=lambda: None, warp_specialize=owner.specialize,
        program_id=lambda axis: owner.program, num_programs=lambda axis: owner.programs,
    )  # fmt: skip
