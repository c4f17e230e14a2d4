"""What a profiler is: a measurement that a suite or `--measure` switches on by name.

There are two kinds. A `CaseProfiler` measures inside the worker that has just proven the case
right. A `BatchProfiler` runs after the sweep, outside the workers, over all cases that are ok: what
needs a child process of its own (hardware counters) pays for its start once.

Neither may raise for what a machine lacks: `missing` says beforehand why a device cannot give the
figures, and `Measured.missing` says so for one case. What is raised all the same fails this
measurement of this case and no other.

Profilers are imported by `list` and `plan`: their modules import torch only inside functions.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mambench.harness.spec import Case, Device, DeviceKind, Metric, Outcome, Settings
from mambench.harness.workers.pool import Code

if TYPE_CHECKING:
    from mambench.harness.instruments.telemetry import Telemetry
    from mambench.harness.instruments.timing import StopRule, Timing
    from mambench.implementations.workload import Workload

DECIDING = "time"  # the measurement without which a case has no result
Value = float | int | None
Execute = Callable[[], object]


class Process(StrEnum):
    """The worker in which a profiler runs; what disturbs others has a worker apart."""

    TIMED = "timed"  # nothing is attached that could slow an execution down
    TUNED_MALLOC = "tuned-malloc"  # freed memory is returned at once: slow, but memory is exact
    TRACED = "traced"  # a profiler is attached, and leaves its hooks behind


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a profiler found for one case."""

    values: Mapping[str, Value] = field(default_factory=dict[str, Value])  # by metric tag, SI
    method: str | None = None
    samples_s: tuple[float, ...] | None = None  # raw, in the order taken
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])  # plain JSON values

    @classmethod
    def missing(cls, reason: str, **details: Any) -> "Measured":
        """Return no values and the reason why."""
        return cls(details={"missing": reason, **details})


@dataclass(frozen=True, kw_only=True)
class Failed:
    """How a batch profiler failed on one case."""

    outcome: Outcome = Outcome.ERROR
    reason: str
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the plan knows of a case when it asks a profiler for an estimate."""

    case: Case
    device: Device
    settings: Settings
    execution_s: float  # estimated time of one execution
    launches: int  # estimated operations launched by one execution


class Profiler(ABC):
    """One measurement. Subclass `CaseProfiler` or `BatchProfiler`."""

    name: ClassVar[str]  # of the measurement in records, in suites and on the command line
    summary: ClassVar[str]  # one line for `list`
    metrics: ClassVar[tuple[Metric, ...]]  # what its values are; tags are unique in a run
    devices: ClassVar[tuple[DeviceKind, ...]] = tuple(DeviceKind)

    def missing(self, device: Device) -> str | None:
        """Return why this device has no such figures, None if it may have; must be quick."""
        if device.kind in self.devices:
            return None
        return f"{self.name} is measured on {' and '.join(self.devices)} only"

    @abstractmethod
    def estimate_s(self, work: Work) -> float:
        """Return the seconds this adds to a case."""


class CaseProfiler(Profiler):
    """Measures inside a worker; one instance may serve many cases."""

    # Within a worker the lower comes first. 0 is for what nothing may precede (memory), 50 for
    # eager calls, 100 for the capture of graphs: a failed one leaves its mark on the process.
    order: ClassVar[int] = 50

    def process(self, device: Device) -> Process:
        """Return the worker this runs in."""
        return Process.TIMED

    @abstractmethod
    def measure(self, context: "Context") -> Measured:
        """Measure one case; it was executed and proven right before."""


class BatchProfiler(Profiler):
    """Measures many cases in one go, after the sweep."""

    start_s: ClassVar[float] = 0.0  # estimate of what is paid once, however many cases there are

    def start_estimate_s(self, device: Device, settings: Settings) -> float:
        """Estimate what is paid once on a device; `start_s` unless overridden."""
        return self.start_s

    @abstractmethod
    def measure_batch(self, batch: "Batch") -> Iterator[tuple[Case, Measured | Failed]]:
        """Yield what was found, case by case, as soon as it is known.

        A case that is not yielded is recorded as an error: that of the exception raised, if any.
        """


def is_profiler(value: object) -> bool:
    """Whether this is a class of profilers that can be made."""
    return (
        isinstance(value, type)
        and issubclass(value, CaseProfiler | BatchProfiler)
        and not inspect.isabstract(value)
    )


class Context(Protocol):
    """One case in a worker, as a profiler sees it."""

    @property
    def case(self) -> Case:
        """The question."""
        ...

    @property
    def device(self) -> Device:
        """Where it runs."""
        ...

    @property
    def settings(self) -> Settings:
        """How the run measures."""
        ...

    @property
    def threads(self) -> int:
        """CPU threads of this worker."""
        ...

    @property
    def telemetry(self) -> "Telemetry":
        """The state of the device."""
        ...

    @property
    def first_call(self) -> Mapping[str, float]:
        """What the first call took: `first_call_s`, `compile_s`; empty if there was none."""
        ...

    @property
    def timings(self) -> "dict[str, Timing]":
        """Samples of the case's earlier profilers by name, for those that build on them."""
        ...

    def workload(self) -> "Workload":
        """Return the case's inputs and operation, made when first asked for."""
        ...

    def execute(self) -> Execute:
        """Return the closure that executes the pass once; the same one until `release`."""
        ...

    @property
    def tuned_malloc(self) -> bool:
        """Whether this process returns freed memory at once (`Process.TUNED_MALLOC`)."""
        ...

    def release(self, *, inputs: bool = True) -> None:
        """Drop the closure, and the inputs too unless told; both are made anew when asked for."""
        ...

    def rule(self, share: float = 1.0) -> "StopRule":
        """Return when to stop sampling: the run's rule for this share of its seconds."""
        ...

    def synchronize(self) -> None:
        """Wait for the device."""
        ...

    def give_up_process(self, reason: str) -> None:
        """Say that this process should serve no further case."""
        ...


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The cases of a batch profiler, all of them ok, and what a child process needs to run them."""

    cases: tuple[Case, ...]
    times_s: Mapping[str, float]  # measured time of one execution by case_id, where known
    first_calls_s: Mapping[str, float] = field(default_factory=dict[str, float])  # likewise
    left_s: float = math.inf  # of the run's time budget
    device: Device
    settings: Settings
    threads: int
    plugins: tuple[str, ...]
    sys_path: tuple[str, ...]
    note: Callable[[str], None]  # tells the person something
    on_case: Callable[[Case], None]  # tells which case is being measured
    code: Code = field(default_factory=Code)  # what a child process imports
