"""mamba_ssm's own operations: the CUDA selective scan, the Triton SSD, the Triton state update.

`selective_scan_fn` and `mamba_chunk_scan_combined` have the families' signatures: they are called
as they are, and everything they do is timed. Nothing is done for them outside. Of
`selective_state_update` the s6 update is called as it is; for ssd, whose heads share A, dt, bias
and D among their channels, these are expanded without copies, by which it knows them as tied.
"""

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from mambench.harness.spec import Case, Device, DType, Family, Pass
from mambench.implementations.base import Implementation, Variant
from mambench.implementations.peers.availability import unavailable
from mambench.implementations.peers.warm import CONFIGURATION_S, TUNING_S, compile_share, tune_for

if TYPE_CHECKING:
    from torch import Tensor

# Both are needed: without the first, releases since 2026 leave the CUDA extension out; without the
# second, an older one takes a wheel of another torch.
INSTALL = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE MAMBA_FORCE_BUILD=TRUE pip install --no-build-isolation mamba-ssm"
)
_TRITON = ("mamba_ssm", "einops", "triton")
_MAX_D_STATE = 256
_MAX_GRID_Y = 65_535  # the scan launches one block for each channel along the grid's y
_SCAN_CHUNK = 2048  # tokens between the states that the scan keeps
_SSD_CHUNK = 256
_SSD_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_FORWARD_CONFIGURATIONS, _BACKWARD_CONFIGURATIONS = 42, 83  # of 2.3.2, all kernels together
_FP32 = 4


