"""GPU time with a cold L2. Imports torch at module level; used by workers only.

L2 is emptied before each execution by reading twice its size (each half of the cache keeps lines of
its own). Reading leaves clean lines; after writing, the execution would pay for the write-back of
the lines that emptied the cache. What the execution before it left dirty is written back meanwhile.

One execution is captured in a graph, and emptying lies outside the two events around its replay.
What such a pair of events adds to a replay (`cuda_timing.bracket_s`) is taken off each sample as it
is off hot ones: so cold and hot differ by the cache alone.
"""

from typing import Any

import torch

from mambench.harness.instruments.cuda_timing import (
    MAX_QUEUED_S,
    NotCapturableError,
    Run,
    as_timing,
    bracket_s,
    captured_once,
    event,
    hold_queue,
    time_eager,
    without_bracket_s,
)
from mambench.harness.instruments.telemetry import ThrottleWatch
from mambench.harness.instruments.timing import (
    Criterion,
    Execute,
    StopRule,
    Timing,
    collect,
    collector_paused,
)

EVICT_L2_SIZES = 2
MAX_QUEUED = 32  # evictions and replays: the waiting kernel hides the launch of so many


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
        evict, reason, timing = evictor(), not_capturable or run.needs_no_graph, None
        if run.needs_no_graph is not None:
            timing = time_eager(run, evict)
            if run.was_slow_once(timing):
                timing, reason = None, not_capturable
        if reason is None:
            try:
                timing = _time_graph(run, evict)
            except NotCapturableError as error:
                reason, reusable = str(error), False
        timing = timing or run.without_graph(evict)
    timing.details["l2"] = f"cold: {EVICT_L2_SIZES} times its size read before each execution"
    if reason is not None:
        run.explain(timing, reason)
    return timing, reusable


def evictor() -> Execute:
    """Return what empties the current device's L2 by reading; it holds a buffer until dropped."""
    cuda: Any = torch.cuda
    size: int = EVICT_L2_SIZES * cuda.get_device_properties(cuda.current_device()).L2_cache_size
    return torch.zeros(size // 4, dtype=torch.float32, device="cuda").sum


def _time_graph(run: Run, evict: Execute) -> Timing:
    bracket = bracket_s()
    graph, once_s = captured_once(run)
    queued = max(1, min(MAX_QUEUED, int(MAX_QUEUED_S / once_s)))

    def take(count: int) -> list[tuple[float, float]]:
        spent: list[float] = []
        while len(spent) < count:
            spent += _replay_s(graph, evict, min(queued, count - len(spent)), run.watch)
        return [(without_bracket_s(s, bracket), s) for s in spent]

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
    timing.details["bracket_s"] = bracket  # taken off each sample
    return timing


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
