"""The bookkeeping of cold times, on a fake device; real ones are timed in test_cuda_timing."""

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from mambench.harness.instruments import cuda_cold, cuda_timing  # noqa: E402
from mambench.harness.instruments.timing import StopRule  # noqa: E402

RULE = StopRule(target_s=0.3, min_samples=10, max_samples=50, relative_error=0.002)
GAP_S = 3e-6  # what the launch of a graph adds between two events


class Device:
    """Time passes as it works; an execution is slower when the cache was emptied before it."""

    def __init__(self, hot_s: float, cold_s: float) -> None:
        self.now_s = 0.0
        self.cold = True
        self.evictions = 0
        self._times_s = {False: hot_s, True: cold_s}

    def execute(self) -> None:
        self.now_s += self._times_s[self.cold]
        self.cold = False

    def wait(self) -> None:
        self.now_s += 5e-6

    def evict(self) -> None:
        self.now_s += 40e-6
        self.cold = True
        self.evictions += 1


class Event:
    def __init__(self, device: Device) -> None:
        self._device = device
        self.at_s = 0.0

    def record(self) -> None:
        self.at_s = self._device.now_s

    def synchronize(self) -> None:
        """Wait for nothing."""

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at_s - self.at_s)


class Graph:
    def __init__(self, device: Device, execute: Callable[[], None], executions: int) -> None:
        self._device, self._execute, self._executions = device, execute, executions

    def replay(self) -> None:
        self._device.now_s += GAP_S
        for _ in range(self._executions):
            self._execute()

    def reset(self) -> None:
        """Hold nothing."""


def on(monkeypatch: pytest.MonkeyPatch, device: Device, *, capturable: bool = True) -> None:
    def capture(execute: Callable[[], None], executions: int) -> Graph:
        if not capturable:
            raise cuda_timing.NotCapturableError("planted: cannot be captured")
        return Graph(device, execute, executions)

    monkeypatch.setattr(cuda_timing, "capture", capture)
    monkeypatch.setattr(cuda_timing, "_brackets", {})
    monkeypatch.setattr(cuda_timing, "short_wait", device.wait)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for module in (cuda_timing, cuda_cold):
        monkeypatch.setattr(module, "event", lambda: Event(device))
        monkeypatch.setattr(module, "hold_queue", lambda: None)
    monkeypatch.setattr(cuda_cold, "evictor", lambda: device.evict)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.parametrize("hot_s", [5e-6, 60e-6, 190e-6])
def test_cold_and_hot_differ_by_the_cache_alone(
    monkeypatch: pytest.MonkeyPatch, hot_s: float
) -> None:
    device = Device(hot_s, 2 * hot_s)
    on(monkeypatch, device)
    timing, reusable = cuda_cold.time_cold(device.execute, RULE)
    assert reusable
    assert timing.median_s == pytest.approx(2 * hot_s, rel=1e-6)
    assert timing.details["bracket_s"] == pytest.approx(GAP_S, rel=1e-6)
    assert device.evictions == len(timing.samples_s) + 1
    assert "cold" in timing.details["l2"]


@pytest.mark.parametrize("hot_s", [2e-6, 5e-6, 50e-6, 100e-6, 500e-6, 5e-3])
def test_a_graph_s_launch_is_in_no_time_however_few_executions_share_it(
    monkeypatch: pytest.MonkeyPatch, hot_s: float
) -> None:
    device = Device(hot_s, hot_s)
    on(monkeypatch, device)
    timing, _ = cuda_timing.time_gpu(device.execute, RULE)
    assert timing.median_s == pytest.approx(hot_s, rel=1e-6)
    assert timing.details["bracket_s"] == pytest.approx(GAP_S, rel=1e-6)


def test_a_sample_is_never_less_than_an_event_resolves() -> None:
    assert cuda_timing.without_bracket_s(5e-6, 3.8e-6) == pytest.approx(1.2e-6)
    assert cuda_timing.without_bracket_s(3e-6, 3.8e-6) == cuda_timing.EVENT_STEP_S


def test_what_a_graph_s_launch_takes_is_measured_once_per_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, waits = Device(1e-4, 1e-4), [0]
    on(monkeypatch, device)

    def wait() -> None:
        waits[0] += 1
        device.wait()

    monkeypatch.setattr(cuda_timing, "short_wait", wait)
    cuda_timing.bracket_s()
    once = waits[0]
    assert cuda_timing.bracket_s() == pytest.approx(GAP_S, rel=1e-6)
    assert waits[0] == once


