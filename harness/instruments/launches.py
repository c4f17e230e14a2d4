"""What one execution launches: kernels by name, their shares, what Triton compiled them to.

Imports torch and triton inside functions only. A profiler that was attached once leaves its hooks
behind, so this belongs in a process that times nothing.
"""

import gc
import importlib
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

MAX_KERNELS = 40  # named in a record, the longest first
Execute = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One kernel, copy or fill on the device."""

    name: str
    time_s: float


def trace(execute: Execute) -> list[Launch]:
    """Execute once under torch's profiler and return what ran on the device, in order."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        execute()
        torch.cuda.synchronize()
    events: Any = profiler.events() or ()
    ran = [event for event in events if event.device_type.name == "CUDA"]
    ran.sort(key=lambda event: event.time_range.start)
    return [Launch(name=e.name, time_s=e.time_range.elapsed_us() / 1e6) for e in ran]


def by_kernel(launches: Iterable[Launch]) -> list[dict[str, Any]]:
    """Return count, time and share of each kernel, the longest total first."""
    counts, times_s = Counter[str](), defaultdict[str, float](float)
    for launch in launches:
        counts[launch.name] += 1
        times_s[launch.name] += launch.time_s
    total_s = sum(times_s.values())
    rows = [
        {
            "name": name,
            "count": counts[name],
            "time_s": time_s,
            "share": time_s / total_s if total_s > 0 else None,
        }
        for name, time_s in sorted(times_s.items(), key=lambda item: -item[1])
    ]
    return rows


class CompileTimes:
    """How long Triton compiled, kernel by kernel, while `watching`; caches count as hits."""

    def __init__(self) -> None:
        self.compiled_s: dict[str, float] = {}
        self.hits = 0

    def __call__(
        self, *, metadata: Mapping[str, Any], times: Any, cache_hit: bool, **_: Any
    ) -> None:
        """Take what Triton's compilation listener is told; times are in microseconds."""
        if cache_hit:
            self.hits += 1
            return
        name = str(metadata.get("name") or "?")
        self.compiled_s[name] = self.compiled_s.get(name, 0.0) + times.total / 1e6

    @property
    def seen(self) -> bool:
        """Whether Triton compiled anything, or found it in its cache."""
        return bool(self.compiled_s or self.hits)

    @property
    def total_s(self) -> float:
        """The seconds of all kernels."""
        return sum(self.compiled_s.values())

    @contextmanager
    def watching(self) -> Generator[None]:
        """Listen to Triton's compiler, where there is one that can be listened to."""
        compilation = getattr(
            getattr(sys.modules.get("triton"), "knobs", None), "compilation", None
        )
        if compilation is None or not hasattr(compilation, "listener"):
            yield
            return
        before = compilation.listener
        compilation.listener = self
        try:
            yield
        finally:
            compilation.listener = before


def triton_kernels(
    execute: Execute, synchronize: Callable[[], None]
) -> list[dict[str, Any]] | None:
    """Execute once and return what each Triton kernel that was launched was compiled to.

    None if Triton is not loaded or has no launch hook. What autotuning chose shows as the kernel's
    constants, warps and stages: the configuration that runs is the one that won.
    """
    triton: Any = sys.modules.get("triton")
    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    if runtime is None or not hasattr(runtime, "launch_enter_hook"):
        return None
    launched = Counter[int]()

    def enter(metadata: Any) -> None:
        launched[int(metadata.get()["function"])] += 1

    with _hooked(runtime, enter):
        execute()
        synchronize()
    return _described(launched)


@contextmanager
def _hooked(runtime: Any, enter: Callable[[Any], None]) -> Generator[None]:
    before = runtime.launch_enter_hook
    chained = hasattr(before, "add")  # from Triton 3.5 on hooks form a chain
    if chained:
        before.add(enter)
    else:
        runtime.launch_enter_hook = enter
    try:
        yield
    finally:
        if chained:
            before.remove(enter)
        else:
            runtime.launch_enter_hook = before


def _described(launched: Mapping[int, int]) -> list[dict[str, Any]]:
    compiled: Any = importlib.import_module("triton.compiler.compiler").CompiledKernel
    found: dict[int, dict[str, Any]] = {}
    everything: list[Any] = gc.get_objects()
    for kernel in everything:
        if type(kernel) is compiled and kernel.function in launched:
            found.setdefault(kernel.function, _facts(kernel, launched[kernel.function]))
    return sorted(found.values(), key=lambda facts: str(facts["name"]))


def _facts(kernel: Any, count: int) -> dict[str, Any]:
    metadata = kernel.metadata
    return {
        "name": kernel.name,
        "count": count,
        "registers": kernel.n_regs,
        "spills": kernel.n_spills,
        "shared_bytes": metadata.shared,
        "warps": metadata.num_warps,
        "stages": metadata.num_stages,
        "constants": _constants(kernel),
        "hash": str(getattr(kernel, "hash", ""))[:12] or None,
    }


def _constants(kernel: Any) -> dict[str, Any]:
    """Return the compile-time constants by name: block sizes, switches."""
    source = getattr(kernel, "src", None)
    names = getattr(getattr(source, "fn", None), "arg_names", ())
    found: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = getattr(source, "constants", None) or {}
    for path, value in constants.items():
        if len(path) == 1 and path[0] < len(names):  # longer paths lead into tuples
            plain = value if isinstance(value, int | float | str | None) else str(value)
            found[names[path[0]]] = plain
    return found
