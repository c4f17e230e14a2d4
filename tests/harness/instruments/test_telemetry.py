import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from mambench.harness import machine
from mambench.harness.instruments import telemetry
from mambench.harness.spec import Device, DeviceKind

GPU = Device(kind=DeviceKind.CUDA, name="GPU", compute_capability=(9, 0), memory_bytes=1)


class NotSupported(Exception):
    """NVML's way to say that a GPU lacks something."""


def fake_nvml(*, throttle: int = 0x4, power: bool = True) -> Any:
    def power_mw(handle: str) -> int:
        if not power:
            raise NotSupported
        return 350_000

    return SimpleNamespace(
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetCurrentClocksEventReasons=lambda handle: throttle,
        nvmlDeviceGetPowerUsage=power_mw,
        nvmlDeviceGetMaxClockInfo=lambda handle, domain: 1980,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 123_456,
        nvmlDeviceGetClockInfo=lambda handle, domain: {1: 1980, 2: 2619}[domain],
        nvmlDeviceGetTemperature=lambda handle, sensor: 54,
    )


def snapshot(monkeypatch: pytest.MonkeyPatch, nvml: Any) -> dict[str, Any]:
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(machine, "gpu_environment", lambda device: {"uuid": "GPU-1"})
    return telemetry.Telemetry(GPU).snapshot()


def test_gpu_state_is_in_si_units(monkeypatch: pytest.MonkeyPatch) -> None:
    assert snapshot(monkeypatch, fake_nvml()) == {
        "sm_clock_hz": 1.98e9,
        "memory_clock_hz": 2.619e9,
        "temperature_c": 54,
        "power_w": 350.0,
        "throttle_reasons": ["power_cap"],
    }


def test_what_a_gpu_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    state = snapshot(monkeypatch, fake_nvml(power=False))
    assert state["power_w"] is None
    assert state["temperature_c"] == 54


def test_missing_nvml_is_said_and_raises_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setattr(machine, "gpu_environment", lambda device: {"uuid": "GPU-1"})
    assert "pip install" in telemetry.Telemetry(GPU).snapshot()["missing"]
    monkeypatch.setattr(machine, "gpu_environment", lambda device: None)
    assert "NVML does not answer" in telemetry.Telemetry(GPU).snapshot()["missing"]


@pytest.mark.parametrize(
    ("bits", "reasons"),
    [
        (0, []),
        (0x1, ["gpu_idle"]),
        (0x44, ["power_cap", "hardware_thermal"]),
        (0x1000, ["unknown (0x1000)"]),
    ],
)
def test_throttle_bits_are_named(bits: int, reasons: list[str]) -> None:
    assert telemetry.decode_throttle(bits) == reasons


def test_only_real_throttling_counts() -> None:
    snapshots = {
        "before": {"throttle_reasons": ["gpu_idle"]},
        "after": {"throttle_reasons": ["software_thermal", "application_clocks"]},
        "other": {"throttle_reasons": None},
    }
    assert telemetry.throttled(snapshots) == ["software_thermal"]


def test_cpu_state_is_plain_json() -> None:
    state = telemetry.Telemetry(machine.cpu()).snapshot()
    assert json.loads(json.dumps(state)) == state
    assert set(state) == {"load_average_1min", "cpu_clock_hz", "temperature_c"}


@pytest.mark.parametrize(
    ("clock_hz", "reasons", "found"),
    [
        (1.98e9, [], []),
        (1.98e9, ["power_cap"], []),  # it belongs to the load
        (1.40e9, ["power_cap"], ["power_cap", telemetry.LOW_CLOCK]),
        (1.98e9, ["hardware_thermal"], ["hardware_thermal"]),
        (1.40e9, [], [telemetry.LOW_CLOCK]),
        (0.35e9, ["gpu_idle"], []),
        (1.40e9, ["application_clocks"], []),  # asked for
        (None, None, []),
    ],
)
def test_only_accidents_and_low_clocks_spoil_samples(
    clock_hz: float | None, reasons: list[str] | None, found: list[str]
) -> None:
    assert telemetry.slowed(clock_hz, 1.98e9, reasons) == found


def test_a_watch_sees_through_nvml_and_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(throttle=0x40))
    monkeypatch.setattr(machine, "gpu_environment", lambda device: {"uuid": "GPU-1"})
    sensors = telemetry.Telemetry(GPU).sensors
    assert sensors is not None
    assert sensors.energy_j() == pytest.approx(123.456)
    watch = telemetry.ThrottleWatch(sensors)
    watch.look()
    assert watch.reasons() == ["hardware_thermal"]
    assert watch.reasons() == []


def test_without_sensors_nothing_is_slow() -> None:
    watch = telemetry.ThrottleWatch(None)
    watch.look()
    assert watch.reasons() == []


def test_a_watch_looks_seldom_and_means_every_batch() -> None:
    now, asked = [0.0], [0]

    class Hot:
        def snapshot(self) -> dict[str, Any]:
            return {}

        def energy_j(self) -> None:
            return None

        def slowed(self) -> list[str]:
            asked[0] += 1
            return ["hardware_thermal"] if now[0] < 1.0 else []

    watch = telemetry.ThrottleWatch(Hot(), clock=lambda: now[0])
    for _ in range(100):
        watch.look()
    assert (asked[0], watch.reasons()) == (1, ["hardware_thermal"])
    watch.look()
    assert (asked[0], watch.reasons()) == (1, ["hardware_thermal"])
    now[0] = 1.0
    watch.look()
    assert (asked[0], watch.reasons()) == (2, [])
