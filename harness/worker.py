"""A worker process: proves cases right and lets profilers measure them, one after the other.

Whatever an implementation raises ends here and becomes the case's outcome; what kills the process
is the runner's to notice. torch is imported when serving begins, in the forked process already
loaded; plugins and numba are imported only here, never in the fork server.
"""

import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from mambench.harness.failures import classify, describe, trace
from mambench.harness.instruments import memory
from mambench.harness.instruments.launches import CompileTimes
from mambench.harness.instruments.telemetry import Telemetry
from mambench.harness.instruments.timing import StopRule, Timing
from mambench.harness.profilers.base import DECIDING, CaseProfiler, Measured, Profiler
from mambench.harness.records import now
from mambench.harness.spec import Case, DeviceKind, Outcome
from mambench.harness.workers.protocol import (
    BUILD,
    COMPILE,
    SETTING_UP,
    START,
    Done,
    Finding,
    Phase,
    Precompile,
    Work,
    WorkerConfig,
)

if TYPE_CHECKING:
    from mambench.harness.gate import GateReport
    from mambench.implementations.base import Implementation
    from mambench.implementations.workload import Workload

EXECUTIONS_AGAIN = 3  # what checking again after timing takes: forward, backward, hashing
TIMING_SHARE = 0.8  # of the time that is left; the rest is for what ends later than estimated

Send = Callable[[object], None]


def serve(connection: Connection) -> None:
    """Answer the runner's messages until it closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    faulthandler.enable()  # a crash prints where it was; the runner keeps the end of the output
    try:
        session = _Session(connection.recv())
        while True:
            message = connection.recv()
            if isinstance(message, Precompile):
                connection.send(session.precompile(message))
            else:
                connection.send(session.work(message, connection.send))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


class _Session:
    """What the cases of one worker share."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.telemetry = Telemetry(config.device)
        self._implementations: dict[str, Implementation] = {}
        self._warmed: set[str] = set()
        self._profilers: Mapping[str, Profiler] | None = None
        os.environ["NUMBA_NUM_THREADS"] = str(config.threads)  # read when numba is imported
        sys.path.extend(entry for entry in config.sys_path if entry not in sys.path)
        self.tuned = config.tuned_malloc and memory.tune_malloc()
        import torch

        torch.set_num_threads(config.threads)
        if self.on_gpu:
            torch.cuda.set_device(config.device.index)
            # CUDA graphs cannot be captured on the default stream, and autograd runs a backward on
            # its forward's stream: everything goes to one other stream.
            torch.cuda.set_stream(torch.cuda.Stream())

    @property
    def on_gpu(self) -> bool:
        return self.config.device.kind is DeviceKind.CUDA

    def implementation(self, name: str) -> "Implementation":
        """Find an implementation, importing what the plan names."""
        if name not in self._implementations:
            from mambench.harness import registry

            self._implementations[name] = registry.get(name, self.config.plugins)
        return self._implementations[name]

    def synchronize(self) -> None:
        """Wait for the device, so that its errors and its time belong to what was just done."""
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()

    def precompile(self, message: Precompile) -> Done:
        """Compile ahead, as far as it works: what fails here fails again where it is recorded."""
        case = message.cases[0]
        try:
            implementation = self.implementation(case.implementation)
            ahead: Callable[[Case], None] = getattr(implementation, "precompile", _ignore)
            # What a check compares with may be older code, which did not divide its work.
            share = getattr(implementation, "precompile_share", None)
            for case in message.cases:
                if message.shares > 1 and share is not None:
                    share(case, message.share, message.shares)
                elif message.share == 0:
                    ahead(case)
        except BaseException as error:
            return Done(
                outcome=classify(error), reason=f"compiling {case.label} ahead: {describe(error)}"
            )
        return Done()

    def collect(self, *, keep: bool) -> None:
        """Collect garbage; `keep` what is left then for good, and look at it no more.

        What a kind of case loads (kernels, compilers) stays. Collections, of which a case sees
        several, would go through it each time: that has taken half of a quick case.
        """
        gc.collect()
        if keep:
            gc.freeze()

    def free(self) -> None:
        """Return the device memory that nothing holds."""
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def work(self, message: Work, send: Send) -> Done:
        """Measure one case, sending findings as they are made."""
        return _CaseWork(self, message, send).run()

    @property
    def profilers(self) -> Mapping[str, Profiler]:
        """Every profiler by name, plugins' included."""
        if self._profilers is None:
            from mambench.harness.profilers import catalog

            self._profilers = catalog.load(self.config.plugins)
        return self._profilers

    def first_of_kind(self, case: Case) -> bool:
        """Whether nothing like this case has run in this process; from now on something has."""
        values = case.to_dict()
        for size in ("batch", "seqlen"):
            del values["problem"][size]
        kind = repr(values)
        known = kind in self._warmed
        self._warmed.add(kind)
        return not known


