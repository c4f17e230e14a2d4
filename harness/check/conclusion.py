"""What a check comes to: its exit code, and what is said of it as a whole. Imports no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mambench.harness.verdict import Assessment, Kind, Point, Verdict

BLIND = "blind"  # could not have seen the slowdown that it promises to see
NONE = "none"
# What `--fail-on` may name, with the exit code; the first that applies decides.
FAILURES: Mapping[str, int] = {
    Verdict.REGRESSED: 1,
    Verdict.FAILED: 4,
    Verdict.MISSING: 4,
    Verdict.UNSTABLE: 3,
    Verdict.INCONCLUSIVE: 3,
    Verdict.NEW: 4,
    BLIND: 3,
}
DEFAULT_FAIL_ON = (Verdict.REGRESSED, Verdict.FAILED, Verdict.MISSING, Verdict.UNSTABLE, BLIND)
ORDER = (
    *(Verdict.REGRESSED, Verdict.FAILED, Verdict.MISSING, Verdict.UNSTABLE),
    *(Verdict.INCONCLUSIVE, Verdict.IMPROVED, Verdict.NEW, Verdict.SAME),
)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything that is said of a check."""

    title: str
    assessment: Assessment
    facts: Mapping[str, str]  # base, head, device, suite, rounds ...
    fail_on: Sequence[str] = DEFAULT_FAIL_ON
    alarm_rate: Mapping[str, Any] | None = None  # of this machine, see `noise.alarm_rate`
    unknown_alarms: str = "this machine has too few A/A rounds"  # why, where there is no rate
    problem: str | None = None  # why there is nothing to judge
    judged: bool = True  # False: shown without judging
    wall_s: float | None = None
    closing: Sequence[str] | None = None  # last sentences, instead of `seen` and `alarms`

    @property
    def exit_code(self) -> int:
        """0 pass, 1 regressed, 3 could not have seen the promised slowdown, 4 not measured."""
        if not self.judged:
            return 0
        if self.problem is not None or not self._compared:
            return 4
        counts = self.assessment.counts()
        present = {verdict: counts[verdict] > 0 for verdict in Verdict}
        present[Verdict.UNSTABLE] = self.assessment.unstable
        blind = self.assessment.blind or bool(self.assessment.suspects)
        for name, code in FAILURES.items():
            if name in self.fail_on and (blind if name == BLIND else present[Verdict(name)]):
                return code
        return 0

    @property
    def _compared(self) -> bool:
        return any(p.change_frac is not None for p in self.assessment.points)

    @property
    def conclusion(self) -> str:
        """One sentence."""
        if self.problem is not None:
            return f"Not judged: {self.problem}"
        if not self._compared:
            points = self.assessment.points
            if points and all(p.kind is Kind.BUDGET for p in points):
                return "No budget found a case that it could judge."
            counts = self.assessment.counts()
            said = ", ".join(f"{counts[v]} {v}" for v in ORDER if counts[v])
            nothing = "Nothing could be compared: no case was measured on both sides"
            return f"{nothing}{': ' if said else ''}{said}."
        counts, points = self.assessment.counts(), self.assessment.points
        tolerated = sum(p.tolerated for p in points)
        counts[Verdict.UNSTABLE] -= tolerated
        said = ", ".join(f"{counts[v]} {v}" for v in ORDER if counts[v] or v is Verdict.REGRESSED)
        accepted = sum(p.accepted is not None for p in points)
        more = f", {accepted} accepted" if accepted else ""
        more += f"; {tolerated} call times too unstable to judge" if tolerated else ""
        if not self.judged:
            return f"{len(points)} points, not judged."
        return f"{self._result}: {said}{more}."

    @property
    def _result(self) -> str:
        code = self.exit_code
        if code == 0 and self.assessment.blind:
            return _BLINDLY
        if code != 3 or self.assessment.blind:
            return _RESULTS[code]
        if self.assessment.suspects:
            return _UNSETTLED
        return _UNSTABLE if self.assessment.unstable else _UNDECIDED

    @property
    def seen(self) -> str:
        """What the run could have seen, in a sentence."""
        promise = self.assessment.promise_frac
        smallest = self.assessment.smallest_seen_frac
        if smallest is None:
            return "No slowdown could have been seen: too few cases have enough rounds."
        text = f"In nine of ten cases a slowdown of {smallest:.1%} would have been seen"
        if self.assessment.blind:
            keeps = f", or promise what it keeps: --promise {math.ceil(smallest * 100)}"
            return (
                f"{text}; {promise:.1%} was promised. A quieter machine, larger cases or more "
                f"--rounds see more{'' if self.assessment.unstable else keeps}."
            )
        return f"{text} (promised: {promise:.1%})."

    @property
    def alarms(self) -> str:
        """The false-alarm rate, in a sentence."""
        rate = self.alarm_rate
        if rate is None:
            return f"The false-alarm rate is not known: {self.unknown_alarms}."
        shares = [f"{share:.0%} of +{float(c):.0%}" for c, share in rate.get("found", {}).items()]
        found = f", and find {' and '.join(shares)} in one case" if shares else ""
        return (
            f"As far as this machine's own {rate['aa_rounds']} A/A rounds of {rate['cases']} cases "
            f"stand for it, {rate['alarms']} of {rate['simulated_checks']} checks of equal code "
            f"would raise a false alarm (at most {rate['bound_95']:.1%} with 95 % confidence)"
            f"{found}."
        )

    def ordered(self) -> list[Point]:
        """Return the points, what matters first."""
        return sorted(
            self.assessment.points,
            key=lambda p: (
                *(p.tolerated, ORDER.index(p.verdict), p.accepted is not None),
                *(-(p.change_frac or 0.0), p.name),
            ),
        )


_RESULTS = {
    0: "Passed",
    1: "Regressed",
    3: "Could not have seen the promised slowdown",
    4: "Not measured",
}


_BLINDLY = "Passed, though the promised slowdown could have gone unseen"
_UNSTABLE = "Something was too unstable to be judged"
_UNDECIDED = "Not everything could be decided"
_UNSETTLED = "A suspicion was not settled, for want of time"
