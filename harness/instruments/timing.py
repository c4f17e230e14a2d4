"""Samples of an execution's time, and when there are enough of them. Imports no torch.

The time of an execution is skewed and drifts, so its centre is the median and its uncertainty a
distribution-free interval from order statistics: no normality is assumed. What is here works for
any device; `harness.instruments.cuda_timing` takes the samples on a GPU.
"""

import functools
import gc
import math
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from mambench.harness.spec import Settings

CONFIDENCE = 0.95
MIN_SAMPLE_S = 50e-6  # shorter executions are timed several at a time ...
MIN_TICKS = 1000  # ... and on a coarse clock, until a sample is this many of its ticks
NARROW_LOOKS = 3
WARM_UP_S = 0.1
WARM_UP_CEILING_S = 1.0
WARM_UP_DRIFT = 0.05
SLOW_FLOOR = 3  # samples of an execution too slow for `min_samples`
SLOW_FACTOR = 4.0  # ... which it is where they would take this many times `target_s`
SLOW_EXECUTION_S = 0.3  # ... or where one takes this long: then nothing warms up for long either
RETAKES = 3  # batches of a measurement that are taken again because the device was slowed down
RECOVERY_S = 0.05  # left to the device before that

Clock = Callable[[], int]  # nanoseconds, monotonic
Execute = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Samples in the order they were taken, none dropped, and how they were taken."""

    samples_s: tuple[float, ...]
    method: str
    details: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def median_s(self) -> float:
        """The median of all samples."""
        return median(self.samples_s)


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """How many samples are wanted; times in seconds of wall time."""

    target_s: float
    min_samples: int
    max_samples: int
    relative_error: float  # half the width of the median's interval over the median
    limit_s: float = math.inf  # never begin a sample that would end after this

    @classmethod
    def of(cls, settings: Settings, limit_s: float, *, share: float = 1.0) -> "StopRule":
        """Take the rule from a run's settings, for a share of its seconds."""
        return cls(
            target_s=share * settings.target_s,
            min_samples=settings.min_samples,
            max_samples=settings.max_samples,
            relative_error=settings.relative_error,
            limit_s=limit_s,
        )


def median_interval(
    samples: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float] | None:
    """Return the interval that holds the distribution's median with this confidence.

    Order statistics with the interpolation of Hettmansperger and Sheather, "Confidence intervals
    based on interpolated order statistics" (1986), which makes the level nearly exact for any
    continuous distribution. None if there are too few samples for the confidence (below 6 at 95 %).
    """
    ordered, n = sorted(samples), len(samples)
    rank = _rank(n, confidence)
    if rank is None:
        return None
    outer, inner = _coverage(n, rank), _coverage(n, rank + 1)
    excess = (outer - confidence) / (outer - inner)
    weight = (n - rank) * excess / (rank + (n - 2 * rank) * excess)
    low = (1 - weight) * ordered[rank - 1] + weight * ordered[rank]
    high = (1 - weight) * ordered[n - rank] + weight * ordered[n - rank - 1]
    return low, high


@functools.lru_cache(maxsize=4096)
def _coverage(n: int, rank: int) -> float:
    """Return the chance that the median lies between the rank-th smallest and largest of n."""
    if 2 * rank > n:
        return 0.0
    return 1 - 2 * sum(math.comb(n, k) for k in range(rank)) / 2**n


@functools.lru_cache(maxsize=4096)
def _rank(n: int, confidence: float) -> int | None:
    """Return the largest rank whose interval still has the confidence, or None."""
    tail, rank = 0, 0
    while 1 - 2 * (tail + math.comb(n, rank)) / 2**n >= confidence:
        tail += math.comb(n, rank)
        rank += 1
    return rank or None


