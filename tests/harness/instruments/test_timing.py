import gc
import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mambench.harness.instruments.timing import (
    RETAKES,
    Criterion,
    StopRule,
    collect,
    median_interval,
    repetitions,
    time_cpu,
    warm_up,
)

RULE = StopRule(target_s=0.5, min_samples=5, max_samples=200, relative_error=0.01)


class FakeMachine:
    """A clock that only executing, and a little reading it, moves on."""

    def __init__(self, durations_s: Callable[[int], float], tick_ns: int = 30) -> None:
        self.now_ns = 0
        self.executions = 0
        self._durations_s = durations_s
        self._tick_ns = tick_ns

    def execute(self) -> None:
        self.now_ns += round(1e9 * self._durations_s(self.executions))
        self.executions += 1

    def clock(self) -> int:
        self.now_ns += self._tick_ns
        return self.now_ns


def time_on(machine: FakeMachine, rule: StopRule = RULE):
    return time_cpu(machine.execute, rule, clock=machine.clock)


def test_constant_time_is_measured_exactly_and_stops_early() -> None:
    timing = time_on(FakeMachine(lambda i: 2e-3))
    assert timing.median_s == pytest.approx(2e-3, rel=1e-4)
    convergence = timing.details["convergence"]
    assert convergence["converged"]
    assert convergence["stopped_by"] == "interval"
    assert convergence["spent_s"] < RULE.target_s


def test_known_mean_and_noise_are_recovered() -> None:
    noise = random.Random(1)
    timing = time_on(FakeMachine(lambda i: 1e-3 * (1 + noise.gauss(0, 0.02))))
    convergence = timing.details["convergence"]
    low, high = convergence["interval_s"]
    assert low < 1e-3 < high
    assert timing.median_s == pytest.approx(1e-3, rel=0.01)
    assert convergence["relative_error"] <= RULE.relative_error


def test_noise_that_does_not_settle_is_reported_as_not_converged() -> None:
    noise = random.Random(2)
    timing = time_on(FakeMachine(lambda i: 1e-3 * math.exp(noise.gauss(0, 1))))
    convergence = timing.details["convergence"]
    assert not convergence["converged"]
    assert convergence["stopped_by"] in ("samples", "target")
    assert len(timing.samples_s) <= RULE.max_samples


def test_samples_are_kept_raw_and_in_order() -> None:
    # A slow execution in the middle of sampling: it must stay where it was.
    machine = FakeMachine(lambda i: 0.5 if i == 55 else 2e-3)
    timing = time_on(machine)
    warm = timing.details["warm_up"]["executions"]
    assert timing.samples_s.index(max(timing.samples_s)) == 55 - warm
    assert max(timing.samples_s) == pytest.approx(0.5, rel=1e-4)


def test_short_executions_are_repeated_until_the_clock_resolves_them() -> None:
    timing = time_on(FakeMachine(lambda i: 1e-6, tick_ns=100))
    assert timing.details["executions_per_sample"] >= 90  # 1000 ticks of 100 ns
    assert timing.median_s == pytest.approx(1e-6, rel=0.01)


def test_long_executions_are_not_repeated() -> None:
    assert time_on(FakeMachine(lambda i: 1e-3)).details["executions_per_sample"] == 1


def test_warm_up_ends_when_the_time_no_longer_drifts() -> None:
    machine = FakeMachine(lambda i: 2e-3 * (1 + 4 * math.exp(-i / 20)))
    timing = time_on(machine)
    assert timing.details["warm_up"]["stable"]
    assert timing.median_s == pytest.approx(2e-3, rel=0.03)


def test_endless_drift_ends_the_warm_up_and_shows() -> None:
    machine = FakeMachine(lambda i: 1e-3 * 1.05**i)
    warm = warm_up(lambda: _once(machine), least_s=0.1, ceiling_s=1.0)
    assert not warm.stable
    assert 1.0 <= sum(warm.executions_s) < 1.2


def _once(machine: FakeMachine) -> float:
    begin = machine.now_ns
    machine.execute()
    return (machine.now_ns - begin) / 1e9


