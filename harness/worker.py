"""A worker process: proves cases right, times them and measures their memory, one after the other.

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
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from mambench.harness import memory, timing
from mambench.harness.protocol import (
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
from mambench.harness.spec import Case, DeviceKind, Outcome
from mambench.harness.telemetry import Telemetry, throttled

if TYPE_CHECKING:
    from mambench.implementations.base import Implementation
    from mambench.implementations.workload import Workload

REASON_LENGTH = 240
TRACEBACK_LENGTH = 4000
TIMING_SHARE = 0.8  # of the time that is left; the rest is for what ends later than estimated
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
_GPU_ORDER = ("memory", "call_time", "time")

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
            for case in message.cases:
                ahead(case)
        except BaseException as error:
            return Done(
                outcome=classify(error), reason=f"compiling {case.label} ahead: {describe(error)}"
            )
        return Done()

    def work(self, message: Work, send: Send) -> Done:
        """Measure one case, sending findings as they are made."""
        return _CaseWork(self, message, send).run()

    def memory_meter(self) -> tuple[memory.Meter | None, str | None]:
        """Return what reads the device's memory, or None and the reason why nothing can."""
        if self.on_gpu:
            return memory.CudaMeter(self.config.device.torch_name), None
        missing = memory.cpu_missing()
        if missing is None and not self.tuned:
            missing = "the C library's allocator cannot be told to return freed memory (mallopt)"
        return (None, missing) if missing else (memory.ResidentMeter(), None)

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
    """One case in one worker: build, first call, gate, measurements."""

    def __init__(self, session: _Session, message: Work, send: Send) -> None:
        self._session = session
        self._message = message
        self._case = message.case
        self._send = send
        self._workload: Workload | None = None
        self._phase = START
        self._begun = time.monotonic()
        self._set_up_s = 0.0
        self._replace = False
        self._first_call_s: float | None = None
        self._gate: dict[str, Any] | None = None

    def run(self) -> Done:
        """Measure; whatever is raised becomes the outcome of what was not measured."""
        try:
            return self._measure()
        except BaseException as error:
            outcome = classify(error)
            done = Done(
                outcome=outcome,
                reason=f"{describe(error)} (in {self._phase})",
                details={"traceback": _trace(error), "phase": self._phase},
                replace=outcome is not Outcome.UNSUPPORTED,
            )
            traceback.clear_frames(error.__traceback__)  # they hold the case's tensors
            return done
        finally:
            self._release()
            gc.collect()

    def _measure(self) -> Done:
        first = self._session.first_of_kind(self._case)
        # What the first call of its kind loads, compiles and tries out is not the case's memory.
        if self._message.warm or first:
            self._first_call()
        if self._message.gate and (rejected := self._rejected()):
            return rejected
        for measurement in self._order():
            self._measure_one(measurement)
        self._session.synchronize()
        return Done(replace=self._replace)

    def _order(self) -> list[str]:
        if not self._session.on_gpu:
            return list(self._message.measurements)
        # Memory comes first: a failed capture leaves its mark on the allocator.
        return sorted(self._message.measurements, key=_GPU_ORDER.index)

    def _built(self) -> "Workload":
        """Return the workload, drawing its inputs unless they are there already."""
        if self._workload is None:
            from mambench.implementations.workload import build

            implementation = self._session.implementation(self._case.implementation)
            config = self._session.config
            with self._in_phase(BUILD):
                self._workload = build(
                    self._case, implementation, config.device, seed=config.settings.seed
                )
        return self._workload

    def _release(self) -> None:
        if self._workload is not None:
            self._workload.release()
            self._workload = None

    def _prepared(self) -> Callable[[], object]:
        return self._built().prepare(self._case.pass_)

    def _first_call(self) -> None:
        self._built()
        with self._in_phase(COMPILE):
            execute = self._prepared()
            begin = time.perf_counter()
            execute()
            self._session.synchronize()
            self._first_call_s = time.perf_counter() - begin

    def _rejected(self) -> Done | None:
        """Judge the case's results; returns how the case ends if they are wrong."""
        from mambench.harness import gate

        seed = self._session.config.settings.seed
        with self._in_phase("gate"):
            report = gate.check(self._built(), self._case, seed=seed)
        self._gate = {"passed": report.passed, "errors": report.errors, "judged": report.judged}
        if report.passed:
            return None
        return Done(
            outcome=Outcome.WRONG,
            reason=report.reason or "the result is wrong",
            details={"gate": self._gate},
            replace=True,  # what answers wrongly may have written where it should not
        )

    def _measure_one(self, measurement: str) -> None:
        measure = {"time": self._time, "call_time": self._call_time, "memory": self._memory}
        self._built()
        started_at, begin = _now(), time.monotonic()
        with self._in_phase(measurement):
            method, values, samples, details = measure[measurement]()
        if self._gate is not None:
            details = {"gate": self._gate} | details
        self._send(
            Finding(
                measurement=measurement,
                started_at=started_at,
                duration_s=time.monotonic() - begin,
                method=method,
                values=values,
                samples_s=samples,
                details=details,
            )
        )

    def _time(self) -> "_Measured":
        execute = self._prepared()
        before = self._session.telemetry.snapshot()
        if self._session.on_gpu:
            from mambench.harness import cuda_timing

            taken, reusable = cuda_timing.time_gpu(execute, self._rule())
            self._replace = self._replace or not reusable
        else:
            taken = timing.time_cpu(execute, self._rule())
        values = {
            "time_s": taken.median_s,
            "tokens_per_s": self._case.problem.tokens / taken.median_s,
            "first_call_s": self._first_call_s,
        }
        return taken.method, values, taken.samples_s, self._details(taken, before)

    def _call_time(self) -> "_Measured":
        from mambench.harness import cuda_timing

        execute = self._prepared()
        before = self._session.telemetry.snapshot()
        taken = cuda_timing.time_calls(execute, self._rule())
        values = {"call_time_s": taken.median_s}
        return taken.method, values, taken.samples_s, self._details(taken, before)

    def _details(self, taken: timing.Timing, before: dict[str, Any]) -> dict[str, Any]:
        telemetry = {"before": before, "after": self._session.telemetry.snapshot()}
        return taken.details | {
            "threads": self._session.config.threads,
            "telemetry": telemetry,
            "throttled": throttled(telemetry),
        }

    def _memory(self) -> "_Measured":
        meter, missing = self._session.memory_meter()
        if meter is None:
            reading = memory.MemoryReading(missing=missing)
        else:
            reading = memory.measure(meter, self._prepared, self._release)
        details = dict(reading.details) | ({"missing": missing} if missing else {})
        values: dict[str, float | int | None] = {
            "peak_memory_bytes": reading.peak_bytes,
            "extra_memory_bytes": reading.extra_bytes,
        }
        return reading.method, values, None, details

    def _rule(self) -> timing.StopRule:
        spent_s = time.monotonic() - self._begun - self._set_up_s
        left_s = max(0.0, self._message.limit_s - spent_s)
        return timing.StopRule.of(self._session.config.settings, TIMING_SHARE * left_s)

    @contextmanager
    def _in_phase(self, name: str) -> Generator[None]:
        self._phase = name
        self._send(Phase(name=name))
        begin = time.monotonic()
        yield
        if name in SETTING_UP:
            self._set_up_s += time.monotonic() - begin


_Measured = tuple[
    str | None, Mapping[str, float | int | None], tuple[float, ...] | None, dict[str, Any]
]


def classify(error: BaseException) -> Outcome:
    """Return the outcome that an exception of an implementation means."""
    if isinstance(error, NotImplementedError):
        return Outcome.UNSUPPORTED
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(sign in text for sign in _OUT_OF_MEMORY):
        return Outcome.OOM
    return Outcome.ERROR


def describe(error: BaseException) -> str:
    """Return one short line: the exception's type and the first line of its text."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= REASON_LENGTH else text[: REASON_LENGTH - 1] + "…"


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACEBACK_LENGTH:]


def _ignore(case: Case) -> None:
    """Do nothing ahead."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
