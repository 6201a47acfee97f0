"""Points of the attention operators: HSA on three selections, full causal attention, the sliding window.

Full attention runs through torch's SDPA with one backend forced; grouped heads are tried, then expanded ones, and the
faster is measured. tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from hsa_ultralong.bench.points import (
    DIRECTIONS,
    Call,
    Point,
    Settings,
    directed,
    noise,
    passes,
    traffic,
    visible_keys,
)
from hsa_ultralong.bench.timing import time_call

# gives the lists (T, K) of a selection, or None where there are none
Lists = Callable[[str, int, int], "np.ndarray | None"]

_CHOICE_MAX = 16_384  # beyond this length grouped or expanded is taken from shorter ones


def fusion_weights(indices: torch.Tensor, settings: Settings) -> torch.Tensor:
    """Softmax of random scores over the filled slots, fp32, zero in empty ones."""
    scores = noise(settings, *indices.shape, seed=4, dtype=torch.float32)
    empty = indices < 0
    scores = scores.masked_fill(empty & ~empty.all(-1, keepdim=True), -torch.inf)
    return scores.softmax(-1).masked_fill(empty, 0.0)


def hsa_inputs(settings: Settings, lists: np.ndarray, num_keys: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Indices (1, T, 1, K), then q, k, v and weights."""
    num_tokens = lists.shape[0]
    indices = torch.from_numpy(lists).to(settings.device)[None, :, None]  # (1, T, 1, K)
    q = noise(settings, 1, num_tokens, settings.Hq, settings.D, seed=1)
    k = noise(settings, 1, num_keys, settings.Hkv, settings.D, seed=2)
    v = noise(settings, 1, num_keys, settings.Hkv, settings.D, seed=3)
    return indices, [q, k, v, fusion_weights(indices, settings)]


def _hsa_point(
    operators: Any, settings: Settings, impl: str, direction: str, T: int, K: int, selection: str, lists: np.ndarray
) -> Point:
    def prepare() -> Call:
        indices, inputs = hsa_inputs(settings, lists, T)

        def forward(q: Any, k: Any, v: Any, weights: Any) -> torch.Tensor:
            return operators.hsa_attention(
                q, k, v, indices, weights, chunk_size=settings.S, causal=True, impl=impl
            )  # fmt: skip

        return directed(forward, inputs, direction)

    width = settings.dtype.itemsize
    rows, keys = T * settings.Hq * settings.D * width, 2 * T * settings.Hkv * settings.D * width
    chosen = int((lists >= 0).sum())
    return Point(
        "hsa", impl, direction, T, prepare, selection=selection, K=K, C=T // settings.S,
        flops=passes(direction) * 4 * settings.Hq * settings.D * settings.S * chosen,
        bytes=traffic(direction, rows + keys + lists.size * 4, rows, lists.size * 4),
    )  # fmt: skip


def hsa_points(operators: Any, settings: Settings, lists: Lists) -> Iterator[Point]:
    """The kernels on every selection and K; the torch paths on the shared selection at one K, up to torch_max."""
    kernels = ("triton",) if settings.device == "cuda" else ()
    for T in settings.lengths:
        for K in settings.topks:
            for selection in ("shared", "random", "recorded"):
                is_main = selection == "shared" and settings.main_topk == K and settings.torch_max >= T
                impls = (*kernels, *(("torch_gather", "torch_dense") if is_main else ()))
                chosen = lists(selection, T, K) if impls else None
                if chosen is None:
                    continue
                for impl in impls:
                    for direction in DIRECTIONS:
                        yield _hsa_point(operators, settings, impl, direction, T, K, selection, chosen)


def _qkv(settings: Settings, num_tokens: int) -> list[torch.Tensor]:
    heads = (settings.Hq, settings.Hkv, settings.Hkv)
    return [noise(settings, 1, num_tokens, count, settings.D, seed=i + 1) for i, count in enumerate(heads)]


def _backend(impl: str) -> contextlib.AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if impl == "cudnn":
        return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)
    if impl == "flash":
        return sdpa_kernel(SDPBackend.FLASH_ATTENTION)
    return contextlib.nullcontext()


def _full_forward(settings: Settings, impl: str, is_grouped: bool) -> Callable[..., torch.Tensor]:
    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (1, H, T, D)
        if not is_grouped:
            k, v = (x.repeat_interleave(settings.Hq // settings.Hkv, 1) for x in (k, v))  # (1, Hq, T, D)
        with _backend(impl):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)
        return out.transpose(1, 2)  # (1, T, Hq, D)

    return forward


def _fastest_layout(
    settings: Settings, impl: str, direction: str, T: int, chosen: dict[tuple[str, str], bool]
) -> Callable[..., torch.Tensor]:
    """Grouped or expanded key heads, whichever works and is faster; remembered for lengths too long to try both."""
    key = (impl, direction)
    if key in chosen and T > _CHOICE_MAX:
        return _full_forward(settings, impl, chosen[key])
    times: dict[bool, float] = {}
    errors: list[Exception] = []
    for is_grouped in (True, False):
        try:
            call = directed(_full_forward(settings, impl, is_grouped), _qkv(settings, T), direction)
            budget = settings.budget_s / 5
            timing = time_call(call, settings.device, budget_s=budget, make_capture=settings.make_capture)
            times[is_grouped] = timing.ms
        except Exception as error:
            # a traceback would keep the tensors of the failed call
            errors.append(error.with_traceback(None))
    if not times:
        raise errors[-1]
    chosen[key] = min(times, key=lambda is_grouped: times[is_grouped])
    return _full_forward(settings, impl, chosen[key])


def _qkv_traffic(settings: Settings, direction: str, T: int) -> int:
    width = settings.dtype.itemsize
    rows = T * settings.Hq * settings.D * width
    return traffic(direction, rows + 2 * T * settings.Hkv * settings.D * width, rows)


def full_points(settings: Settings) -> Iterator[Point]:
    """Full causal attention with cuDNN and with flash attention, up to full_max; torch's own choice on a CPU."""
    chosen: dict[tuple[str, str], bool] = {}

    def point(impl: str, direction: str, T: int) -> Point:
        def prepare() -> Call:
            return directed(_fastest_layout(settings, impl, direction, T, chosen), _qkv(settings, T), direction)

        flops = passes(direction) * 4 * settings.Hq * settings.D * visible_keys(T)
        return Point(
            "full_attention", impl, direction, T, prepare, flops=flops, bytes=_qkv_traffic(settings, direction, T)
        )

    for T in settings.lengths:
        if settings.full_max < T:
            continue
        for impl in ("cudnn", "flash") if settings.device == "cuda" else ("sdpa",):
            for direction in DIRECTIONS:
                yield point(impl, direction, T)


def window_points(operators: Any, settings: Settings) -> Iterator[Point]:
    """The sliding window through its backends: the kernels on a GPU, and blocks of SDPA."""

    def point(impl: str, direction: str, T: int) -> Point:
        def prepare() -> Call:
            def forward(q: Any, k: Any, v: Any) -> torch.Tensor:
                return operators.sliding_window_attention(q, k, v, window=settings.window, impl=impl)

            return directed(forward, _qkv(settings, T), direction)

        flops = passes(direction) * 4 * settings.Hq * settings.D * visible_keys(T, settings.window)
        more = {"window": settings.window}
        size = _qkv_traffic(settings, direction, T)
        return Point("window", impl, direction, T, prepare, flops=flops, bytes=size, more=more)

    for T in settings.lengths:
        for impl in ("torch", "triton") if settings.device == "cuda" else ("torch",):
            for direction in DIRECTIONS:
                yield point(impl, direction, T)
