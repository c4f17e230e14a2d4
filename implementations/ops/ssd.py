"""Chunked state-space duality (Mamba-2): matrix products inside chunks, a state between them."""

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass
from mambench.implementations.base import Implementation, Variant


class Ssd(Implementation):
    """Triton kernels on the GPU, batched torch products on the CPU (and anywhere else)."""

    name: ClassVar[str] = "ssd"
    families: ClassVar[tuple[Family, ...]] = (Family.SSD,)
    summary: ClassVar[str] = "Mamba-2 in chunks: intra-chunk products, chunk states, state passing"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton` and `torch` on a GPU, `torch` on a CPU."""
        if device.kind is DeviceKind.CPU:
            return (Variant(name="torch"),)
        missing = None
        if importlib.util.find_spec("triton") is None:
            missing = "triton is not installed: pip install 'triton>=3.6' (Linux only)"
        elif device.compute_capability is not None and device.compute_capability < (8, 0):
            missing = "needs compute capability 8.0 (bf16 tensor cores)"
        return (Variant(name="triton", unavailable=missing), Variant(name="torch"))

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the operation of a variant."""
        if variant == "triton":
            from mambench.kernels.ssd.triton_ssd import ssd

            return ssd
        from mambench.kernels.ssd.torch_ssd import ssd as torch_ssd

        return torch_ssd

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Return the limit of the Triton kernels that the case is beyond, or None."""
        if case.variant != "triton":
            return None
        from mambench.kernels.ssd.triton_config import MAX_D_STATE, MAX_HEADDIM

        if case.dtype is DType.FP64:
            return "the Triton kernels take fp32, fp16 and bf16"
        headdim, d_state = case.problem.headdim or 0, case.problem.d_state or 0
        if headdim > MAX_HEADDIM or d_state > MAX_D_STATE:
            return f"headdim is at most {MAX_HEADDIM} and d_state at most {MAX_D_STATE}"
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Estimate what the largest pass allocates beyond inputs, outputs and gradients."""
        if case.variant == "triton":
            return _triton_workspace(case)
        from mambench.kernels.ssd.torch_config import workspace_bytes

        p = case.problem
        return workspace_bytes(
            batch=p.batch,
            seqlen=p.seqlen,
            nheads=p.nheads,
            headdim=p.headdim or 0,
            d_state=p.d_state or 0,
            itemsize=case.dtype.itemsize,
            needs_grad=case.pass_ is not Pass.FORWARD,
        )


def _triton_workspace(case: Case) -> int:
    """Per-chunk decay sums; in the backward pass the states of all chunks and sums over heads."""
    from mambench.kernels.ssd.triton_config import tiling

    p = case.problem
    headdim, d_state, ngroups = p.headdim or 0, p.d_state or 0, p.ngroups or 1
    tiles = tiling(case.dtype.itemsize, headdim, d_state, wgmma=True)
    token_heads = p.tokens * p.nheads
    forward = 8 * token_heads
    if case.pass_ is Pass.FORWARD:
        return forward
    chunks = -(-p.seqlen // tiles.grad_chunk) * p.batch
    states = 2 * chunks * p.nheads * headdim * d_state * case.dtype.itemsize
    partials = 2 * 4 * p.tokens * ngroups * d_state * min(8, p.nheads // ngroups)
    return 16 * token_heads + states + partials
