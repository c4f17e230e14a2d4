"""Runs a plan's cases in guarded workers and appends an observation for each measurement.

Whatever happens to a worker is its case's outcome and nobody else's. Imports neither torch nor
triton: the process that supervises must survive what it supervises.
"""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime

from mambench.harness import machine, precompile
from mambench.harness.errors import RunFolderError
from mambench.harness.guard import Limits, supervise
from mambench.harness.limits import memory_limit, thread_count
from mambench.harness.lock import device_lock
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.pool import Pool, Worker, make_pool
from mambench.harness.progress import Listener
from mambench.harness.protocol import Done, Finding, Work, WorkerConfig
from mambench.harness.records import Observation, observation_id
from mambench.harness.spec import Case, Device, DeviceKind, Outcome, Settings, digest
from mambench.harness.store import Key, RunFolder

ROUND = 0
MAX_WARM_S = 1.0  # an execution slower than this is not run once more just to measure its memory
# What does not change a measurement does not change its identity.
_NOT_IDENTITY = ("time_limit_s", "compile_limit_s", "memory_limit_bytes", "measurements")


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """How a run ended."""

    counts: Mapping[Outcome, int]  # cases by outcome, those of earlier sessions included
    interrupted: bool
    wall_s: float

    @property
    def failed(self) -> bool:
        """Whether a case ended as wrong, error, oom, timeout or crashed."""
        return any(outcome.failed and count for outcome, count in self.counts.items())


class SilentListener:
    """A listener that tells nobody."""

    def on_plan(self, n_total: int, n_left: int) -> None:
        """Ignore it."""

    def on_case_start(self, case: Case) -> None:
        """Ignore it."""

    def on_phase(self, case: Case, phase: str) -> None:
        """Ignore it."""

    def on_case_end(self, case: Case, observations: Sequence[Observation]) -> None:
        """Ignore it."""

    def on_note(self, text: str) -> None:
        """Ignore it."""


def run(
    plan: Plan,
    folder: RunFolder,
    *,
    listener: Listener | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    wait: bool = False,
    pool: Pool | None = None,
) -> RunSummary:
    """Run what is not finished yet, and return how all cases of the plan ended.

    Args:
        plan: the cases; the same as when the folder was made.
        folder: opened for append.
        listener: told what happens.
        time_budget_s: cases whose estimate does not fit into what is left of it are skipped, and
            tried again on resume.
        retry_failed: measure again what ended as wrong, error, oom, timeout or crashed.
        wait: wait for the device if another run holds it.
        pool: where workers come from; a new one if None.

    Raises DeviceBusyError if another run holds the device and `wait` is false, RunFolderError if
    the folder belongs to another plan, MeasurementError if workers cannot be started.
    """
    if folder.manifest["plan_hash"] != plan.plan_hash:
        raise RunFolderError(f"{folder.path} was made for other cases than this plan's.")
    listener = listener or SilentListener()
    begin = time.monotonic()
    interrupted = False
    try:
        with ExitStack() as stack:
            key = machine.lock_key(plan.device)
            held = device_lock(key, holder=str(folder.path), wait=wait, on_wait=listener.on_note)
            stack.enter_context(held)
            threads = thread_count(plan.settings)
            pool = pool or stack.enter_context(make_pool(threads=threads))
            runner = _Runner(plan, folder, pool, threads, listener)
            stack.callback(runner.stop_workers)
            runner.run(time_budget_s, retry_failed)
    except KeyboardInterrupt:
        interrupted = True
        listener.on_note(f"interrupted; continue with: run_bench.py run --resume {folder.path}")
    counts = Counter(outcome_of(plan, planned.case, folder) for planned in plan.cases)
    counts.pop(None, None)
    return RunSummary(
        counts={o: counts[o] for o in Outcome if counts[o]},
        interrupted=interrupted,
        wall_s=time.monotonic() - begin,
    )


