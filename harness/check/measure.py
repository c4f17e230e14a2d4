"""Measures two sides in one job on one device, in interleaved fresh processes. Imports no torch.

Round 0 of a side compiles, proves the answers right and measures what hardly varies. Then, round by
round, each arm (base, head, and the base again where the machine's noise is not known yet) runs all
cases in a new process, in shuffled order. On a GPU the arms of a round follow one another in random
order; on a CPU they take turns, case by case (`harness.check.turns`). What is suspected after that
is measured again in fresh rounds.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from mambench.harness import machine, runner
from mambench.harness.check import judge as judging
from mambench.harness.check.judge import Evidence, Stages
from mambench.harness.check.rounds import AA, Rounds
from mambench.harness.check.rule import Rule
from mambench.harness.check.sides import Side
from mambench.harness.check.turns import TurnListener, Turns, together
from mambench.harness.lock import device_lock
from mambench.harness.plan import Plan, PlannedCase
from mambench.harness.progress import SilentListener
from mambench.harness.records import Observation
from mambench.harness.spec import SCHEMA_VERSION, Case, DeviceKind, Outcome
from mambench.harness.store import RunFolder, new_run
from mambench.harness.verdict import Assessment
from mambench.harness.workers.limits import thread_count
from mambench.harness.workers.pool import Pool, make_pool

BASE, HEAD, AGAIN = "base", "head", "again"
TIMED = ("time", "call_time")
# glibc moves its thresholds by what a process has freed before, so that the order of the cases
# decides which of them get their memory anew in every call: between processes of equal code that
# has made a factor of two. With fixed thresholds what was freed is kept, in every process.
STEADY_HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),  # the most that it may be
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(64 * 2**20),
}
SPARE_CORES = 4  # with so many, the next process may start while this one measures on the GPU


class Progress(Protocol):
    """What a check tells while it works."""

    def on_note(self, text: str) -> None:
        """Something a person should know."""

    def on_work(self, processes: int) -> None:
        """So many processes are still to come."""

    def on_process(self, arm: str, what: str, cases: int) -> None:
        """A process begins."""

    def on_case(self, case: Case) -> None:
        """A case begins."""

    def on_process_end(self, failed: int) -> None:
        """It has ended, and so many of its cases have failed."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """Code that is measured under a name."""

    name: str  # BASE, HEAD or AGAIN
    side: Side
    plan: Plan


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How a check measures and judges."""

    rule: Rule = field(default_factory=Rule)
    promise_frac: float = 0.05
    time_budget_s: float | None = None
    seed: int = 0  # of the orders
    stored: AA | None = None  # this machine's A/A rounds, if they are known
    baseline: Rounds | None = None  # a stored run that stands for the base


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a check found, for the report."""

    assessment: Assessment
    evidence: Evidence
    wall_s: float
    loads: tuple[float, ...] = ()  # of the machine, before and after; none where nothing tells


class Check:
    """One check: measure, judge, measure the suspects again, judge."""

    def __init__(
        self,
        arms: Sequence[Arm],
        folder: Path,
        terms: Terms,
        progress: Progress,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arms = {arm.name: arm for arm in arms}
        self._terms = terms
        self._progress = progress
        self._clock = clock
        self._random = random.Random(terms.seed)
        self._folders = {arm.name: _create(folder / arm.name, arm) for arm in arms}
        self._waiting: dict[str, Pool] = {}  # started ahead, by arm
        self._stages = Stages(screening=())
        self._begun = clock()
        self._round_s = 0.0  # the longest round of all arms so far
        self._device = arms[0].plan.device
        self._threads = thread_count(arms[0].plan.settings)

    def run(self, *, wait: bool = False) -> Measured:
        """Measure and judge; raises DeviceBusyError if another run holds the device."""
        before = _load()
        with ExitStack() as stack:
            key, note = machine.lock_key(self._device), self._progress.on_note
            stack.enter_context(device_lock(key, holder="a check", wait=wait, on_wait=note))
            stack.callback(self._close)
            self._measure_all()
        return Measured(
            assessment=self._assess(),
            evidence=self._evidence(),
            wall_s=self._clock() - self._begun,
            loads=(*before, *_load()),
        )

    def observations(self, arm: str) -> list[Observation]:
        """Return what was measured of an arm."""
        return self._folders[arm].observations()

    def _measure_all(self) -> None:
        rule = self._terms.rule
        proven = [name for name in self._arms if name != AGAIN]
        self._progress.on_work(len(proven) + self._steps * rule.rounds)
        for name, following in zip(proven, [*proven[1:], None], strict=True):
            self._prove(name, following)
        alive = self._alive()
        if not alive:
            return
        screening = self._rounds(range(1, rule.rounds + 1), alive, least=rule.min_rounds)
        self._stages = Stages(screening=screening)
        for _ in range(rule.confirmations):
            suspects = self._assess().suspects
            if not suspects:
                return
            if not self._confirm([p for p in alive if p.case.case_id in suspects]):
                return

    def _confirm(self, suspects: list[PlannedCase]) -> bool:
        """Measure the suspects in fresh rounds; returns False if there is no time for it."""
        rule, last = self._terms.rule, max(self._stages.all)
        rounds = range(last + 1, last + 1 + rule.confirm_rounds)
        self._progress.on_note(
            f"{len(suspects)} of the cases look different: measuring them again in "
            f"{rule.confirm_rounds} fresh rounds"
        )
        self._progress.on_work(self._steps * rule.confirm_rounds)
        done = self._rounds(rounds, suspects, least=0, exact=rounds[0])
        if len(done) < rule.confirm_rounds:
            return False
        self._stages = replace(self._stages, confirmations=(*self._stages.confirmations, done))
        return True

    def _rounds(
        self,
        rounds: range,
        cases: Sequence[PlannedCase],
        *,
        least: int,
        exact: int | None = None,
    ) -> tuple[int, ...]:
        """Run rounds until they are all done or time is up; returns those that are complete."""
        done: list[int] = []
        orders = _orders(list(self._arms), len(rounds), self._random)
        following = [*[name for order in orders for name in order][1:], None]
        position = 0
        for number, order in zip(rounds, orders, strict=True):
            if len(done) >= least and not self._time_for_another():
                self._progress.on_note("the time budget ends the rounds early")
                break
            begin = self._clock()
            kinds = {n: self._kinds(n, timed=True, exact=number == exact) for n in order}
            if self._in_turn:
                self._process_in_turn(order, number, cases, kinds)
            for name in () if self._in_turn else order:
                self._process(name, number, cases, kinds[name], following[position])
                position += 1
            self._round_s = max(self._round_s, self._clock() - begin)
            done.append(number)
        return tuple(done)

    def _time_for_another(self) -> bool:
        budget_s = self._terms.time_budget_s
        return budget_s is None or self._clock() - self._begun + self._round_s <= budget_s

    def _prove(self, name: str, following: str | None) -> None:
        arm = self._arms[name]
        kinds = self._kinds(name, timed=False, exact=True)
        self._process(name, 0, arm.plan.cases, kinds, following)

    def _kinds(self, name: str, *, timed: bool, exact: bool) -> tuple[str, ...]:
        """Return the measurements of a process."""
        wanted = self._arms[name].plan.settings.measurements
        times = [m for m in wanted if m in TIMED] if timed else []
        others = [m for m in wanted if m not in TIMED] if exact and name != AGAIN else []
        # Where times are all that is wanted, one is taken with the proof, to be recorded by it.
        return (*times, *others) or (tuple(wanted[:1]) if exact else ())

    @property
    def _in_turn(self) -> bool:
        """Whether the processes of a round are there together: they fit, and it is quieter so."""
        return self._device.kind is DeviceKind.CPU and len(self._arms) > 1

    @property
    def _steps(self) -> int:
        """How many steps of progress a round has."""
        return 1 if self._in_turn else len(self._arms)

    def _process(
        self,
        name: str,
        number: int,
        cases: Sequence[PlannedCase],
        measurements: tuple[str, ...],
        following: str | None,
    ) -> None:
        """Let one new process of an arm measure all cases once, in random order."""
        what = f"round {number}" if number else "compile, prove, measure memory"
        self._progress.on_process(name, what, len(cases))
        with self._pool(name) as pool:
            self._start_ahead(following)
            listener = _CaseListener(self._progress)
            shuffled = self._random.sample(cases, len(cases))
            failed = self._measure(name, number, shuffled, measurements, pool, listener)
        self._progress.on_process_end(failed)

    def _process_in_turn(
        self,
        order: Sequence[str],
        number: int,
        cases: Sequence[PlannedCase],
        measurements: Mapping[str, tuple[str, ...]],
    ) -> None:
        """Let a new process of each arm measure each case, one arm after the other."""
        self._progress.on_process(" and ".join(order), f"round {number}", len(cases))
        shuffled = self._random.sample(cases, len(cases))
        orders = _orders(order, len(cases), self._random)
        turns = Turns([name for of_a_case in orders for name in of_a_case])
        failed: dict[str, int] = {}
        with ExitStack() as stack:
            pools = {name: stack.enter_context(self._pool(name)) for name in order}
            for pool in pools.values():
                pool.wait_ready()  # what one still imports would disturb what another measures

            def work(name: str) -> None:
                listener = TurnListener(name, turns, _CaseListener(self._progress))
                kinds = measurements[name]
                failed[name] = self._measure(name, number, shuffled, kinds, pools[name], listener)

            everybody = {name: partial(work, name) for name in order}
            together(turns, everybody, on_abort=stack.close)
        self._progress.on_process_end(sum(failed.values()))

    def _measure(
        self,
        name: str,
        number: int,
        cases: Sequence[PlannedCase],
        measurements: tuple[str, ...],
        pool: Pool,
        listener: SilentListener,
    ) -> int:
        """Measure cases in the processes of a pool; returns how many of them failed."""
        arm, folder = self._arms[name], self._folders[name]
        settings = replace(arm.plan.settings, measurements=measurements)
        plan = replace(arm.plan, cases=tuple(cases), plugins=(), settings=settings)
        session = runner.Session(
            round=number,
            proven=number > 0,
            holds_device=True,
            plugins=arm.side.plugins,
            code=arm.side.code,
            subset=True,
        )
        before = len(folder.observations())
        runner.run(plan, folder, listener=listener, pool=pool, session=session)
        new = folder.observations()[before:]
        return len({o.case.case_id for o in new if o.outcome.failed})

    def _pool(self, name: str) -> Pool:
        return self._waiting.pop(name, None) or self._new_pool(name)

    def _new_pool(self, name: str) -> Pool:
        code = self._arms[name].side.code
        if self._device.kind is DeviceKind.CPU:
            code = replace(code, variables=STEADY_HEAP)
        return make_pool(threads=self._threads, code=code)

    def _start_ahead(self, name: str | None) -> None:
        """Start the next process while the GPU works; on a CPU that would disturb what is timed."""
        spare = (os.cpu_count() or 1) >= SPARE_CORES
        if name and self._device.kind is DeviceKind.CUDA and spare and name not in self._waiting:
            self._waiting[name] = self._new_pool(name)

    def _close(self) -> None:
        while self._waiting:
            self._waiting.popitem()[1].close()
        for folder in self._folders.values():
            folder.close()

    def _alive(self) -> list[PlannedCase]:
        """Return the cases that ended as ok on each side that was proven."""
        plan = self._arms[HEAD if HEAD in self._arms else BASE].plan
        proven = [
            Rounds.of(self._folders[name].observations()) for name in self._arms if name != AGAIN
        ]
        if self._terms.baseline is not None:
            proven.append(self._terms.baseline)
        return [
            planned
            for planned in plan.runnable
            if all(side.outcome(planned.case) is Outcome.OK for side in proven)
        ]

    def _evidence(self) -> Evidence:
        sides = {
            name: Rounds.of(self._folders[name].observations(), _cases(arm.plan))
            for name, arm in self._arms.items()
        }
        base = self._terms.baseline or sides[BASE]
        return Evidence(
            base=base,
            head=sides.get(HEAD, base),
            again=sides.get(AGAIN),
            stored=self._terms.stored,
            stages=self._stages,
        )

    def _assess(self) -> Assessment:
        return judging.assess(
            self._evidence(), self._terms.rule, promise_frac=self._terms.promise_frac
        )


class _CaseListener(SilentListener):
    """Passes on which case is measured, and notes."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def on_case_start(self, case: Case) -> None:
        self._progress.on_case(case)

    def on_note(self, text: str) -> None:
        self._progress.on_note(text)


def _orders(names: Sequence[str], rounds: int, rng: random.Random) -> list[list[str]]:
    """Return the order of the arms in each round: at random, and with two arms as ABBA or BAAB.

    A drift that is even over two rounds then cancels.
    """
    orders: list[list[str]] = []
    for number in range(rounds):
        if number % 2 and len(names) == 2:
            orders.append(orders[-1][::-1])
        else:
            orders.append(rng.sample(list(names), len(names)))
    return orders


def _load() -> tuple[float, ...]:
    """Return how many processes were busy in the last minute, in a tuple of at most one."""
    return os.getloadavg()[:1] if hasattr(os, "getloadavg") else ()


def _cases(plan: Plan) -> Iterable[Case]:
    return (planned.case for planned in plan.runnable)


def _create(path: Path, arm: Arm) -> RunFolder:
    _, run_id, created_at = new_run(path.parent, arm.plan.suite)
    manifest = {
        "schema": SCHEMA_VERSION,
        "run_id": run_id,
        "created_at": created_at,
        "command": list(sys.argv),
        **arm.plan.to_dict(),
        "environment": machine.environment(arm.plan.device),
        "code": arm.side.version,
    }
    return RunFolder.create(path, manifest)