def test_what_the_cache_cannot_hold_is_as_fast_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(1e-3, 1e-3)
    on(monkeypatch, device)
    cold, _ = cuda_cold.time_cold(device.execute, RULE)
    hot, _ = cuda_timing.time_gpu(device.execute, RULE)
    assert cold.median_s == pytest.approx(hot.median_s, rel=1e-6)


def test_what_cannot_be_captured_is_profiled_without_the_eviction(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(1e-3, 2e-3)
    on(monkeypatch, device, capturable=False)

    def durations(
        execute: Callable[[], None], count: int, *, before: Callable[[], None] | None = None
    ) -> list[float]:
        found: list[float] = []
        for _ in range(count):
            for run in (before, execute):
                if run is not None:
                    begin_s = device.now_s
                    run()
                    found.append(device.now_s - begin_s)
        return found

    monkeypatch.setattr(cuda_timing, "kernel_durations_s", durations)
    timing, reusable = cuda_cold.time_cold(device.execute, RULE)
    assert not reusable
    assert timing.method == "profiler-kernel-sum"
    assert timing.median_s == pytest.approx(2e-3)
    assert "planted" in timing.details["not_captured"]
    assert timing.details["kernels_per_execution"] == 1


def test_what_is_known_not_to_be_capturable_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(1.5, 1.6)
    on(monkeypatch, device)
    timing, reusable = cuda_cold.time_cold(device.execute, RULE, not_capturable="known")
    assert (timing.method, reusable) == ("events", True)
    assert timing.median_s == pytest.approx(1.6)


def test_a_slow_execution_is_not_replayed_to_learn_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(0.4, 0.4)
    on(monkeypatch, device)
    executions = [0]

    def execute() -> None:
        executions[0] += 1
        device.execute()

    timing, _ = cuda_timing.time_gpu(execute, RULE)
    assert timing.method == "cuda-graph"
    assert len(timing.samples_s) == 3
    assert executions[0] == 5  # one is doubted, one warms up; capturing executes nothing


@pytest.mark.parametrize("time", [cuda_timing.time_gpu, cuda_cold.time_cold])
def test_one_slow_execution_does_not_decide_how_the_others_are_timed(
    monkeypatch: pytest.MonkeyPatch, time: Callable[..., tuple[Any, bool]]
) -> None:
    device = Device(1e-3, 1e-3)
    on(monkeypatch, device)
    stalls = iter([0.0])

    def execute() -> None:
        device.now_s += next(stalls, 0.0)
        device.execute()

    for first in (0, 1, 2):  # whatever held the first, second or third execution up
        stalls = iter([*[0.0] * first, 1.5])
        timing, _ = time(execute, RULE)
        assert timing.method.startswith("cuda-graph"), first
        assert timing.median_s == pytest.approx(1e-3, rel=1e-6)
    stalls = iter([1.5, 1.5])  # tuned twice, as a backward may after its forward
    timing, _ = time(execute, RULE)
    assert timing.method.startswith("cuda-graph")


@pytest.mark.parametrize("time", [cuda_timing.time_gpu, cuda_cold.time_cold])
@pytest.mark.parametrize(
    ("launching_s", "capturable", "method", "gaps"),
    [
        (1.4, True, "cuda-graph", None),  # launched for seconds, and executed in 0.1 s
        (1.4, False, "events", True),  # what is not the kernels' time says so
        (7.0, True, "events", True),  # a graph of so much is too large
        (0.0, True, "events", False),  # kernels that long need no graph
    ],
)
def test_an_execution_that_launches_for_long_is_captured_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
    time: Callable[..., tuple[Any, bool]],
    launching_s: float,
    capturable: bool,
    method: str,
    gaps: bool | None,
) -> None:
    kernels_s = 0.1 if launching_s else 1.5
    device = Device(kernels_s, kernels_s)
    on(monkeypatch, device, capturable=capturable)
    monkeypatch.setattr(cuda_timing.time, "perf_counter", lambda: host.now_s)
    host = Device(0.0, 0.0)

    def execute() -> None:
        if replaying:
            device.execute()
            return
        host.now_s += launching_s
        device.now_s += max(0.0, launching_s - kernels_s)
        device.execute()

    replaying: list[bool] = []
    usual = Graph.replay
    monkeypatch.setattr(
        Graph, "replay", lambda self: (replaying.append(True), usual(self), replaying.pop())
    )
    timing, _ = time(execute, RULE)
    assert timing.method.removesuffix("-after-eviction") == method
    expected_s = kernels_s if method == "cuda-graph" else max(launching_s, kernels_s)
    assert timing.median_s == pytest.approx(expected_s, rel=1e-6)
    assert timing.details.get("launch_gaps") is gaps
    assert ("not_captured" in timing.details) is (method == "events")
