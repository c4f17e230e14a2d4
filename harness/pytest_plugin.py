"""A pytest plugin: time functions and cases under pytest-benchmark, with a timer that waits.

    def test_scan(bench_case):
        out = bench_case(scan, x, dt)             # a function of yours; returns what it returns
        assert out.isfinite().all()

    def test_ours(bench_case, mambench_case):     # one test for each case of --mambench-suite
        bench_case(mambench_case)                 # proven right by the gate first

It is found by its entry point once Mambench is installed. Times are call times: the device is
waited for before and after, so that launching is included and nothing is left out.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mambench.harness.spec import Case, Device

INSTALL = "bench_case needs pytest-benchmark: pip install pytest-benchmark"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options that say which cases `mambench_case` stands for."""
    group = parser.getgroup("mambench")
    group.addoption(
        "--mambench-suite", metavar="NAME|FILE", default="quick", help="Cases of mambench_case."
    )
    group.addoption("--mambench-plugin", action="append", metavar="FILE", help="See run --plugin.")
    group.addoption("--mambench-device", metavar="DEVICE", help="cpu, cuda or cuda:INDEX.")
    group.addoption(
        "--mambench-filter", action="append", metavar="EXPRESSION", help="See run --filter."
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each case that can run here."""
    if "mambench_case" not in metafunc.fixturenames:
        return
    from mambench.harness import plan, suite

    config = metafunc.config
    made = plan.make_plan(
        suite.find(str(config.getoption("--mambench-suite"))),
        _device(config),
        filters=config.getoption("--mambench-filter") or (),
        plugins=config.getoption("--mambench-plugin") or (),
    )
    cases = [planned.case for planned in made.runnable]
    metafunc.parametrize("mambench_case", cases, ids=[case.label for case in cases])


@pytest.fixture
def bench_case(request: pytest.FixtureRequest) -> "BenchCase":
    """Time a function, or a case of Mambench, under pytest-benchmark."""
    if not request.config.pluginmanager.hasplugin("benchmark"):
        pytest.fail(INSTALL, pytrace=False)
    timer = Timer()
    node = request.node
    marker = node.get_closest_marker("benchmark")
    named: dict[str, Any] = {"timer": timer}
    if marker is not None:
        named |= marker.kwargs
    # The nearest marker is the one that pytest-benchmark reads, when its fixture is made.
    node.add_marker(pytest.mark.benchmark(**named), append=False)
    return BenchCase(
        request.getfixturevalue("benchmark"),
        _device_once(request.config),
        timer,
        plugins=request.config.getoption("--mambench-plugin") or (),
    )


class Timer:
    """`perf_counter` after everything on the GPU has ended; without one, just `perf_counter`."""

    def __init__(self) -> None:
        self._wait: Callable[[], object] | None = None
        self.__name__ = "synchronised_perf_counter"  # what reports show

    def use(self, device: "Device") -> None:
        """Wait for this device from now on."""
        from mambench.harness.spec import DeviceKind

        if device.kind is DeviceKind.CUDA:
            import torch

            self._wait = lambda: torch.cuda.synchronize(device.torch_name)

    def __call__(self) -> float:
        """Return seconds."""
        if self._wait is not None:
            self._wait()
        return time.perf_counter()


class BenchCase:
    """What the fixture `bench_case` is."""

    def __init__(
        self,
        benchmark: Any,
        device: "Callable[[], Device]",
        timer: Timer,
        plugins: Sequence[str] = (),
    ) -> None:
        self.benchmark = benchmark  # pytest-benchmark's fixture, for its further settings
        self._device = device
        self._timer = timer
        self._plugins = tuple(plugins)

    def __call__(self, target: "Callable[..., Any] | Case", *args: Any, **named: Any) -> Any:
        """Time a function with its arguments, or a case; returns what one call returns.

        Fails the test if a case's answer is wrong. Raises what the function raises.
        """
        from mambench.harness.spec import Case

        device = self._device()
        self._timer.use(device)
        if isinstance(target, Case):
            return self._case(target, device)
        return self.benchmark(target, *args, **named)

    def _case(self, case: "Case", device: "Device") -> Any:
        from mambench.harness import gate, registry
        from mambench.implementations.workload import build

        workload = build(case, registry.get(case.implementation, self._plugins), device, seed=0)
        try:
            report = gate.check(workload, case, seed=0)
            if not report.passed:
                pytest.fail(f"{case.label}: {report.reason}", pytrace=False)
            self.benchmark.extra_info["mambench"] = {
                "case": case.to_dict(),
                "case_id": case.case_id,
                "device": {"kind": device.kind.value, "name": device.name},
            }
            return self.benchmark(workload.prepare(case.pass_))
        finally:
            workload.release()


def _device_once(config: pytest.Config) -> "Callable[[], Device]":
    """Return a way to the device that asks for it once a session."""

    def device() -> "Device":
        found = getattr(config, "_mambench_device", None)
        if found is None:
            found = _device(config)
            config._mambench_device = found  # pyright: ignore[reportAttributeAccessIssue]
        return found

    return device


def _device(config: pytest.Config) -> "Device":
    from mambench.harness import machine

    return machine.detect(config.getoption("--mambench-device"))
