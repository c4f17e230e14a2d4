"""GPU time with a cold L2. Imports torch at module level; used by workers only.

L2 is emptied before each execution by reading twice its size (each half of the cache keeps lines of
its own). Reading leaves clean lines; after writing, the execution would pay for the write-back of
the lines that emptied the cache. What the execution before it left dirty is written back meanwhile.

One execution is captured in a graph, and emptying lies outside the two events around its replay.
What such a pair of events adds to a replay is measured on the same graph with a warm L2, against
many executions in one graph, and taken off each sample: so cold and hot differ by the cache alone.
"""

from statistics import median
from typing import Any

import torch

from mambench.harness.cuda_timing import (
    GRAPH_SAMPLE_S,
    MAX_CAPTURED_S,
    MAX_EXECUTIONS_PER_GRAPH,
    MAX_QUEUED_S,
    NotCapturableError,
    Run,
    as_timing,
    capture,
    captured_once,
    event,
    hold_queue,
    profiled,
    replay_s,
    time_eager,
)
from mambench.harness.telemetry import ThrottleWatch
from mambench.harness.timing import (
    Criterion,
    Execute,
    StopRule,
    Timing,
    collect,
    collector_paused,
    repetitions,
)

EVICT_L2_SIZES = 2
MAX_QUEUED = 32  # evictions and replays: the waiting kernel hides the launch of so many
BRACKET_REPLAYS = 10


def time_cold(
    execute: Execute,
    rule: StopRule,
    watch: ThrottleWatch | None = None,
    *,
    not_capturable: str | None = None,
) -> tuple[Timing, bool]:
    """Return the GPU time of an execution that finds L2 full of other, clean lines.

    Args:
        execute: what is timed.
        rule: when to stop.
        watch: tells whether the device was slowed down.
        not_capturable: why a graph of it cannot be captured, where that is known.

    Returns the timing, and whether the process is still fit for other cases.
    """
    run, reusable = Run(execute, rule, watch or ThrottleWatch(None)), True
    with collector_paused():
        run.warm_up()
        evict, reason = evictor(), not_capturable
        if run.warm.estimate_s > MAX_CAPTURED_S:
            timing, reason = time_eager(run, evict), f"an execution takes over {MAX_CAPTURED_S:g} s"
        else:
            timing = None
            if reason is None:
                try:
                    timing = _time_graph(run, evict)
                except NotCapturableError as error:
                    reason, reusable = str(error), False
            timing = timing or profiled(run, evict) or time_eager(run, evict)
    timing.details["l2"] = f"cold: {EVICT_L2_SIZES} times its size read before each execution"
    if reason:
        timing.details["not_captured"] = reason
    return timing, reusable


def evictor() -> Execute:
    """Return what empties the current device's L2 by reading; it holds a buffer until dropped."""
    cuda: Any = torch.cuda
    size: int = EVICT_L2_SIZES * cuda.get_device_properties(cuda.current_device()).L2_cache_size
    return torch.zeros(size // 4, dtype=torch.float32, device="cuda").sum


def _time_graph(run: Run, evict: Execute) -> Timing:
    graph, once_s = captured_once(run)
    bracket_s = _bracket_s(run, graph, once_s)
    queued = max(1, min(MAX_QUEUED, int(MAX_QUEUED_S / once_s)))

    def take(count: int) -> list[tuple[float, float]]:
        spent: list[float] = []
        while len(spent) < count:
            spent += _replay_s(graph, evict, min(queued, count - len(spent)), run.watch)
        return [(spent_s - bracket_s, spent_s) for spent_s in spent]

    evict()
    criterion = Criterion(run.rule)
    samples, throttling = collect(criterion, take, slowed=run.watch.reasons)
    graph.reset()
    timing = as_timing(
        samples,
        "cuda-graph-after-eviction",
        criterion,
        run.warm,
        executions_per_sample=1,
        throttling=throttling,
    )
    timing.details["bracket_s"] = bracket_s  # taken off each sample
    return timing


def _bracket_s(run: Run, graph: torch.cuda.CUDAGraph, once_s: float) -> float:
    """Return what the launch of a graph of one execution adds between two events, L2 warm."""
    executions = min(repetitions(once_s, GRAPH_SAMPLE_S), MAX_EXECUTIONS_PER_GRAPH)
    if executions == 1:
        return 0.0  # longer than 200 us: a hundredth of it at most
    many = capture(run.execute, executions)
    many.replay()
    each_s = median(replay_s(many, BRACKET_REPLAYS, run.watch)) / executions
    many.reset()
    return max(0.0, median(replay_s(graph, BRACKET_REPLAYS, run.watch)) - each_s)


def _replay_s(
    graph: torch.cuda.CUDAGraph, evict: Execute, count: int, watch: ThrottleWatch
) -> list[float]:
    """Empty L2 before each replay and return each replay's time, that of emptying aside."""
    brackets = [(event(), event()) for _ in range(count)]
    hold_queue()
    for begin, end in brackets:
        evict()
        begin.record()
        graph.replay()
        end.record()
    watch.look()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1e3 for begin, end in brackets]
