"""One point of a benchmark: its fields, how to prepare the call, its arithmetic and its smallest memory traffic.

Arithmetic counts multiplications and additions of the forward on visible or selected keys; forward and backward is
three times that, recomputation not counted (docs/results.md). Bytes are the operands read or written once per use.
The operators come in as an argument (`hsa_ultralong.ops`, or a test's): this part of the package imports none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

DIRECTIONS = ("fwd", "fwd_bwd")
_DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

Call = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """Shapes and limits of a run; letters as in docs/architecture.md."""

    lengths: tuple[int, ...] = (4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
    topks: tuple[int, ...] = (32, 16, 64)
    decode_chunks: tuple[int, ...] = (16_384, 65_536, 262_144)
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    Hq: int = 16
    Hkv: int = 1
    D: int = 64
    S: int = 64
    R: int = 256
    window: int = 512
    seed: int = 0
    full_max: int = 131_072  # full attention is quadratic
    torch_max: int = 32_768  # so is the dense torch path, and the gathering one moves K * S keys a token
    recorded_max: int = 32_768
    budget_s: float = 0.25
    # the trainer's CudaCapture: every point is timed as the replay of a graph (timing.py)
    make_capture: Callable[[torch.device], Any] | None = None

    @property
    def dtype_name(self) -> str:
        return _DTYPE_NAMES[self.dtype]

    @property
    def main_topk(self) -> int:
        """The K of the figure, and of operators that are measured at one K: 32 where it is among them."""
        return 32 if 32 in self.topks else self.topks[0]


@dataclass(frozen=True)
class Point:
    """One measurement to be made; `prepare` makes the inputs and returns the call, under the runner's guard."""

    op: str
    impl: str
    direction: str
    T: int
    prepare: Callable[[], Call]
    selection: str = "none"
    K: int | None = None
    C: int | None = None
    flops: int = 0
    bytes: int = 0
    use_graph: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    # what is wrong with the results of this implementation, None if nothing is
    check: Callable[[], str | None] | None = None

    def record(self, settings: Settings) -> dict[str, Any]:
        """The flat record of docs/results.md without its measured part."""
        return {
            "op": self.op, "impl": self.impl, "direction": self.direction, "selection": self.selection, "T": self.T,
            "K": self.K, "C": self.C, "Hq": settings.Hq, "Hkv": settings.Hkv, "D": settings.D, "S": settings.S,
            "R": settings.R, "dtype": settings.dtype_name, "flops": self.flops, "bytes": self.bytes, **self.more,
            **({"graph": True} if settings.make_capture is not None else {}),
        }  # fmt: skip


def one_line(error: Exception) -> str:
    """Kind and message of an error, shortened."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def noise(settings: Settings, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Standard normal values on the device."""
    generator = torch.Generator(settings.device).manual_seed(settings.seed + seed)
    values = torch.randn(shape, generator=generator, device=settings.device, dtype=torch.float32)
    return values.to(dtype or settings.dtype)


def directed(forward: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], direction: str) -> Call:
    """The forward without gradients, or forward and backward with a fixed random upstream gradient."""
    if direction == "fwd":

        def run() -> torch.Tensor:
            with torch.no_grad():
                return forward(*inputs)

        return run
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.no_grad():
        out = forward(*leaves)
    upstream = torch.randn_like(out)
    del out

    def run_both() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(forward(*leaves), leaves, upstream)

    return run_both


def traffic(direction: str, inputs: int, outputs: int, indices: int = 0) -> int:
    """Smallest traffic: operands read, outputs written; the backward reads operands and dO, writes gradients."""
    if direction == "fwd":
        return inputs + outputs + indices
    return 3 * inputs + 2 * outputs + 2 * indices


def passes(direction: str) -> int:
    """The backward's two products per forward product."""
    return 1 if direction == "fwd" else 3


def visible_keys(num_tokens: int, window: int | None = None) -> int:
    """Sum over tokens of the keys they see causally, at most `window` each."""
    if window is None or window >= num_tokens:
        return num_tokens * (num_tokens + 1) // 2
    return window * (window + 1) // 2 + (num_tokens - window) * window


def visible_chunks(num_tokens: int, chunk_size: int) -> int:
    """Sum over tokens t of t // S."""
    full, rest = divmod(num_tokens, chunk_size)
    return chunk_size * full * (full - 1) // 2 + rest * full
