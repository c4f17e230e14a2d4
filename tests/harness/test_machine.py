"""Detecting devices (with a planted NVML), the environment, and the code's version."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambench.harness import machine
from mambench.harness.errors import UsageError
from mambench.harness.spec import DeviceKind

UUIDS = ("GPU-aaaa-1", "GPU-aaab-2", "GPU-cccc-3")


class FakeNvml:
    """As much of pynvml as is used; handles are indices, and some calls are not supported."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def nvmlDeviceGetCount(self) -> int:
        return len(UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"MIG-x": 1}[uuid]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return UUIDS[handle]

    def nvmlDeviceGetName(self, handle: int) -> bytes:  # old versions return bytes
        return f"GPU {handle}".encode()

    def nvmlDeviceGetCudaComputeCapability(self, handle: int) -> tuple[int, int]:
        return 9, handle

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> Any:
        return SimpleNamespace(total=(handle + 1) * 2**30)

    def nvmlDeviceGetVbiosVersion(self, handle: int) -> str:
        return "96.00"

    def nvmlDeviceGetEccMode(self, handle: int) -> list[int]:
        return [1, 0]

    def nvmlDeviceGetMigMode(self, handle: int) -> list[int]:
        raise RuntimeError("Not Supported")

    def nvmlDeviceGetPersistenceMode(self, handle: int) -> int:
        return 0

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: int) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 41

    def nvmlDeviceGetClockInfo(self, handle: int, domain: int) -> int:
        return {1: 345, 2: 2619}[domain]

    def nvmlDeviceGetMaxClockInfo(self, handle: int, domain: int) -> int:
        return {1: 1980, 2: 2619}[domain]

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[object]:
        return []

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13_010


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    from contextlib import nullcontext

    fake = FakeNvml()
    monkeypatch.setattr(machine, "_nvml", lambda: nullcontext(fake))
    monkeypatch.setattr(machine, "torch_cuda_version", lambda: "13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return fake


def test_the_first_gpu_is_taken(nvml: FakeNvml):
    for name in (None, "auto", "cuda", "cuda:0"):
        found = machine.detect(name)
        assert (found.kind, found.index, found.name) == (DeviceKind.CUDA, 0, "GPU 0")
        assert found.compute_capability == (9, 0)
        assert found.memory_bytes == 2**30
    assert machine.detect("cuda:2").name == "GPU 2"
    assert machine.detect("cpu").kind is DeviceKind.CPU


@pytest.mark.parametrize(
    ("variable", "names"),
    [
        ("1", ["GPU 1"]),
        ("2,0", ["GPU 2", "GPU 0"]),
        (" 2 , 0 ", ["GPU 2", "GPU 0"]),
        ("GPU-cccc", ["GPU 2"]),
        ("GPU-aaab-2,0", ["GPU 1", "GPU 0"]),
        ("MIG-x", ["GPU 1"]),
        ("0,-1,1", ["GPU 0"]),  # CUDA ignores what follows an entry it cannot use
        ("0,7,1", ["GPU 0"]),
    ],
)
def test_visible_devices_are_numbered_as_torch_does(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, variable: str, names: list[str]
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    found = machine.gpus().devices
    assert [device.name for device in found] == names
    assert [device.index for device in found] == list(range(len(names)))


@pytest.mark.parametrize("variable", ["", "-1", "GPU-nope"])
def test_no_visible_device_means_the_cpu(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, variable: str
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    assert machine.detect().kind is DeviceKind.CPU
    with pytest.raises(
        UsageError,
        match=r"device 'cuda' cannot be used: (no GPU is visible.*)?CUDA_VISIBLE_DEVICES",
    ):
        machine.detect("cuda")


def test_a_torch_without_cuda_means_the_cpu(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "torch_cuda_version", lambda: None)
    assert machine.detect().kind is DeviceKind.CPU
    with pytest.raises(UsageError, match="torch is not installed with CUDA"):
        machine.detect("cuda:0")


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    def refuse() -> Any:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setattr(machine, "_nvml", refuse)
    assert machine.detect().kind is DeviceKind.CPU
    with pytest.raises(UsageError, match="NVML does not answer"):
        machine.detect("cuda")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpu", "unknown device 'gpu'"),
        ("cudda", "Did you mean 'cuda'?"),
        ("cuda:9", "there is no device 'cuda:9'. Valid: cpu, cuda:0, cuda:1, cuda:2."),
        ("cuda:x", "unknown device 'cuda:x'"),
    ],
)
def test_a_wrong_device(nvml: FakeNvml, name: str, says: str):
    with pytest.raises(UsageError) as caught:
        machine.detect(name)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ("cuda = '12.8'", "12.8"),
        ("cuda: Optional[str] = None", None),
        ("cudax = '1'", None),
    ],
)
def test_the_cuda_of_torch_is_read_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, version: str | None
):
    (tmp_path / "version.py").write_text(f"__version__ = '2'\n{line}\nhip = None\n")
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: spec)
    assert machine.torch_cuda_version() == version


