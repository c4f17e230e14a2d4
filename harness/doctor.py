"""`doctor`: what this machine can measure, and how to enable what it cannot. Imports no torch."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mambench.harness import machine, registry
from mambench.harness.counters.ncu import PERMISSION_FIX
from mambench.harness.instruments import ceilings
from mambench.harness.spec import Device, DeviceKind, Settings
from mambench.harness.workers import limits
from mambench.implementations.base import Implementation, Variant


@dataclass(frozen=True, kw_only=True)
class Check:
    """One capability: whether it is there, what was found, and what to do if it is not."""

    name: str
    ok: bool | None  # None: not needed, or cannot be told
    found: str
    enables: str  # what it is good for
    fix: str | None = None


def examine(implementations: Mapping[str, Implementation]) -> list[Check]:
    """Return all checks of this machine, the basic ones first."""
    access = machine.gpus()
    device = access.devices[0] if access.devices else machine.cpu()
    return [
        _processor(),
        _memory(),
        _load(),
        _torch(),
        _gpu(access),
        _nvml(access),
        _triton(),
        _distribution("numba", "the compiled CPU scan", "pip install numba"),
        _counters(),
        _ceilings(device),
        *(_implementation(item, device) for item in implementations.values()),
    ]


def _processor() -> Check:
    cores = machine.environment()["cpu"]
    quota = cores["cgroup_cpus"]
    limit = f", limited to {quota:g} by a cgroup" if quota else ""
    found = f"{cores['model']}, {cores['physical_cores']} cores{limit}"
    return Check(name="processor", ok=True, found=found, enables="runs on the CPU")


def _memory() -> Check:
    gib = machine.usable_memory_bytes() / 1024**3
    return Check(name="memory", ok=True, found=f"{gib:.1f} GiB usable", enables="host memory limit")


def _load() -> Check:
    enables = "steady times on the CPU"
    if not hasattr(os, "getloadavg"):
        return Check(name="load", ok=None, found="unknown here", enables=enables)
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    return Check(
        name="load",
        ok=load < 0.5 * cores,
        found=f"{load:.2f} on {cores} logical cores",
        enables=enables,
        fix="end other work on this machine before timing on the CPU",
    )


def _torch() -> Check:
    version = _version("torch")
    cuda = machine.torch_cuda_version()
    build = f"CUDA {cuda}" if cuda else "without CUDA"
    return Check(
        name="torch",
        ok=version is not None,
        found=f"{version}, {build}" if version else "not installed",
        enables="everything",
        fix="pip install torch",
    )


def _gpu(access: machine.GpuAccess) -> Check:
    found = ", ".join(
        f"{device.torch_name} {device.name} ({device.memory_bytes / 1024**3:.0f} GiB)"
        for device in access.devices
    )
    return Check(
        name="GPU",
        ok=bool(access.devices) or None,
        found=found or "none usable",
        enables="runs on the GPU",
        fix=access.problem,
    )


def _nvml(access: machine.GpuAccess) -> Check:
    state = machine.gpu_environment(access.devices[0]) if access.devices else None
    enables = "clocks, temperature and power beside each case"
    if state is None:
        return Check(name="NVML", ok=None, found="no GPU to ask", enables=enables)
    lacking = [name for name in ("power_limit_w", "temperature_c") if state[name] is None]
    return Check(
        name="NVML",
        ok=not lacking,
        found=f"driver {state['driver']}" + (f", no {', '.join(lacking)}" if lacking else ""),
        enables=enables,
        fix="update the NVIDIA driver, or run outside the restricted container"
        if lacking
        else None,
    )


def _triton() -> Check:
    """Triton builds its launcher with a C compiler and Python's headers at the first call."""
    version = _version("triton")
    compiler = (
        os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    fixes = {
        "triton is not installed": ("pip install triton", version is None),
        "no C compiler": ("install gcc or clang", compiler is None),
        "no Python.h": (
            f"install Python's headers (Debian: python{sys.version_info[0]}."
            f"{sys.version_info[1]}-dev)",
            not header.is_file(),
        ),
    }
    wrong = {what: fix for what, (fix, holds) in fixes.items() if holds}
    return Check(
        name="triton",
        ok=not wrong,
        found=", ".join(wrong) or f"{version}, compiler {compiler}",
        enables="our GPU kernels",
        fix="; ".join(wrong.values()) or None,
    )


def _distribution(name: str, enables: str, fix: str) -> Check:
    version = _version(name)
    return Check(
        name=name,
        ok=version is not None,
        found=version or "not installed",
        enables=enables,
        fix=fix,
    )


def _counters() -> Check:
    enables = "bytes of HBM traffic by hardware counters"
    ncu = shutil.which("ncu")
    if ncu is None:
        found = "ncu is not on PATH"
        fix = "install NVIDIA Nsight Compute and put ncu on PATH"
        return Check(name="counters", ok=None, found=found, enables=enables, fix=fix)
    restricted = counters_restricted()
    version = _ncu_version(ncu)
    permission = {True: "restricted to administrators", False: "permitted", None: "not known"}
    return Check(
        name="counters",
        ok=None if restricted is None else not restricted or os.geteuid() == 0,
        found=f"ncu {version}; counters {permission[restricted]}",
        enables=enables,
        fix=PERMISSION_FIX,
    )


def _ceilings(device: Device) -> Check:
    kept = ceilings.load(device, limits.thread_count(Settings()))
    return Check(
        name="ceilings",
        ok=None if kept is None else True,
        found=f"measured {kept.measured_at}" if kept else "not measured on this machine as it is",
        enables="sol_frac: how near a case comes to what this machine can do",
        fix="run_bench.py ceilings (measuring `sol` does it too)",
    )


def counters_restricted(path: Path = Path("/proc/driver/nvidia/params")) -> bool | None:
    """Return whether the driver lets only administrators read counters; None if it does not say."""
    try:
        match = re.search(r"^RmProfilingAdminOnly:\s*(\d)", path.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if match is None else match[1] == "1"


def _ncu_version(ncu: str) -> str:
    try:
        done = subprocess.run([ncu, "--version"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "of unknown version"
    match = re.search(r"Version (\S+)", done.stdout)
    return match[1] if match else "of unknown version"


def _implementation(implementation: Implementation, device: Device) -> Check:
    variants: tuple[Variant, ...] = registry.ask(implementation, "variants", device)
    usable = [variant.name for variant in variants if variant.unavailable is None]
    lacks = {v.name: v.unavailable for v in variants}
    if not usable:  # it may compute one token and no sequence
        decoding: tuple[Variant, ...] = registry.ask(implementation, "decode_variants", device)
        usable = [f"{v.name} (decode)" for v in decoding if v.unavailable is None]
        lacks |= {v.name: v.unavailable for v in decoding}
    missing = [f"{name}: {reason}" for name, reason in lacks.items() if reason is not None]
    where = "the CPU" if device.kind is DeviceKind.CPU else device.name
    return Check(
        name=implementation.name,
        ok=bool(usable) or (None if implementation.peer else False),
        found=", ".join(usable) or "no variant can run",
        enables=f"{implementation.summary} (on {where})",
        fix="\n".join(missing) or None,
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
