"""Time and peak memory of one call: CUDA events after warm-up, a cold L2 cache before every repeat; a clock on a CPU.

The events stand around the call alone. Repeats are queued without waiting for each other, so launch costs count only
where they are the bottleneck, as in training. tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

# larger than any L2 cache; written between repeats
_FLUSH_BYTES = 256 * 2**20
_LOW, _HIGH = 0.2, 0.8
_MAX_REPEATS = 200


class Timing(NamedTuple):
    """Median, 20% and 80% quantiles in ms; peak_bytes of the device with everything held (0 on a CPU)."""

    ms: float
    ms_low: float
    ms_high: float
    repeats: int
    peak_bytes: int


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def num_repeats(ms: float, budget_s: float, least: int = 3) -> int:
    """Repeats of a call of `ms` that fit into the budget, at least `least`."""
    return max(least, min(_MAX_REPEATS, int(budget_s * 1e3 / max(ms, 1e-3))))


def time_call(call: Callable[[], Any], device: str, *, budget_s: float = 0.25, use_graph: bool = False) -> Timing:
    """Measure `call`, which is run two times before.

    Args:
        call: the whole step, without arguments; its result is dropped.
        device: "cuda" or "cpu".
        budget_s: time for the repeats, at least three are made.
        use_graph: capture the call in a CUDA graph and time its replay (decoding); on a CPU it changes nothing.
    """
    return _time_cuda(call, budget_s, use_graph) if device == "cuda" else _time_cpu(call, budget_s)


def _summary(times: list[float], peak: int) -> Timing:
    return Timing(quantile(times, 0.5), quantile(times, _LOW), quantile(times, _HIGH), len(times), peak)


def _time_cpu(call: Callable[[], Any], budget_s: float) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    once()
    return _summary([once() for _ in range(num_repeats(once(), budget_s))], 0)


def _capture(call: Callable[[], Any]) -> Callable[[], Any]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _time_cuda(call: Callable[[], Any], budget_s: float, use_graph: bool) -> Timing:
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if use_graph:
        call = _capture(call)
    flush = torch.empty(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def repeat(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in pairs:
            flush.zero_()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    return _summary(repeat(num_repeats(repeat(1)[0], budget_s)), peak)
