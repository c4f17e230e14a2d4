"""Budgets: promises that a drift of small steps would break. Imports neither torch nor triton.

    budgets:
      - name: ssd stays under half of mamba_ssm
        cases: [implementation=ssd, pass=forward, "seqlen>=4096"]   # filters; all must hold
        metric: time_s                                              # default
        at_most: 0.5
        of: [implementation=mamba_ssm]      # relative to the case of the same problem and pass
      - name: 64K tokens
        cases: [implementation=ssd, seqlen=65536]
        metric: tokens_per_s
        at_least: 2.0e6
        device: "*H100*"                    # optional: judged on such devices only

A budget is broken where the whole interval of the value lies beyond the limit, and kept where all
of it lies within; between the two it is inconclusive. A budget that finds no case is missing: a
promise about nothing protects nothing.
"""

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mambench.harness.analysis import loading
from mambench.harness.analysis.intervals import ROUNDS_FOR_INTERVAL
from mambench.harness.analysis.results import Analysis, Result
from mambench.harness.check.report import quantity
from mambench.harness.curves import PROCESS_FRAC, speedup
from mambench.harness.errors import SuiteError, UsageError, unknown_name
from mambench.harness.filters import Predicate, compile_filter
from mambench.harness.spec import METRICS, Case, Outcome
from mambench.harness.verdict import Kind, Point, Verdict
from mambench.harness.yaml_nodes import Reader, parse_yaml

_FIELDS = ("name", "cases", "metric", "at_most", "at_least", "of", "device")
_NOISY = ("time_s", "tokens_per_s")  # have an interval
# Vary as times do, and no interval is known of them; bytes and counts do not.
_VARYING = {m.tag for m in METRICS if m.unit in ("s", "J", "W", "tokens/J")} | {"sol_frac"}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One promise."""

    name: str
    cases: Sequence[Predicate]
    metric: str
    limit: float
    at_most: bool  # else at least
    of: Sequence[Predicate] = ()  # (): the limit is absolute
    device: str = "*"

    def covers(self, result: Result) -> bool:
        """Whether the promise is about this result's case."""
        return all(keep(result.case) for keep in self.cases)


@dataclass(frozen=True, kw_only=True)
class Value:
    """A quantity, or a ratio of two, with its interval; no interval: nothing is known of it."""

    value: float
    low: float | None
    high: float | None


def read(path: Path) -> tuple[Budget, ...]:
    """Read a budget file; raises SuiteError that names file, line and field."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else error
        raise SuiteError(f"{path}: cannot be read: {problem}") from error
    root = parse_yaml(text, path, expected="a mapping with budgets")
    found = root.fields(("budgets",), required=("budgets",))["budgets"]
    budgets = tuple(_budget(item) for item in found.items())
    if not budgets:
        raise found.fail("has no budget.")
    return budgets


def _budget(reader: Reader) -> Budget:
    found = reader.fields(_FIELDS, required=("name", "cases"))
    limits = [name for name in ("at_most", "at_least") if name in found]
    if len(limits) != 1:
        raise reader.fail("takes one of at_most and at_least.")
    metric = found["metric"].text() if "metric" in found else "time_s"
    tags = [m.tag for m in METRICS if m.tag != "samples_s"]
    if metric not in tags:
        raise found["metric"].fail(unknown_name("metric", metric, tags))
    return Budget(
        name=found["name"].text(),
        cases=_filters(found["cases"]),
        metric=metric,
        limit=_limit(found[limits[0]]),
        at_most=limits[0] == "at_most",
        of=_filters(found["of"]) if "of" in found else (),
        device=found["device"].text() if "device" in found else "*",
    )


def _limit(reader: Reader) -> float:
    value = reader.value()
    try:
        # YAML 1.1 reads 2e6 as text.
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        number = math.nan
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise reader.fail(f"expected a number above 0, got {value!r}.")
    return number


def _filters(reader: Reader) -> tuple[Predicate, ...]:
    made: list[Predicate] = []
    for item in reader.items():
        try:
            made.append(compile_filter(item.text()))
        except SuiteError:
            raise
        except UsageError as error:
            raise item.fail(str(error)) from error
    if not made:
        raise reader.fail("is an empty list.")
    return tuple(made)


def judge_runs(budgets: Sequence[Budget], runs: Sequence[Path]) -> tuple[Point, ...]:
    """Judge run folders (of one machine and one code); raises RunFolderError, UsageError."""
    loaded = loading.load(runs)
    if len(loaded.sources) != 1:
        labels = ", ".join(source.label for source in loaded.sources)
        raise UsageError(f"budgets are judged on one machine and one code, got: {labels}.")
    return tuple(judge(budgets, loaded))


def judge(budgets: Sequence[Budget], found: Analysis) -> Iterable[Point]:
    """Yield a point for each case that a budget is about, or one that says why there is none."""
    device = found.sources[0].device_name
    by_case = {result.case: result for result in found.results}
    for budget in budgets:
        if not fnmatch.fnmatchcase(device, budget.device):
            continue
        covered = [result for result in found.results if budget.covers(result)]
        if not covered:
            yield _unjudged(budget, Verdict.MISSING, "the run has no case that this is about")
        for result in covered:
            yield _judged(budget, result, by_case)


def _judged(budget: Budget, result: Result, by_case: Mapping[Case, Result]) -> Point:
    if result.outcome is not Outcome.OK:
        reason = f"ended as {result.outcome}: {result.reason}"
        return _unjudged(budget, Verdict.FAILED, reason, result)
    other = None
    if budget.of:
        other = _other(budget, result, by_case)
        if other is None:
            reason = "the run has no case of the same problem, pass and dtype to be relative to"
            return _unjudged(budget, Verdict.MISSING, reason, result)
    value = _value(budget, result, other)
    if value is None:
        lacking = result if result.value(budget.metric) is None or other is None else other
        reason = lacking.missing.get(budget.metric) or f"there is no {budget.metric}"
        return _unjudged(budget, Verdict.MISSING, reason, result)
    verdict = _verdict(budget, value)
    return Point(
        kind=Kind.BUDGET,
        name=f"{budget.name}: {result.case.label}",
        metric=budget.metric,
        verdict=verdict,
        case=result.case,
        reason=_reason(budget, value, verdict),
        # How far beyond the limit: above 0 is the wrong side for at_most.
        change_frac=value.value / budget.limit - 1,
        low_frac=None if value.low is None else value.low / budget.limit - 1,
        high_frac=None if value.high is None else value.high / budget.limit - 1,
        base=None if budget.of else budget.limit,
        head=None if budget.of else value.value,
        rounds=result.rounds,
    )


def _other(budget: Budget, result: Result, by_case: Mapping[Case, Result]) -> Result | None:
    """Return the best of the cases that the limit is relative to."""
    asked = result.case
    found = [
        r
        for r in by_case.values()
        if r.case.problem == asked.problem
        and r.case.pass_ is asked.pass_
        and r.case.dtype is asked.dtype
        and r.case != asked
        and r.outcome is Outcome.OK
        and all(keep(r.case) for keep in budget.of)
        and r.value(budget.metric) is not None
    ]
    # The one that is hardest to be measured against.
    best = min if budget.at_most else max
    return best(found, key=lambda r: r.value(budget.metric) or 0.0, default=None)


def _value(budget: Budget, result: Result, other: Result | None) -> Value | None:
    """Return the quantity, or its ratio to the other's, with an interval where it is noisy."""
    metric = budget.metric
    ours = result.value(metric)
    if ours is None:
        return None
    if other is not None:
        return _ratio(metric, result, other)
    if metric not in _NOISY:
        return _known(metric, ours)
    interval = result.interval
    if interval is None or result.time_s is None:
        return Value(value=ours, low=None, high=None)
    low, high = interval.low / result.time_s, interval.high / result.time_s
    if metric == "tokens_per_s":
        low, high = 1 / high, 1 / low
    return _widened(Value(value=ours, low=ours * low, high=ours * high), result)


