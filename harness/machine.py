"""What machine this is: the device a run is for, the environment, and the code's version.

Imports neither torch nor pynvml at module level and starts no CUDA context, so that the process
that plans and supervises holds no GPU memory and may fork.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from mambench.harness import gpu_state
from mambench.harness.errors import UsageError, unknown_name
from mambench.harness.host_state import HostState
from mambench.harness.spec import Device, DeviceKind

LIBRARIES = (
    *("torch", "triton", "numba", "numpy", "pandas", "flash-attn-4", "flash-attn-3", "flash-attn"),
    *("mamba-ssm", "causal-conv1d", "flash-linear-attention", "fla-core", "flashinfer-python"),
    *("einops", "tilelang"),
    *("nvidia-cuda-runtime", "nvidia-cuda-runtime-cu12", "nvidia-cublas", "nvidia-cublas-cu12"),
    *("nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "nvidia-cutlass-dsl", "nvidia-ml-py", "psutil"),
)

MAX_CHANGED_FILES = 50  # named in the manifest; the digest covers all
# Top-level modules that are not called as their distributions.
MODULES = {"fla-core": "fla", "flashinfer-python": "flashinfer", "nvidia-ml-py": "pynvml"}

# Variables that change what is run or how fast; no other variable is recorded.
VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "PYTORCH_ALLOC_CONF"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "NVIDIA_TF32_OVERRIDE"),
    *("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE"),
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "KMP_AFFINITY", "GOMP_CPU_AFFINITY"),
    *("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "NUMBA_NUM_THREADS"),
    *("NUMBA_THREADING_LAYER", "NUMBA_CPU_NAME", "NUMBA_DISABLE_JIT", "MALLOC_ARENA_MAX"),
)


@dataclass(frozen=True, kw_only=True)
class GpuAccess:
    """Whether CUDA can be used here, and if not, why and what to do."""

    devices: tuple[Device, ...] = ()
    problem: str | None = None  # None if `devices` is not empty


def detect(name: str | None = None) -> Device:
    """Return the device to run on.

    Args:
        name: `cpu`, `cuda`, `cuda:INDEX` (torch's index, so within CUDA_VISIBLE_DEVICES), or `auto`
            or None for the first GPU that works and else the CPU.

    Raises UsageError for an unknown name or a device that is not there, with the reason.
    """
    name = (name or "auto").strip()
    match = re.fullmatch(r"cuda:(\d+)", name)
    if name not in ("auto", "cpu", "cuda") and match is None:
        raise UsageError(unknown_name("device", name, ("auto", "cpu", "cuda", "cuda:0")))
    if name == "cpu":
        return cpu()
    access = gpus()
    if name == "auto":
        return access.devices[0] if access.devices else cpu()
    if access.problem is not None:
        raise UsageError(f"device '{name}' cannot be used: {access.problem}")
    index = int(match[1]) if match else 0
    if index >= len(access.devices):
        valid = ", ".join(device.torch_name for device in access.devices)
        raise UsageError(f"there is no device '{name}'. Valid: cpu, {valid}.")
    return access.devices[index]


def cpu() -> Device:
    """Return this machine's processor as a device; its memory is what this process may use."""
    return Device(kind=DeviceKind.CPU, name=_cpu_model(), memory_bytes=usable_memory_bytes())


def gpus() -> GpuAccess:
    """Return the GPUs torch will see, in its order, or why there are none."""
    try:
        with _nvml() as nvml:
            handles = [_handle(nvml, item) for item in _visible(nvml)]
            devices = tuple(_gpu(nvml, handle, i) for i, handle in enumerate(handles))
    except ImportError:
        return GpuAccess(problem="nvidia-ml-py is not installed: pip install nvidia-ml-py")
    except LookupError as error:
        return GpuAccess(problem=str(error))
    except Exception as error:  # NVML raises one class per code, made at import
        return GpuAccess(problem=f"NVML does not answer ({error}); is the NVIDIA driver installed?")
    if not devices:
        return GpuAccess(problem="no GPU is visible; see CUDA_VISIBLE_DEVICES")
    if torch_cuda_version() is None:
        return GpuAccess(
            problem="torch is not installed with CUDA; install torch's CUDA build to use the GPU"
        )
    return GpuAccess(devices=devices)


def torch_cuda_version() -> str | None:
    """Return the CUDA version torch was built with, without importing torch."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    version = Path(spec.origin).with_name("version.py")
    with suppress(OSError):
        if match := re.search(r"^cuda\b[^=]*=\s*'([^']+)'", version.read_text(), re.MULTILINE):
            return match[1]
    return None


def usable_memory_bytes() -> int:
    """Return the memory this process may use: the machine's, or less where a cgroup limits it."""
    import psutil

    total = psutil.virtual_memory().total
    limit = cgroup_memory_limit_bytes()
    return total if limit is None else min(total, limit)


def cgroup_memory_limit_bytes() -> int | None:
    """Return the memory limit of this process' cgroup, or None."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(path)
        if text.isdigit() and int(text) < 2**60:
            return int(text)
    return None


def cgroup_cpus() -> float | None:
    """Return how many processors' worth of time this process' cgroup may use, or None."""
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def environment(device: Device | None = None) -> dict[str, Any]:
    """Return everything that explains a difference between two runs, as plain JSON values.

    A quantity that cannot be read is None, with its reason in `missing` (the GPU's in its own). The
    GPU's part is None on the CPU.
    """
    import psutil

    memory, host = psutil.virtual_memory(), HostState()
    cpu_settings, system = host.cpu(), host.system()
    return {
        "python": platform.python_version(),
        "python_implementation": platform.python_implementation(),
        "platform": platform.platform(),
        "system": system,
        "libraries": {name: library_version(name) for name in LIBRARIES},
        "torch_cuda": torch_cuda_version(),
        "cpu": {
            "model": _cpu_model(),
            "physical_cores": psutil.cpu_count(logical=False),
            "logical_cores": psutil.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else None,
            "cgroup_cpus": cgroup_cpus(),
            "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
            **cpu_settings,
        },
        "memory": {
            "total_bytes": memory.total,
            "available_bytes": memory.available,
            "cgroup_limit_bytes": cgroup_memory_limit_bytes(),
        },
        "container": host.container(),
        "gpu": gpu_environment(device) if device and device.kind is DeviceKind.CUDA else None,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "missing": host.missing,
    }


def gpu_environment(device: Device) -> dict[str, Any] | None:
    """Return a GPU's identity, limits and present state; None where NVML does not answer."""
    try:
        with _nvml() as nvml:
            return gpu_state.read(nvml, _handle(nvml, _visible(nvml)[device.index]))
    except Exception:  # what is missing from the record is None; planning has reported NVML's state
        return None


def lock_key(device: Device) -> str:
    """Return what names a device to the lock that lets one run at a time use it."""
    if device.kind is DeviceKind.CPU:
        return "cpu"
    state = gpu_environment(device) or {}
    return state.get("uuid") or device.torch_name


def code_version() -> dict[str, Any]:
    """Return what code this is: package version, commit, and a digest of uncommitted changes.

    `id` joins them to one string, for an observation's identity. Outside a git checkout of Mambench
    itself `dirty`, `diff_digest` and `changed_files` are None, and `commit` is what MAMBENCH_COMMIT
    says: a copy in a container cannot know.
    """
    from mambench import __version__

    root = Path(__file__).resolve().parent.parent
    checkout = (root / ".git").exists()
    commit = _git(root, "rev-parse", "HEAD") if checkout else None
    status = _git(root, "status", "--porcelain=v1", "--untracked-files=normal") if commit else None
    if commit is None or status is None:
        stated = os.environ.get("MAMBENCH_COMMIT")
        name = f"{__version__}+{stated[:12]}" if stated else __version__
        unknown: dict[str, Any] = {"dirty": None, "diff_digest": None, "changed_files": None}
        return {"id": name, "version": __version__, "commit": stated, **unknown}
    commit, dirty = commit.strip(), bool(status.strip())
    diff_digest = _diff_digest(root) if dirty else None
    parts = (__version__, commit[:12], diff_digest)
    return {
        "id": "+".join(part for part in parts if part),
        "version": __version__,
        "commit": commit,
        "dirty": dirty,
        "diff_digest": diff_digest,
        "changed_files": [line[3:] for line in status.splitlines()][:MAX_CHANGED_FILES],
    }


def _diff_digest(root: Path) -> str:
    """Digest the uncommitted changes, the contents of untracked files included."""
    hashed = hashlib.sha256((_git(root, "diff", "HEAD", "--binary") or "").encode())
    untracked = _git(root, "ls-files", "--others", "--exclude-standard", "-z") or ""
    for name in sorted(filter(None, untracked.split("\0"))):
        hashed.update(name.encode())
        with suppress(OSError):
            hashed.update((root / name).read_bytes())
    return hashed.hexdigest()[:12]


def _git(root: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(root), "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace")


@contextmanager
def _nvml() -> Generator[Any]:
    import pynvml  # pyright: ignore[reportMissingTypeStubs]

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        pynvml.nvmlShutdown()


def _visible(nvml: Any) -> list[int | str]:
    """Return NVML indices or UUIDs in torch's order."""
    everything: list[int | str] = list(range(nvml.nvmlDeviceGetCount()))
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is None:
        return everything
    chosen: list[int | str] = []
    for item in (part.strip() for part in variable.split(",")):
        # CUDA stops at the first entry that it cannot use; so must we, to agree with torch.
        if item.isdigit() and int(item) < len(everything):
            chosen.append(int(item))
        elif item.startswith(("GPU-", "MIG-")):
            chosen.append(item)
        else:
            break
    return chosen


def _handle(nvml: Any, item: int | str) -> Any:
    if isinstance(item, int):
        return nvml.nvmlDeviceGetHandleByIndex(item)
    if item.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(item)
    # CUDA accepts the beginning of a UUID where it is unambiguous; NVML wants all of it.
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(item):
            return handle
    raise LookupError(f"CUDA_VISIBLE_DEVICES names {item}, and there is no such GPU")


def _gpu(nvml: Any, handle: Any, index: int) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        kind=DeviceKind.CUDA,
        index=index,
        name=_text(nvml.nvmlDeviceGetName(handle)),
        compute_capability=(major, minor),
        memory_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
    )


def _text(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value


def library_version(distribution: str) -> str | None:
    """Return the installed version of a distribution, without importing it; None if there is none.

    A package without metadata (on PYTHONPATH, say) is asked for the version its source states.
    """
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return _stated_version(MODULES.get(distribution, distribution.replace("-", "_")))


def _stated_version(module: str) -> str | None:
    """Return the `__version__` that a package's source states, without importing it.

    A package on PYTHONPATH, unpacked or a checkout, has no metadata.
    """
    with suppress(ImportError, ValueError):
        spec = importlib.util.find_spec(module)
        for folder in (spec and spec.submodule_search_locations) or ():
            for name in ("__init__.py", "version.py", "_version.py"):
                stated = r"^__version__\b[^=\n]*=\s*['\"]([^'\"]+)['\"]"
                if match := re.search(stated, _read(str(Path(folder) / name)), re.MULTILINE):
                    return match[1]
    return None


@functools.cache
def _cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo"), re.MULTILINE)
    if match:
        return match[1].strip()
    if sys.platform == "darwin":
        with suppress(OSError, subprocess.SubprocessError):
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
    return platform.processor() or platform.machine() or "unknown processor"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
