"""Parallel prefix over (decay, input) pairs: log-depth, the state of every step in memory.

In Triton on a GPU, blocks of time by `tl.associative_scan`; in plain PyTorch everywhere.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from mambench.harness.spec import Case, Device, DeviceKind, DType, Family
from mambench.implementations.base import Implementation, Variant

STATE_ITEMSIZE = 4
_MAX_D_STATE = 256  # of the Triton kernels


class AssociativeScan(Implementation):
    """The state of every step in memory: written by one kernel, or by 2 log2(L) passes of torch."""

    name = "associative_scan"
    families = (Family.S6, Family.SSD)
    summary = "parallel prefix over (decay, input) pairs, log-depth, the state materialised"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return `torch`, which runs everywhere; on a GPU `triton` before it."""
        portable = Variant(name="torch")
        if device.kind is DeviceKind.CPU:
            return (portable,)
        missing = None
        if find_spec("triton") is None:
            missing = "triton is not installed: pip install 'triton>=3.6' (Linux only)"
        elif device.compute_capability is not None and device.compute_capability < (8, 0):
            missing = "needs compute capability 8.0"
        return (Variant(name="triton", unavailable=missing), portable)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Import and return the family's scan of a variant."""
        if variant == "triton":
            from mambench.kernels import scan_triton as module
        else:
            from mambench.kernels import scan_torch as module
        if family is Family.S6:
            return module.selective_scan
        return module.state_space_dual

    def unsupported(self, case: Case, device: Device) -> str | None:
        """Refuse what the Triton kernels do not take; torch takes everything."""
        if case.variant != "triton":
            return None
        if case.dtype is DType.FP64:
            return "the triton kernels compute in fp32; use fp32, fp16 or bf16"
        if (case.problem.d_state or 0) > _MAX_D_STATE:
            return f"d_state is at most {_MAX_D_STATE}, got {case.problem.d_state}"
        return None

    def workspace_bytes(self, case: Case) -> int:
        """Count the tensors as large as all states that are alive at once.

        Triton: the states, with gradients theirs beside them. torch, forward: states and their
        product with C, and for s6 the decays, twice, which are as large. With gradients: those
        that autograd keeps, the gradients of both, and one product.
        """
        problem = case.problem
        states = problem.tokens * problem.d_inner * (problem.d_state or 0) * STATE_ITEMSIZE
        activations = 4 * problem.tokens * problem.d_inner * STATE_ITEMSIZE
        if case.variant == "triton":
            return (2 if case.pass_.needs_grad else 1) * states + activations
        alive = {Family.S6: (3, 6), Family.SSD: (2, 4)}[problem.family][case.pass_.needs_grad]
        return alive * states + activations

    def launches(self, case: Case) -> int:
        """Estimate: two kernels; in torch three operations a level of the tree, and some around."""
        if case.variant == "triton":
            return 2
        return 20 + 3 * case.problem.length.bit_length()

    def precompile(self, case: Case) -> None:
        """Compile Triton's kernels by a call; torch compiles nothing that can be kept."""
        if case.variant == "triton":
            from mambench.implementations.warm import call_once

            call_once(self, case)
