"""The step-by-step recurrence in plain PyTorch: the specification, and what fusion must beat."""

from collections.abc import Callable
from typing import Any

from mambench.harness.spec import Case, Device, Family, Pass, Problem
from mambench.implementations.base import Implementation, Variant

STATE_ITEMSIZE = 4


class NaiveRecurrence(Implementation):
    """Step by step in time, one small tensor operation after another."""

    name = "naive_recurrence"
    families = (Family.S6, Family.SSD)
    summary = "the step-by-step recurrence in plain PyTorch: the specification"

    def variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the one variant, which runs everywhere."""
        return (Variant(name="torch"),)

    def op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Return the family's step-by-step operation."""
        from mambench.kernels import recurrence_torch

        if family is Family.S6:
            return recurrence_torch.selective_scan
        return recurrence_torch.state_space_dual

    def decode_variants(self, device: Device) -> tuple[Variant, ...]:
        """Return the one variant, which runs everywhere."""
        return (Variant(name="torch"),)

    def decode_op(self, family: Family, variant: str) -> Callable[..., Any]:
        """Return the step that both families share."""
        from mambench.kernels.state_update.torch_update import selective_state_update

        return selective_state_update

    def workspace_bytes(self, case: Case) -> int:
        """Estimate: activations in fp32; with gradients, what autograd keeps of every step."""
        problem = case.problem
        if case.pass_ is Pass.DECODE:
            return 4 * _state_bytes(problem)  # decay, two products, and the state in fp32
        activations = 4 * problem.tokens * problem.d_inner * STATE_ITEMSIZE
        if not case.pass_.needs_grad:
            return activations + 4 * _state_bytes(problem)
        kept_per_step = 2 if problem.family is Family.S6 else 1  # the state, and s6's decay
        return 3 * activations + (kept_per_step * problem.length + 4) * _state_bytes(problem)

    def launches(self, case: Case) -> int:
        """Estimate: about ten small operations a step."""
        if case.pass_ is Pass.DECODE:
            return 15
        return 10 * case.problem.length


def _state_bytes(problem: Problem) -> int:
    return problem.batch * problem.d_inner * (problem.d_state or 0) * STATE_ITEMSIZE
