"""Results: the fold of one case's observations, and their columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from functools import cache
from typing import Any

from mambench.harness.analysis.intervals import Interval, quantile
from mambench.harness.analysis.runs import Run, Source
from mambench.harness.spec import METRICS, Case, Outcome

LAUNCH_GAPS = "timed by eager calls, gaps between launches included"  # begins such a flag
TAGS = tuple(metric.tag for metric in METRICS)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class Result:
    """The fold of one case's observations on one source."""

    source: str
    run_id: str  # of the newest observation
    case: Case
    outcome: Outcome
    reason: str | None = None
    time_s: float | None = None
    interval: Interval | None = None
    method: str | None = None
    rounds: int = 0
    samples_s: tuple[float, ...] = field(default=(), repr=False)  # pooled over rounds
    round_medians_s: tuple[float, ...] = ()
    converged: bool | None = None
    call_time_s: float | None = None
    first_call_s: float | None = None
    peak_memory_bytes: int | None = None
    extra_memory_bytes: int | None = None
    model_flop: int | None = None
    compulsory_bytes: int | None = None
    weight_count: int | None = None
    state_bytes: int | None = None
    values: Mapping[str, float] = field(
        default_factory=dict[str, float]
    )  # by tag, of metrics that have no field of their own
    missing: Mapping[str, str] = field(
        default_factory=dict[str, str]
    )  # metric tag -> why it is None
    flags: tuple[str, ...] = ()  # what a reader should distrust
    telemetry: Mapping[str, Any] = field(default_factory=dict[str, Any])
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    found: Mapping[str, Mapping[str, Any]] = field(
        default_factory=dict[str, Mapping[str, Any]], repr=False
    )  # newest details by measurement: kernels, traces, configurations
    measured_at: str | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of one pass over its time."""
        return None if self.time_s is None else self.case.tokens / self.time_s

    def value(self, tag: str) -> float | None:
        """Return a metric by its tag, None where it is missing."""
        return self.values.get(tag) if tag not in OWN_FIELDS else getattr(self, tag)

    @property
    def launch_gaps(self) -> bool:
        """Whether the time holds gaps between launches: it is more than what the GPU worked."""
        return any(flag.startswith(LAUNCH_GAPS) for flag in self.flags)

    @property
    def flop_per_s(self) -> float | None:
        """Modelled FLOP over measured time."""
        return _ratio(self.model_flop, self.time_s)

    @property
    def modelled_bytes_per_s(self) -> float | None:
        """Compulsory (modelled) bytes over measured time; not a measurement of traffic."""
        return _ratio(self.compulsory_bytes, self.time_s)

    @property
    def quantiles_s(self) -> tuple[float, ...] | None:
        """Quantiles of the pooled samples at `QUANTILES`."""
        if not self.samples_s:
            return None
        ordered = sorted(self.samples_s)
        return tuple(quantile(ordered, at) for at in QUANTILES)


OWN_FIELDS = {f.name for f in fields(Result)} | {"tokens_per_s"}


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """Everything a report is made from."""

    sources: tuple[Source, ...]
    results: tuple[Result, ...]

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, source by source."""
        return tuple(run for source in self.sources for run in source.runs)


def columns(
    results: Sequence[Result], labels: Mapping[str, str] | None = None
) -> dict[str, list[Any]]:
    """Return results as flat plain values, column by column: as records, but much sooner."""
    names = labels or {}
    cases = [result.case for result in results]
    problems = [vars(case.problem) for case in cases]
    intervals = [result.interval for result in results]
    return {
        "device": [names.get(result.source, result.source) for result in results],
        "run_id": [result.run_id for result in results],
        "case_id": [case.case_id for case in cases],
        "implementation": [case.implementation for case in cases],
        "variant": [case.variant for case in cases],
        **{
            name: [_plain(problem[name]) for problem in problems]
            for name in (problems[0] if problems else ())
        },
        "pass": [_plain(case.pass_) for case in cases],
        "dtype": [_plain(case.dtype) for case in cases],
        "outcome": [_plain(result.outcome) for result in results],
        "reason": [result.reason for result in results],
        "time_s": [result.time_s for result in results],
        "time_low_s": [interval and interval.low for interval in intervals],
        "time_high_s": [interval and interval.high for interval in intervals],
        "interval_coverage": [interval and interval.coverage for interval in intervals],
        "interval_over": [interval and interval.over for interval in intervals],
        "method": [result.method for result in results],
        "rounds": [result.rounds for result in results],
        "samples": [len(result.samples_s) for result in results],
        "converged": [result.converged for result in results],
        **{tag: values_of(results, tag) for tag in TAGS if tag != "time_s"},
        "model_flop_per_s": [result.flop_per_s for result in results],
        "modelled_bytes_per_s": [result.modelled_bytes_per_s for result in results],
        "measured_at": [result.measured_at for result in results],
    }


def values_of(results: Sequence[Result], tag: str) -> list[float | None]:
    """Return `Result.value` of every result."""
    if tag in OWN_FIELDS:
        return [getattr(result, tag) for result in results]
    return [result.values.get(tag) for result in results]


@cache
def _value(member: Enum) -> Any:
    return member.value


def _plain(value: Any) -> Any:
    # To ask a member for its value is ten times as dear as to look it up.
    return _value(value) if isinstance(value, Enum) else value


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return None if numerator is None or denominator is None else numerator / denominator
