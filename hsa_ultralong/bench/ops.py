"""The suite `ops`: every operator against its baselines, in one run on one card. Called by `hsa bench ops`.

Each point is guarded: what fails is kept under meta["failures"] and the run goes on. The file is written after every
point, so a run that is stopped keeps what it measured. tests/bench/test_benchmarks.py.
"""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hsa_ultralong.bench.attention import full_points, hsa_points, window_points
from hsa_ultralong.bench.guard import Guard
from hsa_ultralong.bench.points import Point, Settings, one_line
from hsa_ultralong.bench.retrieval import decode_points, topk_points
from hsa_ultralong.bench.rival_calls import is_left_out
from hsa_ultralong.bench.rivals import RIVAL_OPS, rival_points
from hsa_ultralong.bench.selections import mean_union, random_lists, shared_lists
from hsa_ultralong.bench.timing import time_call
from hsa_ultralong.eval.metadata import write_json

OPS = ("hsa", "full_attention", "window", *RIVAL_OPS, "chunk_topk", "decode")
# what one of them may be measured with alone, as nsa:fla; which of them there are depends on the operator
IMPLS = ("triton", "torch", "torch_gather", "torch_dense", "auto", "unfused", "cudnn", "flash", "sdpa", "fla", "flex",
         "flash_attn")  # fmt: skip
NEIGHBOURS = (4, 8, 16)
_UNION_TOKENS = 16_384

# K -> lists (T, K) recorded from a model, T as long as the text allows
MakeLists = Callable[[int], np.ndarray]
# one finished or failed point: a record, or a failure with "error"
OnPoint = Callable[[dict[str, Any]], None]


class ListStore:
    """Lists of every selection and K, drawn once for the longest T; shorter ones are prefixes."""

    def __init__(self, settings: Settings, recorder: MakeLists | None) -> None:
        self.settings, self.recorder = settings, recorder
        self.longest = max(settings.lengths)
        self.lists: dict[tuple[str, int], np.ndarray] = {}
        self.failures: list[dict[str, Any]] = []
        self._unions: dict[str, dict[str, float]] = {}

    def __call__(self, selection: str, num_tokens: int, topk: int) -> np.ndarray | None:
        if selection == "recorded" and (self.recorder is None or num_tokens > self.settings.recorded_max):
            return None
        if (selection, topk) not in self.lists:
            self.lists[selection, topk] = self._draw(selection, topk)
        lists = self.lists[selection, topk]
        return lists[:num_tokens] if len(lists) >= num_tokens else None

    def _draw(self, selection: str, topk: int) -> np.ndarray:
        settings = self.settings
        if selection != "recorded":
            draw = shared_lists if selection == "shared" else random_lists
            return draw(self.longest, topk, settings.S, settings.seed)
        assert self.recorder is not None
        try:
            return self.recorder(topk)
        except Exception as error:
            self.failures.append({"op": "hsa", "selection": "recorded", "K": topk, "error": one_line(error)})
            return np.empty((0, topk), dtype=np.int32)

    def unions(self) -> dict[str, dict[str, float]]:
        """Mean union of neighbouring lists per selection and K, over the last _UNION_TOKENS of those that are full."""
        for (selection, topk), lists in self.lists.items():
            name, late = f"{selection} K={topk}", lists[-_UNION_TOKENS:]
            full = late[(late >= 0).all(-1)]
            if name not in self._unions and len(full) >= max(NEIGHBOURS):
                self._unions[name] = {str(count): round(mean_union(full, count), 1) for count in NEIGHBOURS}
        return self._unions


def points_of(op: str, operators: Any, settings: Settings, lists: ListStore) -> Iterator[Point]:
    """The points of one entry of OPS."""
    if op == "hsa":
        return hsa_points(operators, settings, lists)
    if op == "full_attention":
        return chain(full_points(settings), rival_points(op, settings))
    if op == "window":
        return chain(window_points(operators, settings), rival_points(op, settings))
    if op in RIVAL_OPS:
        return rival_points(op, settings, lists)
    return (topk_points if op == "chunk_topk" else decode_points)(operators, settings)


def measure(point: Point, settings: Settings) -> dict[str, Any]:
    """The record of one point, or its failure: a few fields and "error"."""
    try:
        call = point.prepare()
        timing = time_call(
            call, settings.device, budget_s=settings.budget_s, use_graph=point.use_graph,
            make_capture=settings.make_capture,
        )  # fmt: skip
        peak = timing.peak_bytes
        return {
            **point.record(settings), "ms": timing.ms, "ms_low": timing.ms_low, "ms_high": timing.ms_high,
            "peak_bytes": peak, "repeats": timing.repeats,
        }  # fmt: skip
    except Exception as error:
        return _failure(point, one_line(error))


