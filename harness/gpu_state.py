"""A GPU's identity, limits and present state, as NVML tells them. Imports no pynvml itself.

What cannot be read is None, and `missing` says why: "not supported" on this GPU is something else
than "off".
"""

from collections.abc import Callable
from typing import Any

_COMPUTE_MODES = {0: "default", 1: "exclusive thread", 2: "prohibited", 3: "exclusive process"}
_MHZ = 1_000_000
_MILLI = 1e-3


def read(nvml: Any, handle: Any) -> dict[str, Any]:
    """Return a GPU's state as plain JSON values, SI units in the names."""
    reader = _Reader(nvml, handle)
    state = {
        **_identity(reader),
        **_limits(reader),
        "clocks_hz": {
            name: _clocks(reader, name, domain)
            for name, domain in (("sm", nvml.NVML_CLOCK_SM), ("memory", nvml.NVML_CLOCK_MEM))
        },
        # NVML sets locks (nvidia-smi --lock-gpu-clocks) but does not tell of them; a maximum
        # below the GPU's own, or clocks that never move under load, are what shows of one.
        "clock_locks": None,
        "temperature_c": reader("temperature_c", "Temperature", nvml.NVML_TEMPERATURE_GPU),
        "other_processes": _processes(reader),
        "driver": _text(reader.system("driver", "nvmlSystemGetDriverVersion")),
        "cuda_driver": _version(reader.system("cuda_driver", "nvmlSystemGetCudaDriverVersion_v2")),
    }
    reader.missing["clock_locks"] = "NVML does not tell whether clocks are locked"
    return {**state, "missing": reader.missing}


class _Reader:
    """Asks NVML, and keeps the reason where it does not answer."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self.missing: dict[str, str] = {}

    def __call__(self, key: str, function: str, *arguments: Any) -> Any:
        """Ask for something of the device: `nvmlDeviceGet` and the function's name."""
        return self._try(
            key, lambda: getattr(self._nvml, f"nvmlDeviceGet{function}")(self._handle, *arguments)
        )

    def system(self, key: str, function: str) -> Any:
        """Ask for something that is not a device's."""
        return self._try(key, lambda: getattr(self._nvml, function)())

    def _try(self, key: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except AttributeError:
            self.missing[key] = "this version of NVML or of nvidia-ml-py does not know it"
        except Exception as error:  # NVML raises one class per code, made at import
            self.missing[key] = str(error) or type(error).__name__
        return None


def _identity(reader: _Reader) -> dict[str, Any]:
    memory = reader("memory_bytes", "MemoryInfo")
    capability = reader("compute_capability", "CudaComputeCapability")
    return {
        "name": _text(reader("name", "Name")),
        "uuid": _text(reader("uuid", "UUID")),
        "vbios": _text(reader("vbios", "VbiosVersion")),
        "compute_capability": None if capability is None else ".".join(map(str, capability)),
        "memory_bytes": None if memory is None else int(memory.total),
        "pcie": {
            "generation": reader("pcie.generation", "CurrPcieLinkGeneration"),
            "width": reader("pcie.width", "CurrPcieLinkWidth"),
        },
    }


def _limits(reader: _Reader) -> dict[str, Any]:
    mode = reader("compute_mode", "ComputeMode")
    return {
        "ecc": _current(reader("ecc", "EccMode")),
        "mig": _current(reader("mig", "MigMode")),
        "persistence": _flag(reader("persistence", "PersistenceMode")),
        "compute_mode": None if mode is None else _COMPUTE_MODES.get(mode, str(mode)),
        "power_limit_w": _scaled(reader("power_limit_w", "EnforcedPowerLimit"), _MILLI),
        "power_limit_default_w": _scaled(
            reader("power_limit_default_w", "PowerManagementDefaultLimit"), _MILLI
        ),
    }


def _clocks(reader: _Reader, name: str, domain: int) -> dict[str, float | None]:
    """Return a domain's clocks: now, the most it can, and the application clocks if set."""
    kinds = {
        "current": "ClockInfo",
        "max": "MaxClockInfo",
        "application": "ApplicationsClock",
        "application_default": "DefaultApplicationsClock",
    }
    return {
        kind: _scaled(reader(f"clocks_hz.{name}.{kind}", function, domain), _MHZ)
        for kind, function in kinds.items()
    }


def _processes(reader: _Reader) -> int | None:
    """Count the processes that hold a context, our own aside: planning starts none."""
    found = reader("other_processes", "ComputeRunningProcesses")
    return None if found is None else len(found)


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def _flag(value: int | None) -> bool | None:
    return None if value is None else bool(value)


def _current(pair: Any) -> bool | None:
    """Return the current mode of NVML's (current, pending)."""
    return None if pair is None else bool(pair[0])


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _version(number: int | None) -> str | None:
    return None if number is None else f"{number // 1000}.{number % 1000 // 10}"