class Criterion:
    """Decides when there are enough samples: ask `batch`, `add` that many, until it is 0.

    Sampling ends when the median is known well enough, when `target_s` seconds have been spent, at
    `max_samples`, or before `limit_s` would be exceeded. The interval must be narrow in three looks
    in a row, half as many more samples apart: stopping at the first narrow look would favour
    intervals that are narrow by accident, and cover the median less often than they claim (90 % in
    place of 95 % after one narrow look, 92 % after two: `harness.selftest.statistics` shows it).
    """

    def __init__(self, rule: StopRule) -> None:
        self._rule = rule
        self._samples: list[float] = []
        self._spent_s = 0.0
        self._longest_s = 0.0
        self._lost_s = 0.0
        self._narrow_looks = 0
        self._stopped_by: str | None = None

    def add(self, sample_s: float, spent_s: float) -> None:
        """Take a sample, the time of one execution, and the wall time that it cost."""
        self._samples.append(sample_s)
        self._spent_s += spent_s
        self._longest_s = max(self._longest_s, spent_s)

    def lose(self, spent_s: float) -> bool:
        """Count wall time that gave no sample, if as much is left once more; returns whether."""
        enough = self._spent_s + self._lost_s + 2 * spent_s <= self._rule.limit_s
        self._lost_s += spent_s if enough else 0.0
        return enough

    def batch(self) -> int:
        """Look at the samples; return how many to take before the next look, 0 if enough."""
        n = len(self._samples)
        if n == 0:
            return 1
        self._stopped_by = self._stopped_by or self._look(n)
        if self._stopped_by is not None:
            return 0
        floor, rule = self._floor(), self._rule
        step = floor - n if n < floor else max(1, n // 2)
        cost = max(self._spent_s / n, 1e-12)
        limit_s = rule.limit_s - self._lost_s - self._longest_s
        until = min(limit_s, max(rule.target_s, floor * cost))
        affordable = math.ceil((until - self._spent_s) / cost) if math.isfinite(until) else step
        return max(1, min(step, affordable, rule.max_samples - n))

    def report(self) -> dict[str, Any]:
        """Return the facts a reader needs to judge the samples, as plain JSON values."""
        interval = median_interval(self._samples)
        error = self._relative_error()
        return {
            "samples": len(self._samples),
            "stopped_by": self._stopped_by,  # "interval", "target", "samples" or "limit"
            "converged": error is not None and error <= self._rule.relative_error,
            "few_samples": len(self._samples) < self._rule.min_samples,
            "interval_s": interval,
            "interval_confidence": CONFIDENCE if interval else None,
            "relative_error": error,
            "spent_s": self._spent_s,
        }

    def _look(self, n: int) -> str | None:
        rule = self._rule
        error = self._relative_error()
        narrow = error is not None and error <= rule.relative_error
        self._narrow_looks = self._narrow_looks + 1 if narrow else 0
        if self._spent_s + self._lost_s + self._longest_s > rule.limit_s:
            return "limit"
        if n >= rule.max_samples:
            return "samples"
        if n < self._floor():
            return None
        if self._narrow_looks >= NARROW_LOOKS:
            return "interval"
        return "target" if self._spent_s >= rule.target_s else None

    def _floor(self) -> int:
        each = self._spent_s / len(self._samples)
        slow = (
            each > SLOW_EXECUTION_S
            or each * self._rule.min_samples > SLOW_FACTOR * self._rule.target_s
        )
        return min(SLOW_FLOOR, self._rule.min_samples) if slow else self._rule.min_samples

    def _relative_error(self) -> float | None:
        interval = median_interval(self._samples)
        centre = median(self._samples)
        return (interval[1] - interval[0]) / 2 / centre if interval and centre > 0 else None


Take = Callable[[int], Sequence[tuple[float, float]]]
"""Takes that many samples: the time of one execution of each, and the wall time that it cost."""


def collect(
    criterion: Criterion,
    take: Take,
    *,
    slowed: Callable[[], Sequence[str]] = tuple,
    pause: Callable[[float], None] = time.sleep,
) -> tuple[list[float], dict[str, Any]]:
    """Take samples until there are enough; a batch taken on a slowed device is taken again.

    After `RETAKES` of these the samples stay as they are. Both kinds are in the record: the details
    name what was set aside, with its samples, and which of the kept samples are under suspicion.

    Args:
        criterion: says how many samples to take next.
        take: takes them.
        slowed: why the device was slow during the last `take`; empty if it was not.
        pause: lets the device recover, in seconds.
    """
    samples: list[float] = []
    set_aside: list[dict[str, Any]] = []
    suspects: list[dict[str, Any]] = []
    while batch := criterion.batch():
        taken = take(batch)
        while reasons := list(slowed()):
            cost_s = sum(spent_s for _, spent_s in taken)
            if len(set_aside) == RETAKES or not criterion.lose(cost_s):
                suspects.append({"from": len(samples), "count": len(taken), "reasons": reasons})
                break
            set_aside.append({"reasons": reasons, "samples_s": [each for each, _ in taken]})
            pause(RECOVERY_S)
            taken = take(batch)
        for sample_s, spent_s in taken:
            samples.append(sample_s)
            criterion.add(sample_s, spent_s)
    return samples, {"set_aside": set_aside, "kept": suspects} if set_aside or suspects else {}


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """What was executed before the first sample."""

    executions_s: tuple[float, ...]
    stable: bool

    @property
    def estimate_s(self) -> float:
        """The time of one execution, from the latest half."""
        return median(self.executions_s[len(self.executions_s) // 2 :])

    def report(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "executions": len(self.executions_s),
            "elapsed_s": sum(self.executions_s),
            "stable": self.stable,
        }


def warm_up(
    timed: Callable[[], float],
    *,
    least_s: float = WARM_UP_S,
    ceiling_s: float = WARM_UP_CEILING_S,
    doubt_first: bool = False,
) -> WarmUp:
    """Execute for `least_s` seconds and until the time no longer drifts, at most `ceiling_s`.

    Args:
        timed: executes once and returns how long it took, in seconds.
        least_s: seconds to go on at least, for clocks and caches to settle.
        ceiling_s: seconds after which it ends though the time still drifts.
        doubt_first: a first execution that would be the only one is not believed, as it may have
            compiled or autotuned: the warm-up begins again after it.
    """
    if doubt_first and (first_s := timed()) < min(ceiling_s, SLOW_EXECUTION_S):
        taken, elapsed = [first_s], first_s
    else:
        taken, elapsed = [], 0.0
    while True:
        taken.append(timed())
        elapsed += taken[-1]
        if elapsed >= ceiling_s:
            return WarmUp(executions_s=tuple(taken), stable=_settled(taken))
        if elapsed >= least_s and (_settled(taken) or taken[-1] >= SLOW_EXECUTION_S):
            return WarmUp(executions_s=tuple(taken), stable=True)


def warm_up_for(timed: Callable[[], float], rule: StopRule, *, doubt_first: bool = False) -> WarmUp:
    """Warm up as long as befits the sampling that follows: a quick look is not preceded by more."""
    return warm_up(
        timed,
        doubt_first=doubt_first,
        least_s=min(WARM_UP_S, rule.target_s),
        ceiling_s=min(WARM_UP_CEILING_S, 2 * max(WARM_UP_S, rule.target_s)),
    )


def _settled(taken: Sequence[float]) -> bool:
    """Whether the last quarter is about as fast as the quarter before it."""
    quarter = len(taken) // 4
    if quarter == 0:
        return False
    last, before = median(taken[-quarter:]), median(taken[-2 * quarter : -quarter])
    return abs(last - before) <= WARM_UP_DRIFT * before


def time_cpu(execute: Execute, rule: StopRule, *, clock: Clock = time.perf_counter_ns) -> Timing:
    """Time an execution on the CPU with a monotonic clock, garbage collection held back.

    An execution shorter than 50 us, or than 1000 ticks of the clock, is repeated inside a sample;
    the sample is then the mean of the repetitions.
    """

    def timed(repeat: int = 1) -> float:
        begin = clock()
        for _ in range(repeat):
            execute()
        return (clock() - begin) / 1e9

    criterion = Criterion(rule)
    with collector_paused():
        warm = warm_up_for(timed, rule)
        resolution_s = clock_resolution_s(clock)
        inner = repetitions(warm.estimate_s, max(MIN_SAMPLE_S, MIN_TICKS * resolution_s))
        samples: list[float] = []
        # Too slow for a warm-up of several: the first call and the gate have warmed it up, and
        # seconds of work are not thrown away.
        if len(warm.executions_s) == 1:
            samples.append(warm.executions_s[0])
            criterion.add(samples[0], samples[0])

        def take(count: int) -> list[tuple[float, float]]:
            spent = [timed(inner) for _ in range(count)]
            return [(spent_s / inner, spent_s) for spent_s in spent]

        samples += collect(criterion, take)[0]
    details = {
        "convergence": criterion.report(),
        "warm_up": warm.report(),
        "executions_per_sample": inner,
        "clock_resolution_s": resolution_s,
    }
    return Timing(samples_s=tuple(samples), method="perf_counter", details=details)


def repetitions(execution_s: float, sample_s: float) -> int:
    """Return how many executions make a sample of at least this length."""
    return max(1, math.ceil(sample_s / max(execution_s, 1e-9)))


def clock_resolution_s(clock: Clock) -> float:
    """Return the smallest step seen between two readings, in seconds; 0 if it did not advance."""
    steps: list[int] = []
    for _ in range(100):
        begin = clock()
        steps.append(clock() - begin)
    return min((step for step in steps if step > 0), default=0) / 1e9


@contextmanager
def collector_paused() -> Generator[None]:
    """Collect garbage now, and not while the block runs."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
