"""The processor's settings, the system and what it runs in, from the files of /proc and /sys.

What a system does not tell is None, and `missing` says which file was asked.
"""

import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CPU = "/sys/devices/system/cpu"
# Instructions that decide which kernels a numerical library picks.
_INSTRUCTIONS = (
    *("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"),
    *("amx_tile", "asimd", "sve", "bf16"),
)


def busy(device: Mapping[str, Any], environment: Mapping[str, Any]) -> str | None:
    """Say so if other work held all of the processor that was to be measured; else None.

    Args:
        device: as a manifest has it; a GPU's times do not share the processor.
        environment: as a manifest has it, taken before the run's own work began.
    """
    cores: Mapping[str, Any] = environment.get("cpu") or {}
    load, usable = cores.get("load_average"), cores.get("usable_cores")
    if device.get("kind") != "cpu" or not load or not usable or load[0] < usable:
        return None
    return (
        f"the processor was busy with other work as the run began (load {load[0]:.1f} on {usable} "
        f"cores): its times hold that too"
    )


class HostState:
    """Reads files below a root, which tests choose."""

    def __init__(self, root: Path = Path("/")) -> None:
        self._root = root
        self.missing: dict[str, str] = {}

    def cpu(self) -> dict[str, Any]:
        """Return the processor's settings: what scales its clock, and what it can execute."""
        text = self.read("/proc/cpuinfo")
        flags = set(re.findall(r"\S+", _field(text, r"flags|Features") or ""))
        return {
            "governor": self._file("cpu.governor", f"{_CPU}/cpu0/cpufreq/scaling_governor"),
            "frequency_driver": self._file(
                "cpu.frequency_driver", f"{_CPU}/cpu0/cpufreq/scaling_driver"
            ),
            "turbo": self._turbo(),
            "smt": self._switch("cpu.smt", f"{_CPU}/smt/active"),
            "microcode": _field(text, "microcode"),
            "numa_nodes": self._numa_nodes(),
            "cache_bytes": self._caches(),
            "instructions": [name for name in _INSTRUCTIONS if name in flags] if flags else None,
        }

    def system(self) -> dict[str, Any]:
        """Return kernel, distribution, C library, and whether the machine is virtual."""
        release = self.read("/etc/os-release")
        name = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
        pages = self._file("system.huge_pages", "/sys/kernel/mm/transparent_hugepage/enabled")
        chosen = re.search(r"\[(\w+)\]", pages or "")
        return {
            "kernel": platform.release(),
            "distribution": name[1] if name else None,
            "libc": " ".join(platform.libc_ver()).strip() or None,
            "virtualisation": self._virtualisation(),
            "huge_pages": chosen[1] if chosen else None,
        }

    def container(self) -> str | None:
        """Return the kind of container, as far as a file or variable tells; None outside of one."""
        if (self._root / ".dockerenv").exists():
            return "docker"
        if (self._root / "run/.containerenv").exists():
            return "podman"
        if "KUBERNETES_SERVICE_HOST" in os.environ:
            return "kubernetes"
        return os.environ.get("container")  # noqa: SIM112  # systemd-nspawn and others write it so

    def read(self, path: str) -> str:
        """Return a file's text, "" if it cannot be read."""
        try:
            return (self._root / path.lstrip("/")).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def _file(self, key: str, path: str) -> str | None:
        text = self.read(path)
        if not text:
            self.missing[key] = f"{path} cannot be read"
        return text or None

    def _switch(self, key: str, path: str) -> bool | None:
        text = self._file(key, path)
        return None if text is None else text == "1"

    def _turbo(self) -> bool | None:
        """Return whether the clock may rise above its base; Intel's file says the contrary."""
        intel = self.read(f"{_CPU}/intel_pstate/no_turbo")
        if intel:
            return intel == "0"
        return self._switch("cpu.turbo", f"{_CPU}/cpufreq/boost")

    def _numa_nodes(self) -> int | None:
        nodes = list((self._root / "sys/devices/system/node").glob("node[0-9]*"))
        if not nodes:
            self.missing["cpu.numa_nodes"] = "/sys/devices/system/node cannot be read"
        return len(nodes) or None

    def _caches(self) -> dict[str, int] | None:
        """Return the sizes of the first core's caches by level: L1d, L2, L3."""
        found: dict[str, int] = {}
        for folder in sorted((self._root / f"{_CPU[1:]}/cpu0/cache").glob("index*")):
            inside = "/" + str(folder.relative_to(self._root))
            kind, level = self.read(f"{inside}/type"), self.read(f"{inside}/level")
            size = re.fullmatch(r"(\d+)K", self.read(f"{inside}/size"))
            if kind != "Instruction" and size:
                found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[1]) * 1024
        if not found:
            self.missing["cpu.cache_bytes"] = f"{_CPU}/cpu0/cache cannot be read"
        return found or None

    def _virtualisation(self) -> str | None:
        """Return the hypervisor as far as the system tells; "none" on bare metal."""
        kind = self.read("/sys/hypervisor/type")
        if kind:
            return kind
        text = self.read("/proc/cpuinfo")
        if not text:
            self.missing["system.virtualisation"] = "/proc/cpuinfo cannot be read"
            return None
        if "hypervisor" not in (_field(text, "flags") or "").split():
            return "none"
        maker = self.read("/sys/class/dmi/id/sys_vendor")
        return f"virtual machine ({maker})" if maker else "virtual machine"


def _field(text: str, name: str) -> str | None:
    match = re.search(rf"^(?:{name})\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1].strip() if match else None
