"""HBM traffic by hardware counters, of all cases in one child process: `harness.counters`."""

from collections.abc import Iterator

from mambench.harness import registry
from mambench.harness.counters import count as counters
from mambench.harness.counters.count import OVER, Counted
from mambench.harness.profilers.base import Batch, BatchProfiler, Failed, Measured, Work
from mambench.harness.spec import Case, Device, DeviceKind, Outcome, metrics_of

# A case that needs gradients launches about as many operations again, twice.
GRADIENT_LAUNCHES = 3


class Traffic(BatchProfiler):
    """Bytes that an execution reads from and writes to the GPU's memory."""

    name = "traffic"
    summary = "bytes read from and written to HBM, by hardware counters (Nsight Compute)"
    metrics = metrics_of("traffic")
    devices = (DeviceKind.CUDA,)
    start_s = counters.START_S

    def missing(self, device: Device) -> str | None:
        """Return why nothing can be counted; whether it is permitted shows only when tried."""
        return super().missing(device) or counters.missing(device)

    def estimate_s(self, work: Work) -> float:
        """Return the seconds of building, warming up and executing once under ncu."""
        return counters.estimate_s(work.launches)

    def measure_batch(self, batch: Batch) -> Iterator[tuple[Case, Measured | Failed]]:
        """Execute every case once under ncu, first those that compile and tune least.

        Where the run has a time budget, what is counted when it is spent is kept.
        """
        found = registry.load(batch.plugins)

        def launches(case: Case) -> int:
            count: int = registry.ask(found[case.implementation], "launches", case)
            return count * (GRADIENT_LAUNCHES if case.pass_.needs_grad else 1)

        request = counters.Request(
            device=batch.device,
            seed=batch.settings.seed,
            threads=batch.threads,
            plugins=batch.plugins,
            sys_path=batch.sys_path,
            code=batch.code,
            compile_limit_s=batch.settings.compile_limit_s,
            time_limit_s=batch.settings.time_limit_s,
            total_limit_s=batch.left_s,
        )
        cases = sorted(batch.cases, key=lambda case: batch.first_calls_s.get(case.case_id, 0.0))
        for case, counted in counters.count_cases(
            cases, request, launches=launches, on_begin=batch.on_case
        ):
            yield case, _measured(counted)


def _measured(counted: Counted) -> Measured | Failed:
    if counted.outcome is Outcome.OK:
        return Measured(values=counted.values, method=counted.method, details=counted.details)
    reason = counted.reason or f"{counted.outcome}"
    if reason == OVER:  # unlike a lack of the machine it is tried again on resume
        again = f"time budget: {reason}; resume the run or raise --time-budget"
        return Failed(outcome=Outcome.SKIPPED, reason=again)
    if counted.outcome in (Outcome.UNAVAILABLE, Outcome.SKIPPED):
        return Measured.missing(reason)  # a lack of the machine, and no failure of the case
    return Failed(outcome=counted.outcome, reason=reason, details=counted.details)
