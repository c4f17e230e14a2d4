"""Measures a machine's ceilings: copy bandwidth, matrix and exponential rates, launch cost.

A program of its own (see `harness.instruments.ceilings`), so that what is measured finds a fresh
process and leaves nothing behind. Each ceiling is the median of samples taken after a warm-up long
enough for the clocks to settle; all samples are kept. On a processor it is the fastest tenth of
them: threads wait for one another, and where other work takes a core even for a moment, most
samples hold the scheduler's time slice, which is no ceiling. What a machine cannot do has a reason
instead.
"""

import gc
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from statistics import median
from typing import Any

import torch

from mambench.harness.failures import describe
from mambench.harness.instruments.ceilings import (
    COPY,
    EXP,
    LAUNCH_EAGER,
    LAUNCH_GRAPH,
    MATRIX,
    VECTOR,
)
from mambench.harness.instruments.telemetry import Telemetry
from mambench.harness.spec import Device, DeviceKind

SIZES: Mapping[DeviceKind, Mapping[str, float]] = {
    # A copy of several times L2; a product large enough that its edges do not count.
    DeviceKind.CUDA: {"copy_bytes": 1 << 30, "matrix": 8192, "exp_rounds": 512, "seconds": 0.4},
    DeviceKind.CPU: {"copy_bytes": 1 << 28, "matrix": 2048, "exp": 1 << 16, "seconds": 0.4},
}
MATRIX_DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp64")
LONGEST_PRODUCT_S = 0.1  # smaller matrices where one product would take longer
LEAST_MATRIX = 256
LAUNCHES = 1000
MIN_SAMPLES, MAX_SAMPLES = 5, 100
FASTEST = 0.1  # of a processor's samples
_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp64": torch.float64,
}

Found = dict[str, Any]


@dataclass(frozen=True)
class Rate:
    """Samples of a program that does a known amount of work."""

    work: float
    samples_s: tuple[float, ...]
    fastest: float | None = None  # this share of the samples counts; None: their median

    @property
    def per_s(self) -> float:
        """Work over the median time of what counts."""
        if self.fastest is None:
            return self.work / median(self.samples_s)
        count = max(1, round(self.fastest * len(self.samples_s)))
        return self.work / median(sorted(self.samples_s)[:count])

    def found(self, method: str, **details: Any) -> Found:
        """Return the ceiling as plain JSON values."""
        statistic = "median" if self.fastest is None else f"fastest {self.fastest:.0%}"
        details = {
            "work": self.work,
            "statistic": statistic,
            "samples_s": list(self.samples_s),
            **details,
        }
        return {"value": self.per_s, "method": method, "details": details}


def main(arguments: list[str]) -> None:
    """Measure, and write the answer to the file that is named first."""
    path, request = arguments[0], json.loads(arguments[1])
    capability = request["compute_capability"]
    device = Device(
        kind=DeviceKind(request["kind"]),
        index=request["index"],
        name=request["name"],
        compute_capability=tuple(capability) if capability else None,
        memory_bytes=request["memory_bytes"],
    )
    torch.set_num_threads(request["threads"])
    answer = calibrate(device, {**SIZES[device.kind], **request["sizes"]})
    with open(path, "w") as file:
        json.dump(answer, file)


def calibrate(device: Device, sizes: Mapping[str, float]) -> dict[str, Any]:
    """Measure every ceiling of a device; one that fails has its reason and stops no other."""
    cuda: Any = torch.cuda
    on_gpu = device.kind is DeviceKind.CUDA
    if on_gpu:
        cuda.set_device(device.index)
    bench = _Bench(device, sizes)
    telemetry = Telemetry(device)
    parts: dict[str, Callable[[], Found]] = {
        COPY: bench.copy,
        **{f"{MATRIX}-{name}": bench.matrix(name) for name in MATRIX_DTYPES},
        VECTOR: bench.vector,
        EXP: bench.exponentials,
        LAUNCH_EAGER: bench.launch_eager,
        LAUNCH_GRAPH: bench.launch_graph,
    }
    before = telemetry.snapshot()
    found: dict[str, Found] = {}
    for name, part in parts.items():
        try:
            found[name] = part()
        except Exception as error:  # a dtype or a compiler that this machine lacks
            found[name] = {"value": None, "reason": describe(error)}
        gc.collect()
        if on_gpu:
            cuda.empty_cache()
    return {
        "ceilings": found,
        "sm_count": cuda.get_device_properties(device.index).multi_processor_count
        if on_gpu
        else None,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "telemetry": {"before": before, "after": telemetry.snapshot()},
    }


