"""Runs a plan's cases in guarded workers and appends an observation for each measurement.

Whatever happens to a worker is its case's outcome and nobody else's. Imports neither torch nor
triton: the process that supervises must survive what it supervises.
"""

import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from mambench.harness import machine
from mambench.harness.batches import Batches
from mambench.harness.errors import RunFolderError
from mambench.harness.ledger import Ledger
from mambench.harness.lock import device_lock
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.profilers import catalog
from mambench.harness.profilers.base import (
    DECIDING,
    BatchProfiler,
    CaseProfiler,
    Measured,
    Process,
)
from mambench.harness.progress import Listener, SilentListener
from mambench.harness.records import now
from mambench.harness.spec import Case, Outcome
from mambench.harness.store import Key, RunFolder
from mambench.harness.workers import precompile
from mambench.harness.workers.guard import Limits, supervise
from mambench.harness.workers.limits import memory_limit, thread_count
from mambench.harness.workers.pool import Code, Pool, Worker, make_pool
from mambench.harness.workers.protocol import Done, Work, WorkerConfig

MAX_WARM_S = 1.0  # an execution slower than this is not run once more just to measure its memory


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


@dataclass(frozen=True, kw_only=True)
class Session:
    """Which round of a plan is run, and what is known already when it begins."""

    round: int = 0
    subset: bool = False  # the folder was made for more cases than this round has
    proven: bool = (
        False  # an earlier round of the same code compiled everything and passed the gate
    )
    holds_device: bool = False  # the caller has locked it
    plugins: tuple[str, ...] = ()  # further ones, that only workers import
    code: Code = field(default_factory=Code)  # what the pool's processes import


