"""Whether a peer can run on a device, told without importing it."""

from collections.abc import Sequence
from importlib.util import find_spec

from mambench.harness.spec import Device, DeviceKind

NEEDS_GPU = "needs an NVIDIA GPU"
_FIRST_CAPABILITY = (8, 0)  # bf16 in the matrix units, which all of the peers' kernels use


def unavailable(device: Device, modules: Sequence[str], install: str) -> str | None:
    """Return why the top-level `modules` cannot run on `device`, and what to install, or None."""
    if device.kind is DeviceKind.CPU:
        return NEEDS_GPU
    capability = device.compute_capability
    if capability is not None and capability < _FIRST_CAPABILITY:
        return f"needs compute capability 8.0, {device.name} has {capability[0]}.{capability[1]}"
    missing = [name for name in modules if find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{' and '.join(missing)} {verb} not installed: {install}"
