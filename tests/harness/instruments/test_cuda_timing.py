import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import mambench
from mambench.harness.instruments.timing import StopRule

torch = pytest.importorskip("torch")

from mambench.harness.instruments import cuda_timing, kernel_times  # noqa: E402

RULE = StopRule(target_s=0.3, min_samples=10, max_samples=200, relative_error=0.002)


@pytest.fixture
def side_stream():
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


def product(size: int) -> Callable[[], object]:
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    return lambda: a @ a


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
@pytest.mark.parametrize("size", [2048, 4096])
def test_graph_replay_and_profiler_agree(size: int) -> None:
    execute = product(size)
    timing, reusable = cuda_timing.time_gpu(execute, RULE)
    assert reusable
    assert timing.method == "cuda-graph"
    count = 20
    durations = kernel_times.kernel_durations_s(execute, count)
    profiled = sorted(kernel_times.per_execution(durations, count))[count // 2]
    assert timing.median_s == pytest.approx(profiled, rel=0.03, abs=2e-6)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_a_known_wait_is_measured() -> None:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import globaltimer

    @triton.jit
    def spin(out_ptr, wait_ns):
        begin = globaltimer()
        now = begin
        while now - begin < wait_ns:
            now = globaltimer()
        tl.store(out_ptr, now)

    out = torch.zeros(1, dtype=torch.int64, device="cuda")
    for wait_s in (100e-6, 1e-3):
        wait_ns = int(1e9 * wait_s)
        timing, _ = cuda_timing.time_gpu(lambda wait_ns=wait_ns: spin[(1,)](out, wait_ns), RULE)
        # The timer ticks once a microsecond, and a graph's node costs about one more.
        assert timing.median_s == pytest.approx(wait_s, rel=0.01, abs=3e-6)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_launch_gaps_show_in_the_call_time_only() -> None:
    small = torch.randn(64, 64, device="cuda")

    def execute() -> None:
        for _ in range(50):
            small.add_(1)

    timing, _ = cuda_timing.time_gpu(execute, RULE)
    assert cuda_timing.time_calls(execute, RULE).median_s > 1.5 * timing.median_s


UNCAPTURABLE = """
import json, runpy, sys
from pathlib import Path
package = Path(sys.argv[1])
runpy.run_path(str(package / "_start.py"))["load_package"](package)
import torch
from mambench.harness.instruments import cuda_timing
from mambench.harness.instruments.timing import StopRule
torch.cuda.set_stream(torch.cuda.Stream())
a = torch.randn(2048, 2048, device="cuda")
execute = lambda: (a @ a).sum().item()  # waits for the device: not allowed in a capture
rule = StopRule(target_s=0.3, min_samples=10, max_samples=200, relative_error=0.002)
timing, reusable = cuda_timing.time_gpu(execute, rule)
why = timing.details["not_captured"]
print(json.dumps([reusable, timing.method, bool(why), timing.median_s]))
"""


@pytest.mark.gpu
def test_what_cannot_be_captured_is_profiled_and_the_process_given_up() -> None:
    # In a process of its own: a failed capture spoils the random generators of the one it is in.
    package = Path(mambench.__path__[0])
    done = subprocess.run(
        [sys.executable, "-c", UNCAPTURABLE, str(package)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    reusable, method, reason, median_s = json.loads(done.stdout.splitlines()[-1])
    assert not reusable
    assert method == "profiler-kernel-sum"
    assert reason
    assert median_s > 0


@pytest.mark.gpu
@pytest.mark.usefixtures("side_stream")
def test_backward_is_captured() -> None:
    x = torch.randn(512, 512, device="cuda", requires_grad=True)
    y = (x @ x).tanh()
    grad = torch.randn_like(y)

    def execute() -> object:
        return torch.autograd.grad(y, x, grad, retain_graph=True)

    execute()  # loads libraries, as a worker's first call does
    timing, reusable = cuda_timing.time_gpu(execute, RULE)
    assert (timing.method, reusable) == ("cuda-graph", True)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_a_set_that_fits_in_l2_is_slower_when_cold() -> None:
    from mambench.harness.instruments import cuda_cold

    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    x = torch.randn(l2_bytes // 4 // 4, device="cuda")  # a quarter of L2
    hot, _ = cuda_timing.time_gpu(lambda: x.sum(), RULE)
    cold, reusable = cuda_cold.time_cold(lambda: x.sum(), RULE)
    assert reusable
    assert cold.method == "cuda-graph-after-eviction"
    assert cold.median_s > 1.2 * hot.median_s
    assert "cold" in cold.details["l2"]


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_what_never_fits_in_l2_is_as_fast_when_cold() -> None:
    from mambench.harness.instruments import cuda_cold

    x = torch.randn(8 * torch.cuda.get_device_properties(0).L2_cache_size // 4, device="cuda")
    hot, _ = cuda_timing.time_gpu(lambda: x.sum(), RULE)
    cold, _ = cuda_cold.time_cold(lambda: x.sum(), RULE)
    assert cold.median_s == pytest.approx(hot.median_s, rel=0.05)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_host_time_does_not_hold_the_device_s_time() -> None:
    execute = product(8192)  # a millisecond and more for the GPU, microseconds to launch
    host = cuda_timing.time_host(execute, RULE)
    assert host.median_s < 0.2 * cuda_timing.time_calls(execute, RULE).median_s


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.usefixtures("side_stream")
def test_energy_of_a_load_is_its_power_times_its_time() -> None:
    from mambench.harness import machine
    from mambench.harness.instruments import energy, telemetry
    from mambench.harness.instruments.cuda_load import Load
    from mambench.kernels import probes

    sensors = telemetry.Telemetry(machine.detect("cuda")).sensors
    if sensors is None or sensors.energy_j() is None:
        pytest.skip("this GPU's energy is not counted")
    # Drawn from the cores' units for exponentials alone: far from the power limit, at which a
    # load that goes on is slower than the same work timed for a moment.
    out = probes.chain_out()
    execute = lambda: probes.chain(out, 20_000)  # noqa: E731 - some milliseconds
    timing, _ = cuda_timing.time_gpu(execute, RULE)
    load = Load(execute, timing.median_s, not_capturable=None)
    meter = energy.Meter(sensors.energy_j, sensors.snapshot)
    reading = energy.measure(load.burst, meter, region_s=1.0)
    load.close()
    assert reading.missing is None
    expected_j = reading.power_w * timing.median_s
    assert reading.energy_j == pytest.approx(expected_j, rel=0.1), (timing, reading.details)
    assert reading.details["resolution_frac"] <= energy.RESOLUTION_FRAC