class MambaSsmScan(Implementation):
    """`mamba_ssm.selective_scan_fn`, one CUDA kernel forward and one backward."""

    name: ClassVar[str] = "mamba_ssm_scan"
    families: ClassVar[tuple[Family, ...]] = (Family.S6,)
    summary: ClassVar[str] = "peer: mamba_ssm's selective_scan_fn (CUDA)"
    peer: ClassVar[bool] = True

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `cuda`; it needs the extension that mamba_ssm builds."""
        modules = ("selective_scan_cuda", *_TRITON)
        return (Variant(name="cuda", unavailable=unavailable(device, modules, INSTALL)),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return `selective_scan_fn`."""
        return import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton`: `selective_state_update` needs no extension."""
        return (Variant(name="triton", unavailable=unavailable(device, _TRITON, INSTALL)),)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the s6 update."""
        return _state_update()

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse float64, more than 256 states and more channels than a grid's y."""
        if case.dtype is DType.FP64:
            return "mamba_ssm's scan takes fp32, fp16 and bf16"
        if (case.problem.d_state or 0) > _MAX_D_STATE:
            return f"mamba_ssm's scan takes a d_state of at most {_MAX_D_STATE}"
        if case.pass_ is Pass.DECODE:
            groups = case.problem.ngroups or 1
            return "its update takes one group of channels" if groups > 1 else None
        if case.problem.d_inner > _MAX_GRID_Y:
            return f"mamba_ssm's scan takes a d_inner of at most {_MAX_GRID_Y}"
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Count pairs of fp32 states every 2,048 tokens; the gate's second output; fp32 sums."""
        p, d_state = case.problem, case.problem.d_state or 1
        if case.pass_ is Pass.DECODE:
            return 0
        chunks = -(-(p.tokens // p.batch) // _SCAN_CHUNK)
        kept = 2 * _FP32 * p.batch * p.d_inner * d_state * chunks
        gate = case.dtype.itemsize * p.tokens * p.d_inner if p.gated else 0
        sums = 2 * _FP32 * p.tokens * (p.ngroups or 1) * d_state if case.pass_.needs_grad else 0
        return kept + gate + sums

    def launches(self, case: Case) -> int:
        """Count the one kernel."""
        return 1


class MambaSsmSsd(Implementation):
    """`mamba_ssm.mamba_chunk_scan_combined`, five Triton kernels forward, autotuned on first use.

    It is given the chunk size of 256 that its own modules give it.
    """

    name: ClassVar[str] = "mamba_ssm_ssd"
    families: ClassVar[tuple[Family, ...]] = (Family.SSD,)
    summary: ClassVar[str] = "peer: mamba_ssm's mamba_chunk_scan_combined (Triton)"
    peer: ClassVar[bool] = True
    compile_shares: ClassVar[int] = 12

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton`."""
        return (Variant(name="triton", unavailable=unavailable(device, _TRITON, INSTALL)),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return `mamba_chunk_scan_combined`."""
        return import_module(_SSD_MODULE).mamba_chunk_scan_combined

    def begin_case(self, case: Case) -> None:
        """Let the kernels be tuned at the case's own sizes."""
        import_module(_SSD_MODULE)
        tune_for("mamba_ssm", case)

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton`: `selective_state_update` needs no extension."""
        return (Variant(name="triton", unavailable=unavailable(device, _TRITON, INSTALL)),)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the ssd update."""
        return tied_update(_state_update())

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse float64."""
        return "mamba_ssm's SSD takes fp32, fp16 and bf16" if case.dtype is DType.FP64 else None

    def workspace_bytes(self, case: Case) -> int:
        """Count chunk states, products C B^T, and steps; in the backward what sums over heads."""
        p, e = case.problem, case.dtype.itemsize
        if case.pass_ is Pass.DECODE:
            return 0
        wide = p.tokens * p.d_inner
        states = wide * (p.d_state or 1) // min(_SSD_CHUNK, p.tokens // p.batch)
        products = p.tokens * (p.ngroups or 1) * _SSD_CHUNK
        forward = (_FP32 + e) * states + _FP32 * products + 2 * _FP32 * p.tokens * p.nheads
        gate = e * wide if p.gated else 0
        if case.pass_ is Pass.FORWARD:
            return forward + gate
        return forward + gate + 4 * e * wide + 4 * _FP32 * states + 4 * _FP32 * products

    def launches(self, case: Case) -> int:
        """Count the kernels of a forward."""
        return 1 if case.pass_ is Pass.DECODE else 5

    def compile_s(self, case: Case) -> float:
        """Estimate the seconds of one processor that all configurations take to compile."""
        return CONFIGURATION_S * self._configurations(case)

    def tuning_s(self, case: Case) -> float:
        """Estimate how long it times them: what was chosen for one pass serves the others too."""
        return TUNING_S * self._configurations(case)

    def _configurations(self, case: Case) -> int:
        if case.pass_ is Pass.DECODE:
            return 0
        return _FORWARD_CONFIGURATIONS + case.pass_.needs_grad * _BACKWARD_CONFIGURATIONS

    def precompile(self, case: Case) -> None:
        """Compile all configurations that autotuning will try."""
        self.precompile_share(case, 0, 1)

    def precompile_share(self, case: Case, share: int, shares: int) -> None:
        """Compile one part of them; a decode step has a single kernel, compiled once."""
        if case.pass_ is not Pass.DECODE or share == 0:
            compile_share(self, case, share, shares)


def _state_update() -> Callable[..., Any]:
    return import_module("mamba_ssm.ops.triton.selective_state_update").selective_state_update


def tied_update(update: Callable[..., Any]) -> Callable[..., Any]:
    """Give a `selective_state_update` for single channels the arguments of whole heads.

    Args:
        update: takes state (B, H, P, N), x, dt, z (B, H, P), A (H, P, N), B, C (B, G, N), D and
            dt_bias (H, P).

    Returns: an operation with dt (B, H) and A, D, dt_bias (H,); the rest is unchanged.
    """

    def ssd(
        state: "Tensor",
        x: "Tensor",
        dt: "Tensor",
        A: "Tensor",
        B: "Tensor",
        C: "Tensor",
        D: "Tensor | None" = None,
        z: "Tensor | None" = None,
        dt_bias: "Tensor | None" = None,
        dt_softplus: bool = False,
    ) -> "Tensor":
        heads = x.shape[1:]
        return update(
            state,
            x,
            dt[..., None].expand(x.shape),
            A[:, None, None].expand(state.shape[1:]),
            B,
            C,
            D=None if D is None else D[:, None].expand(heads),
            z=z,
            dt_bias=None if dt_bias is None else dt_bias[:, None].expand(heads),
            dt_softplus=dt_softplus,
        )

    return ssd
