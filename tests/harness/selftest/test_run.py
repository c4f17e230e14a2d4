"""The selftest with planted faults: an instrument that is off must be reported, and exit with 1."""

import json
import math
import runpy
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

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


# What the GPU's parts judge


def waits(factor: float = 1.0, start_s: float = 1.2e-6):
    gpu = pytest.importorskip("mambench.harness.selftest.gpu")
    return [
        gpu.Wait(
            asked_s=asked_s,
            own_s=1.001 * asked_s,
            uncertainty_s=1e-8,
            measured_s=factor * 1.001 * asked_s + start_s,
        )
        for asked_s in gpu.WAITS_S
    ]


@pytest.mark.parametrize("method", ["graph replay", "profiler sum"])
def test_known_waits_pass_and_a_timer_three_per_cent_off_fails(method: str) -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    right = verdicts(selftest_gpu.judge_waits(method, waits()))
    assert len(right) == 1 + len(selftest_gpu.WAITS_S)
    assert all(right.values())
    off = verdicts(selftest_gpu.judge_waits(method, waits(factor=1.03)))
    assert [off[f"{method}: wait of {text}"] for text in ("500 us", "1 ms", "5 ms")] == [False] * 3


def test_a_timer_that_adds_a_constant_fails() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    found = list(selftest_gpu.judge_waits("graph replay", waits(start_s=8e-6)))
    assert found[0].passed is False
    assert "start of a kernel" in found[0].what


def counted(read: float, written: float):
    from mambench.harness.counters.count import Counted

    return Counted(values={"dram_read_bytes": int(read), "dram_write_bytes": int(written)})


def test_counters_within_two_per_cent_pass_and_five_off_fail() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    size = 1 << 28
    assert all(verdicts(selftest_gpu.judge_traffic(size, counted(size, 1.01 * size))).values())
    found = verdicts(selftest_gpu.judge_traffic(size, counted(1.05 * size, size)))
    assert list(found.values()) == [False, True]
    found = verdicts(selftest_gpu.judge_traffic(size, counted(size, 0.95 * size)))
    assert list(found.values()) == [True, False]


def test_counters_that_are_not_permitted_are_skipped_with_the_reason() -> None:
    from mambench.harness.counters.count import Counted
    from mambench.harness.selftest import gpu as selftest_gpu
    from mambench.harness.spec import Outcome

    lack = Counted(outcome=Outcome.UNAVAILABLE, reason="no permission (ERR_NVGPUCTRPERM)")
    (check,) = selftest_gpu.judge_traffic(1 << 20, lack)
    assert check.passed is None
    assert check.reason == lack.reason
    with pytest.raises(RuntimeError, match="crashed"):
        list(selftest_gpu.judge_traffic(1 << 20, Counted(outcome=Outcome.CRASHED, reason="x")))


def test_timers_that_differ_or_say_nothing_fail() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    short = {selftest_gpu.SHORT_WAIT: 21e-6}
    ours = short | {"a": 1e-3, "b": 1e-3, "c": 1e-3, "d": 1e-3}
    others = short | {"a": 1.01e-3, "b": 1.03e-3, "c": math.nan}
    found = selftest_gpu.agree("another", ours, others)
    assert [check.passed for check in found] == [True, True, False, False, False]


def test_what_another_timer_s_events_take_is_taken_off_and_bounded() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    ours = {selftest_gpu.SHORT_WAIT: 21e-6, "a": 101e-6}
    found = selftest_gpu.agree("another", ours, {name: s + 4e-6 for name, s in ours.items()})
    assert [check.passed for check in found] == [True, True]
    found = selftest_gpu.agree("another", ours, {name: s + 9e-6 for name, s in ours.items()})
    assert [check.passed for check in found] == [False, True]
    found = selftest_gpu.agree("another", ours, {name: 1.03 * s for name, s in ours.items()})
    assert [check.passed for check in found] == [True, False]


def calls(excess_s: float = 21e-6, launches_s: tuple[float, ...] = (31e-6, 33e-6), factor=1.0):
    return [
        replace(wait, measured_s=factor * (wait.own_s + excess_s), launches_s=launches_s)
        for wait in waits()
    ]


def failed_calls(made: list[Any]) -> list[str]:
    from mambench.harness.selftest import gpu as selftest_gpu

    found = verdicts(selftest_gpu.judge_call(wait) for wait in made)
    assert len(found) == len(selftest_gpu.WAITS_S)
    return [what.removeprefix("call time: wait of ") for what, ok in found.items() if not ok]


def test_a_call_takes_the_wait_and_a_launch() -> None:
    assert failed_calls(calls()) == []
    # A host that other work keeps busy takes longer to launch, and by what it was measured to.
    assert failed_calls(calls(excess_s=78e-6, launches_s=(36e-6, 80e-6))) == []


@pytest.mark.parametrize(
    ("factor", "caught"),
    [(1.02, ["5 ms"]), (1.03, ["1 ms", "5 ms"]), (0.98, ["5 ms"]), (0.95, ["1 ms", "5 ms"])],
)
def test_a_call_time_that_is_off_by_some_per_cent_fails(factor: float, caught: list[str]) -> None:
    assert set(caught) <= set(failed_calls(calls(factor=factor)))


def test_a_call_that_is_not_waited_for_or_does_not_begin_on_an_idle_device_fails() -> None:
    made = calls()
    unfinished = [replace(wait, measured_s=31e-6) for wait in made]  # the launch alone
    assert failed_calls(unfinished)[-5:] == ["50 us", "100 us", "500 us", "1 ms", "5 ms"]
    queued = [replace(wait, measured_s=wait.own_s + 1e-6) for wait in made]  # none of the launch
    assert {"5 us", "10 us", "20 us", "50 us", "100 us"} <= set(failed_calls(queued))
    doubled = [replace(wait, measured_s=wait.own_s + 66e-6) for wait in made]
    assert len(failed_calls(doubled)) >= 7


def test_a_host_that_takes_long_to_call_nothing_fails() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    assert selftest_gpu._judge_launch(31e-6).passed
    assert not selftest_gpu._judge_launch(300e-6).passed


def test_another_timer_that_a_busy_host_delayed_is_asked_again(monkeypatch) -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    ours = {selftest_gpu.SHORT_WAIT: 21e-6, "a": 1e-4}
    kernels = {"a": lambda: None, selftest_gpu.SHORT_WAIT: lambda: None}
    late, right = [104e-6, 37e-6], [104e-6, 25e-6]
    times_s = iter([*late, *right])
    monkeypatch.setattr(selftest_gpu, "_do_bench", lambda execute: next(times_s))
    checks = selftest_gpu._against_do_bench(ours, kernels)
    assert all(check.passed for check in checks)
    assert all("measured again, 2 failed" in check.got for check in checks)
    times_s = iter(selftest_gpu.ATTEMPTS * late)
    assert not any(c.passed for c in selftest_gpu._against_do_bench(ours, kernels))
    assert next(times_s, None) is None


def test_what_a_busy_host_spoilt_is_measured_again_and_told() -> None:
    from mambench.harness.selftest import gpu as selftest_gpu

    right = calls()[2]
    spoilt = replace(right, measured_s=right.measured_s + 50e-6)
    attempts = iter([spoilt, right])
    made = selftest_gpu.again(lambda: selftest_gpu.judge_call(next(attempts)))
    assert made.passed
    assert "attempt 2, before: 91" in made.got
    attempts = iter([spoilt] * selftest_gpu.ATTEMPTS)
    assert not selftest_gpu.again(lambda: selftest_gpu.judge_call(next(attempts))).passed
    assert next(attempts, None) is None


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
