"""Time and peak memory of one call: CUDA events after warm-up, a cold L2 cache before every repeat; a clock on a CPU.

The events stand around the call alone. Repeats are queued without waiting for each other, so launch costs count only
where they are the bottleneck, as in training; with a capture they do not count at all, as in training by CUDA graphs.
tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hsa_ultralong.bench.points import one_line

# the trainer's CudaCapture of a device (train/graphs.py)
MakeCapture = Callable[[torch.device], Any]
# calls before a graph is made, as in the trainer; in the last of them nothing may wait for the device
_CALLS_BEFORE = 3
# larger than any L2 cache; read between repeats: lines that were written would be written back while a call is timed,
# 50 MB of them on an H200, which a call of 40 microseconds that only reads takes for its own
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


def time_call(
    call: Callable[[], Any], device: str, *, budget_s: float = 0.25, use_graph: bool = False,
    make_capture: MakeCapture | None = None,
) -> Timing:  # fmt: skip
    """Measure `call`, which is run two times before.

    Args:
        call: the whole step, without arguments; its result is dropped.
        device: "cuda" or "cpu".
        budget_s: time for the repeats, at least three are made.
        use_graph: capture the call in a CUDA graph and time its replay (decoding); on a CPU it changes nothing.
        make_capture: capture the call by what this makes, and time what replays it; peak_bytes stays the plain call's.

    Raises:
        RuntimeError: no graph holds the call.
    """
    if device == "cuda":
        return _time_cuda(call, budget_s, use_graph, make_capture)
    return _time_cpu(call, budget_s, make_capture)


def _summary(times: list[float], peak: int) -> Timing:
    return Timing(quantile(times, 0.5), quantile(times, _LOW), quantile(times, _HIGH), len(times), peak)


def captured(call: Callable[[], Any], device: torch.device, make_capture: MakeCapture) -> Callable[[], Any]:
    """What replays `call`, after a few calls that are not captured.

    Raises:
        RuntimeError: no graph holds it, with the first reason in one line.
    """
    capture, nothing, reasons = make_capture(device), torch.zeros(3, device=device), []

    def run() -> torch.Tensor:
        try:
            call()
        except Exception as error:
            # what ends a failed capture hides it
            reasons.append(one_line(error))
            raise
        return nothing

    try:
        for number in range(_CALLS_BEFORE):
            with capture.aside(may_wait=number + 1 < _CALLS_BEFORE):
                run()
        # what autograd may still hold of earlier calls belongs to another stream
        gc.collect()
        replay: Callable[[], Any] = capture(run)[0]
        return replay
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reasons.append(one_line(error))
    # outside of the handler: a traceback would keep the tensors of the failed call
    raise RuntimeError(f"no CUDA graph holds it: {reasons[0]}")


def _time_cpu(call: Callable[[], Any], budget_s: float, make_capture: MakeCapture | None) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3

    once()
    if make_capture is not None:
        call = captured(call, torch.device("cpu"), make_capture)
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


def _time_cuda(
    call: Callable[[], Any], budget_s: float, use_graph: bool, make_capture: MakeCapture | None
) -> Timing:  # fmt: skip
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if make_capture is not None:
        call = captured(call, torch.device("cuda", torch.cuda.current_device()), make_capture)
    elif use_graph:
        call = _capture(call)
    others = torch.zeros(_FLUSH_BYTES // 4, dtype=torch.int32, device="cuda")

    def repeat(count: int) -> list[float]:
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, stop in pairs:
            others.amax()
            start.record()
            call()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in pairs]

    return _summary(repeat(num_repeats(repeat(1)[0], budget_s)), peak)