def test_slow_execution_gets_few_samples_and_is_flagged() -> None:
    machine = FakeMachine(lambda i: 4.0)
    timing = time_on(machine)
    assert len(timing.samples_s) == 3
    assert machine.executions == 3  # a warm-up of seconds is a sample
    assert timing.details["convergence"]["few_samples"]
    assert not timing.details["convergence"]["converged"]


def test_sampling_ends_before_the_limit() -> None:
    rule = StopRule(target_s=10, min_samples=5, max_samples=200, relative_error=0.0, limit_s=9.0)
    machine = FakeMachine(lambda i: 2.0)
    timing = time_on(machine, rule)
    assert timing.details["convergence"]["stopped_by"] == "limit"
    assert machine.now_ns < 9.0e9
    assert len(timing.samples_s) == 4


def test_one_sample_is_taken_though_it_exceeds_the_limit() -> None:
    rule = StopRule(target_s=1, min_samples=5, max_samples=200, relative_error=0.01, limit_s=1.0)
    assert len(time_on(FakeMachine(lambda i: 5.0), rule).samples_s) == 1


def test_target_bounds_the_seconds_spent() -> None:
    noise = random.Random(3)
    machine = FakeMachine(lambda i: 0.02 * math.exp(noise.gauss(0, 0.5)))
    timing = time_on(machine)
    assert timing.details["convergence"]["stopped_by"] == "target"
    assert timing.details["convergence"]["spent_s"] < RULE.target_s + 0.2


def test_garbage_collection_is_held_back_and_restored() -> None:
    seen: list[bool] = []
    machine = FakeMachine(lambda i: 1e-3)

    def execute() -> None:
        seen.append(gc.isenabled())
        machine.execute()

    assert gc.isenabled()
    time_cpu(execute, RULE, clock=machine.clock)
    assert gc.isenabled()
    assert not any(seen)


@pytest.mark.parametrize(("execution_s", "expected"), [(8e-6, 7), (49e-6, 2), (1e-3, 1)])
def test_repetitions(execution_s: float, expected: int) -> None:
    assert repetitions(execution_s, 50e-6) == expected


def normal(source: random.Random, i: int) -> float:
    return source.gauss(1.0, 0.02)


def lognormal(source: random.Random, i: int) -> float:
    return math.exp(source.gauss(0, 0.1))


def bimodal(source: random.Random, i: int) -> float:
    return source.gauss(1.0 if source.random() < 0.6 else 1.05, 0.005)


def drifting(source: random.Random, i: int) -> float:
    return source.gauss(1.0 + 0.0002 * i, 0.02)


