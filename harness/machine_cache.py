"""What is known of this machine between runs: results kept in the user's cache, one file a machine.

A file that is missing, broken or cannot be written never stops a run: nothing is known then.
"""

import json
import os
from pathlib import Path
from typing import Any, cast

from mambench.harness import machine
from mambench.harness.spec import Device, DeviceKind, digest


def fingerprint(device: Device) -> str:
    """Return what two results must share to be of one machine: the processor and the GPU's UUID."""
    cores = machine.environment()["cpu"]
    known: list[Any] = [cores["model"], cores["logical_cores"]]
    if device.kind is DeviceKind.CUDA:
        state: dict[str, Any] = machine.gpu_environment(device) or {}
        known.append(state.get("uuid") or device.name)
    return digest(known)


def folder() -> Path:
    """Return the folder of the user's cache, which need not exist."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "mambench"


def path(kind: str, device: Device) -> Path:
    """Return where the newest result of a kind ("selftest") of this machine is kept."""
    return folder() / f"{kind}-{fingerprint(device)}.json"


def keep(kind: str, device: Device, result: dict[str, Any]) -> str | None:
    """Keep a result in place of an older one; returns why it could not be kept, or None."""
    file = path(kind, device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(file)
    except OSError as error:
        return f"{file} cannot be written: {error.strerror}"
    return None


def kept(kind: str, device: Device) -> dict[str, Any] | None:
    """Return the newest result of this kind on this machine, or None."""
    try:
        found: Any = json.loads(path(kind, device).read_text())
    except (OSError, ValueError):
        return None
    return cast("dict[str, Any]", found) if isinstance(found, dict) else None