def _failure(point: Point, error: str) -> dict[str, Any]:
    fields = ("op", "impl", "direction", "selection", "T", "K", "C")
    return {**{name: getattr(point, name) for name in fields}, "error": error}


def _clean_up(settings: Settings) -> None:
    if settings.device != "cuda":
        return
    gc.collect()
    # what a failed capture left behind may forbid it: no reason to end the run
    with contextlib.suppress(RuntimeError):
        if settings.make_capture is not None:
            # every capture has a stream, and cuBLAS keeps memory for each, which would count in later peaks
            torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.empty_cache()


def _parsed(ops: tuple[str, ...], settings: Settings) -> list[tuple[str, str | None]]:
    """ "nsa" -> ("nsa", None), "nsa:fla" -> ("nsa", "fla")."""
    found = []
    for entry in ops:
        op, _, impl = entry.partition(":")
        if op not in OPS:
            raise ValueError(f"operators to measure are {', '.join(OPS)}; got {op or 'none'}")
        if ":" in entry and impl not in IMPLS:
            raise ValueError(f"{op} may be measured with one of {', '.join(IMPLS)} alone; got {impl or 'none'}")
        found.append((op, impl or None))
    if not found:
        raise ValueError(f"operators to measure are {', '.join(OPS)}; got none")
    if min(settings.lengths) < settings.S:
        raise ValueError(f"lengths must be at least one chunk of {settings.S} tokens, got {min(settings.lengths)}")
    return found


def run_ops(
    operators: Any,
    settings: Settings,
    meta: dict[str, Any],
    *,
    ops: tuple[str, ...] = OPS,
    recorder: MakeLists | None = None,
    path: Path | None = None,
    progress: OnPoint | None = None,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Measure `ops` and return {"meta", "records"}, writing it to `path` after every point.

    Args:
        operators: hsa_attention, chunk_topk, sliding_window_attention, ChunkVisibility: `hsa_ultralong.ops`.
        meta: of eval/metadata.py; "failures" and "unions" are added to it, "graphs" if points are timed by graphs,
            "left_out" of what needs a GPU where there is none, and "stopped_before" if time was over.
        ops: entries of OPS in the order wanted, or OP:IMPL for one implementation alone.
        recorder: gives recorded lists; without one that selection is left out.
        progress: called with every record and failure.
        minutes: no point is begun after them.

    Raises:
        ValueError: for an unknown operator or impossible settings.
    """
    wanted = _parsed(ops, settings)
    deadline = time.monotonic() + 60 * minutes
    lists = ListStore(settings, recorder)
    records: list[dict[str, Any]] = []
    failures: list[dict[str, Any]] = []
    guard = Guard(operators, settings)
    result: dict[str, Any] = {"meta": meta, "records": records}
    meta["failures"], meta["unions"] = failures, {}
    if settings.make_capture is not None:
        meta["graphs"] = True

    def keep(found: dict[str, Any]) -> None:
        (failures if "error" in found else records).append(found)
        meta["failures"], meta["unions"] = [*failures, *lists.failures], lists.unions()
        if path is not None:
            write_json(path, result)
        if progress is not None:
            progress(found)

    for op, impl in wanted:
        is_known = impl is None
        for point in points_of(op, operators, settings, lists):
            if impl not in (None, point.impl):
                continue
            is_known = True
            if impl is None and is_left_out(point.impl, settings):
                meta.setdefault("left_out", []).append(f"{op}:{point.impl}")
                continue
            if time.monotonic() > deadline:
                meta["stopped_before"] = f"{op} {point.impl} {point.direction} T={point.T}, after {minutes:g} minutes"
                break
            error = guard.refusal(point)
            found = _failure(point, error) if error else measure(point, settings)
            keep(found)
            _clean_up(settings)
        if "stopped_before" in meta:
            break
        if not is_known:
            fields: dict[str, Any] = {"op": op, "impl": impl, "direction": "", "selection": "none", "T": 0}
            error = f"no point of {op} has {impl}, on this device and at these lengths"
            keep({**fields, "K": None, "C": None, "error": error})
    if path is not None:
        write_json(path, result)
    return result
