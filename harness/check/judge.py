"""Judges two versions of code from the observations of their rounds. Imports no torch.

Times follow `harness.check.rule`. What hardly varies has a tolerance instead. `assess` is a
function of observations alone, so that a stored check can be judged again. It says which cases must
be measured once more before a verdict stands; the caller does that and asks again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mambench.harness.check import rule as rules
from mambench.harness.check.groups import Group, change_where_longest, groups
from mambench.harness.check.moderated import Array, Mask, median
from mambench.harness.check.rounds import AA, Rounds
from mambench.harness.check.rule import Limits, Rule
from mambench.harness.spec import Case, Outcome
from mambench.harness.verdict import EXACT, TIMES, Assessment, Kind, Point, Tolerance, Verdict

UNSTABLE_FRAC = 0.25  # noise that hides a slowdown of a quarter is no measurement
# Of three rounds of d = candidate - mean of two bases, and of two bases: bring the second to the
# variance of the first.
AA_SCALE = math.sqrt(1.5 / 2)


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Which rounds are the screening and which each confirmation."""

    screening: tuple[int, ...]
    confirmations: tuple[tuple[int, ...], ...] = ()

    @property
    def all(self) -> tuple[int, ...]:
        """Every round."""
        return (*self.screening, *(r for stage in self.confirmations for r in stage))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What the verdicts rest on."""

    base: Rounds
    head: Rounds
    again: Rounds | None = None  # the base once more, in the same rounds: A/A
    stored: AA | None = None  # A/A rounds of this machine from earlier
    stages: Stages


def assess(evidence: Evidence, rule: Rule, *, promise_frac: float = 0.05) -> Assessment:
    """Judge everything that was measured."""
    shared, points = _presence(evidence)
    suspects: set[str] = set()
    for metric in TIMES:
        group = [c for c in shared if evidence.base.has(c, metric) or evidence.head.has(c, metric)]
        found, again = _times(group, metric, evidence, rule)
        points += found
        suspects |= again
    for metric in EXACT:
        found, again = _exact(shared, metric, evidence, rule)
        points += found
        suspects |= again
    return Assessment(points=tuple(points), suspects=frozenset(suspects), promise_frac=promise_frac)


def _presence(evidence: Evidence) -> tuple[list[Case], list[Point]]:
    """Return the cases that both sides have, and a point for each of the others."""
    shared: list[Case] = []
    points: list[Point] = []
    base, head = evidence.base, evidence.head
    for case in {**base.cases, **head.cases}.values():
        before, after = base.proof(case), head.outcome(case)
        if after is Outcome.OK and before is Outcome.OK:
            shared.append(case)
            continue
        verdict, reason = _absence(before, base.reason(case), after, head.reason(case))
        if verdict is not None:
            label = case.label
            points.append(
                Point(
                    kind=Kind.CASE,
                    name=label,
                    metric="time_s",
                    verdict=verdict,
                    case=case,
                    reason=reason,
                )
            )
    return shared, points


def _absence(
    before: Outcome | None, why_before: str | None, after: Outcome | None, why_after: str | None
) -> tuple[Verdict | None, str]:
    """Return what is said of a case that one side has not measured; None: nothing to say."""
    if after is not None and after.failed:
        also = f" (on the base too: {before})" if before is not None and before.failed else ""
        return Verdict.FAILED, f"{after}: {why_after}{also}"
    if after is Outcome.OK:
        what = (
            f"the base ended as {before}: {why_before}" if before else "the base has no such case"
        )
        return Verdict.NEW, what
    if before is Outcome.OK:
        what = f"{after}: {why_after}" if after else "the candidate has no such case"
        return Verdict.MISSING, what
    if before is not None and before.failed:
        return Verdict.MISSING, f"the base ended as {before}: {why_before}"
    return None, ""


# --- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Table:
    """Logarithms of the rounds of many cases, (cases, rounds); NaN where there is none."""

    cases: Sequence[Case]
    base: Array
    head: Array
    again: Array | None
    stored: Array | None  # (cases, pairs): A/A differences

    @property
    def d(self) -> Array:
        """The difference of each round."""
        if self.again is None:
            return self.head - self.base
        with np.errstate(invalid="ignore"):
            both = np.where(np.isfinite(self.again), (self.base + self.again) / 2, self.base)
        return self.head - np.where(np.isfinite(both), both, self.again)

    @property
    def aa(self) -> Array | None:
        """Differences of the same code, of the variance of d."""
        if self.again is not None:
            return (self.again - self.base) * AA_SCALE
        return self.stored

    def over_cases(self, groups: Sequence[Sequence[int]], weights: Sequence[Array]) -> "_Table":
        """Return the weighted sum of each group of cases, NaN in rounds that lack one of them."""

        def combined(values: Array) -> Array:
            rows = [w @ values[list(m)] for m, w in zip(groups, weights, strict=True)]
            return np.array(rows).reshape(len(groups), values.shape[1])

        return _Table(
            cases=self.cases,
            base=combined(self.base),
            head=combined(self.head),
            again=None if self.again is None else combined(self.again),
            stored=None if self.stored is None else combined(self.stored),
        )


def _times(
    cases: list[Case], metric: str, evidence: Evidence, rule: Rule
) -> tuple[list[Point], set[str]]:
    if not cases:
        return [], set()
    table = _table(cases, metric, evidence)
    points: list[Point] = []
    suspects: set[str] = set()
    judged = _judge(table, evidence.stages, rule, rule.case)
    for i, case in enumerate(cases):
        points.append(_case_point(i, case, metric, table, judged, evidence))
        if judged.pending[i]:
            suspects.add(case.case_id)
    first = np.isfinite(table.d[:, : len(evidence.stages.screening)])
    complete = np.asarray(first.all(axis=1))
    for kind, limits in ((Kind.FAMILY, rule.family), (Kind.EXPONENT, rule.exponent)):
        gathered = groups(kind, cases, complete)
        if not gathered:
            continue
        members = [group.members for group in gathered]
        summed = table.over_cases(members, [group.weights for group in gathered])
        together = _judge(summed, evidence.stages, rule, limits)
        if kind is Kind.EXPONENT:
            together = _unless_faster(together, gathered, table, limits)
        for i, group in enumerate(gathered):
            points.append(_point(i, kind, group.name, metric, together))
            if together.pending[i]:
                suspects.update(cases[m].case_id for m in group.members)
    return points, suspects


def _table(cases: Sequence[Case], metric: str, evidence: Evidence) -> _Table:
    rounds = evidence.stages.all

    def logs(side: Rounds) -> Array:
        values = np.array([[side.value(c, metric, r) for r in rounds] for c in cases], dtype=float)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(values > 0, np.log(values), np.nan)

    stored = None
    if evidence.stored:
        ways = [evidence.head.methods(c, metric) for c in cases]
        stored = evidence.stored.differences(cases, metric, ways)
    again = logs(evidence.again) if evidence.again else None
    return _Table(
        cases=cases, base=logs(evidence.base), head=logs(evidence.head), again=again, stored=stored
    )


@dataclass(frozen=True, kw_only=True)
class _Judgement:
    """What the rule says of each row of a table."""

    first: rules.Screened
    overall: rules.Screened
    smallest: Array
    few: Mask  # fewer rounds than say anything
    regressed: Mask
    pending: Mask
    unconfirmed: Mask


def _judge(table: _Table, stages: Stages, rule: Rule, limits: Limits) -> _Judgement:
    d = table.d
    used = len(stages.screening)
    aa = table.aa
    if aa is not None and table.again is not None:
        aa = aa[:, :used]
    first = rules.screen(d[:, :used], aa, rule, limits)
    standing, before = first.slower, d[:, :used]
    confirmed = 0
    for stage in stages.confirmations:
        fresh = d[:, before.shape[1] : before.shape[1] + len(stage)]
        standing = rules.confirm(fresh, before, first, standing, rule, limits)
        before = np.concatenate([before, fresh], axis=1)
        confirmed += 1
    settled = confirmed >= rule.confirmations
    overall = rules.screen(d, table.aa, rule, limits)
    return _Judgement(
        first=first,
        overall=overall,
        smallest=rules.smallest_seen(first, rule, limits),
        few=first.n < rule.min_rounds,
        regressed=standing & settled,
        pending=standing & (not settled),
        unconfirmed=first.slower & ~standing,
    )


def _case_point(
    i: int, case: Case, metric: str, table: _Table, judged: _Judgement, evidence: Evidence
) -> Point:
    point = _point(i, Kind.CASE, case.label, metric, judged)
    point = replace(point, case=case, base=_level(table.base[i]), head=_level(table.head[i]))
    broken = [
        f"{name} gave no number in round {r}"
        for name, side in (("the base", evidence.base), ("the candidate", evidence.head))
        for r in evidence.stages.screening
        if side.broken(case, metric, r)
    ]
    if broken:
        return replace(point, verdict=Verdict.FAILED, reason="; ".join(broken[:3]))
    screening = len(evidence.stages.screening)
    counts = [int(np.isfinite(side[i, :screening]).sum()) for side in (table.base, table.head)]
    if counts[0] != counts[1] and point.verdict is not Verdict.REGRESSED:
        why = f"measured in {counts[0]} rounds of the base and {counts[1]} of the candidate"
        reason = f"{why}: processes of equal code do not all end well"
        return replace(point, verdict=Verdict.UNSTABLE, reason=reason)
    methods = evidence.base.methods(case, metric), evidence.head.methods(case, metric)
    if methods[0] != methods[1]:
        what = " and ".join("/".join(sorted(m)) or "nothing" for m in methods)
        reason = f"base and candidate were timed in different ways ({what}): not comparable"
        return replace(point, verdict=Verdict.INCONCLUSIVE, reason=reason)
    return point


def _point(i: int, kind: Kind, name: str, metric: str, judged: _Judgement) -> Point:
    overall, first = judged.overall, judged.first
    low, high = overall.interval()
    # It is of the trimmed mean; of rounds in two modes the median, which is shown, can lie beyond.
    low, high = np.fmin(low, overall.median), np.fmax(high, overall.median)
    verdict, reason = _said(i, judged, float(low[i]), float(high[i]))
    return Point(
        kind=kind,
        name=name,
        metric=metric,
        verdict=verdict,
        reason=reason,
        change_frac=_frac(overall.median[i]),
        low_frac=_frac(low[i]),
        high_frac=_frac(high[i]),
        margin_frac=_frac(first.margin[i]),
        smallest_seen_frac=_plain(judged.smallest[i]),
        noise_frac=_frac(first.noise.sd[i]),
        rounds=int(overall.n[i]),
        p_value=_plain(first.p_slower[i]),
    )


def _said(i: int, judged: _Judgement, low: float, high: float) -> tuple[Verdict, str | None]:
    first = judged.first
    if judged.regressed[i]:
        return Verdict.REGRESSED, None
    if judged.pending[i]:
        return Verdict.INCONCLUSIVE, "suspected, and not measured again: time or rounds ran out"
    if judged.few[i]:
        return Verdict.INCONCLUSIVE, f"{int(first.n[i])} comparable rounds are too few to judge"
    if not math.isfinite(float(judged.smallest[i])):
        return Verdict.INCONCLUSIVE, "how much rounds of the same code differ is not known"
    if judged.smallest[i] > UNSTABLE_FRAC:
        noise = f"{float(first.noise.sd[i]):.1%}"
        return Verdict.UNSTABLE, f"one round differs from another by {noise} of the time"
    if first.faster[i] and high < 0:
        return Verdict.IMPROVED, None
    margin = float(first.margin[i])
    if -margin < low and high < margin:
        return Verdict.SAME, None
    if judged.unconfirmed[i]:
        return Verdict.INCONCLUSIVE, "suspected at first, and not seen again in fresh rounds"
    return Verdict.INCONCLUSIVE, "a change beyond the margin can neither be shown nor ruled out"


def _unless_faster(
    judged: _Judgement, curves: Sequence[Group], table: _Table, limits: Limits
) -> _Judgement:
    """Spare curves that are steeper only because they got quicker where they are short."""
    slower = change_where_longest(curves, median(table.d)) > limits.margin / 2
    return replace(judged, regressed=judged.regressed & slower, pending=judged.pending & slower)


# --- what hardly varies --------------------------------------------------------------------------


def _exact(
    cases: Sequence[Case], metric: str, evidence: Evidence, rule: Rule
) -> tuple[list[Point], set[str]]:
    points: list[Point] = []
    suspects: set[str] = set()
    for case in cases:
        base, head = evidence.base.values(case, metric), evidence.head.values(case, metric)
        if not base and not head:
            continue
        point = Point(
            kind=Kind.CASE,
            name=case.label,
            metric=metric,
            verdict=Verdict.SAME,
            case=case,
            base=_middle(base),
            head=_middle(head),
            rounds=min(len(base), len(head)),
            margin_frac=EXACT[metric].frac,
        )
        if not base or not head:
            side, verdict = ("base", Verdict.NEW) if not base else ("candidate", Verdict.MISSING)
            reason = f"the {side} has no {metric}"
            points.append(replace(point, verdict=verdict, reason=reason))
            continue
        # A stored run is not measured again: its few values stand for every round.
        rounds = len(head) if evidence.base.repeated else min(len(base), len(head))
        verdict, reason = _compare(base, head, EXACT[metric], rounds, rule)
        if verdict is Verdict.INCONCLUSIVE:
            suspects.add(case.case_id)
        middle = _middle(base)
        change = (_middle(head) or 0.0) / middle - 1 if middle else None
        points.append(replace(point, verdict=verdict, reason=reason, change_frac=change))
    return points, suspects


def _compare(
    base: Sequence[float], head: Sequence[float], tolerance: Tolerance, rounds: int, rule: Rule
) -> tuple[Verdict, str | None]:
    """Judge by the most favourable of all rounds; inconclusive: they must be repeated first."""
    if min(head) > tolerance.limit(max(base)):
        if rounds > rule.confirmations:
            return Verdict.REGRESSED, None
        return Verdict.INCONCLUSIVE, "more than allowed, and not measured again"
    if min(base) > tolerance.limit(max(head)):
        return Verdict.IMPROVED, None
    for side in (base, head):
        # Also beyond the tolerated amount: a quarter of little is little.
        least = max(min(side) * (1 + UNSTABLE_FRAC), tolerance.limit(min(side)))
        if max(side) > least:
            said = f"rounds of the same code differ: {min(side):,.6g} to {max(side):,.6g}"
            return Verdict.UNSTABLE, said
    return Verdict.SAME, None


def _middle(values: Sequence[float]) -> float | None:
    return float(np.median(values)) if values else None


def _level(logs: Array) -> float | None:
    finite = logs[np.isfinite(logs)]
    return float(np.exp(np.median(finite))) if finite.size else None


def _frac(log: Any) -> float | None:
    return math.expm1(log) if math.isfinite(log) else None


def _plain(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None