def run(
    plan: Plan,
    folder: RunFolder,
    *,
    listener: Listener | None = None,
    time_budget_s: float | None = None,
    retry_failed: bool = False,
    wait: bool = False,
    pool: Pool | None = None,
    session: Session | None = None,
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
        session: which round this is; the first and only one if None.

    Raises DeviceBusyError if another run holds the device and `wait` is false, RunFolderError if
    the folder belongs to another plan, MeasurementError if workers cannot be started.
    """
    session = session or Session()
    if folder.manifest["plan_hash"] != plan.plan_hash and not session.subset:
        raise RunFolderError(f"{folder.path} was made for other cases than this plan's.")
    listener = listener or SilentListener()
    begin = time.monotonic()
    interrupted = False
    try:
        with ExitStack() as stack:
            if not session.holds_device:
                key = machine.lock_key(plan.device)
                holder = str(folder.path)
                held = device_lock(key, holder=holder, wait=wait, on_wait=listener.on_note)
                stack.enter_context(held)
            threads = thread_count(plan.settings)
            pool = pool or stack.enter_context(make_pool(threads=threads))
            runner = _Runner(plan, folder, pool, threads, listener, session)
            stack.callback(runner.stop_workers)
            runner.run(time_budget_s, retry_failed)
    except KeyboardInterrupt:
        if session.holds_device:
            raise
        interrupted = True
        listener.on_note(f"interrupted; continue with: run_bench.py run --resume {folder.path}")
    counts = Counter(outcome_of(plan, p.case, folder, session.round) for p in plan.cases)
    counts.pop(None, None)
    return RunSummary(
        counts={o: counts[o] for o in Outcome if counts[o]},
        interrupted=interrupted,
        wall_s=time.monotonic() - begin,
    )


def outcome_of(plan: Plan, case: Case, folder: RunFolder, round: int = 0) -> Outcome | None:
    """Return the outcome of a case's newest observations, None while any is missing."""
    newest = folder.newest()
    keys = [(case.case_id, m, round) for m in plan.settings.measurements]
    found = [newest[key].outcome for key in keys if key in newest]
    if len(found) < len(keys):
        return None
    not_ok = [outcome for outcome in found if outcome is not Outcome.OK]
    return next((o for o in not_ok if o.failed), not_ok[0] if not_ok else Outcome.OK)


class _Runner:
    """The state of one `run`."""

    def __init__(
        self,
        plan: Plan,
        folder: RunFolder,
        pool: Pool,
        threads: int,
        listener: Listener,
        session: Session,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._pool = pool
        self._threads = threads
        self._listener = listener
        self._session = session
        self._plugins = (*plan.plugins, *session.plugins)
        self._ledger = Ledger(plan, folder, session.round)
        self._wanted = plan.settings.measurements
        found = catalog.load(plan.plugins)
        self._profilers = {name: found[name] for name in self._wanted}
        self._absent = {
            name: reason
            for name, profiler in self._profilers.items()
            if (reason := profiler.missing(plan.device))
        }
        self._processes = {
            profiler.process(plan.device)
            for name, profiler in self._profilers.items()
            if isinstance(profiler, CaseProfiler) and name not in self._absent
        }
        self._batches = Batches(
            plan=plan,
            ledger=self._ledger,
            listener=listener,
            profilers={
                name: profiler
                for name, profiler in self._profilers.items()
                if isinstance(profiler, BatchProfiler) and name not in self._absent
            },
            threads=threads,
            plugins=self._plugins,
            code=session.code,
        )
        self._workers: dict[Process, Worker] = {}
        self._memory_limit = memory_limit(plan.settings)

    def run(self, time_budget_s: float | None, retry_failed: bool) -> None:
        """Decide, compile ahead, run case after case, then what measures many at once."""
        deadline = None if time_budget_s is None else time.monotonic() + time_budget_s
        for warning in self._folder.warnings:
            self._listener.on_note(warning)
        self._ledger.record_decided(self._plan.cases)
        finished = self._ledger.finished(retry_failed=retry_failed)
        left = [(p, m) for p in self._plan.runnable if (m := self._missing(p.case, finished))]
        self._listener.on_plan(len(self._plan.cases), len(left))
        cases = [planned.case for planned, _ in left]
        if not self._session.proven:
            config = self._config(Process.TIMED)
            precompile.compile_ahead(cases, self._pool, config, self._listener)
        for planned, missing in left:
            self._case(planned, missing, deadline)
        self.stop_workers()  # what comes next has the device to itself
        for name in self._batches.profilers:
            self._batches.measure(name, finished, deadline)

    def stop_workers(self) -> None:
        """Kill the workers that are left; they are idle, or the run is being interrupted."""
        while self._workers:
            self._workers.popitem()[1].kill()

    def _missing(self, case: Case, finished: set[Key]) -> tuple[str, ...]:
        return tuple(
            m
            for m in self._wanted
            if m not in self._batches.profilers and self._ledger.key(case, m) not in finished
        )

    def _case(self, planned: PlannedCase, missing: tuple[str, ...], deadline: float | None) -> None:
        case = planned.case
        self._ledger.begin()
        started_at, begin = now(), time.monotonic()
        self._listener.on_case_start(case)
        done = self._over_budget(planned, deadline) or self._ledger.earlier_failure(case, missing)
        done = done or self._measured(case, missing)
        pending = [m for m in missing if m not in {o.measurement for o in self._ledger.observed}]
        for measurement in pending:
            if done is not None:
                taken_s = time.monotonic() - begin
                self._ledger.failure(
                    case, measurement, done, started_at=started_at, duration_s=taken_s
                )
            else:
                self._ledger.measured(
                    case,
                    self._profilers[measurement],
                    Measured.missing(self._absent[measurement]),
                )
        self._listener.on_case_end(case, self._ledger.observed)

    def _over_budget(self, planned: PlannedCase, deadline: float | None) -> Done | None:
        left_s = float("inf") if deadline is None else deadline - time.monotonic()
        if planned.estimate_s <= left_s and left_s > 0:
            return None
        reason = (
            f"time budget: needs about {planned.estimate_s:.1f} s, {max(left_s, 0):.1f} s were "
            f"left; resume the run or raise --time-budget"
        )
        return Done(outcome=Outcome.SKIPPED, reason=reason)

    def _measured(self, case: Case, missing: tuple[str, ...]) -> Done | None:
        """Let workers measure; returns how the case ended if it failed.

        A measurement that fails, other than of the time, fails alone: a new worker goes on.
        """
        pending: list[str] = [m for m in missing if m not in self._absent]
        proven = len(missing) < len(self._wanted) - len(self._batches.profilers)
        gate = not self._session.proven
        while next_work := self._next_work(case, pending, proven=proven, gate=gate):
            work, process = next_work
            done = self._work(work, process)
            proven, gate = True, False
            seen = {o.measurement for o in self._ledger.observed}
            left = [m for m in pending if m not in seen]
            if done.outcome is Outcome.OK:
                pending = [m for m in left if m not in work.measurements]
                continue
            culprit = done.details.get("phase")
            if culprit == DECIDING or culprit not in work.measurements:
                return done
            if culprit in left:
                self._ledger.failure(case, culprit, done)
                left.remove(culprit)
            pending = left
        return None

    def _next_work(
        self, case: Case, pending: Sequence[str], *, proven: bool, gate: bool
    ) -> tuple[Work, Process] | None:
        """Return what the next worker does: first what is timed, then what is apart from it.

        The gate is the timed worker's, and passed once per session: what was `proven` in a run that
        was cut off is proven again only before it is timed.
        """
        groups: dict[Process, list[str]] = {Process.TIMED: []}
        for name in sorted(pending, key=self._order):
            groups.setdefault(self._process(name), []).append(name)
        for process, names in groups.items():
            if not names and (proven or process is not Process.TIMED):
                continue
            # An execution is not repeated just so that a second worker has seen one.
            warm = (
                process is not Process.TUNED_MALLOC
                or self._ledger.value(case, "time_s") < MAX_WARM_S
            )
            limit_s = self._plan.settings.time_limit_s
            work = Work(
                case=case,
                measurements=tuple(names),
                gate=gate and process is Process.TIMED,
                warm=warm,
                limit_s=limit_s,
            )
            return work, process
        return None

    def _order(self, name: str) -> int:
        profiler = self._profilers[name]
        return profiler.order if isinstance(profiler, CaseProfiler) else 0

    def _process(self, name: str) -> Process:
        profiler = self._profilers[name]
        assert isinstance(profiler, CaseProfiler)
        return profiler.process(self._plan.device)

    def _work(self, work: Work, process: Process) -> Done:
        worker = self._workers.get(process) or self._pool.worker(self._config(process))
        self._workers[process] = worker
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
            on_finding=lambda finding: self._ledger.finding(work.case, finding),
        )
        if done.replace:
            del self._workers[process]
            if alive:
                worker.kill()
        return done

    def _config(self, process: Process) -> WorkerConfig:
        return WorkerConfig(
            device=self._plan.device,
            settings=self._plan.settings,
            threads=self._threads,
            plugins=self._plugins,
            tuned_malloc=process is Process.TUNED_MALLOC,
            traced=process is Process.TRACED,
            shares_device=len(self._processes) > 1,
            sys_path=tuple(sys.path),
        )
