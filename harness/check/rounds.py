"""Rounds of one side of a check as a table of values. Imports no torch.

A round is one fresh process that ran all cases; round 0 is the one that compiled, proved the
answers right and measured what hardly varies.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambench.harness.records import Observation
from mambench.harness.spec import Case, Outcome

MEASUREMENT = {"time_s": "time", "call_time_s": "call_time"}


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """All observations of one side, by case and round."""

    cases: Mapping[str, Case]  # by case_id
    found: Mapping[str, Sequence[Observation]]  # by case_id
    repeated: bool = False  # a stored run: its rounds stand for later ones too, from the first on

    @classmethod
    def of(
        cls,
        observations: Iterable[Observation],
        planned: Iterable[Case] = (),
        *,
        repeated: bool = False,
    ) -> "Rounds":
        """Collect observations; of two for the same measurement and round the last one counts.

        A planned case without any observation is there, and has no outcome.
        """
        newest = {(o.case.case_id, o.measurement, o.round): o for o in observations}
        found: dict[str, list[Observation]] = defaultdict(list)
        cases = {case.case_id: case for case in planned}
        for (case_id, _, _), observation in newest.items():
            found[case_id].append(observation)
            cases[case_id] = observation.case
        return cls(cases=cases, found=dict(found), repeated=repeated)

    def outcome(self, case: Case) -> Outcome | None:
        """Return how a case ended over all rounds: ok only if it never failed; None: not there."""
        worst = self._worst(case)
        return worst.outcome if worst else None

    def reason(self, case: Case) -> str | None:
        """Return why it did not end as ok."""
        worst = self._worst(case)
        return worst.reason if worst else None

    def proof(self, case: Case) -> Outcome | None:
        """Return how a case ended in round 0, or in a run without one at its best.

        What ended badly only later has fewer rounds, and can still be compared with.
        """
        found = [o for o in self.found.get(case.case_id, ()) if decides(o)]
        proofs = [o for o in found if o.round == 0]
        if proofs:
            return next((o.outcome for o in proofs if o.outcome is not Outcome.OK), Outcome.OK)
        return Outcome.OK if any(o.outcome is Outcome.OK for o in found) else self.outcome(case)

    def value(self, case: Case, metric: str, round: int) -> float:
        """Return a metric of a round, NaN if there is none or it is no number above 0."""
        values = self._values(case, metric)
        if self.repeated and values and round not in values:
            known = sorted(values)
            round = known[(round - known[0]) % len(known)]
        value = values.get(round)
        return value if value is not None and math.isfinite(value) and value > 0 else math.nan

    def values(self, case: Case, metric: str) -> list[float]:
        """Return the numbers of all rounds."""
        found = self._values(case, metric).values()
        return [v for v in found if v is not None and math.isfinite(v)]

    def has(self, case: Case, metric: str) -> bool:
        """Whether any round tried to measure it."""
        return bool(self._values(case, metric))

    def broken(self, case: Case, metric: str, round: int) -> bool:
        """Whether a round that ended as ok gave no number, or one that no time can be."""
        values = self._values(case, metric)
        return round in values and math.isnan(self.value(case, metric, round))

    def methods(self, case: Case, metric: str) -> set[str]:
        """Return the ways in which the metric was measured."""
        wanted = MEASUREMENT[metric]
        return {
            o.method
            for o in self.found.get(case.case_id, ())
            if o.measurement == wanted and o.method and o.round > 0
        }

    def observations(self, case: Case) -> Sequence[Observation]:
        """Return everything known of a case."""
        return self.found.get(case.case_id, ())

    def _values(self, case: Case, metric: str) -> dict[int, Any]:
        """Return the metric's raw value by round, of rounds that ended as ok."""
        wanted = MEASUREMENT.get(metric)
        return {
            o.round: o.values[metric]
            for o in self.found.get(case.case_id, ())
            if metric in o.values
            and o.outcome is Outcome.OK
            and (wanted is None or (o.measurement == wanted and o.round > 0))
            and not (wanted is None and o.values[metric] is None)
        }

    def _worst(self, case: Case) -> Observation | None:
        """Return the observation that decides: of the time, or of the gate before it."""
        found = [o for o in self.found.get(case.case_id, ()) if decides(o)]
        bad = [o for o in found if o.outcome is not Outcome.OK]
        failed = [o for o in bad if o.outcome.failed]
        return next(iter(failed or bad or found), None)


def decides(observation: Observation) -> bool:
    """Whether a failure of this measurement is a failure of the case."""
    phase = observation.details.get("phase")
    alone = observation.measurement not in ("time", "call_time")
    return not (alone and phase == observation.measurement)


@dataclass(frozen=True, kw_only=True)
class AA:
    """A machine's own noise: pairs of rounds of the same code, case by case."""

    # case_id -> metric -> [[log time, log time of the other], ...]
    pairs: Mapping[str, Mapping[str, Sequence[Sequence[float]]]] = field(
        default_factory=dict[str, Mapping[str, Sequence[Sequence[float]]]]
    )

    # case_id -> metric -> how it was timed, where there was one way
    methods: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])

    def rows(
        self, case: Case, metric: str, ways: Collection[str] = ()
    ) -> Sequence[Sequence[float]]:
        """Return a case's pairs; none if it was timed in another way than these, if any."""
        timed = self.methods.get(case.case_id, {}).get(metric)
        if ways and timed is not None and timed not in ways:
            return ()
        return self.pairs.get(case.case_id, {}).get(metric, ())

    def differences(
        self, cases: Sequence[Case], metric: str, ways: Sequence[Collection[str]] | None = None
    ) -> NDArray[np.float64] | None:
        """Return (cases, pairs) differences, NaN where a case is not known; None if none is.

        Args:
            cases: what is asked for.
            metric: of them.
            ways: how each case is timed now; noise of another way is another noise.
        """
        ways = ways or [()] * len(cases)
        rows = [self.rows(c, metric, way) for c, way in zip(cases, ways, strict=True)]
        width = max(map(len, rows), default=0)
        if width == 0:
            return None
        table = np.full((len(rows), width), np.nan)
        for i, row in enumerate(rows):
            for j, (first, second) in enumerate(row):
                table[i, j] = second - first
        return table


def pairs(first: Rounds, second: Rounds, rounds: Iterable[int]) -> AA:
    """Return the rounds of two arms of the same code as a machine's noise."""
    numbers = list(rounds)
    found: dict[str, Mapping[str, list[list[float]]]] = {}
    ways: dict[str, Mapping[str, str]] = {}
    for case_id, case in first.cases.items():
        metrics: dict[str, list[list[float]]] = {}
        for metric in MEASUREMENT:
            both = [(first.value(case, metric, r), second.value(case, metric, r)) for r in numbers]
            kept = [[math.log(a), math.log(b)] for a, b in both if a > 0 and b > 0]
            if kept:
                metrics[metric] = kept
        if metrics:
            found[case_id] = metrics
            timed = {metric: first.methods(case, metric) for metric in metrics}
            ways[case_id] = {metric: way.pop() for metric, way in timed.items() if len(way) == 1}
    return AA(pairs=found, methods=ways)
