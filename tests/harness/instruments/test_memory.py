from collections.abc import Callable

import pytest

from mambench.harness.instruments.memory import CudaMeter, ResidentMeter, cpu_missing, measure

MIB = 1 << 20


class FakeMeter:
    """Memory as a number that the test moves."""

    method = "fake"

    def __init__(self) -> None:
        self.held = 1000
        self.highest = 10**6  # of the gate, before
        self.settled = 0

    def settle(self) -> None:
        self.settled += 1

    def reset_peak(self) -> None:
        self.highest = self.held

    def level(self) -> int:
        return self.held

    def peak(self) -> int:
        return self.highest

    def peak_reserved(self) -> int:
        return 2 * self.highest

    def hold(self, size: int) -> None:
        self.held += size
        self.highest = max(self.highest, self.held)


def test_peak_holds_inputs_and_outputs_and_nothing_from_before() -> None:
    meter = FakeMeter()
    meter.hold(100)  # inputs

    def prepare() -> Callable[[], object]:
        meter.hold(30)  # what a backward keeps of its forward

        def execute() -> None:
            meter.hold(50)
            meter.hold(-40)

        return execute

    reading = measure(meter, prepare, lambda: meter.hold(-140))
    assert reading.extra_bytes == 50
    assert reading.peak_bytes == 180
    assert reading.reserved_bytes == 2 * 1180
    assert reading.method == "fake"
    assert meter.settled == 3


def test_inputs_that_something_keeps_are_in_the_peak_all_the_same() -> None:
    meter = FakeMeter()
    meter.hold(100)  # inputs, which an autotuner keeps as its last arguments

    def prepare() -> Callable[[], object]:
        meter.hold(30)
        return lambda: meter.hold(50)

    reading = measure(meter, prepare, lambda: meter.hold(-50), input_bytes=100)
    assert reading.extra_bytes == 50
    assert reading.peak_bytes == 180
    assert reading.details["kept_after_release_bytes"] == 130


def test_inputs_that_are_released_are_counted_once() -> None:
    meter = FakeMeter()
    meter.hold(100)
    reading = measure(
        meter, lambda: lambda: meter.hold(50), lambda: meter.hold(-150), input_bytes=100
    )
    assert reading.peak_bytes == 150
    assert "kept_after_release_bytes" not in reading.details


def test_a_pass_that_allocates_nothing_has_no_extra_memory() -> None:
    meter = FakeMeter()
    reading = measure(meter, lambda: lambda: None, lambda: None)
    assert (reading.peak_bytes, reading.extra_bytes) == (0, 0)


def test_what_the_library_keeps_is_not_negative_memory() -> None:
    meter = FakeMeter()
    reading = measure(meter, lambda: lambda: meter.hold(70), lambda: meter.hold(500))
    assert reading.peak_bytes == 70
    assert reading.extra_bytes == 70


@pytest.mark.skipif(cpu_missing() is not None, reason=str(cpu_missing()))
def test_resident_meter_sees_what_was_held_only_for_a_moment() -> None:
    meter = ResidentMeter()

    def execute() -> None:
        b"x" * (64 * MIB)  # freed before the meter is read

    reading = measure(meter, lambda: execute, lambda: None)
    assert reading.extra_bytes == pytest.approx(64 * MIB, abs=2 * MIB)
    assert measure(meter, lambda: lambda: None, lambda: None).extra_bytes < 2 * MIB


@pytest.mark.gpu
def test_cuda_meter_counts_tensors_exactly() -> None:
    import torch

    meter = CudaMeter("cuda:0")
    inputs = [torch.zeros(8 * MIB, dtype=torch.uint8, device="cuda")]

    def execute() -> torch.Tensor:
        scratch = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
        out = torch.zeros(4 * MIB, dtype=torch.uint8, device="cuda")
        del scratch
        return out

    reading = measure(meter, lambda: execute, inputs.clear)
    assert reading.extra_bytes == 68 * MIB
    assert reading.peak_bytes == 76 * MIB
