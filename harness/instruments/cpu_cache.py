"""The CPU's last-level cache: how large it is, and the time of an execution that finds it cold.

Imports no torch at module level. Sizes: Linux, Documentation/ABI/testing/sysfs-devices-system-cpu.
"""

import time
from pathlib import Path

from mambench.harness.instruments.timing import (
    Clock,
    Criterion,
    Execute,
    StopRule,
    Timing,
    clock_resolution_s,
    collect,
    collector_paused,
    warm_up_for,
)

EVICT_SIZES = 2
LARGEST_BYTES = 256 << 20  # reading twice that takes a tenth of a second for each sample
_ROOT = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def last_level_bytes(root: Path = _ROOT) -> int | None:
    """Return the size of the first CPU's largest cache, None if the system does not say."""
    sizes: list[int] = []
    for path in root.glob("cpu0/cache/index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes, default=None)


def missing() -> str | None:
    """Return why the cache cannot be emptied here, or None."""
    size = last_level_bytes()
    if size is None:
        return "the system does not say how large the CPU's caches are"
    if size > LARGEST_BYTES:
        return (
            f"the last-level cache has {size >> 20} MiB, which takes too long to empty before each "
            f"execution (at most {LARGEST_BYTES >> 20} MiB)"
        )
    return None


def evictor() -> Execute:
    """Return what empties the caches by reading twice the size of the largest, on all threads."""
    import torch

    size = last_level_bytes()
    assert size is not None
    return torch.zeros(EVICT_SIZES * size // 4, dtype=torch.float32).sum


def time_cold(
    execute: Execute, evict: Execute, rule: StopRule, *, clock: Clock = time.perf_counter_ns
) -> Timing:
    """Time an execution on the CPU, the caches emptied before each and that not timed.

    An execution cannot be repeated inside a sample, so a short one is as coarse as the clock.
    """

    def timed() -> float:
        begin = clock()
        execute()
        return (clock() - begin) / 1e9

    def take(count: int) -> list[tuple[float, float]]:
        taken: list[tuple[float, float]] = []
        for _ in range(count):
            begin = clock()
            evict()
            sample_s = timed()
            taken.append((sample_s, (clock() - begin) / 1e9))
        return taken

    criterion = Criterion(rule)
    with collector_paused():
        warm = warm_up_for(timed, rule)
        samples, _ = collect(criterion, take)
    details = {
        "convergence": criterion.report(),
        "warm_up": warm.report(),
        "executions_per_sample": 1,
        "clock_resolution_s": clock_resolution_s(clock),
        "cache": f"cold: {EVICT_SIZES} times the last level's size read before each execution",
    }
    return Timing(samples_s=tuple(samples), method="perf_counter-after-eviction", details=details)
