"""flash-linear-attention's simple gated linear attention, which is SSD by other names.

    S[t] = exp(g[t]) S[t-1] + k[t] v[t]^T,   o[t] = scale S[t]^T q[t]        per head, g a scalar

with q = C, k = B, v = dt x, g = dt A and scale = 1 is Mamba-2's recurrence (Transformers are SSMs,
Dao and Gu 2024, section 5). Its kernels start from v and g and know neither groups nor D nor z. So
a user who has an SSD's inputs must, and this adapter does, before the call: apply bias, softplus
and limits to dt, form g and v, and repeat B and C for every head; after it: add D x and multiply by
silu(z). Both are compiled by torch into fused kernels, and both are part of the measured time.

`fused_chunk` fails the gate with gradients in 16 bits, and rightly: it sums q dq - k dk, which
nearly cancel, from the end of the sequence on, after their products' operands were rounded
separately (docs/experiments.md). In fp32 its gradients are those of the recurrence.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from mambench.harness.spec import Case, Device, DType, Family
from mambench.implementations.base import Implementation, Variant
from mambench.implementations.peers.availability import unavailable
from mambench.implementations.peers.warm import CONFIGURATION_S, TUNING_S, compile_share, tune_for

if TYPE_CHECKING:
    from torch import Tensor

INSTALL = "pip install flash-linear-attention"
NO_LIMIT = (0.0, float("inf"))
_CHUNK = 64
_FP32 = 4
_CONFIGURATIONS, _AROUND_S = 25, 10.0  # a pass of either variant
_FUNCTIONS = {"chunk": "chunk_simple_gla", "fused_chunk": "fused_chunk_simple_gla"}
_MISCOMPILED = ((3, 4, 0), (3, 7, 1))  # Triton from the first up to the second, on Hopper


class FlaSimpleGla(Implementation):
    """fla's `chunk_simple_gla` (states to memory) and `fused_chunk_simple_gla` (states kept)."""

    name: ClassVar[str] = "fla_simple_gla"
    families: ClassVar[tuple[Family, ...]] = (Family.SSD,)
    summary: ClassVar[str] = "peer: fla's simple_gla as SSD, with what it leaves to its caller"
    peer: ClassVar[bool] = True
    compile_shares: ClassVar[int] = 4

    def __init__(self, *, compiled: bool = True) -> None:
        """Take `compiled`: whether torch compiles what comes before and after fla's kernels."""
        self._compiled = compiled

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `chunk` and `fused_chunk`."""
        missing = unavailable(device, ("fla", "einops", "triton"), INSTALL)
        return tuple(Variant(name=name, unavailable=missing) for name in _FUNCTIONS)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import fla's function and return it as an SSD."""
        module = _module(variant)
        return as_ssd(getattr(module, _FUNCTIONS[variant]), compiled=self._compiled)

    def begin_case(self, case: Case) -> None:
        """Let the kernels be tuned at the case's own sizes."""
        _module(case.variant)
        tune_for("fla", case)

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse float64, and the backward that fla itself refuses on Hopper."""
        if case.dtype is DType.FP64:
            return "fla's kernels take fp32, fp16 and bf16"
        hopper = device.compute_capability is not None and device.compute_capability[0] == 9
        if case.variant == "chunk" and case.pass_.needs_grad and hopper and _refuses():
            return (
                "fla refuses this backward on Hopper with Triton 3.4.0 to 3.7.0, which miscompile "
                "it: pip install 'triton>=3.7.1' or tilelang"
            )
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Count B, C and v for every head, chunk states or partial outputs, and in the backward
        the gradients of all of these.
        """
        p, e = case.problem, case.dtype.itemsize
        d_state = p.d_state or 1
        repeated = e * p.tokens * (2 * p.nheads * d_state + p.d_inner)
        if case.variant == "chunk":
            kept = e * p.tokens * p.d_inner * d_state // min(_CHUNK, p.tokens // p.batch)
        else:
            kept = _FP32 * p.tokens * p.d_inner * -(-d_state // _CHUNK)
        steps = 3 * _FP32 * p.tokens * p.nheads
        return (repeated + kept) * (3 if case.pass_.needs_grad else 1) + steps

    def launches(self, case: Case) -> int:
        """Count fla's kernels and those before and after."""
        return 6

    def compile_s(self, case: Case) -> float:
        """Estimate the seconds of one processor: fla's configurations, and what torch compiles."""
        passes = 2 if case.pass_.needs_grad else 1
        return passes * (_CONFIGURATIONS * CONFIGURATION_S + _AROUND_S)

    def tuning_s(self, case: Case) -> float:
        """Estimate how long its first call times them."""
        return TUNING_S * _CONFIGURATIONS * (2 if case.pass_.needs_grad else 1)

    def precompile(self, case: Case) -> None:
        """Compile all configurations that autotuning will try, and what comes before and after."""
        compile_share(self, case, 0, 1)

    def precompile_share(self, case: Case, share: int, shares: int) -> None:
        """Compile what comes before and after in the first share, fla's kernels in the others."""
        if share == 0:
            compile_share(self, case, None, 1)
        else:
            compile_share(FlaSimpleGla(compiled=False), case, share - 1, shares - 1)


def _module(variant: str) -> Any:
    return import_module(f"fla.ops.simple_gla.{variant}")


def as_ssd(simple_gla: Callable[..., Any], *, compiled: bool) -> Callable[..., Any]:
    """Return an operation with the interface of `mamba_chunk_scan_combined`.

    Args:
        simple_gla: `simple_gla(q, k, v, g, scale=, initial_state=, output_final_state=)`; q, k
            (B, L, H, N), v (B, L, H, P), g (B, L, H) fp32; returns (o (B, L, H, P), final state
            (B, H, N, P) or None).
        compiled: let torch compile what comes before and after into fused kernels.
    """
    before, after = _prepare, _finish
    if compiled:
        from mambench.kernels.compiled import compiled as compile_

        before, after = compile_(_prepare), compile_(_finish)

    def ssd(
        x: "Tensor",
        dt: "Tensor",
        A: "Tensor",
        B: "Tensor",
        C: "Tensor",
        chunk_size: int,
        D: "Tensor | None" = None,
        z: "Tensor | None" = None,
        dt_bias: "Tensor | None" = None,
        initial_states: "Tensor | None" = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = NO_LIMIT,
        return_final_states: bool = False,
    ) -> "Tensor | tuple[Tensor, Tensor]":
        q, k, v, g = before(x, dt, A, B, C, dt_bias, dt_softplus, dt_limit)
        entry = None if initial_states is None else initial_states.mT.float().contiguous()
        out, final = simple_gla(
            q, k, v, g, scale=1.0, initial_state=entry, output_final_state=return_final_states
        )
        if D is not None or z is not None:
            out = after(out, x, D, z)
        return (out, final.mT) if return_final_states else out

    return ssd


def _prepare(
    x: "Tensor",
    dt: "Tensor",
    A: "Tensor",
    B: "Tensor",
    C: "Tensor",
    dt_bias: "Tensor | None",
    dt_softplus: bool,
    dt_limit: tuple[float, float],
) -> "tuple[Tensor, Tensor, Tensor, Tensor]":
    """Return q = C and k = B for every head, v = dt x rounded to x's dtype, g = dt A in fp32."""
    from torch.nn.functional import softplus

    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit != NO_LIMIT:
        dt = dt.clamp(*dt_limit)
    heads = x.shape[2] // B.shape[2]
    v = (x * dt[..., None]).to(x.dtype)
    return C.repeat_interleave(heads, 2), B.repeat_interleave(heads, 2), v, dt * A


def _finish(out: "Tensor", x: "Tensor", D: "Tensor | None", z: "Tensor | None") -> "Tensor":
    from torch.nn.functional import silu

    wide = out.float()
    if D is not None:
        wide = wide + (D if D.dim() == 2 else D[:, None]) * x
    if z is not None:
        wide = wide * silu(z.float())
    return wide.to(x.dtype)


def _refuses() -> bool:
    """Whether fla raises in the backward of `chunk`, going by versions."""
    if find_spec("tilelang") is not None:
        return False
    try:
        found = tuple(int(part) for part in version("triton").split("+")[0].split(".")[:3])
    except (PackageNotFoundError, ValueError):
        return False
    first, fixed = _MISCOMPILED
    return first <= found < fixed