def test_gpu_environment_has_units_and_nulls(nvml: FakeNvml):
    found = machine.gpu_environment(machine.detect("cuda:1"))
    assert found is not None
    assert found["uuid"] == UUIDS[1]
    assert found["power_limit_w"] == pytest.approx(700)
    sm = found["clocks_hz"]["sm"]
    assert (sm["current"], sm["max"]) == (345_000_000, 1_980_000_000)
    assert found["ecc"] is True
    assert found["mig"] is None  # not supported is not the same as off
    assert found["persistence"] is False
    assert found["cuda_driver"] == "13.1"
    assert machine.environment(machine.detect("cuda:1"))["gpu"]["uuid"] == UUIDS[1]


def test_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("MY_SECRET_TOKEN", "do not record")
    found = machine.environment(machine.cpu())
    assert found["variables"]["OMP_NUM_THREADS"] == "3"
    text = json.dumps(found)
    assert "do not record" not in text
    assert found["gpu"] is None
    assert found["libraries"]["numpy"]
    assert found["libraries"]["mamba-ssm"] is None or isinstance(
        found["libraries"]["mamba-ssm"], str
    )
    assert 0 < found["memory"]["available_bytes"] <= found["memory"]["total_bytes"]
    assert found["cpu"]["model"]
    assert found["system"]["kernel"]
    absent = [name for name in ("governor", "turbo") if found["cpu"][name] is None]
    assert all(found["missing"][f"cpu.{name}"] for name in absent)


def test_cgroup_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {"/sys/fs/cgroup/memory.max": "1073741824", "/sys/fs/cgroup/cpu.max": "150000 100000"}
    monkeypatch.setattr(machine, "_read", lambda path: files.get(path, ""))
    assert machine.cgroup_memory_limit_bytes() == 2**30
    assert machine.usable_memory_bytes() == 2**30
    assert machine.cgroup_cpus() == 1.5
    files.update({"/sys/fs/cgroup/memory.max": "max", "/sys/fs/cgroup/cpu.max": "max 100000"})
    assert machine.cgroup_memory_limit_bytes() is None
    assert machine.cgroup_cpus() is None


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def test_code_version_follows_every_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    module = tmp_path / "harness" / "machine.py"
    module.parent.mkdir()
    module.write_text("x = 1\n")
    monkeypatch.setattr(machine, "__file__", str(module))
    outside = machine.code_version()
    assert outside["commit"] is None
    assert outside["id"] == outside["version"]
    monkeypatch.setenv("MAMBENCH_COMMIT", "0123456789abcdef")
    copy = machine.code_version()
    assert (copy["commit"], copy["dirty"]) == ("0123456789abcdef", None)
    assert copy["id"] == f"{copy['version']}+0123456789ab"
    (tmp_path / ".git").mkdir()  # what a copy may bring along, and git does not recognise
    assert machine.code_version() == copy
    (tmp_path / ".git").rmdir()

    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    clean = machine.code_version()
    assert clean["dirty"] is False
    assert clean["diff_digest"] is None
    assert clean["changed_files"] == []
    assert clean["id"] == f"{clean['version']}+{clean['commit'][:12]}"

    module.write_text("x = 2\n")
    edited = machine.code_version()
    assert edited["dirty"] is True
    assert edited["commit"] == clean["commit"]

    (tmp_path / "new.py").write_text("y = 1\n")
    with_new = machine.code_version()
    assert with_new["changed_files"] == ["harness/machine.py", "new.py"]
    (tmp_path / "new.py").write_text("y = 2\n")
    with_newer = machine.code_version()
    ids = {v["id"] for v in (outside, clean, edited, with_new, with_newer)}
    assert len(ids) == 5
    assert machine.code_version() == with_newer


def test_a_package_without_metadata_states_its_version_in_its_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for module, text in (
        ("unpacked_one", "import torch_is_not_imported_here\n__version__ = '2.3.2'\n"),
        ("unpacked_two", "x = 1\n"),
    ):
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    names = ("unpacked-one", "unpacked-two", "not-there-at-all")
    monkeypatch.setattr(machine, "LIBRARIES", names)
    libraries = machine.environment()["libraries"]
    assert libraries == {"unpacked-one": "2.3.2", "unpacked-two": None, "not-there-at-all": None}
