"""How much two models differ on one task: of the same samples by pairs, of others as independent ones.

Newcombe's score intervals (Statistics in Medicine 17, 1998, 873-890 method 10 and 2635-2650 method 10), exact McNemar
tests, and the bootstrap for scores between 0 and 1. Called by suite_compare.py; tests/eval/test_intervals.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

REPEATS = 2000
Scores: TypeAlias = npt.NDArray[np.float64]


def wilson_interval(right: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% Wilson score interval of a proportion."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)


class Difference(NamedTuple):
    """The second minus the first.

    Attributes:
        low, high: 95% interval. pairs: number of samples that both answered; None: different samples. better, worse:
            pairs of a greater and of a smaller score. p_value: exact McNemar, of pairs that are all right or wrong.
        method: of the interval.
    """

    value: float
    low: float
    high: float
    pairs: int | None
    better: int | None
    worse: int | None
    p_value: float | None
    method: str

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of scores 0..1 of the same samples, in the same order."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    if one.shape != two.shape or one.size == 0:
        raise ValueError(f"pairs need as many scores of both, got {one.size} and {two.size}")
    better, worse = int((two > one).sum()), int((two < one).sum())
    is_binary = bool(np.isin(np.concatenate([one, two]), (0.0, 1.0)).all())
    value, steps = float((two - one).mean()), two - one
    if is_binary or np.ptp(steps) == 0:
        low, high = _newcombe(one, two, _correlation(one, two))
        p = mcnemar(better, worse) if is_binary else None
        return Difference(value, low, high, len(one), better, worse, p, "pairs, Newcombe")
    low, high = middle(steps[draws(len(steps), np.random.default_rng(0))].mean(1))
    return Difference(value, low, high, len(one), better, worse, None, "pairs, bootstrap")


def independent_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Of scores 0..1 of different samples; for scores between 0 and 1 the interval is an upper bound of the width."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    if one.size == 0 or two.size == 0:
        raise ValueError(f"a difference needs scores of both, got {one.size} and {two.size}")
    low, high = _newcombe(one, two, 0.0)
    return Difference(float(two.mean() - one.mean()), low, high, None, None, None, None, "independent, Newcombe")


def _newcombe(one: Scores, two: Scores, correlation: float) -> tuple[float, float]:
    p, q = float(two.mean()), float(one.mean())
    (p_low, p_high), (q_low, q_high) = (wilson_interval(float(x.sum()), len(x)) for x in (two, one))
    below = (p - p_low) ** 2 - 2 * correlation * (p - p_low) * (q_high - q) + (q_high - q) ** 2
    above = (p_high - p) ** 2 - 2 * correlation * (p_high - p) * (q - q_low) + (q - q_low) ** 2
    return max(-1.0, p - q - math.sqrt(max(0.0, below))), min(1.0, p - q + math.sqrt(max(0.0, above)))


def _correlation(one: Scores, two: Scores) -> float:
    """Of right and wrong answers, with Newcombe's correction of continuity; 0 where a model has one score only."""
    n = len(one)
    covered = n * float(one @ two) - float(one.sum() * two.sum())  # = ad - bc of the table of pairs
    spread = math.sqrt(max(0.0, n * float(one @ one) - float(one.sum()) ** 2)) * math.sqrt(
        max(0.0, n * float(two @ two) - float(two.sum()) ** 2)
    )
    if spread == 0:
        return 0.0
    return (max(covered - n / 2, 0.0) if covered > 0 else covered) / spread


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p value that as many pairs turn right as turn wrong."""
    total = better + worse
    tail = sum(math.comb(total, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def draws(total: int, rng: np.random.Generator, repeats: int = REPEATS) -> npt.NDArray[np.int64]:
    """(repeats, total) indices of samples drawn again."""
    return rng.integers(total, size=(repeats, total))


def middle(values: Iterable[float]) -> tuple[float, float]:
    """The middle 95% of what draws gave."""
    low, high = np.quantile(np.asarray(list(values), float), (0.025, 0.975)).tolist()
    return low, high