def _ratio(metric: str, result: Result, other: Result) -> Value | None:
    ours, theirs = result.value(metric), other.value(metric)
    if ours is None or not theirs:
        return None
    if metric not in _NOISY:
        return _known(metric, ours / theirs)
    # `speedup` is the baseline's time over the result's.
    first, second = (other, result) if metric == "time_s" else (result, other)
    found = speedup(first, second)
    if found is None or found.low is None or found.high is None:
        return Value(value=ours / theirs, low=None, high=None)
    value = Value(value=found.ratio, low=found.low, high=found.high)
    return _widened(value, result, other)


def _known(metric: str, value: float) -> Value:
    """Return a value that has no interval: exact, or as wide as processes differ."""
    wide = 1 + PROCESS_FRAC if metric in _VARYING else 1.0
    return Value(value=value, low=value / wide, high=value * wide)


def _widened(value: Value, *results: Result) -> Value:
    """Add what differs between processes where the interval is that of one."""
    if all(result.rounds >= ROUNDS_FOR_INTERVAL for result in results):
        return value
    assert value.low is not None
    assert value.high is not None
    low, high = value.low / (1 + PROCESS_FRAC), value.high * (1 + PROCESS_FRAC)
    return replace(value, low=low, high=high)


def _verdict(budget: Budget, value: Value) -> Verdict:
    if value.low is None or value.high is None:
        return Verdict.INCONCLUSIVE
    # Turned so that more is worse.
    low, high, limit = value.low, value.high, budget.limit
    if not budget.at_most:
        low, high, limit = -value.high, -value.low, -limit
    if low > limit:
        return Verdict.REGRESSED
    return Verdict.SAME if high <= limit else Verdict.INCONCLUSIVE


def _reason(budget: Budget, value: Value, verdict: Verdict) -> str:
    side = "at most" if budget.at_most else "at least"
    relative = " of the other's" if budget.of else ""

    def shown(number: float | None) -> str:
        return f"{number:.4g}" if budget.of else quantity(number, budget.metric)

    said = f"{shown(value.value)}{relative}, promised {side} {shown(budget.limit)}"
    if value.low is None:
        return f"{said}: too few samples for an interval"
    if verdict is Verdict.INCONCLUSIVE:
        return f"{said}: the limit lies within {shown(value.low)} .. {shown(value.high)}"
    return said


def _unjudged(budget: Budget, verdict: Verdict, reason: str, result: Result | None = None) -> Point:
    label = f": {result.case.label}" if result else ""
    return Point(
        kind=Kind.BUDGET,
        name=f"{budget.name}{label}",
        metric=budget.metric,
        verdict=verdict,
        case=result.case if result else None,
        reason=reason,
    )
