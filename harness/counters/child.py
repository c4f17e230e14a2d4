"""The program that Nsight Compute profiles: executes each case once within its NVTX range.

A program of its own and not a worker: ncu is a process' parent and slows down what it watches, so
nothing is timed here. Started by `harness.counters.count` with two files: the request (JSON) and
the report (one JSON object a line), which the parent reads while this runs.

L2 before the range holds clean lines of a buffer that was just read: the case's inputs are not in
it, and nobody else's dirty lines are written back at the case's cost. What the case itself leaves
dirty in L2 is written back by reading the buffer again, within a second range: only the bytes
written by that are the case's. (Emptying L2 by writing would leave it full of dirty lines, which
would then be written back within the range.)

The first launch that ncu profiles in a process is preceded by writes of its own, 10 MB and more,
which L2 still holds dirty when the kernel begins. So two ranges come first that nobody asked for.

Where the request says `ranges`, ncu counts what lies between the profiler's start and stop as one.
Each launch is slow even then, in the range or not, and a capture in a CUDA graph as well. So
nothing is executed twice: what loads the kernels is the same case at a length of a few steps.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import IO, TYPE_CHECKING, Any

import torch

from mambench.harness.counters.ncu import DRAIN, PRIME, RUN, range_name
from mambench.harness.failures import classify, describe
from mambench.harness.spec import Case, Device, DeviceKind, Pass
from mambench.harness.workers.protocol import BUILD, COMPILE

if TYPE_CHECKING:
    from mambench.implementations.base import Implementation

COUNT = "count"
WATCH_S = 1.0
BUFFER_IN_L2_SIZES = 4
WARM_EXECUTIONS = 2  # the first compiles and tunes; after the second nothing is left to load
WARM_STEPS = 64  # of a case of thousands of launches, which are the same in every step
KNOWN_L2_SIZES, KNOWN_LAUNCHES = 5, 1000  # of the copy that shows that ranges are counted rightly
BROKEN_STATUS = 75  # the CUDA context is damaged: the cases that are left need another process

Report = Callable[..., None]


def main(arguments: list[str]) -> int:
    """Execute the request's items; returns the exit status."""
    request_path, report_path = arguments
    with open(request_path) as file:
        request: dict[str, Any] = json.load(file)
    # ncu has a session of its own: a runner that is killed takes nobody along.
    ends = (request["runner"], os.getppid())
    threading.Thread(target=_end_with, args=ends, daemon=True).start()
    sys.path.extend(entry for entry in request["sys_path"] if entry not in sys.path)
    with open(report_path, "a", buffering=1) as file:
        return _Child(request, file).run()


def _end_with(runner: int, parent: int) -> None:
    """Kill this process once the runner or ncu is gone."""
    while os.getppid() == parent and os.path.exists(f"/proc/{runner}"):
        time.sleep(WATCH_S)
    os.kill(os.getpid(), signal.SIGKILL)


