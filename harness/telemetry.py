"""The state of the device around a measurement: clocks, temperature, power, throttling, load.

Imports neither torch nor pynvml at module level. What cannot be read is None, with a reason where
all of it is missing.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any

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


class Telemetry:
    """Takes snapshots of one device; never raises, because a measurement does not depend on it."""

    def __init__(self, device: Device) -> None:
        self._read = _gpu_reader(device) if device.kind is DeviceKind.CUDA else _cpu

    def snapshot(self) -> Snapshot:
        """Return the device's state now, as plain JSON values."""
        return self._read()


def throttled(snapshots: Mapping[str, Snapshot]) -> list[str]:
    """Return the reasons for which the GPU was slowed down in any of the snapshots."""
    reasons = {r for snapshot in snapshots.values() for r in snapshot.get("throttle_reasons") or ()}
    return sorted(reasons - HARMLESS)


def decode_throttle(bits: int) -> list[str]:
    """Name the bits of NVML's clocks-event reasons."""
    known = [name for bit, name in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return known + ([f"unknown ({rest:#x})"] if rest else [])


def _gpu_reader(device: Device) -> Callable[[], Snapshot]:
    state = machine.gpu_environment(device)
    try:
        if state is None:
            raise LookupError("NVML does not answer")
        nvml: Any = importlib.import_module("pynvml")
        nvml.nvmlInit()  # until the process ends: initialising takes longer than reading
        handle = nvml.nvmlDeviceGetHandleByUUID(state["uuid"])
    except ImportError:
        return _missing("nvidia-ml-py is not installed: pip install nvidia-ml-py")
    except Exception as error:  # NVML raises one class per code, made at import
        return _missing(f"the GPU's state cannot be read: {error}")
    return lambda: _gpu(nvml, handle)


def _missing(reason: str) -> Callable[[], Snapshot]:
    return lambda: {"missing": reason}


def _gpu(nvml: Any, handle: Any) -> Snapshot:
    def read(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except Exception:  # not supported on this GPU, or no permission
            return None

    bits = read("nvmlDeviceGetCurrentClocksEventReasons")
    if bits is None:  # the name before NVML 12.2
        bits = read("nvmlDeviceGetCurrentClocksThrottleReasons")
    power_mw = read("nvmlDeviceGetPowerUsage")
    return {
        "sm_clock_hz": _hz(read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)),
        "memory_clock_hz": _hz(read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
        "temperature_c": read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "power_w": None if power_mw is None else power_mw / 1000,
        "throttle_reasons": None if bits is None else decode_throttle(bits),
    }


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
