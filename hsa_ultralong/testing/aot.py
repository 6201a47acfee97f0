"""Compile the Triton kernels for cards of cards.py on a machine without a GPU and show what each costs the card.

`record_launches(card)` lets the operators' own host code choose arguments, tiles and warps for CPU tensors and notes
every launch instead of running it; `compile_launch` compiles one and asks cuobjdump for its registers and memory.

    TRITON_INTERPRET=0 python -m hsa_ultralong.testing.aot [--all] [--capability 80,86,89,90,100,120]
        [--limit-stack BYTES] [--jobs N] [--only NAME]

exits with code 1 if a kernel fails to compile, does not fit into the card's shared memory, or spills more than the
limit on 16-bit numbers. The cases are those of aot_cases.py. Triton is imported only when used.
tests/testing/test_aot.py.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from hsa_ultralong.testing.cards import CARDS, Card
from hsa_ultralong.testing.processes import HANG_SECONDS

HOPPER = CARDS[90]
# what the largest tiles (D = S = 128) may spill; the benchmark shape spills 248 bytes at most
SPILL_LIMIT = 512


@dataclass(frozen=True)
class Launch:
    """One kernel launch as Triton specialises it: types, constexprs, divisibility and compile options."""

    function: Any
    signature: dict[str, str]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.function.__name__

    @property
    def key(self) -> str:
        """Equal for launches that share one compiled kernel."""
        kernel = f"{getattr(self.function, 'module', '')}.{self.name}"
        return repr((kernel, self.signature, sorted(map(repr, self.constexprs.items())), self.attrs, self.options))

    @property
    def card(self) -> Card:
        """The one that it was recorded for; options hold its architecture too, and must not meet another."""
        return CARDS[int(self.options["arch"].removeprefix("sm"))]

    @property
    def num_warps(self) -> int:
        return int(self.options.get("num_warps", 0))

    @property
    def num_stages(self) -> int:
        return int(self.options.get("num_stages", 0))

    def is_for_speed(self) -> bool:
        """Whether it works on 16-bit numbers; in fp32 the large tiles of matrix kernels spill, and serve tests only."""
        kinds = map(str, self.signature.values())
        return any(kind.startswith(("*bf16", "*fp16", "tensordesc<bf16", "tensordesc<fp16")) for kind in kinds)

    def describe(self) -> str:
        """Pointer types once, then the constexprs: "bf16,fp32 BLOCK_T=64 D=64"."""
        types = [kind.lstrip("*") for kind in self.signature.values() if isinstance(kind, str) and kind.startswith("*")]
        names = list(self.signature)
        parts = [",".join(dict.fromkeys(types))]
        for path, value in self.constexprs.items():
            place = path[0] if isinstance(path, tuple) else path
            name = names[place] if isinstance(place, int) else str(place)
            if name.isupper() and not isinstance(value, str):
                parts.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
        return " ".join(filter(None, parts))


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes per thread (registers, stack and local bytes) and per program (bytes of shared
    memory, columns of tensor memory)."""

    name: str
    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    tensor_columns: int = 0

    @property
    def spilled_bytes(self) -> int:
        return self.stack_bytes + self.local_bytes


def is_available() -> bool:
    """Whether Triton with its NVIDIA tools is installed and its kernels are not interpreted."""
    try:
        import triton
    except ImportError:
        return False
    return not is_interpreting(triton) and tool("cuobjdump").is_file()


def is_interpreting(triton: Any) -> bool:
    return bool(triton.knobs.runtime.interpret)


