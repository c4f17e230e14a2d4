"""The selftest with planted faults: an instrument that is off must be reported, and exit with 1."""

import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from mambench.harness import lock, machine, machine_cache
from mambench.harness.instruments import timing
from mambench.harness.instruments.timing import Timing
from mambench.harness.selftest import cache as selftest_cache
from mambench.harness.selftest import cpu as selftest_cpu
from mambench.harness.selftest import energy as selftest_energy
from mambench.harness.selftest import nvbench as selftest_nvbench
from mambench.harness.selftest import run as selftest
from mambench.harness.selftest import statistics as selftest_statistics
from mambench.harness.selftest.run import Check, Part
from mambench.harness.spec import Device, DeviceKind

ROOT = Path(__file__).parent.parent.parent.parent
CPU = Device(kind=DeviceKind.CPU, name="a processor", memory_bytes=1 << 34)
DRAWS = 400


def verdicts(checks: Iterator[Check]) -> dict[str, bool | None]:
    return {check.what: check.passed for check in checks}


# Intervals


def test_intervals_cover_what_they_claim() -> None:
    found = list(selftest_statistics.coverage(draws=DRAWS))
    assert len(found) == 8
    assert all(0.91 <= check.values["got_frac"] <= 0.985 for check in found)  # of few draws


@pytest.mark.parametrize("noise", selftest_statistics.noises(), ids=lambda noise: noise.name)
def test_the_true_median_is_the_true_median(noise: selftest_statistics.Noise) -> None:
    import random

    source, n = random.Random(3), 40
    below = sum(noise.draw(source, i) < noise.median(n) for _ in range(1000) for i in range(n))
    assert below / (1000 * n) == pytest.approx(0.5, abs=0.01)


def test_an_interval_that_is_too_narrow_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timing.median_interval

    def narrow(samples: Sequence[float], confidence: float = 0.95):
        interval = honest(samples, confidence)
        if interval is None:
            return None
        low, high = interval
        middle = (low + high) / 2
        return middle + 0.8 * (low - middle), middle + 0.8 * (high - middle)

    monkeypatch.setattr(timing, "median_interval", narrow)
    found = list(selftest_statistics.coverage(draws=DRAWS))
    assert not any(check.passed for check in found)
    assert "is not 93.0% to 97.0%" in (found[0].reason or "")


def test_a_criterion_that_stops_at_the_first_narrow_look_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "NARROW_LOOKS", 1)
    found = verdicts(selftest_statistics.coverage(draws=DRAWS))
    assert found["coverage of a 95 % interval, normal noise, stopped by the criterion"] is False


def test_an_interval_that_is_too_wide_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timing.median_interval
    monkeypatch.setattr(timing, "median_interval", lambda samples, c=0.95: honest(samples, 0.99))
    found = verdicts(selftest_statistics.coverage(draws=DRAWS))
    assert found["coverage of a 95 % interval, normal noise, 30 samples"] is False


# The CPU's timer, on a machine whose time is a number


class FakeTime:
    """A clock that waiting, and a little every reading, moves on."""

    def __init__(self) -> None:
        self.now_ns = 0

    def read(self) -> int:
        self.now_ns += 40
        return self.now_ns

    def wait(self, wait_s: float) -> None:
        self.now_ns += round(1e9 * wait_s)


