from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from mambench.harness.instruments import energy


class Device:
    """A device at constant power whose counter ticks; time passes only as it works."""

    def __init__(self, *, power_w: float = 300.0, tick_s: float = 0.1, execution_s: float = 0.002):
        self.now_s = 1000.0
        self._power_w, self._tick_s, self._execution_s = power_w, tick_s, execution_s
        self._begun_s = self.now_s

    def clock(self) -> float:
        return self.now_s

    def counter(self) -> float | None:
        ticks = int((self.now_s - self._begun_s) / self._tick_s)
        return 5e6 + self._power_w * self._tick_s * ticks

    def snapshot(self) -> Mapping[str, Any]:
        return {"power_w": self._power_w, "sm_clock_hz": 1.98e9}

    def burst(self, poll: Callable[[], None]) -> int:
        for _ in range(4):
            self.now_s += self._execution_s / 2
            poll()
        return 2

    def measure(self, counter: Callable[[], float | None] | None = None) -> energy.EnergyReading:
        meter = energy.Meter(counter or self.counter, self.snapshot, clock=self.clock)
        return energy.measure(self.burst, meter, clock=self.clock)


@pytest.mark.parametrize("power_w", [60.0, 300.0, 700.0])
@pytest.mark.parametrize("tick_s", [0.02, 0.1])
@pytest.mark.parametrize("execution_s", [0.0001, 0.002, 0.004])
def test_energy_of_a_known_load(power_w: float, tick_s: float, execution_s: float) -> None:
    device = Device(power_w=power_w, tick_s=tick_s, execution_s=execution_s)
    reading = device.measure()
    assert reading.missing is None
    assert reading.power_w == pytest.approx(power_w, rel=energy.RESOLUTION_FRAC)
    assert reading.energy_j == pytest.approx(power_w * execution_s, rel=energy.RESOLUTION_FRAC)
    assert reading.details["resolution_frac"] <= energy.RESOLUTION_FRAC
    assert reading.details["ticks"] >= energy.TICKS
    assert device.now_s - 1000.0 < 1.0


def test_a_counter_read_at_arbitrary_moments_would_be_far_off() -> None:
    # What the edges are for: the same load, the counter read at begin and end of 0.35 s.
    device = Device()
    before, begun_s = device.counter(), device.now_s
    assert before is not None
    while device.now_s - begun_s < 0.35:
        device.burst(lambda: None)
    after = device.counter()
    assert after is not None
    assert abs((after - before) / (device.now_s - begun_s) / 300.0 - 1) > 0.1


def test_a_counter_that_does_not_tick_gives_no_energy_but_a_reason() -> None:
    device = Device()
    reading = device.measure(lambda: 5e6)
    assert reading.energy_j is None
    assert reading.power_w is None
    assert "did not advance in 1.0 s" in (reading.missing or "")
    assert device.now_s - 1000.0 < 1.5


def test_a_counter_that_cannot_be_read_gives_a_reason() -> None:
    assert "cannot be read" in (Device().measure(lambda: None).missing or "")


def test_a_counter_too_slow_for_the_ceiling_gives_a_reason() -> None:
    reading = Device(tick_s=0.9, execution_s=0.5).measure()
    assert reading.energy_j is None
    assert "too seldom" in (reading.missing or "")


def test_the_trace_is_bounded_and_begins_with_the_work() -> None:
    reading = Device(tick_s=0.1).measure()
    trace = reading.details["trace"]
    assert 3 <= len(trace) <= energy.MAX_TRACE
    assert trace[0]["at_s"] < 2 * energy.TRACE_S
    assert trace[-1] == {**trace[-1], "power_w": 300.0, "sm_clock_hz": 1.98e9}


def package(root: Path, value_uj: int, number: int = 0) -> Path:
    zone = root / f"intel-rapl:{number}"
    zone.mkdir(exist_ok=True)
    (zone / "name").write_text(f"package-{number}\n")
    (zone / "energy_uj").write_text(f"{value_uj}\n")
    (zone / "max_energy_range_uj").write_text("1000000\n")
    return zone


def test_rapl_adds_packages_and_survives_wrapping(tmp_path: Path) -> None:
    package(tmp_path, 900_000)
    package(tmp_path, 100, number=1)
    rapl = energy.Rapl(tmp_path)
    assert rapl.missing() is None
    assert rapl.energy_j() == 0
    package(tmp_path, 100_000)
    package(tmp_path, 50_100, number=1)
    assert rapl.energy_j() == pytest.approx(0.2 + 0.05)


def test_rapl_s_absence_has_a_reason(tmp_path: Path) -> None:
    assert "no RAPL counter" in (energy.Rapl(tmp_path).missing() or "")
    zone = package(tmp_path, 1)
    (zone / "energy_uj").write_text("garbage")
    assert "cannot be read" in (energy.Rapl(tmp_path).missing() or "")
