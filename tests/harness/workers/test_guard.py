import os

import pytest

from mambench.harness.workers.guard import Limits, Stopwatch, resident_bytes


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(clock: Clock) -> Stopwatch:
    return Stopwatch(Limits(set_up_s=300, measure_s=60, memory_bytes=1), clock)


def test_compilation_does_not_count_as_measuring(clock: Clock, watch: Stopwatch) -> None:
    watch.enter("compile")
    clock.now += 299
    assert watch.exceeded() is None
    watch.enter("gate")
    clock.now += 59
    assert watch.exceeded() is None


def test_gate_and_measurements_share_a_limit(clock: Clock, watch: Stopwatch) -> None:
    watch.enter("gate")
    clock.now += 40
    watch.enter("time")
    clock.now += 21
    said = watch.exceeded()
    assert said is not None
    assert "time_limit_s = 60 s" in said
    assert "'time'" in said


def test_set_up_has_its_own_limit(clock: Clock, watch: Stopwatch) -> None:
    clock.now += 200  # start
    watch.enter("compile")
    clock.now += 101
    assert "compile_limit_s = 300 s" in (watch.exceeded() or "")


def test_resident_memory_is_read_and_zero_when_the_process_is_gone() -> None:
    assert resident_bytes(os.getpid()) > 10 << 20
    assert resident_bytes(2**22 + 1) == 0
