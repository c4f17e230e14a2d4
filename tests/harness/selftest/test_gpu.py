"""What the GPU's parts of the selftest judge, on what they could have measured."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("triton")

from mambench.harness.counters.count import Counted
from mambench.harness.selftest import gpu, gpu_timers
from mambench.harness.selftest.run import Check
from mambench.harness.spec import Outcome


def verdicts(checks: Iterator[Check]) -> dict[str, bool | None]:
    return {check.what: check.passed for check in checks}


def waits(factor: float = 1.0, start_s: float = 1.2e-6):
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
    right = verdicts(gpu.judge_waits(method, waits()))
    assert len(right) == 1 + len(gpu.WAITS_S)
    assert all(right.values())
    off = verdicts(gpu.judge_waits(method, waits(factor=1.03)))
    assert [off[f"{method}: wait of {text}"] for text in ("500 us", "1 ms", "5 ms")] == [False] * 3


def test_a_timer_that_adds_a_constant_fails() -> None:
    found = list(gpu.judge_waits("graph replay", waits(start_s=8e-6)))
    assert found[0].passed is False
    assert "start of a kernel" in found[0].what


def counted(read: float, written: float):
    return Counted(values={"dram_read_bytes": int(read), "dram_write_bytes": int(written)})


def test_counters_within_two_per_cent_pass_and_five_off_fail() -> None:
    size = 1 << 28
    assert all(verdicts(gpu.judge_traffic(size, counted(size, 1.01 * size))).values())
    found = verdicts(gpu.judge_traffic(size, counted(1.05 * size, size)))
    assert list(found.values()) == [False, True]
    found = verdicts(gpu.judge_traffic(size, counted(size, 0.95 * size)))
    assert list(found.values()) == [True, False]


def test_counters_that_are_not_permitted_are_skipped_with_the_reason() -> None:
    lack = Counted(outcome=Outcome.UNAVAILABLE, reason="no permission (ERR_NVGPUCTRPERM)")
    (check,) = gpu.judge_traffic(1 << 20, lack)
    assert check.passed is None
    assert check.reason == lack.reason
    with pytest.raises(RuntimeError, match="crashed"):
        list(gpu.judge_traffic(1 << 20, Counted(outcome=Outcome.CRASHED, reason="x")))


def test_timers_that_differ_or_say_nothing_fail() -> None:
    short = {gpu_timers.SHORT_WAIT: 21e-6}
    ours = short | {"a": 1e-3, "b": 1e-3, "c": 1e-3, "d": 1e-3}
    others = short | {"a": 1.01e-3, "b": 1.03e-3, "c": math.nan}
    found = gpu_timers.agree("another", ours, others)
    assert [check.passed for check in found] == [True, True, False, False, False]


def test_what_another_timer_s_events_take_is_taken_off_and_bounded() -> None:
    ours = {gpu_timers.SHORT_WAIT: 21e-6, "a": 101e-6}
    found = gpu_timers.agree("another", ours, {name: s + 4e-6 for name, s in ours.items()})
    assert [check.passed for check in found] == [True, True]
    found = gpu_timers.agree("another", ours, {name: s + 9e-6 for name, s in ours.items()})
    assert [check.passed for check in found] == [False, True]
    found = gpu_timers.agree("another", ours, {name: 1.03 * s for name, s in ours.items()})
    assert [check.passed for check in found] == [True, False]


def calls(excess_s: float = 21e-6, launches_s: tuple[float, ...] = (31e-6, 33e-6), factor=1.0):
    return [
        replace(wait, measured_s=factor * (wait.own_s + excess_s), launches_s=launches_s)
        for wait in waits()
    ]


def failed_calls(made: list[Any]) -> list[str]:
    found = verdicts(gpu.judge_call(wait) for wait in made)
    assert len(found) == len(gpu.WAITS_S)
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
    assert gpu._judge_launch(31e-6).passed
    assert not gpu._judge_launch(300e-6).passed


def test_another_timer_that_a_busy_host_delayed_is_asked_again(monkeypatch) -> None:
    ours = {gpu_timers.SHORT_WAIT: 21e-6, "a": 1e-4}
    kernels = {"a": lambda: None, gpu_timers.SHORT_WAIT: lambda: None}
    late, right = [104e-6, 37e-6], [104e-6, 25e-6]
    times_s = iter([*late, *right])
    monkeypatch.setattr(gpu_timers, "_do_bench", lambda execute: next(times_s))
    checks = gpu_timers._against_do_bench(ours, kernels)
    assert all(check.passed for check in checks)
    assert all("measured again, 2 failed" in check.got for check in checks)
    times_s = iter(gpu.ATTEMPTS * late)
    assert not any(c.passed for c in gpu_timers._against_do_bench(ours, kernels))
    assert next(times_s, None) is None


def test_what_a_busy_host_spoilt_is_measured_again_and_told() -> None:
    right = calls()[2]
    spoilt = replace(right, measured_s=right.measured_s + 50e-6)
    attempts = iter([spoilt, right])
    made = gpu.again(lambda: gpu.judge_call(next(attempts)))
    assert made.passed
    assert "attempt 2, before: 91" in made.got
    attempts = iter([spoilt] * gpu.ATTEMPTS)
    assert not gpu.again(lambda: gpu.judge_call(next(attempts))).passed
    assert next(attempts, None) is None
