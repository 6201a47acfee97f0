"""Differences of two models: known values, coverage, and no certainty out of nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hsa_ultralong.eval.intervals import independent_difference, mcnemar, paired_difference


def pairs(both: int, first_only: int, second_only: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores of two models: (first, second)."""
    first = [1.0] * both + [1.0] * first_only + [0.0] * second_only + [0.0] * neither
    second = [1.0] * both + [0.0] * first_only + [1.0] * second_only + [0.0] * neither
    return first, second


# Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: 36 both, 12 and 2 one of the two, none neither
def test_intervals_of_pairs_are_the_published_ones():
    second, first = pairs(36, 12, 2, 0)
    found = paired_difference(first, second)
    assert (found.low, found.high) == (pytest.approx(0.0569, abs=5e-5), pytest.approx(0.3404, abs=5e-5))
    assert (found.better, found.worse, found.pairs) == (12, 2, 50)
    turned = paired_difference(second, first)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


# Newcombe 1998, Statistics in Medicine 17, 873-890, method 10: 56 of 70 and 48 of 80
def test_intervals_of_independent_samples_are_the_published_ones():
    found = independent_difference([1.0] * 48 + [0.0] * 32, [1.0] * 56 + [0.0] * 14)
    assert (found.low, found.high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))
    assert found.pairs is None


@pytest.mark.parametrize(("better", "worse", "p"), [(0, 0, 1.0), (5, 0, 0.0625), (1, 9, 0.021484375), (3, 3, 1.0)])
def test_mcnemars_test_is_exact(better, worse, p):
    assert mcnemar(better, worse) == pytest.approx(p)


def test_the_interval_covers_the_true_difference_about_as_often_as_it_says():
    rng, hits, runs = np.random.default_rng(1), 0, 600
    for _ in range(runs):
        hard = rng.random(40)  # samples that are hard for one model are so for the other
        first, second = ((hard < level).astype(float) for level in (0.5, 0.65))
        flips = rng.random((2, 40)) < 0.1
        first, second = np.where(flips[0], 1 - first, first), np.where(flips[1], 1 - second, second)
        truth = 0.8 * 0.15
        found = paired_difference(first, second)
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / runs <= 0.995


def test_pairs_tell_more_than_independent_samples():
    first, second = pairs(30, 0, 8, 12)
    paired, apart = paired_difference(first, second), independent_difference(first, second)
    assert paired.value == pytest.approx(apart.value)
    assert paired.high - paired.low < apart.high - apart.low
    assert paired.is_clear and not apart.is_clear


@pytest.mark.parametrize("score", [0.0, 0.25, 1.0])
def test_few_samples_that_all_agree_prove_no_equality(score):
    found = paired_difference([score] * 5, [score] * 5)
    assert found.low < -0.2 and found.high > 0.2 and not found.is_clear


def test_scores_between_are_drawn_again_and_the_same_every_time():
    rng = np.random.default_rng(0)
    first = rng.random(200)
    second = np.clip(first + 0.1 + 0.05 * rng.standard_normal(200), 0, 1)
    found = paired_difference(first, second)
    assert found == paired_difference(first, second) and found.p_value is None
    assert found.low < found.value < found.high and found.high - found.low < 0.03
    assert "bootstrap" in found.method


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="pairs need as many scores of both, got 1 and 2"):
        paired_difference([1.0], [1.0, 0.0])
    with pytest.raises(ValueError, match="a difference needs scores of both, got 0 and 1"):
        independent_difference([], [1.0])
    assert math.isfinite(independent_difference([1.0], [0.0]).low)
