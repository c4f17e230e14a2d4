"""Durations of kernels as torch's profiler saw them. Imports torch inside functions only."""

from collections.abc import Callable, Sequence
from typing import Any

Execute = Callable[[], object]


def per_execution(durations_s: Sequence[float], count: int, *, skip: int = 0) -> list[float]:
    """Split kernel durations, in order of their start, into the sums of `count` equal executions.

    The first `skip` kernels of each are not the execution's. Executions that launch different
    numbers of kernels cannot be told apart: then their mean is the only sample, and if some are to
    be skipped there is none.
    """
    if not durations_s or (skip and len(durations_s) % count):
        return []
    if len(durations_s) % count:
        return [sum(durations_s) / count]
    each = len(durations_s) // count
    if each <= skip:
        return []
    return [sum(durations_s[i * each + skip : (i + 1) * each]) for i in range(count)]


def kernel_durations_s(
    execute: Execute, count: int, *, before: Execute | None = None
) -> list[float]:
    """Return the durations of all kernels of so many executions, in order of their start."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(count):
            if before is not None:
                before()
            execute()
        torch.cuda.synchronize()
    events: Any = profiler.events() or ()
    kernels = [e.time_range for e in events if e.device_type.name == "CUDA"]
    return [time_range.elapsed_us() / 1e6 for time_range in sorted(kernels, key=_start)]


def _start(time_range: Any) -> float:
    return time_range.start
