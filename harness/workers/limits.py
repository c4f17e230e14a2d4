"""What a worker may use of this machine: threads and memory. Imports neither torch nor triton."""

import os

import psutil

from mambench.harness import machine
from mambench.harness.spec import Settings

MEMORY_FRACTION = 0.8


def thread_count(settings: Settings) -> int:
    """Return the CPU threads a worker uses: as set, or all physical cores it may run on.

    Siblings of one core share its floating-point units, so logical cores do not count; affinity and
    a container's CPU quota do.
    """
    if settings.threads is not None:
        return max(1, settings.threads)
    counts = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    quota = machine.cgroup_cpus()
    if quota is not None:
        counts.append(max(1, int(quota)))
    return min(counts)


def memory_limit(settings: Settings) -> int:
    """Return the host memory in bytes a worker may hold: as set, or 80 % of what there is."""
    if settings.memory_limit_bytes is not None:
        return settings.memory_limit_bytes
    return int(MEMORY_FRACTION * machine.usable_memory_bytes())


def oom_kills() -> int | None:
    """Return how many processes the kernel has killed for want of memory; None where unknown."""
    try:
        with open("/proc/vmstat") as file:
            counters = dict(line.split() for line in file)
    except OSError:
        return None
    return int(counters["oom_kill"]) if "oom_kill" in counters else None
