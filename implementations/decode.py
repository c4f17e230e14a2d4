"""The state update of one token: the pass `decode` of `selective_scan` and `ssd`. Torch-free."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mambench.harness.spec import Case, Device, DeviceKind, DType
from mambench.implementations.base import Variant
from mambench.kernels.s6.numba_config import LANES
from mambench.kernels.state_update.config import MAX_D_STATE

_FP32_BYTES = 4
_STEPS = 4  # tensors as large as the state that plain torch holds at once


def variants(device: Device) -> tuple[Variant, ...]:
    """Return `triton` on a GPU and `numba` on the CPU, and everywhere `torch` after them."""
    portable = Variant(name="torch")
    if device.kind is DeviceKind.CPU:
        return (Variant(name="numba", unavailable=_missing("numba")), portable)
    capability, too_old = device.compute_capability, None
    if capability is not None and capability < (8, 0):
        too_old = f"needs compute capability 8.0, {device.name} has {capability[0]}.{capability[1]}"
    return (Variant(name="triton", unavailable=_missing("triton") or too_old), portable)


def op(variant: str) -> Callable[..., Any]:
    """Import and return `selective_state_update` of a variant."""
    if variant == "triton":
        from mambench.kernels.state_update import triton_update

        return triton_update.selective_state_update
    if variant == "numba":
        from mambench.kernels.state_update import numba_update

        return numba_update.selective_state_update
    if variant == "torch":
        from mambench.kernels.state_update import torch_update

        return torch_update.selective_state_update
    raise ValueError(f"state update: got variant {variant!r}, expected triton, numba or torch")


def unsupported(case: Case) -> str | None:
    """Return the limit of the variant that the case is beyond, or None."""
    d_state = case.problem.d_state or 0
    if case.variant != "torch" and d_state > MAX_D_STATE:
        return f"d_state is at most {MAX_D_STATE}, got {d_state}"
    if case.variant == "triton" and case.dtype is DType.FP64:
        return "the Triton kernels compute in fp32; use fp32, fp16 or bf16"
    if case.variant == "numba" and case.dtype in (DType.FP16, DType.BF16):
        return f"the Numba kernels update fp32 and fp64 states in place, got {case.dtype}"
    if case.variant == "numba" and d_state % LANES:
        return f"the Numba kernels take a d_state that is a multiple of {LANES}, got {d_state}"
    return None


def workspace_bytes(case: Case) -> int:
    """Count what is held besides inputs and output: nothing but by plain torch."""
    problem = case.problem
    if case.variant != "torch":
        return 0
    states = problem.batch * problem.d_inner * (problem.d_state or 0)
    return _STEPS * max(case.dtype.itemsize, _FP32_BYTES) * states


def launches(case: Case) -> int:
    """Count the operations launched in sequence."""
    return 15 if case.variant == "torch" else 1


def precompile(case: Case) -> None:
    """Compile what a CPU case needs."""
    if case.variant == "numba":
        from mambench.implementations.problems.base import TORCH_DTYPES
        from mambench.kernels.state_update import numba_update

        numba_update.precompile(TORCH_DTYPES[case.dtype])


def _missing(module: str) -> str | None:
    return f"{module} is not installed: pip install {module}" if find_spec(module) is None else None