def tool(name: str) -> Path:
    """One of NVIDIA's programs, "cuobjdump" or "nvdisasm", that Triton brings along or knows."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return bundled if bundled.is_file() else Path(getattr(triton.knobs.nvidia, name).path)


def _target(card: Card) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("cuda", card.capability, 32)


def driver_of(card: Card) -> Any:
    """Stands in for the CUDA driver as far as Triton's launcher asks it about the card."""
    properties = {
        "multiprocessor_count": card.num_processors, "max_shared_mem": card.shared_bytes, "warpSize": 32,
    }  # fmt: skip
    return SimpleNamespace(
        # a number that no real launch uses, one for each card: Triton's caches stay apart
        get_current_device=lambda: -card.capability,
        set_current_device=lambda device: None,
        get_current_stream=lambda device=None: 0,
        get_current_target=lambda: _target(card),
        get_active_torch_device=lambda: torch.device("cpu"),
        get_device_interface=lambda: torch.cuda,
        utils=SimpleNamespace(get_device_properties=lambda device=None: properties),
    )


@contextmanager
def replaced_functions(card: Card) -> Iterator[None]:
    """Let the host code of operators and baselines believe in the card, in every module that holds these functions."""
    from hsa_ultralong.ops import _triton

    replacements: dict[Any, Any] = {}
    for name, new in (
        ("require_triton", lambda op, tensor: None),
        ("is_interpreted", lambda: False),
        ("triton_runs_on", lambda tensor: True),
        ("fp8_runs_on", lambda tensor: card.capability >= 89),
        ("num_processors", lambda index=None: card.num_processors),
        ("shared_memory", lambda index=None: card.shared_bytes),
        ("starts_early", lambda index=None: card.capability >= 90),
        ("runs_hopper_kernels", lambda index=None: card.capability == 90 and _triton.has_gluon()),
    ):
        if hasattr(_triton, name):
            replacements[getattr(_triton, name)] = new

    def forget_plans() -> None:
        # they follow from the card too
        for module in [m for key, m in list(sys.modules.items()) if key.startswith("hsa_ultralong.ops.")]:
            if hasattr(module, "plan_of"):
                module.plan_of.cache_clear()

    def swap(table: dict[Any, Any]) -> None:
        ours = ("hsa_ultralong.ops", "hsa_ultralong.baselines")
        for module in [m for key, m in list(sys.modules.items()) if key.startswith(ours)]:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in table:
                    setattr(module, name, table[value])

    swap(replacements)
    forget_plans()
    try:
        yield
    finally:
        # also modules that were first imported meanwhile
        swap({new: old for old, new in replacements.items()})
        forget_plans()


