"""Samples of an execution's time on a GPU. Imports torch at module level; used by workers only.

Different times answer different questions. `time_gpu` is what the kernels take: executions are
captured in a CUDA graph and replayed, so that nothing is launched from Python. What cannot be
captured (some autograd functions cannot) falls back to the sum of kernel durations that the
profiler saw, and where that is not permitted to events around eager calls; the method is named.
`time_calls` is what one eager call takes between two events on the device, launch gaps included,
and `time_host` how long the CPU is busy with it.

The L2 cache is warm in all of these: an execution finds what the one before it left. The time with
a cold one is in `harness.instruments.cuda_cold`.

Launching a graph between two events takes some microseconds of the device's time, whatever the
graph holds: up to 2 % of a sample. `bracket_s` measures them, and they are taken off each sample.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from mambench.harness.instruments.kernel_times import kernel_durations_s, per_execution
from mambench.harness.instruments.telemetry import ThrottleWatch
from mambench.harness.instruments.timing import (
    SLOW_EXECUTION_S,
    Criterion,
    Execute,
    StopRule,
    Timing,
    WarmUp,
    collect,
    collector_paused,
    repetitions,
    warm_up_for,
)

EVENT_STEP_S = 0.5e-6
GRAPH_SAMPLE_S = 200e-6  # a few hundred times what an event resolves
MAX_EXECUTIONS_PER_GRAPH = 100
MAX_QUEUED_S = 0.1  # replays put into the queue before looking at their times
BLOCKING_CYCLES = 400_000  # some 200 us in which the CPU fills the queue
MAX_CAPTURED_S = 1.0  # longer needs no graph, unless it is the host that takes so long
MAX_LAUNCHED_S = 6.0  # ... up to which a graph is not too large: some 300,000 launches
LAUNCHING_SHARE = (
    0.5  # of an execution; where the host is busy for as much, launching is what lasts
)
SHORT_S = 0.01  # shorter replays are tried several times to learn how long they take
MAX_PROFILED = 50
BRACKET_CYCLES = 10_000  # some 5 us: a kernel that hides nothing of a graph's launch
BRACKET_EXECUTIONS = 20
BRACKET_REPLAYS, BRACKET_ROUNDS = 10, 5

_brackets: dict[int, float] = {}  # by device: what a graph's launch takes does not change


class NotCapturableError(Exception):
    """The execution cannot be captured in a CUDA graph; the process should not be used further."""


@dataclass
class Run:
    """What the ways to time one execution share."""

    execute: Execute
    rule: StopRule
    watch: ThrottleWatch = field(default_factory=lambda: ThrottleWatch(None))
    warm: WarmUp = field(default=WarmUp(executions_s=(), stable=False))
    host_s: float = 0.0  # how long the host was busy with the last execution that warmed up

    def warm_up(self) -> None:
        """Execute until the time has settled; what was slow meanwhile is forgotten.

        A first execution of seconds is not believed: by it a kernel of microseconds that autotunes
        in it would be thought too long to capture.
        """

        def timed() -> float:
            taken_s, self.host_s = _called_s(self.execute, self.watch)
            return taken_s

        self.warm = warm_up_for(timed, self.rule, doubt_first=True)
        self.watch.reasons()

    @property
    def launching(self) -> bool:
        """Whether the host launches all along: then eager calls take longer than their kernels."""
        return self.host_s >= LAUNCHING_SHARE * self.warm.estimate_s

    @property
    def needs_no_graph(self) -> str | None:
        """Why events around eager calls tell as much as a graph, or all that can be told."""
        if self.warm.estimate_s <= MAX_CAPTURED_S:
            return None
        if not self.launching:
            return f"an execution takes over {MAX_CAPTURED_S:g} s"
        if self.warm.estimate_s > MAX_LAUNCHED_S:
            return f"an execution launches for over {MAX_LAUNCHED_S:g} s"
        return None

    def was_slow_once(self, timing: Timing) -> bool:
        """Whether a graph is needed after all: what told otherwise was no typical execution.

        The samples are then what the warm-up should have been.
        """
        if timing.median_s > MAX_CAPTURED_S:
            return False
        self.warm = WarmUp(executions_s=timing.samples_s, stable=False)
        return True

    def without_graph(self, before: Execute | None = None) -> Timing:
        """Time what could not be captured; of what is long the profiler would see too much."""
        if self.warm.estimate_s > MAX_CAPTURED_S:
            return time_eager(self, before)
        return profiled(self, before) or time_eager(self, before)

    def explain(self, timing: Timing, reason: str) -> None:
        """Note why there is no graph, and whether gaps between launches are in the time."""
        timing.details["not_captured"] = reason
        if timing.method == "events":
            timing.details.update(launch_gaps=self.launching, host_s=self.host_s)


def time_gpu(
    execute: Execute, rule: StopRule, watch: ThrottleWatch | None = None
) -> tuple[Timing, bool]:
    """Return the GPU time of an execution, and whether the process is still fit for other cases.

    A failed capture can leave torch's allocator and random generators in capture mode.
    """
    run = Run(execute, rule, watch or ThrottleWatch(None))
    with collector_paused():
        run.warm_up()
        if (reason := run.needs_no_graph) is not None:
            timing = time_eager(run)
            if not run.was_slow_once(timing):
                run.explain(timing, reason)
                return timing, True
        try:
            return _time_graph(run), True
        except NotCapturableError as error:
            reason = str(error)
        timing = run.without_graph()
    run.explain(timing, reason)
    return timing, False


def time_calls(execute: Execute, rule: StopRule, watch: ThrottleWatch | None = None) -> Timing:
    """Return the time between two events around one eager call, launch gaps included."""
    run = Run(execute, rule, watch or ThrottleWatch(None))
    with collector_paused():
        run.warm_up()
        return time_eager(run)


def time_host(
    execute: Execute, rule: StopRule, *, clock: Callable[[], int] = time.perf_counter_ns
) -> Timing:
    """Return the CPU's time until one eager call returns, the device idle when it begins.

    So nothing that was queued before is waited for. What is waited for all the same is the call's
    own: it synchronises, or launches more than the queue holds (about a thousand kernels).
    """

    def one() -> float:
        torch.cuda.synchronize()
        begin = clock()
        execute()
        return (clock() - begin) / 1e9

    with collector_paused():
        warm = warm_up_for(one, rule)
        criterion = Criterion(rule)
        samples, _ = collect(criterion, lambda count: [(s := one(), s) for _ in range(count)])
        torch.cuda.synchronize()
    return as_timing(samples, "perf_counter", criterion, warm, executions_per_sample=1)


def time_profiler(execute: Execute, rule: StopRule) -> Timing | None:
    """Return the sum of kernel durations that the profiler saw; None if it sees no kernels."""
    run = Run(execute, rule)
    with collector_paused():
        run.warm_up()
        return profiled(run)


def call_s(execute: Execute, watch: ThrottleWatch, before: Execute | None = None) -> float:
    """Execute once on an idle device and return the time between two events around it."""
    return _called_s(execute, watch, before)[0]


def _called_s(
    execute: Execute, watch: ThrottleWatch, before: Execute | None = None
) -> tuple[float, float]:
    """Return a call's time between two events, and how long the host was busy with it."""
    begin, end = event(), event()
    if before is not None:
        before()
    torch.cuda.synchronize()
    begin.record()
    called_s = time.perf_counter()
    execute()
    host_s = time.perf_counter() - called_s
    end.record()
    watch.look()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3, host_s


