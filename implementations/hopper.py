"""Where the kernels written in Gluon for Hopper run, read without importing torch or Triton."""

from importlib.metadata import PackageNotFoundError, version

from mambench.harness.spec import Device

CAPABILITY = (9, 0)
_GLUON_TRITON = "3.6"  # Gluon's interface changes with every minor version of Triton


def unavailable_on(device: Device) -> str | None:
    """Return why the Gluon kernels cannot run, read from the device and from metadata alone."""
    if device.compute_capability != CAPABILITY:
        need = ".".join(map(str, CAPABILITY))
        got = ".".join(map(str, device.compute_capability or ())) or "unknown"
        return f"needs compute capability {need}; {device.name} has {got}"
    found = _version("triton") or _version("pytorch-triton")
    if found is None or not found.startswith(_GLUON_TRITON + "."):
        have = "Triton is not installed" if found is None else f"Triton is version {found}"
        return f"{have}, hopper needs {_GLUON_TRITON}: pip install 'triton=={_GLUON_TRITON}.*'"
    return None


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