def card_patches(card: Card) -> list[Any]:
    """torch.cuda's questions about the card."""
    cuda, (major, minor) = torch.cuda, card.major_minor
    properties = SimpleNamespace(
        multi_processor_count=card.num_processors, major=major, minor=minor, name=card.name,
        shared_memory_per_block_optin=card.shared_bytes, L2_cache_size=card.cache_bytes,
    )  # fmt: skip
    return [
        mock.patch.object(cuda, "device", lambda device=None: contextlib.nullcontext()),
        mock.patch.object(cuda, "device_of", lambda tensor=None: contextlib.nullcontext()),
        mock.patch.object(cuda, "current_device", lambda: 0),
        mock.patch.object(cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        mock.patch.object(cuda, "synchronize", lambda device=None: None),
        mock.patch.object(cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(cuda, "get_device_capability", lambda device=None: (major, minor)),
        mock.patch.object(cuda, "get_device_properties", lambda device=None: properties),
    ]


def _zero_patches() -> list[Any]:
    """Tensors of zeros where a kernel would have written."""
    return [
        mock.patch.object(torch, "empty", torch.zeros),
        mock.patch.object(torch, "empty_like", torch.zeros_like),
        mock.patch.object(torch.Tensor, "new_empty", torch.Tensor.new_zeros),
    ]


@contextmanager
def record_launches(card: Card = HOPPER) -> Iterator[list[Launch]]:
    """Note every launch of a Triton kernel on CPU tensors instead of running it, as the host code makes it for the
    card; each distinct launch once.

    Outputs of kernels stay zero, so values computed from them mean nothing.

    Raises:
        RuntimeError: if the kernels are interpreted (TRITON_INTERPRET=1), for then there is nothing to compile.
    """
    import triton
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    if is_interpreting(triton):
        raise RuntimeError("launches can be recorded only with TRITON_INTERPRET=0: interpreted kernels have no code")
    found: dict[str, Launch] = {}
    run = JITFunction.run
    order = list(inspect.signature(JITFunction._do_compile).parameters)

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        given = {**dict(zip(order[1:], args, strict=False)), **kwargs}
        constexprs = given.get("constexprs", given.get("constants"))
        options = {key: value for key, value in vars(given["options"]).items() if key != "extern_libs"}
        launch = Launch(self, dict(given["signature"]), dict(constexprs or {}), dict(given["attrs"]), options)
        found.setdefault(launch.key, launch)

    def run_nothing(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        return run(self, *args, grid=grid, warmup=True, **kwargs)

    def run_every_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())

    result: list[Launch] = []
    previous = driver._active
    driver.set_active(driver_of(card))
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(JITFunction, "run", run_nothing))
            stack.enter_context(mock.patch.object(JITFunction, "_do_compile", note))
            stack.enter_context(mock.patch.object(Autotuner, "run", run_every_configuration))
            stack.enter_context(replaced_functions(card))
            for patch in (*card_patches(card), *_zero_patches()):
                stack.enter_context(patch)
            yield result
    finally:
        driver._active = previous
        result.extend(found.values())


def _compiled(launch: Launch) -> Any:
    import triton
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    from hsa_ultralong.ops._triton import check_compiled

    check_compiled()
    kind = GluonASTSource if isinstance(launch.function, GluonJITFunction) else ASTSource
    source = kind(launch.function, launch.signature, launch.constexprs, launch.attrs)
    return triton.compile(source, target=_target(launch.card), options=dict(launch.options))


def cubin_of(launch: Launch) -> bytes:
    """The machine code of one recorded launch for its card."""
    return bytes(_compiled(launch).asm["cubin"])


def compile_launch(launch: Launch) -> Resources:
    """Compile one recorded launch for its card and read its costs from the machine code."""
    kernel = _compiled(launch)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(kernel.asm["cubin"])
        command = [str(tool("cuobjdump")), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG_SECONDS).stdout
    usage = parse_resource_usage(text)
    shared = max(int(getattr(kernel.metadata, "shared", 0)), usage.get("SHARED", 0))
    columns = int(getattr(kernel.metadata, "tmem_size", 0) or 0)
    return Resources(launch.name, usage["REG"], usage["STACK"], usage["LOCAL"], shared, columns)


def parse_resource_usage(text: str) -> dict[str, int]:
    """cuobjdump's "REG:168 STACK:0 SHARED:0 LOCAL:0 ...", the largest where there are several functions.

    Raises:
        ValueError: if the text has no such line.
    """
    usage: dict[str, int] = {}
    for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text):
        usage[name] = max(usage.get(name, 0), int(value))
    if not {"REG", "STACK", "LOCAL"} <= set(usage):
        raise ValueError(f"cuobjdump reported no resource usage: {text.strip()[:200]!r}")
    return usage


def collect(
    cases: Sequence[tuple[str, Callable[[], None]]], card: Card = HOPPER
) -> tuple[list[Launch], list[str], list[str]]:
    """Distinct launches of all cases, then failures, then what has no Triton backend yet or is refused on the card."""
    launches: dict[str, Launch] = {}
    failures: list[str] = []
    absent: dict[str, None] = {}
    for name, case in cases:
        error: Exception | None = None
        with record_launches(card) as found:
            try:
                case()
            except Exception as raised:
                error = raised
        for launch in found:
            launches.setdefault(launch.key, launch)
        if error is not None and "impl='triton' is not available" in str(error):
            absent[f'{name.split(" ")[0]} has no impl="triton" yet'] = None
        elif isinstance(error, ValueError) and "of shared memory, this card has" in str(error):
            absent[f"{name}: refused, {error}"] = None
        elif error is not None:
            failures.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
    return list(launches.values()), failures, list(absent)


_found: list[Launch] = []  # read by the processes that _compile_all forks


