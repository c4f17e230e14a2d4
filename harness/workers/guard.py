"""Watches a worker at its work: time limits, host memory, death. Imports no torch."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import psutil

from mambench.harness.spec import Outcome
from mambench.harness.workers.limits import oom_kills
from mambench.harness.workers.pool import Worker, signal_name
from mambench.harness.workers.protocol import SETTING_UP, START, Done, Finding, Phase, Work

POLL_S = 0.02  # at 10 GB/s of fresh pages a worker grows 200 MB between two looks

Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a worker may take for one piece of work."""

    set_up_s: float  # start, inputs, first call
    measure_s: float  # gate and measurements
    memory_bytes: int  # resident, of the worker's process


class Stopwatch:
    """Sums up the time spent in the two kinds of phases and compares it with their limits."""

    def __init__(self, limits: Limits, clock: Clock = time.monotonic) -> None:
        self._limits = {True: limits.set_up_s, False: limits.measure_s}
        self._spent = {True: 0.0, False: 0.0}
        self._clock = clock
        self._since = clock()
        self.phase = START

    def enter(self, phase: str) -> None:
        """Begin another phase."""
        now = self._clock()
        self._spent[self.phase in SETTING_UP] += now - self._since
        self._since, self.phase = now, phase

    def exceeded(self) -> str | None:
        """Return a sentence about the limit that is exceeded, or None."""
        setting_up = self.phase in SETTING_UP
        limit = self._limits[setting_up]
        if self._spent[setting_up] + self._clock() - self._since <= limit:
            return None
        name = "compile_limit_s" if setting_up else "time_limit_s"
        return f"took longer than {name} = {limit:g} s, in phase '{self.phase}'"


def supervise(
    worker: Worker,
    work: Work,
    limits: Limits,
    *,
    on_phase: Callable[[str], None],
    on_finding: Callable[[Finding], None],
    poll_s: float = POLL_S,
) -> tuple[Done, bool]:
    """Let a worker do its work; returns how it ended and whether the worker is still alive."""
    worker.clear_output()
    kills = oom_kills()
    watch = Stopwatch(limits)
    worker.send(work)
    while True:
        try:
            message = worker.receive(poll_s)
        except EOFError:
            return _died(worker, watch.phase, kills), False
        if isinstance(message, Done):
            return message, True
        if isinstance(message, Phase):
            watch.enter(message.name)
            on_phase(message.name)
        elif isinstance(message, Finding):
            on_finding(message)
        broken = _broken_limit(worker, watch, limits)
        if broken is not None:
            output = worker.output_tail()
            worker.kill()
            return _ended(*broken, watch.phase, output), False


def resident_bytes(pid: int) -> int:
    """Return a process' resident memory, 0 if it is gone."""
    try:
        return psutil.Process(pid).memory_info().rss
    except psutil.Error:
        return 0


def _broken_limit(worker: Worker, watch: Stopwatch, limits: Limits) -> tuple[Outcome, str] | None:
    late = watch.exceeded()
    if late is not None:
        return Outcome.TIMEOUT, late
    held = resident_bytes(worker.pid)
    if held > limits.memory_bytes:
        return Outcome.OOM, (
            f"the process held {held / 2**30:.1f} GiB, over the limit of "
            f"{limits.memory_bytes / 2**30:.1f} GiB, in phase '{watch.phase}'"
        )
    return None


def _died(worker: Worker, phase: str, kills_before: int | None) -> Done:
    output = worker.output_tail()
    code = worker.end()
    if code is None:  # it lives, but cannot be talked to
        worker.kill()
        return _ended(Outcome.CRASHED, f"the worker hung up in phase '{phase}'", phase, output)
    kills = oom_kills()
    if code == -9 and kills is not None and kills_before is not None and kills > kills_before:
        reason = f"the kernel killed the process for want of host memory, in phase '{phase}'"
        return _ended(Outcome.OOM, reason, phase, output)
    how = f"was killed by {signal_name(code)}" if code < 0 else f"exited with status {code}"
    return _ended(Outcome.CRASHED, f"the worker {how} in phase '{phase}'", phase, output)


def _ended(outcome: Outcome, reason: str, phase: str, output: str) -> Done:
    return Done(
        outcome=outcome, reason=reason, details={"phase": phase, "output": output}, replace=True
    )
