"""The rule that says whether something got slower; arithmetic on rounds and nothing else.

A round is one fresh process, its value the logarithm of the median time of a case. `d` is the
difference candidate - base of one round, `aa` differences between rounds of the same code. Arrays
are (..., cases, rounds), NaN where a round is missing; leading dimensions are simulated runs.

1. Screen: the median of d is over the case's margin, max(3 %, 1.5 x the noise of one round), and
   its trimmed mean is positive at p < 0.05. The noise comes from A/A rounds and from how the
   rounds of d differ, outliers left out, drawn towards the other cases' noise.
2. Confirm, twice: only what passed is measured again, in fresh rounds, and still fails at p < 0.005
   divided by the number of cases under suspicion, with the median of all rounds over the margin.

The first step decides nothing, so it may be generous; the rounds of the others are independent of
it, so picking the worst of hundreds of cases does not bias them. `harness.check.simulate` measures
what this rule does to noise of many kinds, and to planted changes.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from mambench.harness.check.moderated import (
    Array,
    Mask,
    Spread,
    centre,
    count,
    fit_prior,
    median,
    residuals,
    shrink,
    spread,
    standard_error,
    t_point,
    t_tail,
)

POWER = 0.9  # of the smallest slowdown that is said to be seen
SAME_CONFIDENCE = 0.9


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a change must exceed; fractions of the base's time."""

    margin_frac: float
    noise_factor: float = 1.5  # the margin is at least this many times the noise of one round
    beyond: bool = False  # whether the change must be shown to exceed the margin, not just 0

    @property
    def margin(self) -> float:
        """The margin as a difference of logarithms."""
        return math.log1p(self.margin_frac)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """All numbers of the rule; the defaults are those that `docs/methodology.md` reports on."""

    rounds: int = 5
    confirm_rounds: int = 8
    confirmations: int = 2
    min_rounds: int = 3  # fewer say nothing
    screen_p: float = 0.05
    confirm_p: float = 0.005
    case: Limits = field(default_factory=lambda: Limits(margin_frac=0.03))
    # A mean over many cases, and a slope over them, are known better than one case: their margins
    # are narrower, and must be exceeded beyond doubt.
    family: Limits = field(
        default_factory=lambda: Limits(margin_frac=0.01, noise_factor=0.0, beyond=True)
    )
    exponent: Limits = field(
        default_factory=lambda: Limits(margin_frac=0.02, noise_factor=0.0, beyond=True)
    )


@dataclass(frozen=True, kw_only=True)
class Screened:
    """What the first rounds say, each array (..., cases)."""

    rounds: Array  # (..., cases, rounds): d itself
    n: Array
    noise: Spread  # of one round, shrunk
    median: Array
    centre: Array
    error: Array  # standard error of the centre
    margin: Array
    p_slower: Array
    p_faster: Array
    slower: Mask  # under suspicion
    faster: Mask

    def interval(self, confidence: float = SAME_CONFIDENCE) -> tuple[Array, Array]:
        """Return the interval of the change, as a difference of logarithms."""
        half = t_point((1 - confidence) / 2, self.noise.df) * self.error
        return self.centre - half, self.centre + half


def screen(d: Array, aa: Array | None, rule: Rule, limits: Limits) -> Screened:
    """Judge the first rounds.

    Args:
        d: candidate - base of each round.
        aa: differences between rounds of the same code, brought to the variance of d; None if there
            are none.
        rule: the numbers.
        limits: what kind of quantity it is.
    """
    deviations = [residuals(d)] if aa is None else [residuals(d), aa]
    own = spread(np.concatenate(deviations, axis=-1))
    noise = shrink(own, fit_prior(own))
    n, middle, location = count(d), median(d), centre(d)
    error = standard_error(noise, n)
    margin = np.fmax(limits.margin, limits.noise_factor * noise.sd)
    beyond = limits.margin if limits.beyond else 0.0
    enough = n >= rule.min_rounds
    with np.errstate(invalid="ignore", divide="ignore"):
        p_slower = np.where(enough, t_tail((location - beyond) / error, noise.df), np.nan)
        p_faster = np.where(enough, t_tail((-location - beyond) / error, noise.df), np.nan)
        slower = (p_slower < rule.screen_p) & (middle >= margin)
        faster = (p_faster < rule.screen_p) & (-middle >= margin)
    return Screened(
        rounds=d,
        n=n,
        noise=noise,
        median=middle,
        centre=location,
        error=error,
        margin=margin,
        p_slower=p_slower,
        p_faster=p_faster,
        slower=slower,
        faster=faster,
    )


def confirm(
    fresh: Array, before: Array, found: Screened, suspects: Mask, rule: Rule, limits: Limits
) -> Mask:
    """Return which of the suspects still fail after fresh rounds.

    Args:
        fresh: d of rounds that had no part in the suspicion.
        before: d of all earlier rounds.
        found: the screening's noise and margins.
        suspects: what is judged; their number is what the level is divided by.
        rule: the numbers.
        limits: what kind of quantity it is.
    """
    error = standard_error(found.noise, count(fresh))
    beyond = limits.margin if limits.beyond else 0.0
    with np.errstate(invalid="ignore", divide="ignore"):
        p = t_tail((centre(fresh) - beyond) / error, found.noise.df)
        level = rule.confirm_p / np.maximum(suspects.sum(axis=-1, keepdims=True), 1)
        pooled = median(np.concatenate([before, fresh], axis=-1))
        return suspects & (p <= level) & (pooled >= found.margin)


def smallest_seen(found: Screened, rule: Rule, limits: Limits) -> Array:
    """Return the smallest slowdown of each case that nine of ten such runs would find; a fraction.

    It must pass each of the steps, so each may miss its share of a tenth.
    """
    steps = 1 + rule.confirmations
    df = found.noise.df
    spare = t_point(np.asarray((1 - POWER) / steps), df)
    beyond = limits.margin if limits.beyond else 0.0
    fresh_error = standard_error(found.noise, np.asarray(float(rule.confirm_rounds)))
    over_margin = found.margin + spare * 1.12 * found.error  # a median, so a little wider
    screened = beyond + (t_point(rule.screen_p, df) + spare) * found.error
    confirmed = beyond + (t_point(rule.confirm_p, df) + spare) * fresh_error
    return np.expm1(np.fmax(over_margin, np.fmax(screened, confirmed)))