class _Child:
    def __init__(self, request: Mapping[str, Any], file: IO[str]) -> None:
        self._request = request
        self._file = file
        self._ranges: bool = request.get("ranges", False)
        self._plugins = tuple(request["plugins"])
        self._device = _device(request["device"])
        self._implementations: dict[str, Implementation] = {}

    def run(self) -> int:
        self._report(event="start", pid=os.getpid())
        torch.cuda.set_device(self._device.index)
        buffer = _Buffer()
        for part in (RUN, DRAIN):
            self._within(range_name(PRIME, part), buffer.read)
        known_bytes = KNOWN_L2_SIZES * buffer.l2_bytes // 4096 * 4096
        self._report(event="ready", l2=buffer.describe(), known_bytes=known_bytes)
        for item in self._request["items"]:
            self._report(event="begin", id=item["id"])
            if not self._item(item, buffer):
                return BROKEN_STATUS
        return 0

    def _item(self, item: Mapping[str, Any], buffer: "_Buffer") -> bool:
        """Execute one item and report how it ended; returns whether others can follow."""
        end: dict[str, Any] = {"outcome": "ok"}
        try:
            self._count(item, buffer)
        except BaseException as error:
            end = {"outcome": classify(error).value, "reason": describe(error)}
            del error
        gc.collect()
        usable = True
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception as error:
            end = {"outcome": "error", "reason": describe(error)} | end
            usable = False
        self._report(event="end", id=item["id"], **end)
        return usable

    def _count(self, item: Mapping[str, Any], buffer: "_Buffer") -> None:
        """Execute one item in its ranges."""
        self._report(event="phase", id=item["id"], phase=BUILD)
        warm = None
        if "case" in item:
            case = Case.from_dict(item["case"])
            if self._ranges and (short := _shortened(case)) is not None:
                warm = self._case(short)
            execute = self._case(case)
        else:
            execute = _probe(item, buffer.l2_bytes)
        self._report(event="phase", id=item["id"], phase=COMPILE)
        for _ in range(WARM_EXECUTIONS):
            (warm or execute)()
            torch.cuda.synchronize()
        del warm
        self._report(event="phase", id=item["id"], phase=COUNT)
        buffer.read()
        kept = self._within(range_name(item["id"], RUN), execute)
        self._within(range_name(item["id"], DRAIN), buffer.read)
        del kept

    def _within(self, name: str, execute: Callable[[], object]) -> object:
        """Execute within an NVTX range of the whole process; returns what was computed."""
        nvtx: Any = torch.cuda.nvtx
        profiler: Any = torch.cuda.profiler
        handle = nvtx.range_start(name)
        try:
            if self._ranges:
                profiler.start()
            result = execute()
            torch.cuda.synchronize()
            if self._ranges:
                profiler.stop()
                self._report(event="range", name=name)
        finally:
            nvtx.range_end(handle)
        return result

    def _case(self, case: Case) -> Callable[[], object]:
        from mambench.harness import registry
        from mambench.implementations.workload import build

        name = case.implementation
        if name not in self._implementations:
            self._implementations[name] = registry.get(name, self._plugins)
        implementation = self._implementations[name]
        # What a check compares with may be older code, which does not know of it.
        begin: Callable[[Case], None] | None = getattr(implementation, "begin_case", None)
        if begin is not None:
            begin(case)
        workload = build(case, implementation, self._device, seed=self._request["seed"])
        return workload.prepare(case.pass_)

    def _report(self, **values: Any) -> None:
        self._file.write(json.dumps(values | {"at": time.monotonic()}) + "\n")


def _shortened(case: Case) -> Case | None:
    """Return the same case over a few steps; None if it is not one over time, or short already."""
    if case.pass_ is Pass.DECODE or case.problem.length <= WARM_STEPS:
        return None
    return replace(case, problem=replace(case.problem, seqlen=WARM_STEPS))


class _Buffer:
    """Memory of several times L2's size, read to put L2 into a known condition."""

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self.l2_bytes: int = cuda.get_device_properties(cuda.current_device()).L2_cache_size
        count = BUFFER_IN_L2_SIZES * self.l2_bytes // 4
        self._values = torch.zeros(count, dtype=torch.float32, device="cuda")
        self.read()

    def read(self) -> None:
        """Read all of it, and wait: lines that were dirty have then been written back."""
        self._values.amax()
        torch.cuda.synchronize()

    def describe(self) -> dict[str, Any]:
        """Return how L2 is prepared, for the record."""
        return {
            "before": "clean lines of another buffer",
            "l2_bytes": self.l2_bytes,
            "buffer_bytes": self._values.numel() * 4,
        }


def _probe(item: Mapping[str, Any], l2_bytes: int) -> Callable[[], object]:
    """Return a kernel that moves a known number of bytes; a memcpy would not be a kernel."""
    if "known" in item:
        return _known_copy(KNOWN_L2_SIZES * l2_bytes // 4096 * 4096)
    (kind, count), *_ = ((name, value) for name, value in item.items() if name != "id")
    source = torch.ones(count // 4, dtype=torch.float32, device="cuda")
    if kind == "read_bytes":
        return source.amax
    if kind == "write_bytes":
        return lambda: source.fill_(2.0)
    target = torch.empty_like(source)
    return lambda: torch.add(source, 1.0, out=target)


def _known_copy(count: int) -> Callable[[], object]:
    """Return a copy of so many bytes in as many launches as a range must hold together."""
    source = torch.ones(count // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    parts = list(zip(source.chunk(KNOWN_LAUNCHES), target.chunk(KNOWN_LAUNCHES), strict=True))

    def copy() -> None:
        for part, out in parts:
            torch.add(part, 1.0, out=out)

    return copy


def _device(values: Mapping[str, Any]) -> Device:
    capability = values["compute_capability"]
    return Device(
        kind=DeviceKind(values["kind"]),
        index=values["index"],
        name=values["name"],
        compute_capability=tuple(capability) if capability else None,
        memory_bytes=values["memory_bytes"],
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