def true_median(noise: Callable[[random.Random, int], float], n: int) -> float:
    source = random.Random(0)
    draws = sorted(noise(source, i % n) for i in range(100_000))
    return draws[len(draws) // 2]


@pytest.mark.parametrize("noise", [normal, lognormal, bimodal, drifting])
@pytest.mark.parametrize("n", [8, 30])
def test_interval_covers_the_median_as_often_as_it_claims(
    noise: Callable[[random.Random, int], float], n: int
) -> None:
    draws, truth, source = 3000, true_median(noise, n), random.Random(n)
    hits = 0
    for _ in range(draws):
        interval = median_interval([noise(source, i) for i in range(n)])
        assert interval is not None
        hits += interval[0] <= truth <= interval[1]
    assert 0.93 <= hits / draws <= 0.97


def test_stopping_early_keeps_the_coverage() -> None:
    # Looking repeatedly costs coverage; a criterion that stops at its first narrow look has 0.90.
    rule = StopRule(target_s=1e9, min_samples=5, max_samples=200, relative_error=0.01)
    source = random.Random(4)
    draws, hits = 600, 0
    for _ in range(draws):
        criterion = Criterion(rule)
        while batch := criterion.batch():
            for _ in range(batch):
                criterion.add(normal(source, 0), 1.0)
        low, high = criterion.report()["interval_s"]
        hits += low <= 1.0 <= high
    assert 0.93 <= hits / draws <= 0.97


@pytest.mark.parametrize("n", range(6))
def test_too_few_samples_have_no_interval(n: int) -> None:
    assert median_interval([float(i) for i in range(n)]) is None


def test_interval_narrows_with_samples_and_holds_the_median() -> None:
    source = random.Random(5)
    samples = [normal(source, i) for i in range(200)]
    widths = []
    for n in (6, 20, 60, 200):
        low, high = median_interval(samples[:n]) or (math.nan, math.nan)
        assert low <= sorted(samples[:n])[n // 2] <= high
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)


class Throttled:
    """A device that is slowed down during some of the batches taken from it."""

    def __init__(self, slow_batches: set[int]) -> None:
        self.batches = 0
        self.pauses: list[float] = []
        self._slow = slow_batches

    def take(self, count: int) -> list[tuple[float, float]]:
        self.batches += 1
        each = 3e-3 if self.batches in self._slow else 1e-3
        return [(each, each)] * count

    def slowed(self) -> list[str]:
        return ["hardware_thermal"] if self.batches in self._slow else []

    def collect(self, rule: StopRule) -> tuple[list[float], dict[str, Any]]:
        return collect(Criterion(rule), self.take, slowed=self.slowed, pause=self.pauses.append)


STEADY = StopRule(target_s=8e-3, min_samples=8, max_samples=8, relative_error=1e-9)


def test_throttled_samples_are_set_aside_and_taken_again() -> None:
    device = Throttled({2, 3})
    samples, details = device.collect(STEADY)
    assert samples == [1e-3] * 8
    aside = details["set_aside"]
    assert [batch["reasons"] for batch in aside] == [["hardware_thermal"]] * 2
    assert all(set(batch["samples_s"]) == {3e-3} for batch in aside)
    assert details["kept"] == []
    assert len(device.pauses) == 2


def test_a_device_that_stays_throttled_is_timed_and_flagged() -> None:
    device = Throttled(set(range(1, 1000)))
    samples, details = device.collect(STEADY)
    assert samples == [3e-3] * 8
    assert len(details["set_aside"]) == RETAKES
    assert sum(batch["count"] for batch in details["kept"]) == 8
    assert details["kept"][0]["from"] == 0


def test_samples_are_not_taken_again_beyond_the_time_limit() -> None:
    device = Throttled(set(range(1, 1000)))
    samples, details = device.collect(replace(STEADY, limit_s=5e-3))
    assert not details["set_aside"]
    assert details["kept"]
    assert sum(samples) <= 6e-3


def test_an_undisturbed_device_leaves_no_trace() -> None:
    assert Throttled(set()).collect(STEADY) == ([1e-3] * 8, {})


@pytest.mark.parametrize("target_s", [0.06, 0.5, 0.9])
def test_a_case_slower_than_three_tenths_of_a_second_needs_three_samples(target_s: float) -> None:
    machine = FakeMachine(lambda i: 0.31)
    timing = time_on(machine, replace(RULE, target_s=target_s, min_samples=30))
    assert len(timing.samples_s) == 3
    assert machine.executions == 3  # the first warms up and is a sample
    assert not timing.details["convergence"]["converged"]
    assert timing.details["convergence"]["few_samples"]


def test_a_slow_execution_warms_up_once() -> None:
    assert len(warm_up(lambda: 0.35).executions_s) == 1
    assert len(warm_up(lambda: 0.2).executions_s) == 4


def test_a_first_execution_that_autotunes_is_not_taken_for_the_others() -> None:
    tuned = iter([5.0] + [0.001] * 1000)
    warm = warm_up(lambda: next(tuned), doubt_first=True)
    assert warm.estimate_s == 0.001
    assert warm.stable
    assert max(warm.executions_s) == 0.001
    tuned = iter([5.0] + [0.001] * 1000)
    assert warm_up(lambda: next(tuned)).estimate_s == 5.0  # what the doubt is for


def test_a_slow_execution_that_is_doubted_is_executed_twice() -> None:
    executed = []
    warm = warm_up(lambda: executed.append(4.0) or 4.0, doubt_first=True)
    assert warm.estimate_s == 4.0
    assert len(executed) == 2
