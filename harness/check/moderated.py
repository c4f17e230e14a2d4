"""Centres and scales that outliers do not move, and scales that borrow strength from one another.

Five rounds say little about one case's noise, but three hundred cases say much about a machine's.
Each case's variance is drawn towards the common one, as far as the cases are alike: the empirical
Bayes model of Smyth, "Linear models and empirical Bayes methods for assessing differential
expression" (2004), sections 4 and 6.2. All arrays may have leading dimensions, such as simulated
runs; NaN marks a round that is missing.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special as _special  # pyright: ignore[reportMissingTypeStubs]

special: Any = _special  # has no types
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

TRIM_FRAC = 0.2  # of the rounds on each side, rounded down: one of five
CENTRE_SD = 1.07  # of the trimmed mean of normal rounds, over that of their mean
DROP_FRAC = 0.2  # of the deviations, the largest ones, rounded up
DF_PER_VALUE = 0.6  # a scale from n values varies as a variance with this many degrees each
SMALL_SAMPLE = 1.5  # its square is too large by this over n
MIN_VARIANCE_FRAC = 1e-4  # of the median variance: equal rounds are luck, not certainty
MIN_VARIANCE = 1e-12  # a millionth of the time, squared: where all rounds are equal, no clock is
_NEWTON_STEPS = 60


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The variance of one round of each case."""

    variance: Array  # (..., N), NaN where unknown
    df: Array  # (..., N), as a chi-squared variable's; inf: known

    @property
    def sd(self) -> Array:
        """The standard deviation of one round, (..., N)."""
        return np.sqrt(self.variance)


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What the cases' variances have in common: a scaled inverse chi-squared distribution."""

    variance: Array  # (...,)
    df: Array  # (...,), worth this many degrees of freedom; inf: all cases are alike, 0: nothing


def count(values: Array) -> Array:
    """Return how many rounds there are, (..., N) of (..., N, rounds)."""
    return np.isfinite(values).sum(axis=-1).astype(np.float64)


def centre(values: Array, trim_frac: float = TRIM_FRAC) -> Array:
    """Return the trimmed mean over the last axis; NaN where there is no value."""
    n = count(values)[..., None]
    ordered = np.sort(values, axis=-1)  # NaN last
    rank: Array = np.arange(values.shape[-1], dtype=np.float64)
    cut = np.floor(trim_frac * n)
    kept = (rank >= cut) & (rank < n - cut)
    return _mean(ordered, kept)


