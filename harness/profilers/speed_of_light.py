"""How near each case comes to what this machine can do at most: `harness.instruments.ceilings`."""

from collections.abc import Iterator

from mambench.harness.errors import MeasurementError
from mambench.harness.instruments import ceilings
from mambench.harness.instruments.ceilings import Ceilings
from mambench.harness.profilers.base import Batch, BatchProfiler, Failed, Measured, Work
from mambench.harness.spec import Case, Device, Settings, metrics_of
from mambench.harness.workers import limits


class SpeedOfLight(BatchProfiler):
    """Modelled work at the measured ceilings, over the measured time."""

    name = "sol"
    summary = "share of this machine's measured ceiling that binds: copy, matrix, vector or exp"
    metrics = metrics_of("sol")
    start_s = ceilings.CALIBRATION_S  # where the machine is not calibrated yet

    def start_estimate_s(self, device: Device, settings: Settings) -> float:
        """Return the seconds of calibrating, none if the machine is calibrated."""
        kept = ceilings.load(device, limits.thread_count(settings))
        return self.start_s if kept is None else 0.0

    def estimate_s(self, work: Work) -> float:
        """Return nothing: it is arithmetic."""
        return 0.0

    def measure_batch(self, batch: Batch) -> Iterator[tuple[Case, Measured | Failed]]:
        """Calibrate the machine if that was not done yet, and compare every case with it."""
        found = ceilings.load(batch.device, batch.threads)
        if found is None:
            batch.note("calibrating: measuring this machine's ceilings")
            try:
                found = ceilings.measure(batch.device, batch.threads)
            except MeasurementError as error:
                for case in batch.cases:
                    yield case, Measured.missing(str(error))
                return
            if problem := ceilings.save(found, batch.device):
                batch.note(f"the ceilings are not kept: {problem}")
        for case in batch.cases:
            yield case, judge(case, batch.times_s.get(case.case_id), found)


def judge(case: Case, time_s: float | None, found: Ceilings) -> Measured:
    """Return a case's share of the ceiling that binds, or why there is none."""
    if not time_s:
        return Measured.missing("the case has no time: measure `time` too")
    bound = ceilings.bound(case, found)
    if isinstance(bound, str):
        return Measured.missing(bound)
    return Measured(
        values={"sol_frac": bound.time_s / time_s},
        method="measured ceilings",
        details={
            "ceiling": bound.ceiling,
            "bounds_s": dict(bound.times_s),
            "ceilings": {name: found.value(name) for name in bound.times_s},
            "calibrated_at": found.measured_at,
        },
    )