class _CaseWork:
    """One case in one worker: build, first call, gate, measurements. A profiler's `Context`."""

    def __init__(self, session: _Session, message: Work, send: Send) -> None:
        config = session.config
        self.case = message.case
        self.device = config.device
        self.settings = config.settings
        self.threads = config.threads
        self.telemetry = session.telemetry
        self.tuned_malloc = session.tuned
        self.first_call: dict[str, float] = {}
        self.timings: dict[str, Timing] = {}
        self._session = session
        self._message = message
        self._send = send
        self._workload: Workload | None = None
        self._execute: Callable[[], object] | None = None
        self._phase = START
        self._begun = time.monotonic()
        self._set_up_s = 0.0
        self._replace = False
        self._first = False
        self._gate: dict[str, Any] | None = None
        self._around: dict[str, str] = {}
        self._proven: GateReport | None = None

    def run(self) -> Done:
        """Measure; whatever is raised becomes the outcome of what was not measured."""
        try:
            return self._measure()
        except BaseException as error:
            outcome = classify(error)
            done = Done(
                outcome=outcome,
                reason=f"{describe(error)} (in {self._phase})",
                details={"traceback": trace(error), "phase": self._phase},
                replace=outcome is not Outcome.UNSUPPORTED,
            )
            traceback.clear_frames(error.__traceback__)  # they hold the case's tensors
            return done
        finally:
            self.release()
            self._session.collect(keep=self._first and not self._session.config.traced)
            if self._session.config.shares_device:
                self._session.free()

    def workload(self) -> "Workload":
        """Return the workload, drawing its inputs unless they are there already."""
        if self._workload is None:
            from mambench.implementations.workload import build

            implementation = self._session.implementation(self.case.implementation)
            with self._in_phase(BUILD):
                self._workload = build(
                    self.case, implementation, self.device, seed=self.settings.seed
                )
            # What a check compares with may be older code, which does not know of it.
            ask = getattr(self._workload.family, "surroundings", _ignore)
            if (around := ask(self._workload.inputs)) is not None:
                self._around = {"surroundings": around}
        return self._workload

    def execute(self) -> Callable[[], object]:
        """Return the closure that executes the pass once."""
        if self._execute is None:
            self._execute = self.workload().prepare(self.case.pass_)
        return self._execute

    def release(self, *, inputs: bool = True) -> None:
        """Drop the closure, and the inputs too unless told."""
        self._execute = None
        if inputs and self._workload is not None:
            self._workload.release()
            self._workload = None

    def rule(self, share: float = 1.0) -> StopRule:
        """Return when to stop sampling, within what is left of the case's limit."""
        spent_s = time.monotonic() - self._begun - self._set_up_s
        left_s = max(0.0, self._message.limit_s - spent_s)
        return StopRule.of(self.settings, TIMING_SHARE * left_s, share=share)

    def synchronize(self) -> None:
        """Wait for the device."""
        self._session.synchronize()

    def give_up_process(self, reason: str) -> None:
        """Let another process serve the next case."""
        self._replace = True

    def _measure(self) -> Done:
        implementation = self._session.implementation(self.case.implementation)
        # What a check compares with may be older code, which does not know of it.
        begin: Callable[[Case], None] = getattr(implementation, "begin_case", _ignore)
        begin(self.case)
        self._first = self._session.first_of_kind(self.case)
        # What the first call of its kind loads, compiles and tries out is not the case's memory.
        if self._message.warm or self._first:
            self._call_first()
        if self._message.gate and (rejected := self._rejected()):
            return rejected
        for name in self._message.measurements:
            if caught := self._measure_one(name):
                return caught
        self.synchronize()
        return Done(replace=self._replace)

    def _call_first(self) -> None:
        self.workload()
        with self._in_phase(COMPILE):
            execute = self.execute()
            compiling = CompileTimes()
            begin = time.perf_counter()
            with compiling.watching():
                execute()
                self.synchronize()
            self.first_call["first_call_s"] = time.perf_counter() - begin
            if compiling.seen:
                self.first_call["compile_s"] = compiling.total_s
        self.release(inputs=False)  # the gate needs the room

    def _rejected(self) -> Done | None:
        """Judge the case's results; returns how the case ends if they are wrong."""
        from mambench.harness import gate

        with self._in_phase("gate"):
            report = gate.check(self.workload(), self.case, seed=self.settings.seed)
        self._gate = {"passed": report.passed, "errors": report.errors, "judged": report.judged}
        if report.passed:
            self._proven = report
            return None
        return self._wrong(report.reason or "the result is wrong")

    def _wrong(self, reason: str) -> Done:
        return Done(
            outcome=Outcome.WRONG,
            reason=reason,
            details={"gate": self._gate},
            replace=True,  # what answers wrongly may have written where it should not
        )

    def _caught(self, measured: Measured) -> str | None:
        """Say whether what was timed is not what was proven right; costs two executions at most."""
        from mambench.harness import gate

        assert self._proven is not None
        assert self._gate is not None
        reason = None
        if measured.method == "cuda-graph":
            reason = self._replayed_wrong()
        elif (measured.values.get("time_s") or 0.0) < self.rule().limit_s / EXECUTIONS_AGAIN:
            why = measured.details.get("not_captured")
            reason = gate.check_order(self.workload(), self.execute(), why)
        self.release(inputs=False)  # what the pass keeps is not wanted twice
        again_s = EXECUTIONS_AGAIN * (measured.values.get("time_s") or 0.0)
        self._gate["checked_again"] = in_time = again_s < self.rule().limit_s
        if reason is None and in_time:
            proven, seed = self._proven, self.settings.seed
            reason = gate.check_again(self.workload(), self.case, proven, seed=seed)
        return reason

    def _replayed_wrong(self) -> str | None:
        from mambench.harness import gate
        from mambench.harness.instruments.cuda_timing import NotCapturableError

        try:
            return gate.check_replay(self.workload(), self.execute())
        except NotCapturableError as error:  # for want of memory: it was captured a moment ago
            self.give_up_process(str(error))
            return None

    def _measure_one(self, name: str) -> Done | None:
        """Let one profiler measure; what it raises fails it alone, unless it takes the time.

        Returns how the case ends if what was timed turns out to be wrong: its time is not sent.
        """
        profiler = self._session.profilers[name]
        assert isinstance(profiler, CaseProfiler)
        self.workload()
        started_at, begin = now(), time.monotonic()
        outcome, reason = Outcome.OK, None
        with self._in_phase(name):
            try:
                measured = profiler.measure(self)
                if name == DECIDING and self._proven and (caught := self._caught(measured)):
                    return self._wrong(caught)
            except Exception as error:
                if name == DECIDING:
                    raise
                outcome, reason = classify(error), f"{describe(error)} (in {name})"
                measured = Measured(details={"traceback": trace(error), "phase": name})
                traceback.clear_frames(error.__traceback__)
        values = {m.tag: measured.values.get(m.tag) for m in profiler.metrics}
        gate = {"gate": self._gate} if self._gate is not None else {}
        self._send(
            Finding(
                measurement=name,
                started_at=started_at,
                duration_s=time.monotonic() - begin,
                method=measured.method,
                values=values if outcome is Outcome.OK else {},
                samples_s=measured.samples_s,
                details={**gate, **self._around, **measured.details},
                outcome=outcome,
                reason=reason,
            )
        )
        if outcome is not Outcome.OK:
            self._recover()
        return None

    def _recover(self) -> None:
        """Go on after a profiler's failure; raises if the device is damaged."""
        self.synchronize()
        self._replace = True
        self.release()
        self._session.collect(keep=False)
        self._session.free()

    @contextmanager
    def _in_phase(self, name: str) -> Generator[None]:
        outer, self._phase = self._phase, name
        self._send(Phase(name=name))
        begin = time.monotonic()
        yield  # where this raises, the phase stays: it is where the case failed
        if name in SETTING_UP:
            self._set_up_s += time.monotonic() - begin
        self._phase = outer
        if outer != START:
            self._send(Phase(name=outer))


def _ignore(given: Any) -> None:
    """Do nothing."""