def median(values: Array) -> Array:
    """Return the median over the last axis; NaN where there is no value."""
    n = np.isfinite(values).sum(axis=-1)[..., None]
    ordered = np.sort(values, axis=-1)
    low = np.take_along_axis(ordered, np.maximum((n - 1) // 2, 0), axis=-1)[..., 0]
    high = np.take_along_axis(ordered, np.minimum(n // 2, values.shape[-1] - 1), axis=-1)[..., 0]
    return np.where(n[..., 0] > 0, (low + high) / 2, np.nan)


def residuals(values: Array) -> Array:
    """Return deviations from the median, as wide as deviations from the true centre would be."""
    n = count(values)[..., None]
    wider = np.sqrt(n / np.maximum(n - 2, 1))
    return np.where(n > 2, (values - median(values)[..., None]) * wider, np.nan)


def spread(deviations: Array) -> Spread:
    """Estimate the variance of one round from deviations (..., N, n) around the true centre.

    The mean absolute deviation without the largest fifth: a round in twenty may be wild, and two
    modes still show, to which the median absolute deviation is blind.
    """
    n = count(deviations)[..., None]
    ordered = np.sort(np.abs(deviations), axis=-1)
    kept_count = n - np.ceil(DROP_FRAC * n)
    rank: Array = np.arange(deviations.shape[-1], dtype=np.float64)
    kept = rank < kept_count
    with np.errstate(invalid="ignore", divide="ignore"):
        share = (kept_count / n)[..., 0]
        cut = special.ndtri((1 + share) / 2)
        # E|Z| of a standard normal variable within the cut.
        expected = math.sqrt(2 / math.pi) * (1 - np.exp(-(cut**2) / 2)) / share
        variance = (_mean(ordered, kept) / expected) ** 2 / (1 + SMALL_SAMPLE / n[..., 0])
    enough = n[..., 0] >= 3
    return Spread(
        variance=np.where(enough, variance, np.nan),
        df=np.where(enough, DF_PER_VALUE * n[..., 0], 0.0),
    )


def fit_prior(found: Spread) -> Prior:
    """Estimate what the variances have in common from their logarithms (Smyth 2004, section 6.2).

    With fewer than three usable cases there is nothing to borrow: df 0.
    """
    usable = (found.df > 0) & np.isfinite(found.variance)
    cases = usable.sum(axis=-1)
    half = np.where(usable, found.df, 1.0) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        log = np.log(np.maximum(found.variance, _floor(found.variance)))
        centred = log - special.digamma(half) + np.log(half)
        mean = _mean(centred, usable)
        excess = _sum((centred - mean[..., None]) ** 2, usable) / (cases - 1)
        excess = excess - _mean(special.polygamma(1, half), usable)
        df = np.where(excess > 0, 2 * inverse_trigamma(np.maximum(excess, 1e-8)), np.inf)
        prior_half = np.minimum(df, 1e6) / 2
        variance = np.exp(mean + special.digamma(prior_half) - np.log(prior_half))
    enough = (cases >= 3) & np.isfinite(variance)
    return Prior(variance=np.where(enough, variance, 0.0), df=np.where(enough, df, 0.0))


def shrink(found: Spread, prior: Prior) -> Spread:
    """Draw each variance towards the prior; a case without one gets the prior's."""
    prior_df, common = prior.df[..., None], prior.variance[..., None]
    own = np.where(np.isfinite(found.variance), found.variance, 0.0)
    with np.errstate(invalid="ignore", divide="ignore"):
        mixed = (prior_df * common + found.df * own) / (prior_df + found.df)
    variance = np.where(np.isinf(prior_df), common, mixed)
    df = np.broadcast_to(prior_df + found.df, variance.shape)
    variance = np.where(df > 0, variance, np.nan)
    return Spread(variance=np.maximum(variance, _floor(variance)), df=df)


def standard_error(one_round: Spread, n: Array) -> Array:
    """Return the standard deviation of the trimmed mean of n rounds, (..., N)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return CENTRE_SD * one_round.sd / np.sqrt(n)


def t_tail(t: Array, df: Array) -> Array:
    """Return P(T > t) of Student's distribution; infinite df mean the normal one, none NaN."""
    finite = np.where(np.isfinite(df) & (df > 0), df, 1.0)
    student: Any = special.stdtr(finite, -t)
    known = np.where(np.isinf(df), special.ndtr(-t), student)
    return np.where(df > 0, known, np.nan)


def t_point(tail: Array | float, df: Array) -> Array:
    """Return the t whose upper tail is `tail`."""
    finite = np.where(np.isfinite(df) & (df > 0), df, 1.0)
    student: Any = -special.stdtrit(finite, tail)
    known = np.where(np.isinf(df), -special.ndtri(tail), student)
    return np.where(df > 0, known, np.nan)


def inverse_trigamma(value: Array) -> Array:
    """Return x with trigamma(x) = value > 0, by Newton's method on 1 / trigamma."""
    value = np.asarray(value, dtype=np.float64)
    x = 0.5 + 1 / value
    for _ in range(_NEWTON_STEPS):
        first: Any = special.polygamma(1, x)
        second: Any = special.polygamma(2, x)
        step = first * (1 - first / value) / second
        x = x + step
        if np.all(np.abs(step) < 1e-9 * x):
            break
    return x


def _floor(variance: Array) -> Array:
    return np.fmax(MIN_VARIANCE, MIN_VARIANCE_FRAC * median(variance))[..., None]


def _mean(values: Array, kept: Mask) -> Array:
    with np.errstate(invalid="ignore", divide="ignore"):
        return _sum(values, kept) / kept.sum(axis=-1)


def _sum(values: Array, kept: Mask) -> Array:
    return np.where(kept, values, 0.0).sum(axis=-1)
