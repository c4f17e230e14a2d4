"""Robust centres and scales, and what they borrow from one another."""

import numpy as np
import pytest
from scipy import special

from mambench.harness.check import moderated

RNG = np.random.default_rng
NAN = np.nan


def test_the_median_and_the_trimmed_mean_leave_missing_rounds_out():
    rows = np.array([[1.0, 9.0, 2.0, NAN], [NAN, NAN, NAN, NAN], [4.0, NAN, NAN, NAN]])
    np.testing.assert_array_equal(moderated.median(rows), [2.0, NAN, 4.0])
    np.testing.assert_array_equal(moderated.count(rows), [3, 0, 1])
    wild = np.array([[1.0, 1.0, 1.2, 0.8, 50.0]])
    assert moderated.centre(wild)[0] == pytest.approx((1.0 + 1.0 + 1.2) / 3)


@pytest.mark.parametrize("n", [5, 10, 15, 20])
def test_the_scale_of_normal_rounds_is_their_variance(n: int):
    found = moderated.spread(RNG(n).normal(0, 0.02, (40_000, n)))
    # SMALL_SAMPLE was fitted to no single n: within a fifteenth of the variance at each.
    assert np.mean(found.variance) == pytest.approx(0.02**2, rel=0.07)
    # And it varies as a chi-squared variable of its degrees of freedom would.
    spread = np.var(np.log(found.variance))
    assert spread == pytest.approx(float(special.polygamma(1, found.df[0] / 2)), rel=0.2)


def test_one_wild_round_does_not_widen_the_scale_and_two_modes_do():
    quiet = RNG(0).normal(0, 0.01, (2000, 10))
    wild = quiet.copy()
    wild[:, 0] = 0.5
    assert np.median(moderated.spread(wild).sd) < 1.5 * np.median(moderated.spread(quiet).sd)
    modes = quiet + 0.05 * RNG(1).choice([-1, 0, 0, 1], (2000, 10))
    assert np.median(moderated.spread(modes).sd) > 2.5 * np.median(moderated.spread(quiet).sd)


def test_the_prior_recovers_how_alike_the_cases_are():
    rng = RNG(2)
    df, true_df, common = 10.0, 6.0, 4e-4
    each = common * true_df / rng.chisquare(true_df, 20_000)
    seen = moderated.Spread(
        variance=each * rng.chisquare(df, each.shape) / df, df=np.full(each.shape, df)
    )
    prior = moderated.fit_prior(seen)
    assert float(prior.df) == pytest.approx(true_df, rel=0.1)
    assert float(prior.variance) == pytest.approx(common, rel=0.05)


def test_equal_cases_are_drawn_together_and_a_case_without_rounds_gets_the_common_variance():
    rng = RNG(3)
    variance = 1e-4 * rng.chisquare(4, 500) / 4
    variance[7] = NAN
    df = np.full(500, 4.0)
    df[7] = 0.0
    found = moderated.Spread(variance=variance, df=df)
    shrunk = moderated.shrink(found, moderated.fit_prior(found))
    assert np.ptp(shrunk.sd) < 0.1 * np.ptp(np.sqrt(np.delete(variance, 7)))
    assert shrunk.variance[7] == pytest.approx(1e-4, rel=0.1)


def test_two_cases_have_nothing_to_borrow():
    found = moderated.Spread(variance=np.array([1e-4, 4e-4]), df=np.array([3.0, 3.0]))
    prior = moderated.fit_prior(found)
    assert float(prior.df) == 0
    np.testing.assert_allclose(moderated.shrink(found, prior).variance, found.variance)


@pytest.mark.parametrize("value", [1e-6, 0.01, 1.0, 30.0, 1e5])
def test_inverse_trigamma(value: float):
    x = moderated.inverse_trigamma(np.array(value))
    assert float(special.polygamma(1, x)) == pytest.approx(value, rel=1e-6)


def test_tails_and_points_of_student_agree_and_no_degrees_say_nothing():
    df = np.array([3.0, np.inf, 0.0])
    points = moderated.t_point(0.05, df)
    tails = moderated.t_tail(points, df)
    np.testing.assert_allclose(tails[:2], 0.05)
    assert points[1] == pytest.approx(1.6449, abs=1e-4)
    assert np.isnan(points[2])
    assert np.isnan(moderated.t_tail(np.array(1.0), np.array(0.0)))