class _Bench:
    """The programs, on one device."""

    def __init__(self, device: Device, sizes: Mapping[str, float]) -> None:
        self._sizes = sizes
        self._on_gpu = device.kind is DeviceKind.CUDA
        self._where = device.torch_name
        self._cuda: Any = torch.cuda
        limit = device.memory_bytes // 8
        self._copy_bytes = int(min(sizes["copy_bytes"], limit)) // 4096 * 4096

    def copy(self) -> Found:
        """Bytes read and written per second; what a processor reads before writing not counted."""
        source = torch.ones(self._copy_bytes // 4, device=self._where)
        target = torch.empty_like(source)
        ways: dict[str, Callable[[], object]] = {"torch copy_": lambda: target.copy_(source)}
        if self._on_gpu:  # a memcpy and a kernel: whichever is faster is the ceiling
            ways["torch add"] = lambda: torch.add(source, 1.0, out=target)
        rates = {name: self._rate(way, 2.0 * self._copy_bytes) for name, way in ways.items()}
        best = max(rates, key=lambda name: rates[name].per_s)
        others = {f"{name} bytes_per_s": rate.per_s for name, rate in rates.items()}
        return rates[best].found(best, bytes_each=self._copy_bytes, **others)

    def matrix(self, name: str) -> Callable[[], Found]:
        """Return what measures the rate of a large square product on random data."""

        def measure() -> Found:
            if name == "tf32" and not self._on_gpu:
                return {"value": None, "reason": "a processor has no tf32"}
            with _tf32(name == "tf32"):
                size, left, right = self._matrices(_DTYPES[name])
                out = torch.empty_like(left)
                rate = self._rate(lambda: torch.mm(left, right, out=out), 2.0 * size**3)
            return rate.found("torch mm", size=size)

        return measure

    def vector(self) -> Found:
        """FLOP/s of fp32 multiply-adds outside the matrix units."""
        if not self._on_gpu:
            with _tf32(False):
                return self.matrix("fp32")()  # a processor's products run on its vector units
        return self._kernel("multiply_adds")

    def exponentials(self) -> Found:
        """Base-2 exponentials per second of a GPU; exp of a tensor in cache on a processor."""
        if self._on_gpu:
            return self._kernel("exponentials")
        count = int(self._sizes["exp"]) * torch.get_num_threads()
        values = torch.rand(count)
        out = torch.empty_like(values)
        return self._rate(lambda: torch.exp(values, out=out), count).found("torch exp", size=count)

    def launch_eager(self) -> Found:
        """Seconds from one launch of an empty kernel to the next, from Python."""
        if not self._on_gpu:
            value = torch.zeros(1)
            return self._launch(lambda: value.add_(1), "torch add_ of one element")
        return self._launch(lambda: self._cuda._sleep(0), "torch.cuda._sleep(0)")

    def launch_graph(self) -> Found:
        """Seconds from one empty kernel to the next in a CUDA graph."""
        if not self._on_gpu:
            return {"value": None, "reason": "a processor has no CUDA graphs"}
        stream = self._cuda.Stream()
        graph = self._cuda.CUDAGraph()
        with self._cuda.stream(stream), self._cuda.graph(graph, stream=stream):
            for _ in range(LAUNCHES):
                self._cuda._sleep(0)
        rate = self._rate(graph.replay, LAUNCHES)
        return _inverse(rate.found("CUDA graph of torch.cuda._sleep(0)"))

    def _launch(self, call: Callable[[], object], method: str) -> Found:
        def calls() -> None:
            for _ in range(LAUNCHES):
                call()

        return _inverse(self._rate(calls, LAUNCHES, events=False).found(method))

    def _kernel(self, name: str) -> Found:
        from mambench.kernels import ceilings_triton

        sm_count = self._cuda.get_device_properties(self._where).multi_processor_count
        out = torch.empty(ceilings_triton.PROGRAMS_PER_SM * sm_count, device=self._where)
        rounds = int(self._sizes["exp_rounds"])
        run: Callable[[torch.Tensor, int], int] = getattr(ceilings_triton, name)
        work = run(out, rounds)
        return self._rate(lambda: run(out, rounds), work).found(
            f"triton, {name}", programs=out.numel(), rounds=rounds
        )

    def _matrices(self, dtype: torch.dtype) -> tuple[int, torch.Tensor, torch.Tensor]:
        """Return square matrices of random values, small enough that a product is not too long."""
        size = LEAST_MATRIX
        while True:
            left, right = (
                torch.randn(size, size, device=self._where, dtype=torch.float32).to(dtype)
                for _ in range(2)
            )
            torch.mm(left, right)
            taken_s = min(self._once_s(lambda: torch.mm(left, right)) for _ in range(2))  # noqa: B023
            twice = min(2 * size, int(self._sizes["matrix"]))
            if size >= twice or 8 * taken_s > LONGEST_PRODUCT_S:
                return size, left, right
            size = twice

    def _rate(self, execute: Callable[[], object], work: float, *, events: bool = True) -> Rate:
        """Execute until the clocks have settled, then take samples for as long again."""
        once = self._once_s if events and self._on_gpu else self._wall_s
        seconds = self._sizes["seconds"]
        begin = time.perf_counter()
        once(execute)
        while time.perf_counter() - begin < seconds / 2:
            once(execute)
        samples: list[float] = []
        begin = time.perf_counter()
        while len(samples) < MIN_SAMPLES or time.perf_counter() - begin < seconds / 2:
            samples.append(once(execute))
            if len(samples) == MAX_SAMPLES:
                break
        return Rate(work, tuple(samples), None if self._on_gpu else FASTEST)

    def _once_s(self, execute: Callable[[], object]) -> float:
        """Return the device's time of one execution."""
        if not self._on_gpu:
            return self._wall_s(execute)
        begin, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        execute()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def _wall_s(self, execute: Callable[[], object]) -> float:
        begin = time.perf_counter()
        execute()
        if self._on_gpu:
            self._cuda.synchronize()
        return time.perf_counter() - begin


class _tf32:
    """Allow or forbid TF32 in products of fp32 for a while."""

    def __init__(self, allowed: bool) -> None:
        self._wanted = "high" if allowed else "highest"

    def __enter__(self) -> None:
        self._before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self._wanted)

    def __exit__(self, *error: object) -> None:
        torch.set_float32_matmul_precision(self._before)


def _inverse(found: Found) -> Found:
    """Turn a rate of launches into seconds a launch."""
    return {**found, "value": 1 / found["value"]}


if __name__ == "__main__":
    main(sys.argv[1:])
