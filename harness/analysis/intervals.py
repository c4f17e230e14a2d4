"""Quantiles, and distribution-free intervals of a median."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

ROUNDS_FOR_INTERVAL = 5


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A confidence interval of a median, and what it is over: "rounds", "samples" or "hull"."""

    low: float
    high: float
    coverage: float  # of the median, by order statistics; "hull": of each round's own
    over: str


def median_interval(
    values: Sequence[float], over: str = "samples", level: float = 0.95
) -> Interval | None:
    """Return the distribution-free interval of the median, or None for fewer than five values.

    The narrowest pair of order statistics, symmetric in rank, that covers the median with at least
    `level`; with five values the extremes, which cover 93.75 %.
    """
    n = len(values)
    if n < 5:
        return None
    ordered = sorted(values)
    low_rank, coverage = _ranks(n, level)
    return Interval(
        low=ordered[low_rank], high=ordered[n - 1 - low_rank], coverage=coverage, over=over
    )


def quantile(ordered: Any, at: float) -> Any:
    """Interpolate linearly between order statistics, as numpy does by default.

    Args:
        ordered: numbers, or arrays of them, in ascending order.
        at: from 0 to 1.
    """
    place = at * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2) if len(ordered) > 1 else 0
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


@cache
def _ranks(n: int, level: float) -> tuple[int, float]:
    """Index of the lower order statistic, and what it and its mirror image cover."""
    best = (0, 1 - 2 * 0.5**n)
    below = 0.0
    for rank in range(n // 2):
        below += math.exp(_log_choose(n, rank) - n * math.log(2))
        coverage = 1 - 2 * below
        if coverage < level:
            break
        best = (rank, coverage)
    return best


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
