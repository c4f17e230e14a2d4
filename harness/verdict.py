"""What a check says of two versions of code: points and their verdicts. Imports no torch.

What is judged are points: a case's GPU time, call time, peak memory, HBM bytes and kernel count;
the geometric mean of a family (implementation, pass, dtype); and how an implementation's time grows
with the sequence length. `harness.check.judge` makes them from observations.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from mambench.harness.spec import Case, digest


class Verdict(StrEnum):
    """What is said of a point; a reason a person can act on goes with each but the first three."""

    REGRESSED = "regressed"  # slower or bigger, confirmed in fresh rounds
    IMPROVED = "improved"
    SAME = "same"  # the 90 % interval of the change lies inside the margin
    INCONCLUSIVE = "inconclusive"  # neither the same nor different beyond doubt
    UNSTABLE = "unstable"  # too noisy to be judged at all
    MISSING = "missing"  # the base has it, the candidate does not
    NEW = "new"  # the candidate has it, the base does not
    FAILED = "failed"  # the candidate could not be measured


class Kind(StrEnum):
    """What a point stands for."""

    CASE = "case"
    FAMILY = "family"
    EXPONENT = "exponent"
    BUDGET = "budget"  # a limit of its own, see `harness.check.budgets`


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How much a quantity that hardly varies may grow: this fraction and this amount."""

    frac: float
    amount: float

    def limit(self, base: float) -> float:
        """Return the most that is allowed."""
        return base * (1 + self.frac) + self.amount


MIB = 1024.0**2
TIMES = {"time_s": "time", "call_time_s": "call_time"}  # metric: measurement
EXACT: Mapping[str, Tolerance] = {
    "peak_memory_bytes": Tolerance(frac=0.02, amount=2 * MIB),
    "dram_bytes": Tolerance(frac=0.03, amount=MIB),
    "dram_read_bytes": Tolerance(frac=0.03, amount=MIB),
    "dram_write_bytes": Tolerance(frac=0.03, amount=MIB),
    "kernel_count": Tolerance(frac=0.0, amount=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Point:
    """One thing judged. Fractions are of the base: 0.05 is 5 % more."""

    kind: Kind
    name: str  # the case's label, or what the family or curve is
    metric: str
    verdict: Verdict
    case: Case | None = None
    reason: str | None = None
    change_frac: float | None = None
    low_frac: float | None = None  # 90 % interval of the change
    high_frac: float | None = None
    margin_frac: float | None = None
    smallest_seen_frac: float | None = None  # nine of ten such runs would find this
    noise_frac: float | None = None  # standard deviation of one round
    base: float | None = None  # median over rounds, SI
    head: float | None = None
    rounds: int = 0
    p_value: float | None = None  # of the screening
    notes: tuple[str, ...] = ()  # what else changed
    command: str | None = None  # that measures the case alone
    accepted: str | None = None  # why a regression is meant

    @property
    def tolerated(self) -> bool:
        """Whether it is unstable, but a call time: a busy host makes those, and no change did."""
        return self.verdict is Verdict.UNSTABLE and self.metric == "call_time_s"

    @property
    def key(self) -> str:
        """Identity across checks."""
        return digest([self.kind, self.case.case_id if self.case else self.name, self.metric])


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """All points, and what must be measured again before they stand."""

    points: tuple[Point, ...]
    suspects: frozenset[str] = frozenset()  # case_ids that another confirmation must include
    promise_frac: float = 0.05
    notes: tuple[str, ...] = ()

    def counts(self) -> dict[Verdict, int]:
        """Return how many points each verdict has; accepted regressions are not counted."""
        return {
            verdict: sum(p.verdict is verdict and p.accepted is None for p in self.points)
            for verdict in Verdict
        }

    @property
    def smallest_seen_frac(self) -> float | None:
        """The slowdown that would have been seen in nine of ten cases."""
        seen = [
            math.inf if p.smallest_seen_frac is None else p.smallest_seen_frac
            for p in self.points
            if p.kind is Kind.CASE and p.metric == "time_s" and p.verdict not in _NOT_COMPARED
        ]
        worst = float(np.quantile(seen, 0.9, method="higher")) if seen else math.inf
        return worst if math.isfinite(worst) else None

    @property
    def unstable(self) -> bool:
        """Whether a point is unstable that is not tolerated so."""
        return any(
            p.verdict is Verdict.UNSTABLE and not p.tolerated and p.accepted is None
            for p in self.points
        )

    @property
    def blind(self) -> bool:
        """Whether the run could not have seen the slowdown it promises to see."""
        seen = self.smallest_seen_frac
        # Where no time was asked for, nothing was promised of times.
        compared = any(p.metric == "time_s" and p.verdict not in _NOT_COMPARED for p in self.points)
        return compared and (seen is None or seen > self.promise_frac)


_NOT_COMPARED = (Verdict.MISSING, Verdict.NEW, Verdict.FAILED)


def with_points(assessment: Assessment, change: Callable[[Point], Point]) -> Assessment:
    """Return the assessment with every point replaced by what `change` makes of it."""
    return replace(assessment, points=tuple(change(point) for point in assessment.points))