def measurements(settings: Settings, device: Device) -> tuple[str, ...]:
    """Return what is measured on a device: beside a time on a GPU the call time, only there."""
    wanted = [m for m in settings.measurements if m != "call_time"]
    timed = {"time", "call_time"} & set(settings.measurements)
    if device.kind is DeviceKind.CUDA and timed:
        wanted.append("call_time")
    return tuple(dict.fromkeys(wanted))


def outcome_of(plan: Plan, case: Case, folder: RunFolder) -> Outcome | None:
    """Return the outcome of a case's newest observations, None while any is missing."""
    newest = folder.newest()
    keys = [_key(case, m) for m in measurements(plan.settings, plan.device)]
    found = [newest[key].outcome for key in keys if key in newest]
    if len(found) < len(keys):
        return None
    not_ok = [outcome for outcome in found if outcome is not Outcome.OK]
    return next((o for o in not_ok if o.failed), not_ok[0] if not_ok else Outcome.OK)


class _Runner:
    """The state of one `run`."""

    def __init__(
        self, plan: Plan, folder: RunFolder, pool: Pool, threads: int, listener: Listener
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._pool = pool
        self._threads = threads
        self._listener = listener
        self._wanted = measurements(plan.settings, plan.device)
        self._workers: dict[bool, Worker] = {}  # by whether it is tuned to measure memory
        self._memory_limit = memory_limit(plan.settings)
        self._observed: list[Observation] = []  # of the present case

    def run(self, time_budget_s: float | None, retry_failed: bool) -> None:
        """Decide, compile ahead, and run case after case."""
        deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
        for warning in self._folder.warnings:
            self._listener.on_note(warning)
        self._record_decided()
        finished = self._finished(retry_failed)
        left = [(p, m) for p in self._plan.runnable if (m := self._missing(p.case, finished))]
        self._listener.on_plan(len(self._plan.cases), len(left))
        cases = [planned.case for planned, _ in left]
        precompile.compile_ahead(cases, self._pool, self._config(False), self._listener)
        for planned, missing in left:
            self._case(planned, missing, deadline)

    def stop_workers(self) -> None:
        """Kill the workers that are left; they are idle, or the run is being interrupted."""
        while self._workers:
            self._workers.popitem()[1].kill()

    def _record_decided(self) -> None:
        """Record the cases whose outcome the plan knows, once."""
        newest = self._folder.newest()
        for planned in self._plan.cases:
            if planned.outcome is None:
                continue
            done = Done(outcome=planned.outcome, reason=planned.reason)
            for measurement in self._wanted:
                old = newest.get(_key(planned.case, measurement))
                if old is None or (old.outcome, old.reason) != (done.outcome, done.reason):
                    self._append_failure(planned.case, measurement, done, _now(), 0.0)

    def _finished(self, retry_failed: bool) -> set[Key]:
        finished, newest = self._folder.finished(), self._folder.newest()
        return {k for k in finished if not (retry_failed and newest[k].outcome.failed)}

    def _missing(self, case: Case, finished: set[Key]) -> tuple[str, ...]:
        return tuple(m for m in self._wanted if _key(case, m) not in finished)

    def _case(self, planned: PlannedCase, missing: tuple[str, ...], deadline: float | None) -> None:
        case = planned.case
        self._observed = []
        started_at, begin = _now(), time.monotonic()
        self._listener.on_case_start(case)
        done = self._over_budget(planned, deadline) or self._earlier_failure(case, missing)
        for work, tuned in () if done else self._works(case, missing):
            done = self._work(work, tuned)
            if done.outcome is not Outcome.OK:
                break
        pending = [m for m in missing if m not in {o.measurement for o in self._observed}]
        for measurement in pending:
            assert done is not None
            self._append_failure(case, measurement, done, started_at, time.monotonic() - begin)
        self._listener.on_case_end(case, tuple(self._observed))

    def _over_budget(self, planned: PlannedCase, deadline: float | None) -> Done | None:
        left_s = float("inf") if deadline is None else deadline - time.monotonic()
        if planned.estimate_s <= left_s and left_s > 0:
            return None
        reason = (
            f"time budget: needs about {planned.estimate_s:.1f} s, {max(left_s, 0):.1f} s were "
            f"left; resume the run or raise --time-budget"
        )
        return Done(outcome=Outcome.SKIPPED, reason=reason)

    def _earlier_failure(self, case: Case, missing: tuple[str, ...]) -> Done | None:
        """Return how another measurement of the case failed before the run was cut off."""
        newest = self._folder.newest()
        for measurement in self._wanted:
            old = newest.get(_key(case, measurement))
            if old is not None and measurement not in missing and old.outcome is not Outcome.OK:
                return Done(outcome=old.outcome, reason=old.reason, details=old.details)
        return None

    def _works(self, case: Case, missing: tuple[str, ...]) -> Iterator[tuple[Work, bool]]:
        """Split the measurements among workers: on the CPU memory has one of its own.

        Its allocator returns freed memory at once, which would slow down what is timed.
        """
        limit_s = self._plan.settings.time_limit_s
        on_cpu = self._plan.device.kind is DeviceKind.CPU
        apart = tuple(m for m in missing if on_cpu and m == "memory")
        together = tuple(m for m in missing if m not in apart)
        proven = len(missing) < len(self._wanted) and not together
        if not proven:
            yield Work(case=case, measurements=together, gate=True, limit_s=limit_s), False
        if apart:
            quick = self._known_time_s(case) < MAX_WARM_S
            work = Work(case=case, measurements=apart, gate=False, warm=quick, limit_s=limit_s)
            yield work, True

    def _known_time_s(self, case: Case) -> float:
        timed = self._folder.newest().get(_key(case, "time"))
        return (timed.values.get("time_s") if timed else None) or 0.0

    def _work(self, work: Work, tuned: bool) -> Done:
        worker = self._workers.get(tuned) or self._pool.worker(self._config(tuned))
        self._workers[tuned] = worker
        settings = self._plan.settings
        done, alive = supervise(
            worker,
            work,
            Limits(
                set_up_s=settings.compile_limit_s,
                measure_s=settings.time_limit_s,
                memory_bytes=self._memory_limit,
            ),
            on_phase=lambda phase: self._listener.on_phase(work.case, phase),
            on_finding=lambda finding: self._append_finding(work.case, finding),
        )
        if done.replace:
            del self._workers[tuned]
            if alive:
                worker.kill()
        return done

    def _config(self, tuned: bool) -> WorkerConfig:
        return WorkerConfig(
            device=self._plan.device,
            settings=self._plan.settings,
            threads=self._threads,
            plugins=self._plan.plugins,
            tuned_malloc=tuned,
            sys_path=tuple(sys.path),
        )

    def _append_finding(self, case: Case, finding: Finding) -> None:
        self._append(
            Observation(
                case=case,
                measurement=finding.measurement,
                round=ROUND,
                outcome=Outcome.OK,
                observation_id=self._observation_id(case, finding.measurement),
                started_at=finding.started_at,
                duration_s=finding.duration_s,
                method=finding.method,
                values={**finding.values, **_modelled(case)},
                samples_s=finding.samples_s,
                details=finding.details,
            )
        )

    def _append_failure(
        self, case: Case, measurement: str, done: Done, started_at: str, duration_s: float
    ) -> None:
        self._append(
            Observation(
                case=case,
                measurement=measurement,
                round=ROUND,
                outcome=done.outcome,
                reason=done.reason,
                observation_id=self._observation_id(case, measurement),
                started_at=started_at,
                duration_s=duration_s,
                details=done.details,
            )
        )

    def _append(self, observation: Observation) -> None:
        self._folder.append(observation)
        self._observed.append(observation)

    def _observation_id(self, case: Case, measurement: str) -> str:
        code = self._folder.manifest["code"]
        settings = self._plan.settings.to_dict()
        return observation_id(
            case,
            measurement=measurement,
            round=ROUND,
            code_version=code.get("id") or digest(code),
            device=self._plan.device.name,
            settings={k: v for k, v in settings.items() if k not in _NOT_IDENTITY},
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


def _key(case: Case, measurement: str) -> Key:
    return case.case_id, measurement, ROUND


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