def _compile_number(number: int) -> Resources | str:
    try:
        return compile_launch(_found[number])
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _compile_all(launches: list[Launch], jobs: int) -> Iterator[tuple[Launch, Resources | str]]:
    _found[:] = launches
    if jobs == 1:
        yield from ((launch, _compile_number(number)) for number, launch in enumerate(launches))
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from zip(launches, pool.imap(_compile_number, range(len(launches))), strict=True)


def excesses(launch: Launch, resources: Resources, limit_stack: int) -> str:
    """What is more than the card has, or more than 16-bit numbers may spill; empty where all fits."""
    card, found = launch.card, []
    if resources.spilled_bytes > limit_stack and launch.is_for_speed():
        found.append(f"SPILLS more than {limit_stack} bytes")
    if resources.shared_bytes > card.shared_bytes:
        found.append(f"SHARED memory above {card.shared_bytes} bytes")
    if resources.tensor_columns > card.tensor_columns:
        found.append(f"TENSOR memory above {card.tensor_columns} columns")
    return "".join(f"  {one}" for one in found)


def report(launches: list[Launch], limit_stack: int, jobs: int, write: Callable[[str], object]) -> int:
    """Write one line per kernel; returns how many failed, did not fit or spilled more than `limit_stack` bytes
    on 16-bit numbers."""
    bad = 0
    columns = ("warps", "stages", "registers", "stack", "local", "shared")
    write(f"{'kernel':<32}" + "".join(f"{name:>10}" for name in columns) + "  constexprs\n")
    for launch, resources in _compile_all(launches, jobs):
        if isinstance(resources, str):
            bad += 1
            write(f"{launch.name:<32} FAILED  {launch.describe()}\n    {resources}\n")
            continue
        values = (launch.num_warps, launch.num_stages, resources.registers, resources.stack_bytes,
                  resources.local_bytes, resources.shared_bytes)  # fmt: skip
        verdict = excesses(launch, resources, limit_stack)
        bad += bool(verdict)
        write(f"{launch.name:<32}" + "".join(f"{value:>10,}" for value in values))
        write(f"  {launch.describe()}{verdict}\n")
    return bad


def _cards(text: str) -> list[Card]:
    try:
        return [CARDS[int(number)] for number in text.split(",")]
    except (KeyError, ValueError):
        known = ", ".join(map(str, CARDS))
        raise argparse.ArgumentTypeError(f"needs numbers of {known}, with commas between; got {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hsa_ultralong.testing.aot", description="Triton kernels, no GPU")
    parser.add_argument("--all", action="store_true", help="every supported variant instead of a few shapes")
    parser.add_argument(
        "--capability", type=_cards, default=[HOPPER], help="compute capabilities, 90 or 80,86,89 (default 90)"
    )
    limit_help = f"bytes a thread may spill (default {SPILL_LIMIT})"
    parser.add_argument("--limit-stack", type=int, default=SPILL_LIMIT, help=limit_help)
    parser.add_argument("--jobs", type=int, default=1, help="compile in this many processes")
    parser.add_argument("--only", default="", help="cases or kernels whose name contains this")
    options = parser.parse_args(arguments)
    from hsa_ultralong.testing.aot_cases import operator_cases

    cases = operator_cases(is_complete=options.all)
    chosen = [case for case in cases if options.only in case[0]] or cases
    failed = 0
    for card in options.capability:
        launches, failures, absent = collect(chosen, card)
        if chosen is cases:
            launches = [launch for launch in launches if options.only in launch.name]
        bad = report(launches, options.limit_stack, max(1, options.jobs), sys.stdout.write) + len(failures)
        for failure in failures:
            sys.stdout.write(f"FAILED before all launches were made: {failure}\n")
        for line in absent:
            sys.stdout.write(f"{line}\n")
        sys.stdout.write(f"{len(launches)} kernels compiled for sm_{card.capability} ({card.name}), {bad} failed\n")
        failed += bad
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
