"""Intervals of a median, on ranks from a textbook and on samples of known medians."""

import math

import numpy as np
import pytest

from mambench.harness.analysis.intervals import median_interval


@pytest.mark.parametrize(("n", "ranks"), [(6, (0, 5)), (20, (5, 14)), (100, (39, 60))])
def test_median_interval_is_the_binomial_one(n, ranks):
    # The textbook order statistics for 95 %: e.g. the 40th and 61st of 100.
    interval = median_interval([float(v) for v in range(n)])
    assert interval is not None
    assert (interval.low, interval.high) == ranks
    assert interval.coverage >= 0.95


def test_median_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    for draw in (rng.normal, rng.exponential, rng.standard_cauchy):
        samples = draw(size=(2000, 31))
        truth = math.log(2) if draw == rng.exponential else 0.0
        intervals = [median_interval(row.tolist()) for row in samples]
        hits = [i is not None and i.low <= truth <= i.high for i in intervals]
        assert 0.94 <= np.mean(hits) <= 0.985


def test_too_few_values_have_no_interval():
    assert median_interval([1.0, 2.0, 3.0, 4.0]) is None
    five = median_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert five is not None
    assert five.coverage == pytest.approx(0.9375)
