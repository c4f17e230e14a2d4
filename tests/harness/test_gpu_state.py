"""What NVML is asked for, with calls that it does not know or support planted."""

from types import SimpleNamespace
from typing import Any

from mambench.harness import gpu_state

HANDLE = 7


class Nvml:
    """Answers what `answers` holds; what it lacks does not exist."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        if name not in self._answers:
            raise AttributeError(name)
        answer = self._answers[name]

        def call(*arguments: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer(*arguments[1:]) if callable(answer) else answer

        return call


def test_values_have_si_units():
    found = gpu_state.read(
        Nvml(
            nvmlDeviceGetUUID=b"GPU-1",  # old versions return bytes
            nvmlDeviceGetMemoryInfo=SimpleNamespace(total=80 << 30),
            nvmlDeviceGetCudaComputeCapability=(9, 0),
            nvmlDeviceGetEccMode=[1, 0],  # current, pending
            nvmlDeviceGetMigMode=[0, 1],
            nvmlDeviceGetComputeMode=3,
            nvmlDeviceGetEnforcedPowerLimit=650_000,
            nvmlDeviceGetPowerManagementDefaultLimit=700_000,
            nvmlDeviceGetApplicationsClock=lambda domain: {1: 1755, 2: 2619}[domain],
            nvmlDeviceGetComputeRunningProcesses=["somebody"],
            nvmlSystemGetCudaDriverVersion_v2=12_080,
        ),
        HANDLE,
    )
    assert found["uuid"] == "GPU-1"
    assert found["memory_bytes"] == 80 << 30
    assert found["compute_capability"] == "9.0"
    assert (found["ecc"], found["mig"]) == (True, False)
    assert found["compute_mode"] == "exclusive process"
    assert (found["power_limit_w"], found["power_limit_default_w"]) == (650.0, 700.0)
    assert found["clocks_hz"]["sm"]["application"] == 1_755_000_000
    assert found["other_processes"] == 1
    assert found["cuda_driver"] == "12.8"


def test_what_is_missing_is_none_with_its_reason():
    found = gpu_state.read(
        Nvml(nvmlDeviceGetEccMode=RuntimeError("Not Supported"), nvmlDeviceGetPersistenceMode=0),
        HANDLE,
    )
    assert found["ecc"] is None
    assert found["missing"]["ecc"] == "Not Supported"
    assert found["uuid"] is None
    assert "does not know" in found["missing"]["uuid"]
    assert found["clocks_hz"]["sm"]["max"] is None
    assert "clocks_hz.sm.max" in found["missing"]
    assert found["persistence"] is False  # off is not missing
    assert "persistence" not in found["missing"]
    assert found["clock_locks"] is None
    assert "locked" in found["missing"]["clock_locks"]
