"""Compare results over sequence length: speedups, crossovers and scaling exponents, with intervals.

Intervals come from resampling the median of each point. The median of a resample of n values is the
values' quantile at a Beta((n+1)/2, (n+1)/2) variate, so one variate per point and draw is enough.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mambench.harness.analysis.intervals import ROUNDS_FOR_INTERVAL, quantile
from mambench.harness.analysis.results import Result

DRAWS = 2000
LEVEL = 0.95
# What one process' interval does not include: that the next one is a little faster or slower.
PROCESS_FRAC = 0.02
FLOOR_FACTORS = (10.0, 5.0)  # a fitted point takes at least this many times the curve's shortest
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom (standard table).
_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One length of a curve: the value and what it can be resampled from."""

    seqlen: int
    value: float
    samples: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """How many times faster than a baseline; above 1 is faster."""

    ratio: float
    low: float | None
    high: float | None

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 1."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high


class CrossoverKind(StrEnum):
    """What two curves do over the lengths that both cover."""

    AT = "at"  # the challenger overtakes once and stays ahead
    SEVERAL = "several"  # the sign changes more than once, or the challenger falls behind
    CHALLENGER_FASTER = "challenger_faster"  # none in range
    INCUMBENT_FASTER = "incumbent_faster"  # none in range
    NO_OVERLAP = "no_overlap"  # fewer than two lengths in common


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """Where the challenger becomes faster than the incumbent."""

    kind: CrossoverKind
    range: tuple[int, int] | None = None  # lengths that both curves cover
    seqlen: float | None = None  # interpolated between measured lengths
    interval: tuple[float, float] | None = None  # 0 or inf: that bound lies outside the range
    bracket: tuple[int, int] | None = None  # the measured lengths on both sides
    crossings: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Exponent:
    """Fit of time ~ seqlen ** value above the launch floor, or why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    range: tuple[int, int] | None = None
    points: int = 0
    reason: str | None = None


def curve(results: Sequence[Result], metric: str = "time_s") -> tuple[Point, ...]:
    """Return one series' points by length; results without a value or a length are left out."""
    points: list[Point] = []
    for result in results:
        value, seqlen = result.value(metric), result.case.problem.seqlen
        if value is not None and value > 0 and seqlen is not None:
            samples = resampled_from(result) if metric == "time_s" else ()
            points.append(Point(seqlen=seqlen, value=float(value), samples=samples))
    return tuple(sorted(points, key=lambda point: point.seqlen))


def resampled_from(result: Result) -> tuple[float, ...]:
    """What the time's interval is over: rounds where there are enough of them, else samples."""
    enough = len(result.round_medians_s) >= ROUNDS_FOR_INTERVAL
    return result.round_medians_s if enough else result.samples_s


def speedup(result: Result, baseline: Result, *, seed: int = 0) -> Speedup | None:
    """Return baseline's time over result's, or None where one has no time."""
    if result.time_s is None or baseline.time_s is None:
        return None
    ratio = baseline.time_s / result.time_s
    ours, theirs = resampled_from(result), resampled_from(baseline)
    if min(len(ours), len(theirs)) < 5:
        return Speedup(ratio=ratio, low=None, high=None)
    above, below = _draw_medians((theirs, ours), seed)
    ratios = np.sort(above / below)
    low, high = (quantile(ratios, at) for at in _tails())
    return Speedup(ratio=ratio, low=float(low), high=float(high))


def crossover(
    challenger: Sequence[Point], incumbent: Sequence[Point], *, seed: int = 0
) -> Crossover:
    """Find where `challenger` becomes smaller than `incumbent`, on log-log lines between points.

    The interval resamples every point and takes the last crossing of each draw; a bound that lies
    outside the common range is 0 or inf. Without enough samples there is none, only the bracket.
    """
    span = _common_range(challenger, incumbent)
    if span is None:
        return Crossover(kind=CrossoverKind.NO_OVERLAP)
    both = (*challenger, *incumbent)
    knots = tuple(sorted({p.seqlen for p in both if span[0] <= p.seqlen <= span[1]}))
    x = np.log(np.asarray(knots, dtype=float))
    difference = _difference(challenger, incumbent, knots)
    crossings = _crossings(x, difference)
    if not crossings:
        ahead = bool(difference[np.argmax(np.abs(difference))] < 0)
        kind = CrossoverKind.CHALLENGER_FASTER if ahead else CrossoverKind.INCUMBENT_FASTER
        return Crossover(kind=kind, range=span)
    lengths = tuple(math.exp(c) for c in crossings)
    if len(crossings) > 1 or difference[0] < 0:
        return Crossover(kind=CrossoverKind.SEVERAL, range=span, crossings=lengths)
    common = sorted({p.seqlen for p in challenger} & {p.seqlen for p in incumbent}) or list(knots)
    return Crossover(
        kind=CrossoverKind.AT,
        range=span,
        seqlen=lengths[0],
        interval=_crossover_interval(challenger, incumbent, knots, seed),
        bracket=_bracket(common, lengths[0]),
        crossings=lengths,
    )


def exponent(points: Sequence[Point]) -> Exponent:
    """Fit the scaling exponent by least squares over the points well above the curve's floor.

    The interval is Student's, over the residuals: it holds the curve's bend as well as noise.
    """
    if len(points) < 3:
        return Exponent(value=None, reason=f"only {len(points)} lengths measured")
    floor = min(point.value for point in points)
    for factor in FLOOR_FACTORS:
        start = _above_floor(points, floor * factor)
        if len(start) >= 3:
            return _fit(start)
    return Exponent(
        value=None,
        reason=f"too few lengths at {FLOOR_FACTORS[-1]:g} times the shortest time",
    )


