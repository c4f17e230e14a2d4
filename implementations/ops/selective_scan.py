"""The fused selective scan: discretisation, scan and output in one pass, the state on chip."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, ClassVar

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass
from mambench.implementations import decode
from mambench.implementations import hopper as hopper_device
from mambench.implementations.base import Implementation, Variant
from mambench.kernels.s6 import numba_config, triton_config

_MAX_D_STATE = 256
_FP32_BYTES = 4


class SelectiveScan(Implementation):
    """Mamba-1's operation as one kernel: Gluon or Triton on a GPU, Numba's code on the CPU."""

    name: ClassVar[str] = "selective_scan"
    families: ClassVar[tuple[Family, ...]] = (Family.S6,)
    summary: ClassVar[str] = (
        "fused scan, the state never in memory: Gluon or Triton on the GPU, Numba on the CPU"
    )

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `numba` on the CPU; on a GPU `triton`, on Hopper after `hopper`."""
        if device.kind is DeviceKind.CPU:
            return (Variant(name="numba", unavailable=_missing("numba")),)
        portable = Variant(name="triton", unavailable=_missing("triton") or _too_old(device))
        hopper = Variant(name="hopper", unavailable=hopper_device.unavailable_on(device))
        on_hopper = device.compute_capability == hopper_device.CAPABILITY
        return (hopper, portable) if on_hopper else (portable, hopper)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return `selective_scan` of a variant."""
        if variant == "numba":
            from mambench.kernels.s6 import numba_scan

            return numba_scan.selective_scan
        if variant == "triton":
            from mambench.kernels.s6 import triton_scan

            return triton_scan.selective_scan
        if variant == "hopper":
            from mambench.kernels.s6 import hopper_op

            return hopper_op.selective_scan
        raise ValueError(f"selective_scan: got variant {variant!r}, expected numba, triton, hopper")

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton` or `numba`, then `torch`: the state update of one token."""
        return decode.variants(device)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return `selective_state_update` of a variant."""
        return decode.op(variant)

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse more than 256 states and, on a GPU, float64."""
        if case.pass_ is Pass.DECODE:
            return decode.unsupported(case)
        d_state = case.problem.d_state
        if d_state is not None and d_state > _MAX_D_STATE:
            return f"d_state is at most {_MAX_D_STATE}, got {d_state}"
        if case.variant in ("triton", "hopper") and case.dtype is DType.FP64:
            return f"the {case.variant} kernel computes in fp32; use fp32, fp16 or bf16"
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Count kept states, partial sums and copies beside inputs, outputs and gradients."""
        if case.pass_ is Pass.DECODE:
            return decode.workspace_bytes(case)
        p = case.problem
        sizes = {
            "batch": p.batch,
            "seqlen": p.length,
            "d_inner": p.d_inner,
            "d_state": p.d_state or 1,
            "ngroups": p.ngroups or 1,
        }
        if case.variant == "hopper" and not case.pass_.needs_grad:
            return _FP32_BYTES * p.batch * p.d_inner * sizes["d_state"]  # the last state
        if case.variant in ("triton", "hopper"):
            return triton_config.workspace_bytes(**sizes, backward=case.pass_.needs_grad)
        wide = max(case.dtype.itemsize, _FP32_BYTES)  # narrow inputs are computed in fp32 copies
        copies = 0
        if case.dtype.itemsize < wide:
            tensors = (7 if case.pass_.needs_grad else 3) + 2 * p.gated
            copies = wide * tensors * p.batch * p.d_inner * p.length
        return copies + numba_config.workspace_bytes(
            **sizes, backward=case.pass_.needs_grad, itemsize=wide
        )

    def launches(self, case: Case) -> int:
        """Estimate what a call launches in sequence."""
        return decode.launches(case) if case.pass_ is Pass.DECODE else super().launches(case)

    def precompile(self, case: Case) -> None:
        """Compile what a case needs: Numba's code by dtype, Triton's and Gluon's by a call."""
        if case.variant in ("triton", "hopper"):
            from mambench.implementations.warm import call_once

            return call_once(self, case)
        if case.pass_ is Pass.DECODE:
            return decode.precompile(case)
        if case.variant == "numba":
            from mambench.implementations.problems.base import TORCH_DTYPES
            from mambench.kernels.s6 import numba_scan

            numba_scan.precompile(TORCH_DTYPES[case.dtype])


def _missing(module: str) -> str | None:
    if find_spec(module) is None:
        return f"{module} is not installed: pip install {module}"
    return None


def _too_old(device: Device) -> str | None:
    capability = device.compute_capability
    if capability is not None and capability < (8, 0):
        major, minor = capability
        return f"needs compute capability 8.0, {device.name} has {major}.{minor}"
    return None
