"""Peak memory of one pass: of torch's allocator on a GPU, of the process on a CPU.

Imports neither torch nor triton at module level. In both cases three levels are read: `before` the
pass (inputs made), the `peak` while it runs, and `after` everything of the case was released. What
is left then (library workspaces, caches) belongs to no case:

    peak_bytes  = peak - after     inputs and outputs included
    extra_bytes = peak - before    what the pass itself allocated
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

Execute = Callable[[], object]

# glibc's mallopt parameters (malloc.h) and the values that make it return freed memory at once, so
# that the high-water mark shows what was allocated and not what the heap kept. At most this many
# mapped blocks: the kernel allows 65,530 mappings, and threads need some.
_MALLOC_OPTIONS = {
    -3: 65536,  # M_MMAP_THRESHOLD
    -1: 65536,  # M_TRIM_THRESHOLD
    -2: 0,  # M_TOP_PAD
    -4: 16384,  # M_MMAP_MAX
}
_PR_SET_THP_DISABLE = 41  # prctl: huge pages would round each allocation up to 2 MiB


@dataclass(frozen=True, kw_only=True)
class MemoryReading:
    """Bytes, or None with the reason why there are none."""

    peak_bytes: int | None = None
    extra_bytes: int | None = None
    reserved_bytes: int | None = None  # of a GPU: the allocator's, unused blocks included
    method: str | None = None
    missing: str | None = None
    details: dict[str, Any] = field(default_factory=dict[str, Any])


class Meter(Protocol):
    """Reads one kind of memory."""

    method: str

    def settle(self) -> None:
        """Return what is free to where it came from."""

    def reset_peak(self) -> None:
        """Let the peak begin at the present level."""

    def level(self) -> int:
        """Return the bytes held now."""
        ...

    def peak(self) -> int:
        """Return the most bytes held at once since `reset_peak`."""
        ...

    def peak_reserved(self) -> int | None:
        """Return the most bytes that the allocator held for it; None where there is no such."""
        ...


def measure(
    meter: Meter,
    prepare: Callable[[], Execute],
    release: Execute,
    *,
    inspect: Callable[[object], object] | None = None,
    input_bytes: int | None = None,
) -> MemoryReading:
    """Run a pass once and return its memory.

    What the case holds before the pass is what its release frees. Where something keeps that (a
    peer's kernels have kept their last arguments) it is the inputs and what `prepare` added: else
    the peak would lack them.

    Args:
        meter: reads the memory of the device.
        prepare: makes the closure that executes the pass once.
        release: frees the inputs and whatever else belongs to the case.
        inspect: shown what the pass returned, once its peak is known; keeps nothing of it.
        input_bytes: size of the inputs, which are there already; None where it is not known.
    """
    meter.settle()
    unprepared = meter.level()
    execute = prepare()
    meter.settle()
    before = meter.level()
    meter.reset_peak()
    outcome = execute()
    peak, reserved = max(meter.peak(), before), meter.peak_reserved()
    if inspect is not None:
        inspect(outcome)
    del outcome, execute
    release()
    meter.settle()
    after = min(meter.level(), before)
    held = max(before - after, input_bytes + max(0, before - unprepared) if input_bytes else 0)
    kept = held - (before - after)
    details = {"before_bytes": before, "peak_bytes": peak, "after_bytes": after}
    return MemoryReading(
        peak_bytes=peak - before + held,
        extra_bytes=peak - before,
        reserved_bytes=reserved,
        method=meter.method,
        details=details | ({"kept_after_release_bytes": kept} if kept else {}),
    )


class CudaMeter:
    """Bytes that torch's caching allocator has handed out; no others are seen."""

    method = "torch.cuda.max_memory_allocated"

    def __init__(self, device: str) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = device

    def settle(self) -> None:
        """Collect garbage, wait for the device and empty the allocator's cache."""
        gc.collect()
        self._cuda.synchronize(self._device)
        self._cuda.empty_cache()

    def reset_peak(self) -> None:
        """Let the allocator's peak begin at the present level."""
        self._cuda.reset_peak_memory_stats(self._device)

    def level(self) -> int:
        """Return the bytes allocated now."""
        return self._cuda.memory_allocated(self._device)

    def peak(self) -> int:
        """Return the most bytes allocated at once since `reset_peak`."""
        self._cuda.synchronize(self._device)
        return self._cuda.max_memory_allocated(self._device)

    def peak_reserved(self) -> int | None:
        """Return the most bytes that the allocator held from the driver since `reset_peak`."""
        return self._cuda.max_memory_reserved(self._device)


class ResidentMeter:
    """Resident bytes of this process, as the Linux kernel counts them; page granularity."""

    method = "VmHWM"

    def settle(self) -> None:
        """Collect garbage and return the heap's free pages."""
        gc.collect()
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)

    def reset_peak(self) -> None:
        """Let the high-water mark begin at the present level."""
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")

    def level(self) -> int:
        """Return VmRSS."""
        return _status("VmRSS")

    def peak(self) -> int:
        """Return VmHWM."""
        return _status("VmHWM")

    def peak_reserved(self) -> int | None:
        """Return None: the process' pages are what it holds."""


def cpu_missing() -> str | None:
    """Return why this process' high-water mark cannot be measured here, or None."""
    if sys.platform != "linux":
        return f"peak memory on the CPU is read from Linux's /proc; this is {sys.platform}"
    try:
        ResidentMeter().reset_peak()
        _status("VmHWM")
    except (OSError, LookupError) as error:
        return f"the kernel does not let the high-water mark be reset: {error}"
    return None


def tune_malloc() -> bool:
    """Make this process return freed memory at once; returns whether the C library can.

    It slows allocation down, so it belongs in a process that measures no time.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        return False
    done = [libc.mallopt(option, value) == 1 for option, value in _MALLOC_OPTIONS.items()]
    libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    return all(done)


def _status(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    raise LookupError(f"/proc/self/status has no {key}")