def _above_floor(points: Sequence[Point], threshold: float) -> list[Point]:
    """The longest tail of the curve that lies above a threshold."""
    tail: list[Point] = []
    for point in reversed(points):
        if point.value < threshold:
            break
        tail.insert(0, point)
    return tail


def _fit(points: Sequence[Point]) -> Exponent:
    x = np.log([float(p.seqlen) for p in points])
    y = np.log([p.value for p in points])
    dx = x - x.mean()
    slope = float((dx * y).sum() / (dx * dx).sum())
    residuals = y - y.mean() - slope * dx
    df = len(points) - 2
    error = math.sqrt(float((residuals**2).sum()) / df / float((dx * dx).sum()))
    half = (_STUDENT[df - 1] if df <= len(_STUDENT) else 2.0 + 2.3 / df) * error
    return Exponent(
        value=slope,
        low=slope - half,
        high=slope + half,
        range=(points[0].seqlen, points[-1].seqlen),
        points=len(points),
    )


def _common_range(a: Sequence[Point], b: Sequence[Point]) -> tuple[int, int] | None:
    if len(a) < 2 or len(b) < 2:
        return None
    low = max(min(p.seqlen for p in a), min(p.seqlen for p in b))
    high = min(max(p.seqlen for p in a), max(p.seqlen for p in b))
    return (low, high) if low < high else None


Knots = tuple[int, ...]  # lengths


def _difference(challenger: Sequence[Point], incumbent: Sequence[Point], knots: Knots) -> Array:
    """log(challenger / incumbent) at the knots."""
    ours = np.log([[p.value] for p in challenger])
    theirs = np.log([[p.value] for p in incumbent])
    return (_weights_of(challenger, knots) @ ours - _weights_of(incumbent, knots) @ theirs)[:, 0]


def _weights_of(points: Sequence[Point], knots: Knots) -> Array:
    return _weights(tuple(point.seqlen for point in points), knots)


@lru_cache(maxsize=256)  # most curves of a run are over the same lengths
def _weights(own: Knots, knots: Knots) -> Array:
    """Matrix (knots, points) of linear interpolation in log(seqlen)."""
    x, at = (np.log(np.asarray(lengths, dtype=float)) for lengths in (knots, own))
    hats: list[Array] = [np.interp(x, at, unit) for unit in np.eye(len(own))]
    return np.stack(hats, axis=1)


def _crossings(x: Array, difference: Array) -> list[float]:
    """Zeros of a piecewise linear function; a zero at a knot counts once, a touch not at all."""
    found: list[float] = []
    kept = [(xi, d) for xi, d in zip(x, difference, strict=True) if d != 0]
    for (x0, d0), (x1, d1) in pairwise(kept):
        if (d0 < 0) != (d1 < 0):
            found.append(float(x0 + (x1 - x0) * d0 / (d0 - d1)))
    return found


def _crossover_interval(
    challenger: Sequence[Point], incumbent: Sequence[Point], knots: Knots, seed: int
) -> tuple[float, float] | None:
    """Quantiles of the last crossing over draws; 0 and inf where it lies outside the range."""
    points = (*challenger, *incumbent)
    if min(len(p.samples) for p in points) < 5:
        return None
    x = np.log(np.asarray(knots, dtype=float))
    drawn = np.log(_draw_medians([p.samples for p in points], seed))  # (points, draws)
    ours, theirs = drawn[: len(challenger)], drawn[len(challenger) :]
    # (knots, draws)
    difference = _weights_of(challenger, knots) @ ours - _weights_of(incumbent, knots) @ theirs
    changes = (difference[:-1] < 0) != (difference[1:] < 0)
    last = len(x) - 2 - np.argmax(changes[::-1], axis=0)
    column = np.arange(DRAWS)
    before, after = difference[last, column], difference[last + 1, column]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.exp(x[last] + (x[last + 1] - x[last]) * before / (before - after))
    outside = np.where(difference[-1] < 0, 0.0, np.inf)
    draws = np.sort(np.where(changes.any(axis=0), at, outside))
    low, high = (draws[round(tail * (DRAWS - 1))] for tail in _tails())
    return float(low), float(high)


def _draw_medians(points: Sequence[Sequence[float]], seed: int) -> Array:
    """Return the medians (points, draws) of resamples of each point's values."""
    below, share = _places(tuple(len(samples) for samples in points), seed)
    medians = np.empty(below.shape)
    for i, samples in enumerate(points):
        ordered = np.sort(np.asarray(samples))
        steps = ordered[1:] - ordered[:-1]
        medians[i] = steps[below[i]] * share[i] + ordered[below[i]]
    return medians


@lru_cache(maxsize=32)  # a run's curves often have equally many samples, and drawing is dear
def _places(sizes: tuple[int, ...], seed: int) -> tuple[NDArray[np.intp], Array]:
    """Return where among each point's sorted values the medians of its resamples lie.

    As the lower neighbour's rank and the share of the way to the next one, each (points, draws).
    """
    rng = np.random.default_rng(seed)
    shapes = [(n + 1) / 2 for n in sizes]
    last = np.asarray(sizes)[:, None] - 1
    at = np.stack([rng.beta(shape, shape, DRAWS) for shape in shapes]) * last
    below = np.minimum(at.astype(np.intp), last - 1)
    return below, at - below


def _tails() -> list[float]:
    return [(1 - LEVEL) / 2, (1 + LEVEL) / 2]


def _bracket(lengths: Sequence[int], at: float) -> tuple[int, int] | None:
    below = [length for length in lengths if length <= at]
    above = [length for length in lengths if length >= at]
    return (below[-1], above[0]) if below and above else None
