"""Points of other sparse attention on the same shapes: NSA and MoBA, ours and of flash-linear-attention, flash-attn,
and block masks of flex_attention.

`selected` reads lists that are given: the chunks of the same HSA point, of which the oldest gives way to the token's
own, by one softmax. `nsa` and `moba` choose as well, and nsa reads the means of all chunks beside what it chose (no
window, gates of 1). Each is compared with dense attention before it is timed (rival_checks.py). A package that is
missing is one failure that says so. tests/bench/test_rivals.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from hsa_ultralong.bench import flash_stand_in
from hsa_ultralong.bench.points import DIRECTIONS, Call, Point, Settings, directed, noise, passes, traffic, visible_keys
from hsa_ultralong.bench.rival_calls import forward_of, implementations, missing, reading_lists
from hsa_ultralong.bench.rival_checks import check_rival

RIVAL_OPS = ("selected", "nsa", "moba")


def pairs_read(op: str, settings: Settings, T: int, K: int, lists: np.ndarray | None) -> int:
    """Pairs of a token and a key that it reads, of one head."""
    if op == "full_attention":
        return visible_keys(T)
    if op == "window":
        return visible_keys(T, settings.window)
    own = np.arange(T)
    if lists is not None:
        others = int((lists[:, 1:] >= 0).sum())
    else:
        others = int(np.minimum(own // settings.S, K - 1).sum())
    compressed = int(((own + 1) // settings.S).sum()) if op == "nsa" else 0
    return int((own % settings.S + 1).sum()) + others * settings.S + compressed


def _point(op: str, impl: str, direction: str, settings: Settings, T: int, selection: str, lists: Any) -> Point:
    is_sparse = op in RIVAL_OPS
    K = settings.main_topk if is_sparse else 0
    reason = missing(op, impl, settings)

    def prepare() -> Call:
        if reason is not None:
            raise RuntimeError(reason)
        heads = (settings.Hq, settings.Hkv, settings.Hkv)
        inputs = [noise(settings, 1, T, count, settings.D, seed=i + 1) for i, count in enumerate(heads)]
        return directed(forward_of(op, impl, settings, T, K, lists), inputs, direction)

    def check() -> str | None:
        return None if reason is not None else check_rival(op, impl, settings)

    width = settings.dtype.itemsize
    rows, keys = T * settings.Hq * settings.D * width, 2 * T * settings.Hkv * settings.D * width
    more: dict[str, Any] = {"window": settings.window} if op == "window" else {}
    if (op, impl) == ("moba", "fla"):
        more["flash_attn"] = "torch" if flash_stand_in.is_needed() else "flash-attn"
    return Point(
        op, impl, direction, T, prepare, selection=selection, K=K or None, C=T // settings.S if is_sparse else None,
        flops=passes(direction) * 4 * settings.Hq * settings.D * pairs_read(op, settings, T, K, lists),
        bytes=traffic(direction, rows + keys, rows), more=more, check=check,
    )  # fmt: skip


def rival_points(op: str, settings: Settings, lists: Any = None) -> Iterator[Point]:
    """All points of one operator; flex_attention, MoBA and full attention up to full_max.

    Args:
        lists: gives (T, K) lists of a selection, as for HSA; used by "selected".
    """
    for impl in implementations(op, settings):
        if missing(op, impl, settings) is not None:
            yield _point(op, impl, "fwd", settings, min(settings.lengths), "none", _own_only(op, settings))
            continue
        is_limited = impl == "flex" or op in ("moba", "full_attention")
        for T in settings.lengths:
            if is_limited and settings.full_max < T:
                continue
            for selection in ("shared", "random") if op == "selected" else ("none",):
                found = lists(selection, T, settings.main_topk) if op == "selected" else None
                read = None if found is None else reading_lists(found, settings.S)
                for direction in DIRECTIONS:
                    yield _point(op, impl, direction, settings, T, selection, read)


def _own_only(op: str, settings: Settings) -> np.ndarray | None:
    if op != "selected":
        return None
    return np.arange(min(settings.lengths), dtype=np.int32)[:, None] // settings.S
