"""When the Triton backends can run, and the small helpers that their host code shares. Imports no triton at its top."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from importlib.util import find_spec
from typing import Any, TypeVar, cast

import torch

from hsa_ultralong.ops._common import answered_once

_Function = TypeVar("_Function", bound=Callable[..., Any])
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# head dimensions, and sizes of a chunk, that the attention kernels take
KERNEL_SIZES = (16, 32, 64, 128)


@answered_once
def is_interpreted() -> bool:
    """True under TRITON_INTERPRET=1: kernels then run on the CPU, slowly, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=1)
def _finds_triton() -> bool:
    return find_spec("triton") is not None


# not the cached function itself, whose cache torch.compile would pass by, with a warning
@answered_once
def _is_installed() -> bool:
    return _finds_triton()


@lru_cache(maxsize=8)
def _read_capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@answered_once
def _capability(index: int) -> tuple[int, int]:
    return _read_capability(index)


@lru_cache(maxsize=8)
def num_processors(index: int | None) -> int:
    """Streaming multiprocessors of a CUDA device; a small number where kernels are interpreted."""
    if index is None or not torch.cuda.is_available():
        return 4
    return torch.cuda.get_device_properties(index).multi_processor_count


# bytes of shared memory that a program may use on an H100
HOPPER_MEMORY = 232_448


@lru_cache(maxsize=8)
def shared_memory(index: int | None) -> int:
    """Bytes of shared memory that a program may ask for on a CUDA device: HOPPER_MEMORY, also where kernels are
    interpreted, 166,912 on an A100, 101,376 on RTX 30 to 50, A10, L4 and L40S."""
    if index is None or not torch.cuda.is_available():
        return HOPPER_MEMORY
    properties: Any = torch.cuda.get_device_properties(index)
    return int(properties.shared_memory_per_block_optin)


@lru_cache(maxsize=8)
def starts_early(index: int | None) -> bool:
    """Whether a kernel on this CUDA device may start before the one before it has ended (ops/_overlap.py)."""
    if index is None or not torch.cuda.is_available():
        return False
    return torch.version.hip is None and _capability(index)[0] >= 9


# the Triton whose Gluon, an experimental dialect, all kernel_*hopper*.py are written in and were measured with
_GLUON = (3, 6)


@lru_cache(maxsize=1)
def has_gluon() -> bool:
    """Whether the installed Triton compiles the kernel_*hopper*.py."""
    if not _is_installed():
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) == _GLUON


@lru_cache(maxsize=8)
def runs_hopper_kernels(index: int | None) -> bool:
    """Whether kernels in Gluon run on a CUDA device: capability 9.0, and the Triton that they are written for."""
    if index is None or is_interpreted() or not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return _capability(index) == (9, 0) and has_gluon()


def hash_triton_early() -> threading.Thread | None:
    """Let a thread do what the first kernel of a process waits for: Triton hashes all its files (500 MB, 0.6 s) before
    it looks for compiled kernels on disk, and remembers the result. None where Triton is not installed."""

    def work() -> None:
        try:
            from triton.runtime.cache import triton_key
        except ImportError:  # another version, which does it when it wants
            return
        triton_key()

    if not _is_installed():
        return None
    thread = threading.Thread(target=work, name="hash-triton", daemon=True)
    thread.start()
    return thread


@lru_cache(maxsize=1)
def check_compiled() -> None:
    """Let kernels that Triton finds on disk be checked before they are used (ops/_compiled.py)."""
    from hsa_ultralong.ops import _compiled  # imports triton

    _compiled.check_compiled()


def on_own_device(function: _Function) -> _Function:
    """Let it run with the device of its first argument, a tensor, as the current one: Triton launches on the current
    device's stream, which for tensors elsewhere would be another device, out of order."""

    @wraps(function)
    def run(first: torch.Tensor, *args: Any, **options: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *args, **options)
        return function(first, *args, **options)

    return cast(_Function, run)


def triton_runs_on(tensor: torch.Tensor) -> bool:
    """Whether impl="auto" may choose a Triton kernel for this tensor: an NVIDIA GPU from Ampere on."""
    return tensor.is_cuda and _is_installed() and torch.version.hip is None and _capability(tensor.device.index)[0] >= 8


def fp8_runs_on(tensor: torch.Tensor) -> bool:
    """Whether matrix products of 8-bit floats and Triton's conversions to them run for this tensor: Ada and newer."""
    if not triton_runs_on(tensor):
        return False
    major, minor = _capability(tensor.device.index)
    return major > 8 or (major == 8 and minor == 9)


def require_triton(op: str, tensor: torch.Tensor) -> None:
    """Raise one clear RuntimeError where impl="triton" cannot run."""
    if not _is_installed():
        raise RuntimeError(f'{op}: impl="triton" needs the triton package: pip install "hsa-ultralong[kernels]"')
    if not tensor.is_cuda and not is_interpreted():
        raise RuntimeError(
            f'{op}: impl="triton" needs tensors on an NVIDIA GPU, got device {str(tensor.device)!r}; use impl="auto", '
            "or set TRITON_INTERPRET=1 before Python starts to run the kernels on the CPU, slowly, for tests"
        )
    if tensor.is_cuda and _capability(tensor.device.index)[0] < 8:
        raise RuntimeError(f'{op}: impl="triton" needs compute capability 8.0 or newer; use impl="auto"')
    if not torch.compiler.is_compiling():
        check_compiled()


def require_kernel_dtype(op: str, tensor: torch.Tensor) -> None:
    """Raise a ValueError naming the dtypes that the kernels take."""
    if tensor.dtype not in KERNEL_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in KERNEL_DTYPES)
        raise ValueError(f'{op}: impl="triton" takes {names}, got {tensor.dtype}; use impl="auto"')


def next_power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
