"""flashinfer's one-token state update, which is compiled for the sizes it is called with.

Its weights, and dt with them, have one dtype: dt is widened to fp32 before the call, as part of the
measured time, so that D and the bias need not be rounded. A, dt, bias and D are expanded over the
channels of a head without copies.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from mambench.harness.spec import Case, Device, DType, Family
from mambench.implementations.base import Implementation, Variant
from mambench.implementations.peers.availability import unavailable
from mambench.implementations.peers.mamba_ssm import tied_update

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install flashinfer-python (it compiles with nvcc at the first call)"
_MODULES = ("flashinfer", "tvm_ffi")  # the second loads what the first has compiled
_HEADDIMS = (64, 128)  # the kernel's template arguments
_STATES = (64, 128, 256)


class FlashinferUpdate(Implementation):
    """`flashinfer.mamba.selective_state_update`; it computes one token and nothing else."""

    name: ClassVar[str] = "flashinfer_update"
    families: ClassVar[tuple[Family, ...]] = (Family.SSD,)
    summary: ClassVar[str] = "peer: flashinfer's selective_state_update (CUDA, decode only)"
    peer: ClassVar[bool] = True

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return nothing that computes a sequence, and why."""
        return (Variant(name="cuda", unavailable="computes one token, not a sequence"),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Raise NotImplementedError: there is no operation on a sequence."""
        raise NotImplementedError(f"{self.name} computes one token, not a sequence")

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `cuda`."""
        return (Variant(name="cuda", unavailable=unavailable(device, _MODULES, INSTALL)),)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the update with the arguments of whole heads."""
        update = tied_update(import_module("flashinfer.mamba").selective_state_update)

        def widened(state: "Tensor", x: "Tensor", dt: "Tensor", *rest: Any, **named: Any) -> Any:
            return update(state, x, dt.float(), *rest, **named)

        return widened

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse other dtypes than bf16 and fp16, and sizes the kernel is not written for."""
        if case.dtype not in (DType.BF16, DType.FP16):
            return "flashinfer's update takes bf16 and fp16"
        p = case.problem
        if p.headdim not in _HEADDIMS or p.d_state not in _STATES:
            return f"flashinfer's update takes headdim {_HEADDIMS} and d_state {_STATES}"
        return None

    def launches(self, case: Case) -> int:
        """Count the cast of dt and the kernel."""
        return 2
