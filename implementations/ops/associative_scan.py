"""Parallel prefix over (decay, input) pairs in plain PyTorch: log-depth, the state materialised."""

from collections.abc import Callable
from typing import Any

from mambench.harness.spec import Case, Device, Family
from mambench.implementations.base import Implementation, Variant

STATE_ITEMSIZE = 4


class AssociativeScan(Implementation):
    """All steps at once: 2 log2(L) passes over a tensor that holds the state of every step."""

    name = "associative_scan"
    families = (Family.S6, Family.SSD)
    summary = "parallel prefix over (decay, input) pairs, log-depth, the state materialised"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the one variant, which runs everywhere."""
        return (Variant(name="torch"),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Return the family's scan."""
        from mambench.kernels import scan_torch

        if family is Family.S6:
            return scan_torch.selective_scan
        return scan_torch.state_space_dual

    def workspace_bytes(self, case: Case) -> int:
        """Count the tensors as large as all states that are alive at once.

        Forward: states and their product with C, and for s6 the decays, twice, which are as large.
        With gradients: those that autograd keeps, the gradients of both, and one product.
        """
        problem = case.problem
        states = problem.tokens * problem.d_inner * (problem.d_state or 0) * STATE_ITEMSIZE
        activations = 4 * problem.tokens * problem.d_inner * STATE_ITEMSIZE
        alive = {Family.S6: (3, 6), Family.SSD: (2, 4)}[problem.family][case.pass_.needs_grad]
        return alive * states + activations

    def launches(self, case: Case) -> int:
        """Estimate: three operations a level of the tree, and some before and after."""
        return 20 + 3 * case.problem.length.bit_length()
