"""Samples of an execution's time on a GPU. Imports torch at module level; used by workers only.

Two times are taken, because they answer different questions. `time_gpu` is what the kernels take:
executions are captured in a CUDA graph and replayed, so that nothing is launched from Python. What
cannot be captured (some autograd functions cannot) falls back to the sum of kernel durations that
the profiler saw, and where that is not permitted to events around eager calls; the method is named.
`time_calls` is what one eager call takes between two events on the device, launch gaps included.

The L2 cache is warm in all of them: an execution finds what the one before it left.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from mambench.harness.timing import (
    WARM_UP_S,
    Criterion,
    Execute,
    StopRule,
    Timing,
    WarmUp,
    collector_paused,
    repetitions,
    warm_up,
)

GRAPH_SAMPLE_S = 200e-6  # an event resolves about half a microsecond
MAX_EXECUTIONS_PER_GRAPH = 100
MAX_QUEUED_S = 0.1  # replays put into the queue before looking at their times
BLOCKING_CYCLES = 400_000  # some 200 us in which the CPU fills the queue
MAX_CAPTURED_S = 1.0  # longer is one long kernel, or so many that a graph of them is too large
MAX_PROFILED = 50


class NotCapturableError(Exception):
    """The execution cannot be captured in a CUDA graph; the process should not be used further."""


def time_gpu(execute: Execute, rule: StopRule) -> tuple[Timing, bool]:
    """Return the GPU time of an execution, and whether the process is still fit for other cases.

    A failed capture can leave torch's allocator and random generators in capture mode.
    """
    with collector_paused():
        warm = warm_up(lambda: _call_s(execute), least_s=min(WARM_UP_S, rule.target_s))
        if warm.estimate_s > MAX_CAPTURED_S:
            timing = _time_eager(execute, rule, warm)
            timing.details["not_captured"] = f"an execution takes over {MAX_CAPTURED_S:g} s"
            return timing, True
        try:
            return _time_graph(execute, rule, warm), True
        except NotCapturableError as error:
            reason = str(error)
        timing = _time_profiler(execute, rule, warm) or _time_eager(execute, rule, warm)
    timing.details["not_captured"] = reason
    return timing, False


def time_calls(execute: Execute, rule: StopRule) -> Timing:
    """Return the time between two events around one eager call, launch gaps included."""
    with collector_paused():
        warm = warm_up(lambda: _call_s(execute), least_s=min(WARM_UP_S, rule.target_s))
        return _time_eager(execute, rule, warm)


def time_profiler(execute: Execute, rule: StopRule) -> Timing | None:
    """Return the sums of kernel durations by the profiler, or None if it sees no kernels."""
    with collector_paused():
        warm = warm_up(lambda: _call_s(execute), least_s=min(WARM_UP_S, rule.target_s))
        return _time_profiler(execute, rule, warm)


def _call_s(execute: Execute) -> float:
    """Execute once on an idle device and return the time between two events around it."""
    begin, end = _event(), _event()
    torch.cuda.synchronize()
    begin.record()
    execute()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _time_eager(execute: Execute, rule: StopRule, warm: WarmUp) -> Timing:
    criterion = Criterion(rule)
    samples: list[float] = []
    while batch := criterion.batch():
        for _ in range(batch):
            samples.append(_call_s(execute))
            criterion.add(samples[-1], samples[-1])
    return _timing(samples, "events", criterion, warm, executions_per_sample=1)


def _time_graph(execute: Execute, rule: StopRule, warm: WarmUp) -> Timing:
    graph = capture(execute, 1)
    graph.replay()  # the first replay uploads the graph
    once_s = min(_replay_s(graph, 5))
    executions = min(repetitions(once_s, GRAPH_SAMPLE_S), MAX_EXECUTIONS_PER_GRAPH)
    if executions > 1:
        graph.reset()
        graph = capture(execute, executions)
        graph.replay()
    criterion = Criterion(rule)
    samples: list[float] = []
    while batch := criterion.batch():
        queued = max(1, min(batch, int(MAX_QUEUED_S / (once_s * executions))))
        for spent_s in _replay_s(graph, queued):
            samples.append(spent_s / executions)
            criterion.add(samples[-1], spent_s)
    graph.reset()
    return _timing(samples, "cuda-graph", criterion, warm, executions_per_sample=executions)


def _replay_s(graph: torch.cuda.CUDAGraph, count: int) -> list[float]:
    """Replay back to back and return each replay's time.

    A kernel that only waits goes first: the CPU fills the queue behind it, and so no sample holds
    the launching of its graph.
    """
    events = [_event() for _ in range(count + 1)]
    wait: Any = torch.cuda._sleep  # pyright: ignore
    wait(BLOCKING_CYCLES)
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in pairwise(events)]


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


def _time_profiler(execute: Execute, rule: StopRule, warm: WarmUp) -> Timing | None:
    """Sum the durations of each execution's kernels; None if the profiler sees no kernels."""
    wanted = min(rule.max_samples, MAX_PROFILED, int(rule.target_s / max(warm.estimate_s, 1e-6)))
    affordable = int(min(rule.limit_s, 1e6) / max(warm.estimate_s, 1e-6))
    count = max(1, min(max(wanted, rule.min_samples), affordable))
    durations = _kernel_durations_s(execute, count)
    if not durations:
        return None
    samples = per_execution(durations, count)
    criterion = Criterion(rule)
    for sample in samples:
        criterion.add(sample, sample)
    criterion.batch()
    timing = _timing(
        samples, "profiler-kernel-sum", criterion, warm, executions_per_sample=count // len(samples)
    )
    timing.details["kernels_per_execution"] = len(durations) / count
    return timing


def per_execution(durations_s: Sequence[float], count: int) -> list[float]:
    """Split kernel durations, in order of their start, into the sums of `count` equal executions.

    Executions that launch different numbers of kernels cannot be told apart: then their mean is
    the only sample.
    """
    if len(durations_s) % count:
        return [sum(durations_s) / count]
    each = len(durations_s) // count
    return [sum(durations_s[i * each : (i + 1) * each]) for i in range(count)]


def _kernel_durations_s(execute: Execute, count: int) -> list[float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(count):
            execute()
        torch.cuda.synchronize()
    events: Any = profiler.events() or ()
    kernels = [e.time_range for e in events if e.device_type.name == "CUDA"]
    return [time_range.elapsed_us() / 1e6 for time_range in sorted(kernels, key=_start)]


def _start(time_range: Any) -> float:
    return time_range.start


def _timing(
    samples: Sequence[float],
    method: str,
    criterion: Criterion,
    warm: WarmUp,
    *,
    executions_per_sample: int,
) -> Timing:
    details: dict[str, Any] = {
        "convergence": criterion.report(),
        "warm_up": warm.report(),
        "executions_per_sample": executions_per_sample,
        "l2": "warm",
    }
    return Timing(samples_s=tuple(samples), method=method, details=details)