@pytest.fixture
def fake_time(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(selftest_cpu, "own_clock_ns", fake.read)
    monkeypatch.setattr(selftest_cpu.time, "sleep", fake.wait)
    monkeypatch.setattr(selftest_cpu, "_spin", fake.wait)
    honest = timing.time_cpu
    monkeypatch.setattr(
        timing, "time_cpu", lambda execute, rule: honest(execute, rule, clock=fake.read)
    )
    return fake


@pytest.mark.usefixtures("fake_time")
def test_a_right_timer_passes() -> None:
    found = verdicts(selftest_cpu.timer())
    assert len(found) == 10
    assert all(found.values())


@pytest.mark.usefixtures("fake_time")
def test_a_timer_that_is_three_per_cent_off_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timing.time_cpu

    def off(execute: timing.Execute, rule: timing.StopRule) -> Timing:
        taken = honest(execute, rule)
        return replace(taken, samples_s=tuple(1.03 * sample for sample in taken.samples_s))

    monkeypatch.setattr(timing, "time_cpu", off)
    found = verdicts(selftest_cpu.timer())
    assert found["busy wait of 5 ms"] is False
    assert found["sleep of 2 ms"] is False


@pytest.mark.usefixtures("fake_time")
def test_a_timer_that_smooths_the_noise_away_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = timing.time_cpu

    def smooth(execute: timing.Execute, rule: timing.StopRule) -> Timing:
        taken = honest(execute, rule)
        samples = tuple((s + taken.median_s) / 2 for s in taken.samples_s)
        return replace(taken, samples_s=samples)

    monkeypatch.setattr(timing, "time_cpu", smooth)
    found = verdicts(selftest_cpu.timer())
    assert found["busy wait of 1 ms ± 5 % (normal)"] is True
    assert found["spread of the busy wait of 1 ms ± 5 % (normal)"] is False


def test_a_slow_clock_fails() -> None:
    assert not any(
        check.passed
        for check in selftest_cpu.clock(lambda: selftest_cpu.own_clock_ns() // 2000 * 1996)
    )


def test_nvbench_results_are_read() -> None:
    def state(tag: str, value: str):
        data = [{"name": "value", "type": "float64", "value": value}]
        return {"summaries": [{"tag": tag, "data": data}]}

    text = json.dumps(
        {
            "benchmarks": [
                {"name": "wait", "states": [state("nv/cold/time/gpu/mean", "1.5e-4")]},
                {"name": "other", "states": [state("nv/cold/time/cpu/mean", "1.0")]},
                {"name": "skipped", "states": [{"summaries": None}]},
            ]
        }
    )
    assert selftest_nvbench.parse(text) == {"wait": 1.5e-4}


READ = selftest_cache.Reading
HALF = READ(set_bytes=6 << 20, hot_s=2.5e-6, cold_s=4.5e-6)
FITS = READ(set_bytes=12 << 20, hot_s=3.6e-6, cold_s=6e-6)
LARGE = READ(set_bytes=1600 << 20, hot_s=560e-6, cold_s=563e-6)


def test_cold_and_hot_as_the_bandwidths_say_pass() -> None:
    assert [check.passed for check in selftest_cache.judge(HALF, FITS, LARGE)] == [True] * 3


@pytest.mark.parametrize(
    ("fits", "large", "failing"),
    [
        (replace(FITS, cold_s=FITS.hot_s), LARGE, 1),  # what should be cold is hot
        (replace(FITS, hot_s=6.1e-6), LARGE, 0),  # what should be hot is cold
        (FITS, replace(LARGE, cold_s=600e-6), 2),  # emptying the cache is timed too
    ],
)
def test_a_cache_in_another_condition_than_stated_fails(fits, large, failing: int) -> None:
    found = [check.passed for check in selftest_cache.judge(HALF, fits, large)]
    assert found[failing] is False


class FakeGpu:
    """A GPU under a steady load; its counter steps every 0.1 s, perhaps by too much."""

    def __init__(self, *, counter: float = 1.0, execution_s: float = 2e-3) -> None:
        self.now_s = 0.0
        self.counter, self.execution_s = counter, execution_s

    def clock(self) -> float:
        return self.now_s

    def burst(self, poll) -> int:
        for _ in range(10):
            self.now_s += self.execution_s / 5
            poll()
        return 2

    def energy_j(self) -> float:
        return self.counter * 500.0 * math.floor(10 * self.now_s + 1e-9) / 10

    def snapshot(self):
        return {"power_w": 500.0}

    def slowed(self) -> list[str]:
        return []


def energy_verdicts(
    once: FakeGpu, twice: FakeGpu, again: FakeGpu | None = None
) -> list[bool | None]:
    observed = (
        selftest_energy.observe(gpu.burst, gpu, clock=gpu.clock)  # type: ignore[arg-type]
        for gpu in (once, twice, again or FakeGpu(counter=once.counter))
    )
    return [check.passed for check in selftest_energy.judge(*observed)]


def test_a_right_energy_counter_passes() -> None:
    assert energy_verdicts(FakeGpu(), FakeGpu(execution_s=4e-3)) == [True, True]


def test_power_that_drifts_evenly_is_no_error_of_the_counter() -> None:
    once, twice, again = FakeGpu(counter=1.045), FakeGpu(execution_s=4e-3), FakeGpu(counter=0.955)
    assert energy_verdicts(once, twice, again) == [True, True]
    assert energy_verdicts(once, FakeGpu(execution_s=4.4e-3), again) == [True, False]


def test_an_energy_counter_that_is_ten_per_cent_off_fails() -> None:
    assert energy_verdicts(FakeGpu(counter=1.1), FakeGpu(execution_s=4e-3)) == [False, False]
    assert energy_verdicts(FakeGpu(), FakeGpu(execution_s=4.4e-3)) == [True, False]


def test_an_energy_counter_that_stands_still_is_no_measurement() -> None:
    gpu = FakeGpu(counter=0.0)
    with pytest.raises(RuntimeError, match="did not advance"):
        selftest_energy.observe(gpu.burst, gpu, clock=gpu.clock)


def test_power_is_integrated_over_time_and_not_over_samples() -> None:
    assert selftest_energy.mean_power_w([(0, 100), (1, 100), (1, 200), (4, 200)]) == 175


# The whole


def check(passed: bool | None, reason: str | None = None) -> Check:
    return Check(part="p", what="w", expected="1", got="1", passed=passed, reason=reason)


def part(*checks: Check, missing: str | None = None, error: Exception | None = None) -> Part:
    def run(device: Device) -> Iterator[Check]:
        yield from checks
        if error:
            raise error

    return Part(name="p", run=run, missing=lambda device: missing)


def test_a_failure_fails_and_a_skip_does_not() -> None:
    right = part(check(True))
    assert selftest.run(CPU, chosen=[right, part(missing="no GPU")]).passed
    assert not selftest.run(CPU, chosen=[right, part(check(False, "off"))]).passed
    assert not selftest.run(CPU, chosen=[part(missing="no GPU")]).passed  # nothing was shown


def test_a_part_that_raises_fails_after_what_it_found_and_stops_no_other() -> None:
    broken = part(check(True), error=ValueError("planted\nsecond line"))
    result = selftest.run(CPU, chosen=[broken, part(check(True))])
    assert [c.passed for c in result.checks] == [True, False, True]
    assert result.checks[1].reason == "ValueError: planted"
    assert "FAIL  p: after 1 checks: ValueError: planted" in result.text()


def test_what_is_skipped_says_why() -> None:
    result = selftest.run(CPU, chosen=[part(missing="no GPU: buy one")])
    assert "no GPU: buy one" in result.text()
    assert result.counts == {"passed": 0, "failed": 0, "skipped": 1}
    assert result.to_dict()["checks"][0]["reason"] == "no GPU: buy one"


def test_not_a_number_is_never_near_or_between() -> None:
    common = {"show": str, "unit": "s"}
    assert not selftest.near("p", "w", expected=1, got=math.nan, tolerance=1, **common).passed
    assert not selftest.between("p", "w", low=None, high=1, got=math.nan, **common).passed
    assert not selftest.between("p", "w", low=0, high=None, got=math.nan, **common).passed


# The command


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = list(sys.path)
    program = runpy.run_path(str(ROOT / "run_bench.py"))
    sys.path[:] = path
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    honest = lock.device_lock
    monkeypatch.setattr(
        lock, "device_lock", lambda key, **options: honest(key, folder=tmp_path, **options)
    )

    def run(*arguments: str) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["run_bench.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            program["main"]()
        return ended.value.code, capsys.readouterr().out

    return run


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 1)])
def test_the_command_prints_writes_keeps_and_exits(
    passed: bool, code: int, call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    reason = None if passed else "off by 3 %"
    monkeypatch.setattr(selftest, "parts", lambda: (part(check(passed, reason)),))
    ended, out = call("selftest", "--device", "cpu", "-o", "out.json")
    assert ended == code
    assert ("FAIL  p: w: off by 3 %" in out) is not passed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["passed"] is passed
    assert written["code"] == machine.code_version()["id"]
    assert machine_cache.kept("selftest", machine.cpu()) == written
    ended, out = call("selftest", "--device", "cpu", "--json")
    assert ended == code
    assert json.loads(out)["counts"] == written["counts"]


def test_the_result_goes_into_the_manifest_of_later_runs(
    call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from mambench.harness import runner

    summary = runner.RunSummary(counts={}, interrupted=False, wall_s=0.0)
    monkeypatch.setattr(runner, "run", lambda made, folder, **options: summary)
    ask = ("run", "--device", "cpu", "-i", "flash_attention", "-a", "seqlen=16", "--no-report")
    call(*ask, "-o", "before")
    assert json.loads((tmp_path / "before/manifest.json").read_text())["selftest"] is None
    monkeypatch.setattr(selftest, "parts", lambda: (part(check(True)),))
    call("selftest", "--device", "cpu")
    call(*ask, "-o", "after")
    kept = json.loads((tmp_path / "after/manifest.json").read_text())["selftest"]
    assert kept["passed"] is True
    assert kept["ran_at"]


def test_a_broken_or_forbidden_cache_stops_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine_cache.kept("selftest", CPU) is None
    assert machine_cache.keep("selftest", CPU, {"passed": True}) is None
    assert machine_cache.kept("selftest", CPU) == {"passed": True}
    machine_cache.path("selftest", CPU).write_text("{torn")
    assert machine_cache.kept("selftest", CPU) is None
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "cannot be written" in (machine_cache.keep("selftest", CPU, {}) or "")


@pytest.mark.gpu
@pytest.mark.alone
def test_on_a_gpu_every_part_ends_and_nothing_fails() -> None:
    result = selftest.run(machine.detect("cuda"))
    assert result.counts["failed"] == 0, result.text()
    assert result.wall_s < 120
