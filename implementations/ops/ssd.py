"""Chunked state-space duality (Mamba-2): matrix products inside chunks, a state between them."""

import importlib.util
from collections.abc import Callable
from typing import Any, ClassVar

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family, Pass
from mambench.implementations import decode
from mambench.implementations import hopper as hopper_device
from mambench.implementations.base import Implementation, Variant


class Ssd(Implementation):
    """Gluon or Triton kernels on the GPU, batched torch products on the CPU (and elsewhere)."""

    name: ClassVar[str] = "ssd"
    families: ClassVar[tuple[Family, ...]] = (Family.SSD,)
    summary: ClassVar[str] = "Mamba-2 in chunks: intra-chunk products, chunk states, state passing"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `torch` on a CPU; on a GPU `triton` and `torch`, on Hopper after `hopper`."""
        portable = Variant(name="torch")
        if device.kind is DeviceKind.CPU:
            return (portable,)
        missing = None
        if importlib.util.find_spec("triton") is None:
            missing = "triton is not installed: pip install 'triton>=3.6' (Linux only)"
        elif device.compute_capability is not None and device.compute_capability < (8, 0):
            missing = "needs compute capability 8.0 (bf16 tensor cores)"
        triton = Variant(name="triton", unavailable=missing)
        hopper = Variant(name="hopper", unavailable=hopper_device.unavailable_on(device))
        if device.compute_capability == hopper_device.CAPABILITY:
            return (hopper, triton, portable)
        return (triton, portable, hopper)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the operation of a variant."""
        if variant == "triton":
            from mambench.kernels.ssd.triton_ssd import ssd

            return ssd
        if variant == "hopper":
            from mambench.kernels.ssd.hopper_op import ssd as hopper_ssd

            return hopper_ssd
        from mambench.kernels.ssd.torch_ssd import ssd as torch_ssd

        return torch_ssd

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `triton` or `numba`, then `torch`: the state update of one token."""
        return decode.variants(device)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return `selective_state_update` of a variant."""
        return decode.op(variant)

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Return the limit of the variant's kernels that the case is beyond, or None."""
        if case.pass_ is Pass.DECODE:
            return decode.unsupported(case)
        if case.variant == "hopper":
            return _beyond_hopper(case)
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
        if case.pass_ is Pass.DECODE:
            return decode.workspace_bytes(case)
        if case.variant == "hopper" and not case.pass_.needs_grad:
            return _hopper_workspace(case)
        if case.variant in ("triton", "hopper"):  # the backward is the same, and allocates more
            return _triton_workspace(case)
        from mambench.kernels.ssd.torch_config import workspace_bytes

        p = case.problem
        return workspace_bytes(
            batch=p.batch,
            seqlen=p.length,
            nheads=p.nheads,
            headdim=p.headdim or 0,
            d_state=p.d_state or 0,
            itemsize=case.dtype.itemsize,
            needs_grad=case.pass_.needs_grad,
        )

    def launches(self, case: Case) -> int:
        """Estimate what a call launches in sequence."""
        return decode.launches(case) if case.pass_ is Pass.DECODE else super().launches(case)

    def precompile(self, case: Case) -> None:
        """Compile what decode needs on the CPU, and Triton's and Gluon's kernels by a call."""
        if case.variant in ("triton", "hopper"):
            from mambench.implementations.warm import call_once

            call_once(self, case)
        elif case.pass_ is Pass.DECODE:
            decode.precompile(case)


def _beyond_hopper(case: Case) -> str | None:
    from mambench.kernels.ssd.hopper_config import refusal

    if case.dtype not in (DType.BF16, DType.FP16):
        return f"dtype {case.dtype}: the Hopper SSD takes bf16 and fp16"
    return refusal(headdim=case.problem.headdim or 0, d_state=case.problem.d_state or 0)


def _hopper_workspace(case: Case) -> int:
    from mambench.kernels.ssd.hopper_config import workspace_bytes

    p = case.problem
    return workspace_bytes(
        batch=p.batch,
        seqlen=p.length,
        nheads=p.nheads,
        headdim=p.headdim or 0,
        d_state=p.d_state or 0,
        ngroups=p.ngroups or 1,
    )


def _triton_workspace(case: Case) -> int:
    """Per-chunk decay sums; in the backward pass the states of all chunks and sums over heads."""
    from mambench.kernels.ssd.triton_config import tiling

    p = case.problem
    headdim, d_state, ngroups = p.headdim or 0, p.d_state or 0, p.ngroups or 1
    tiles = tiling(case.dtype.itemsize, headdim, d_state, wgmma=True)
    token_heads = p.tokens * p.nheads
    forward = 8 * token_heads
    if not case.pass_.needs_grad:
        return forward
    chunks = -(-p.length // tiles.grad_chunk) * p.batch
    states = 2 * chunks * p.nheads * headdim * d_state * case.dtype.itemsize
    partials = 2 * 4 * p.tokens * ngroups * d_state * min(8, p.nheads // ngroups)
    return 16 * token_heads + states + partials
