"""What one round of a run has recorded and still records: outcomes and observations, by case.

Imports neither torch nor triton.
"""

from collections.abc import Iterable
from typing import Any

from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.profilers.base import DECIDING, Measured, Profiler
from mambench.harness.records import Observation, now, observation_id
from mambench.harness.spec import Case, Outcome, digest
from mambench.harness.store import Key, RunFolder
from mambench.harness.workers.protocol import Done, Finding

# What does not change a measurement does not change its identity.
_NOT_IDENTITY = ("time_limit_s", "compile_limit_s", "memory_limit_bytes", "measurements")


class Ledger:
    """The observations of one round in a folder that is open for append."""

    def __init__(self, plan: Plan, folder: RunFolder, round: int) -> None:
        self._folder = folder
        self._round = round
        self._device = plan.device.name
        self._wanted = plan.settings.measurements
        settings = plan.settings.to_dict()
        self._settings = {k: v for k, v in settings.items() if k not in _NOT_IDENTITY}
        self._observed: list[Observation] = []

    @property
    def observed(self) -> tuple[Observation, ...]:
        """What was recorded since `begin`."""
        return tuple(self._observed)

    def begin(self) -> None:
        """Begin a case, or the cases of one batch."""
        self._observed = []

    def key(self, case: Case, measurement: str) -> Key:
        """Return what a case's measurement is found by in the folder."""
        return case.case_id, measurement, self._round

    def finished(self, *, retry_failed: bool) -> set[Key]:
        """Return what need not be measured again."""
        finished, newest = self._folder.finished(), self._folder.newest()
        return {k for k in finished if not (retry_failed and newest[k].outcome.failed)}

    def value(self, case: Case, tag: str) -> float:
        """Return a value of the case's time; 0 where it is not known."""
        timed = self._folder.newest().get(self.key(case, DECIDING))
        return (timed.values.get(tag) if timed else None) or 0.0

    def earlier_failure(self, case: Case, missing: tuple[str, ...]) -> Done | None:
        """Return how the case failed before the run was cut off, or before this measurement.

        A measurement that failed by itself says nothing about the others.
        """
        newest, alone = self._folder.newest(), set(self._wanted) - {DECIDING}
        for measurement in self._wanted:
            old = newest.get(self.key(case, measurement))
            if old is None or measurement in missing or old.outcome is Outcome.OK:
                continue
            if old.details.get("phase") not in alone:
                return Done(outcome=old.outcome, reason=old.reason, details=old.details)
        return None

    def record_decided(self, cases: Iterable[PlannedCase]) -> None:
        """Record the cases whose outcome the plan knows, once."""
        newest = self._folder.newest()
        for planned in cases:
            if planned.outcome is None:
                continue
            done = Done(outcome=planned.outcome, reason=planned.reason)
            for measurement in self._wanted:
                old = newest.get(self.key(planned.case, measurement))
                if old is None or (old.outcome, old.reason) != (done.outcome, done.reason):
                    self.failure(planned.case, measurement, done)

    def finding(self, case: Case, finding: Finding) -> None:
        """Record what a worker found."""
        modelled = _modelled(case) if finding.outcome is Outcome.OK else {}
        self._append(
            Observation(
                case=case,
                measurement=finding.measurement,
                round=self._round,
                outcome=finding.outcome,
                reason=finding.reason,
                observation_id=self._observation_id(case, finding.measurement),
                started_at=finding.started_at,
                duration_s=finding.duration_s,
                method=finding.method,
                values={**finding.values, **modelled},
                samples_s=finding.samples_s,
                details=finding.details,
            )
        )

    def measured(
        self, case: Case, profiler: Profiler, found: Measured, duration_s: float = 0.0
    ) -> None:
        """Record what a profiler found outside the workers."""
        finding = Finding(
            measurement=profiler.name,
            started_at=now(),
            duration_s=duration_s,
            method=found.method,
            values={metric.tag: found.values.get(metric.tag) for metric in profiler.metrics},
            samples_s=found.samples_s,
            details=found.details,
        )
        self.finding(case, finding)

    def failure(
        self,
        case: Case,
        measurement: str,
        done: Done,
        *,
        started_at: str | None = None,
        duration_s: float = 0.0,
    ) -> None:
        """Record how a measurement ended without a value; it began now unless told."""
        self._append(
            Observation(
                case=case,
                measurement=measurement,
                round=self._round,
                outcome=done.outcome,
                reason=done.reason,
                observation_id=self._observation_id(case, measurement),
                started_at=started_at or now(),
                duration_s=duration_s,
                details=done.details,
            )
        )

    def _append(self, observation: Observation) -> None:
        self._folder.append(observation)
        self._observed.append(observation)

    def _observation_id(self, case: Case, measurement: str) -> str:
        code: Any = self._folder.manifest["code"]
        return observation_id(
            case,
            measurement=measurement,
            round=self._round,
            code_version=code.get("id") or digest(code),
            device=self._device,
            settings=self._settings,
        )


def _modelled(case: Case) -> dict[str, int | None]:
    """Return what the pass must do, from shapes alone."""
    from mambench.implementations.cost import case_cost

    cost = case_cost(case)
    return {
        "model_flop": cost.model_flop,
        "compulsory_bytes": cost.compulsory_bytes,
        "weight_count": cost.weight_count,
        "state_bytes": cost.state_bytes,
    }
