"""The state of the device around a measurement: clocks, temperature, power, throttling, load.

Imports neither torch nor pynvml at module level. What cannot be read is None, with a reason where
all of it is missing.
"""

import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from mambench.harness import machine
from mambench.harness.spec import Device, DeviceKind

Snapshot = dict[str, Any]

# NVML's bits (nvml.h, nvmlClocksEventReasons); "gpu_idle" and "application_clocks" slow nothing
# down that was not asked for.
THROTTLE_REASONS: Mapping[int, str] = {
    0x0001: "gpu_idle",
    0x0002: "application_clocks",
    0x0004: "power_cap",
    0x0008: "hardware_slowdown",
    0x0010: "sync_boost",
    0x0020: "software_thermal",
    0x0040: "hardware_thermal",
    0x0080: "power_brake",
    0x0100: "display_clocks",
}
HARMLESS = frozenset({"gpu_idle", "application_clocks", "display_clocks"})
# Samples are taken again for these. The power cap alone is no accident: it belongs to the load, and
# returns with it. It counts where it holds the clock down by as much as LOW_CLOCK_FRAC says.
ACCIDENTAL = frozenset({"hardware_slowdown", "software_thermal", "hardware_thermal", "power_brake"})
LOW_CLOCK_FRAC = 0.75  # of the largest SM clock; nvbench discards below this too
LOOK_S = 0.02  # between two looks at what slows a device down
LOW_CLOCK = "sm_clock_below_75_percent"


class Sensors(Protocol):
    """What is read of a device while something runs on it; None where it cannot be read."""

    def snapshot(self) -> Snapshot:
        """Return the device's state now, as plain JSON values."""
        ...

    def energy_j(self) -> float | None:
        """Return the joules the device has used since some moment in the past."""
        ...

    def slowed(self) -> list[str]:
        """Return for which reasons the device is slower now than it should be while it works."""
        ...


class Telemetry:
    """Takes snapshots of one device; never raises, because a measurement does not depend on it."""

    def __init__(self, device: Device) -> None:
        self.sensors: Sensors | None = None  # of a GPU
        self.missing: str | None = None  # why there are none
        if device.kind is DeviceKind.CUDA:
            found = _gpu_sensors(device)
            self.sensors, self.missing = (None, found) if isinstance(found, str) else (found, None)
        self._on_gpu = device.kind is DeviceKind.CUDA

    def snapshot(self) -> Snapshot:
        """Return the device's state now, as plain JSON values."""
        if self.sensors is not None:
            return self.sensors.snapshot()
        return {"missing": self.missing} if self._on_gpu else _cpu()


class ThrottleWatch:
    """Looks at a device while it works, and tells at the end of a batch what slowed it down."""

    def __init__(
        self, sensors: Sensors | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._sensors, self._clock = sensors, clock
        self._looked_s: float | None = None
        self._latest: list[str] = []
        self._seen: set[str] = set()

    def look(self) -> None:
        """Look now, while the device is busy; what was seen a moment ago is not looked at again.

        NVML takes longer to answer than many an execution takes.
        """
        if self._sensors is None:
            return
        if self._looked_s is None or self._clock() - self._looked_s >= LOOK_S:
            self._latest = self._sensors.slowed()
            self._looked_s = self._clock()
        self._seen.update(self._latest)

    def reasons(self) -> Sequence[str]:
        """Return what was seen since the last call."""
        seen, self._seen = sorted(self._seen), set()
        return seen


def slowed(
    clock_hz: float | None, largest_hz: float | None, throttle: Sequence[str] | None
) -> list[str]:
    """Return the reasons for which a busy GPU's samples are not its own speed.

    A clock that was asked to be low, and that of an idle GPU, are no reasons.
    """
    reasons = set(throttle or ())
    found = reasons & ACCIDENTAL
    asked = reasons & {"gpu_idle", "application_clocks"}
    if clock_hz and largest_hz and clock_hz < LOW_CLOCK_FRAC * largest_hz and not asked:
        found |= {LOW_CLOCK} | (reasons - HARMLESS)
    return sorted(found)


def throttled(snapshots: Mapping[str, Snapshot]) -> list[str]:
    """Return the reasons for which the GPU was slowed down in any of the snapshots."""
    reasons = {r for snapshot in snapshots.values() for r in snapshot.get("throttle_reasons") or ()}
    return sorted(reasons - HARMLESS)


def decode_throttle(bits: int) -> list[str]:
    """Name the bits of NVML's clocks-event reasons."""
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return known + ([f"unknown ({rest:#x})"] if rest else [])


def _gpu_sensors(device: Device) -> "_Nvml | str":
    """Return what reads the GPU, or the reason why nothing can."""
    state = machine.gpu_environment(device)
    try:
        if state is None:
            raise LookupError("NVML does not answer")
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()  # until the process ends: initialising takes longer than reading
        return _Nvml(nvml, nvml.nvmlDeviceGetHandleByUUID(state["uuid"]))
    except ImportError:
        return "nvidia-ml-py is not installed: pip install nvidia-ml-py"
    except Exception as error:  # NVML raises one class per code, made at import
        return f"the GPU's state cannot be read: {error}"


class _Nvml:
    """The sensors of one GPU."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._largest_hz = _hz(self._read("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM))

    def snapshot(self) -> Snapshot:
        """Return clocks, temperature, power and throttle reasons."""
        nvml, power_mw = self._nvml, self._read("nvmlDeviceGetPowerUsage")
        return {
            "sm_clock_hz": self._sm_clock_hz(),
            "memory_clock_hz": _hz(self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
            "temperature_c": self._read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
            "power_w": None if power_mw is None else power_mw / 1000,
            "throttle_reasons": self._throttle(),
        }

    def energy_j(self) -> float | None:
        """Return the joules used since the driver was loaded; the counter ticks in millijoules."""
        millijoules = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def slowed(self) -> list[str]:
        """Return what slows the GPU down now."""
        return slowed(self._sm_clock_hz(), self._largest_hz, self._throttle())

    def _sm_clock_hz(self) -> float | None:
        return _hz(self._read("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM))

    def _throttle(self) -> list[str] | None:
        bits = self._read("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:  # the name before NVML 12.2
            bits = self._read("nvmlDeviceGetCurrentClocksThrottleReasons")
        return None if bits is None else decode_throttle(bits)

    def _read(self, function: str, *arguments: Any) -> Any:
        try:
            return getattr(self._nvml, function)(self._handle, *arguments)
        except Exception:  # not supported on this GPU, or no permission
            return None


def _hz(mhz: float | None) -> float | None:
    return None if mhz is None else mhz * 1e6


def _cpu() -> Snapshot:
    import psutil

    frequency = _quietly(psutil.cpu_freq)
    sensors: Any = _quietly(getattr(psutil, "sensors_temperatures", dict)) or {}
    degrees = [entry.current for entries in sensors.values() for entry in entries]
    load = _quietly(os.getloadavg)
    return {
        "load_average_1min": load[0] if load else None,
        "cpu_clock_hz": _hz(frequency.current) if frequency and frequency.current else None,
        "temperature_c": max(degrees, default=None),
    }


def _quietly(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Exception:  # sensors differ, and psutil lets through what the system says
        return None
