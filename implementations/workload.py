"""A case made ready to run: family, inputs on the device, closures that execute it once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mambench.harness.spec import Case, Device, DeviceKind, Family, Level, Pass, Problem
from mambench.implementations.base import Implementation
from mambench.implementations.problems.base import TORCH_DTYPES, ProblemFamily

# What the gate may spend on the float64 reference of a scan: about a second on two CPU cores.
CPU_JUDGED_STATES = {Family.S6: 1 << 21, Family.SSD: 1 << 28}


class Workload:
    """One case on one device.

    Attributes:
        case: the question.
        problem: its sizes.
        family: inputs, calling convention and references.
        op: the implementation's operation (at block level, the mixer's).
        inputs: leaf tensors; those that are differentiable require gradients when the pass has any.
    """

    def __init__(
        self, *, case: Case, family: ProblemFamily, op: Callable[..., Any], device: str, seed: int
    ) -> None:
        self.case = case
        self.problem: Problem = case.problem
        self.family = family
        self.op = op
        self._seed = seed
        dtype = TORCH_DTYPES[case.dtype]
        self.inputs: dict[str, Tensor] = family.make_inputs(
            case.problem, dtype=dtype, device=device, seed=seed
        )
        if case.pass_.needs_grad:
            for tensor in self.leaves:
                tensor.requires_grad_()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The differentiable inputs, in the family's order."""
        return tuple(self.inputs[name] for name in self.family.differentiable(self.problem))

    def forward(self) -> tuple[Tensor, ...]:
        """Call the implementation once; records a graph if gradients are enabled and wanted."""
        return self.family.call(self.op, self.problem, self.inputs)

    def prepare(self, pass_: Pass) -> Callable[[], object]:
        """Return a closure that executes the pass exactly once and returns what it computed.

        - forward, prefill and decode: without a graph; decode changes the state among the inputs;
        - backward: the gradients of all differentiable inputs, from a forward that is done here,
          once;
        - training: forward, then these gradients.

        Gradients are returned, never accumulated. The closure holds memory until it is dropped.
        """
        if not pass_.needs_grad:
            return self._forward_without_graph
        if not self.case.pass_.needs_grad:
            raise ValueError(f"a workload for the pass {self.case.pass_} has no gradients")
        leaves = self.leaves
        if pass_ is Pass.BACKWARD:
            outputs = self._forward_with_graph()
            grad_outputs = self._grad_outputs(outputs)
            return lambda: torch.autograd.grad(outputs, leaves, grad_outputs, retain_graph=True)
        with torch.no_grad():
            grad_outputs = self._grad_outputs(self.forward())

        def training() -> tuple[Tensor, ...]:
            return torch.autograd.grad(self._forward_with_graph(), leaves, grad_outputs)

        return training

    def reset(self) -> None:
        """Put a state that is updated in place back to what it was drawn as."""
        self.family.reset(self.problem, self.inputs, seed=self._seed)

    def release(self) -> None:
        """Drop the inputs; the workload cannot be used afterwards."""
        self.inputs.clear()

    def _forward_without_graph(self) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return self.forward()

    def _forward_with_graph(self) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            return self.forward()

    def _grad_outputs(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Draw the gradients of the outputs: normal values of the outputs' shapes and dtypes."""
        generator = torch.Generator(device=outputs[0].device).manual_seed(self._seed + 1)
        return tuple(
            torch.randn(out.shape, generator=generator, dtype=out.dtype, device=out.device)
            for out in outputs
        )


def build(case: Case, implementation: Implementation, device: Device, *, seed: int) -> Workload:
    """Load the implementation's operation and draw the case's inputs on the device.

    Raises whatever the import of the operation or the allocation of the inputs raises.
    """
    if device.kind is DeviceKind.CUDA:
        torch.cuda.set_device(device.index)  # kernels launch on the current device
    load = implementation.decode_op if case.pass_ is Pass.DECODE else implementation.op
    op = load(case.problem.family, case.variant)
    return Workload(
        case=case,
        family=problem_family(case.problem, op, device, case.pass_),
        op=op,
        device=device.torch_name,
        seed=seed,
    )


def problem_family(
    problem: Problem, op: Callable[..., Any], device: Device, pass_: Pass = Pass.FORWARD
) -> ProblemFamily:
    """Return the object that draws, calls and judges this problem; modules load when asked for."""
    if problem.level is Level.BLOCK:
        from mambench.implementations.blocks.problem import block_family

        return block_family(problem, op)
    budget = (
        {"judged_states": CPU_JUDGED_STATES[problem.family]}
        if device.kind is DeviceKind.CPU and problem.family in CPU_JUDGED_STATES
        else {}
    )
    if pass_.leaves_state:
        return _stateful_family(problem.family, pass_, budget)
    if problem.family is Family.S6:
        from mambench.implementations.problems.s6 import S6Problem

        return S6Problem(**budget)
    if problem.family is Family.SSD:
        from mambench.implementations.problems.ssd import SsdProblem

        return SsdProblem(**budget)
    from mambench.implementations.problems.attention import AttentionProblem

    return AttentionProblem()


def _stateful_family(family: Family, pass_: Pass, budget: dict[str, int]) -> ProblemFamily:
    """Return what draws, calls and judges a pass that makes or updates the decoding state."""
    if pass_ is Pass.DECODE and family is Family.ATTENTION:
        from mambench.implementations.problems.attention_decode import AttentionDecodeProblem

        return AttentionDecodeProblem()
    if pass_ is Pass.DECODE:
        from mambench.implementations.problems.state_update import StateUpdateProblem

        return StateUpdateProblem(family, **budget)
    if family is Family.ATTENTION:  # its cache is the keys and values it is given
        from mambench.implementations.problems.attention import AttentionProblem

        return AttentionProblem()
    from mambench.implementations.problems.prefill import S6Prefill, SsdPrefill

    return S6Prefill(**budget) if family is Family.S6 else SsdPrefill(**budget)