def event() -> torch.cuda.Event:
    """Return an event whose time can be read."""
    return torch.cuda.Event(enable_timing=True)


def time_eager(run: Run, before: Execute | None = None) -> Timing:
    """Time eager calls by events; `before` is executed before each, and not timed."""

    def take(count: int) -> list[tuple[float, float]]:
        return [(s := call_s(run.execute, run.watch, before), s) for _ in range(count)]

    criterion = Criterion(run.rule)
    first = run.warm.executions_s if before is None and len(run.warm.executions_s) == 1 else ()
    for sample_s in first:  # too slow for a warm-up of several: it was taken as the others are
        criterion.add(sample_s, sample_s)
    samples, throttling = collect(criterion, take, slowed=run.watch.reasons)
    return as_timing(
        [*first, *samples],
        "events",
        criterion,
        run.warm,
        executions_per_sample=1,
        throttling=throttling,
    )


def _time_graph(run: Run) -> Timing:
    bracket = bracket_s()
    graph, once_s = captured_once(run)
    executions = min(repetitions(once_s, GRAPH_SAMPLE_S), MAX_EXECUTIONS_PER_GRAPH)
    if executions > 1:
        graph.reset()
        graph = capture(run.execute, executions)
        graph.replay()

    def take(count: int) -> list[tuple[float, float]]:
        queued = max(1, int(MAX_QUEUED_S / (once_s * executions)))
        spent: list[float] = []
        while len(spent) < count:
            spent += replay_s(graph, min(queued, count - len(spent)), run.watch)
        return [(without_bracket_s(s, bracket) / executions, s) for s in spent]

    criterion = Criterion(run.rule)
    samples, throttling = collect(criterion, take, slowed=run.watch.reasons)
    graph.reset()
    timing = as_timing(
        samples,
        "cuda-graph",
        criterion,
        run.warm,
        executions_per_sample=executions,
        throttling=throttling,
    )
    timing.details["bracket_s"] = bracket  # taken off each sample
    return timing


def bracket_s() -> float:
    """Return what launching a graph adds between two events, measured once in this process.

    From graphs of one and of many short waits: the time that does not grow with their number. The
    least of some rounds, because a CPU that is too slow to fill the queue makes it longer. Raises
    NotCapturableError.
    """
    device = torch.cuda.current_device()
    if device not in _brackets:
        one_s, many_s = (_waits_s(executions) for executions in (1, BRACKET_EXECUTIONS))
        each_s = (many_s - one_s) / (BRACKET_EXECUTIONS - 1)
        _brackets[device] = max(0.0, one_s - each_s)
    return _brackets[device]


def _waits_s(executions: int) -> float:
    """Return how long a graph of so many short waits takes between two events."""
    graph = capture(short_wait, executions)
    graph.replay()  # uploads it
    rounds = (replay_s(graph, BRACKET_REPLAYS) for _ in range(BRACKET_ROUNDS))
    found = min(median(spent) for spent in rounds)
    graph.reset()
    return found


def without_bracket_s(spent_s: float, bracket: float) -> float:
    """Return a sample without what its two events add; never less than they resolve."""
    return max(spent_s - bracket, EVENT_STEP_S)


def short_wait() -> None:
    """Keep the device waiting for some microseconds."""
    wait: Any = torch.cuda._sleep  # pyright: ignore
    wait(BRACKET_CYCLES)


def captured_once(run: Run) -> tuple[torch.cuda.CUDAGraph, float]:
    """Return a graph of one execution, uploaded unless slow, and about how long a replay takes.

    Where it is the launching that is slow, a replay is not.
    """
    graph = capture(run.execute, 1)
    if run.warm.estimate_s >= SLOW_EXECUTION_S and not run.launching:
        return graph, run.warm.estimate_s
    graph.replay()  # the first replay uploads the graph
    return graph, min(replay_s(graph, 5 if run.warm.estimate_s < SHORT_S else 1, run.watch))


def replay_s(
    graph: torch.cuda.CUDAGraph, count: int, watch: ThrottleWatch | None = None
) -> list[float]:
    """Replay back to back and return each replay's time.

    A kernel that only waits goes first: the CPU fills the queue behind it, and so no sample holds
    the launching of its graph.
    """
    events = [event() for _ in range(count + 1)]
    hold_queue()
    events[0].record()
    for after in events[1:]:
        graph.replay()
        after.record()
    if watch is not None:
        watch.look()  # while the device is busy
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


def hold_queue() -> None:
    """Keep the device waiting while the CPU fills its queue."""
    wait: Any = torch.cuda._sleep  # pyright: ignore
    wait(BLOCKING_CYCLES)


def capture(execute: Execute, executions: int) -> torch.cuda.CUDAGraph:
    """Capture executions in a graph on the current stream; raises NotCapturableError.

    The current stream must not be the default one, and what the execution differentiates must have
    been computed on it: autograd runs a backward on its forward's stream.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        # thread_local: autograd launches from a thread of its own.
        with torch.cuda.graph(
            graph, stream=torch.cuda.current_stream(), capture_error_mode="thread_local"
        ):
            for _ in range(executions):
                execute()
    except Exception as error:
        # Whatever was raised, the answer is another method; a broken context raises again there.
        torch.cuda.synchronize()
        first_line = (str(error).splitlines() or [""])[0]
        raise NotCapturableError(f"{type(error).__name__}: {first_line}") from error
    return graph


def profiled(run: Run, before: Execute | None = None) -> Timing | None:
    """Sum the durations of each execution's kernels; None if the profiler sees no kernels.

    `before` is executed before each, and its kernels are not counted.
    """
    rule, estimate_s = run.rule, max(run.warm.estimate_s, 1e-6)
    wanted = min(rule.max_samples, MAX_PROFILED, int(rule.target_s / estimate_s))
    affordable = int(min(rule.limit_s, 1e6) / estimate_s)
    count = max(1, min(max(wanted, rule.min_samples), affordable))
    others = len(kernel_durations_s(before, 1)) if before is not None else 0
    durations = kernel_durations_s(run.execute, count, before=before)
    samples = per_execution(durations, count, skip=others)
    if not samples:
        return None
    criterion = Criterion(rule)
    for sample in samples:
        criterion.add(sample, sample)
    criterion.batch()
    timing = as_timing(
        samples,
        "profiler-kernel-sum",
        criterion,
        run.warm,
        executions_per_sample=count // len(samples),
    )
    timing.details["kernels_per_execution"] = len(durations) / count - others
    return timing


def as_timing(
    samples: Sequence[float],
    method: str,
    criterion: Criterion,
    warm: WarmUp,
    *,
    executions_per_sample: int,
    throttling: dict[str, Any] | None = None,
) -> Timing:
    """Return samples with what a reader needs to judge them."""
    details: dict[str, Any] = {
        "convergence": criterion.report(),
        "warm_up": warm.report(),
        "executions_per_sample": executions_per_sample,
        "l2": "warm",
    }
    if throttling:
        details["throttling"] = throttling
    return Timing(samples_s=tuple(samples), method=method, details=details)
