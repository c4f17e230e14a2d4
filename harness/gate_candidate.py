"""Runs a candidate as the correctness gate does: once, eagerly, its results complete and its own.

What a candidate may not do is raised as RejectedError here; whether its values are right is judged
by `harness.gate`.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mambench.harness import gate_cheats
from mambench.harness.gate_cheats import RejectedError
from mambench.harness.spec import Case, Pass
from mambench.implementations.problems.base import TORCH_DTYPES, Sample
from mambench.implementations.workload import Workload


@contextmanager
def altered_input(workload: Workload) -> Generator[None, None, None]:
    """Negate an input while the block runs, so that no address or version counter tells."""
    name = next(iter(workload.inputs))
    if workload.case.pass_ is not Pass.DECODE and "v" in workload.inputs:
        name = "v"  # over a single key attention does not depend on q
    altered = workload.inputs[name]
    altered.data.neg_()  # exactly reversible, and needs no second set of inputs
    try:
        yield
    finally:
        altered.data.neg_()


def run_pass(
    workload: Workload, case: Case, sample: Sample, seed: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Run the pass once, eagerly; return complete results and the sampled output gradients."""
    needs_grad, names_of = case.pass_.needs_grad, workload.family.outputs
    with torch.set_grad_enabled(needs_grad), state_restored(workload):
        outputs = _checked(workload, workload.forward())
    _require_declared(outputs, case)
    if not needs_grad:
        results = by_name(names_of, outputs, {})
        _require_finite(results)
        return results, []
    if not all(out.requires_grad for out in outputs):
        raise RejectedError("y: has no graph, so no gradient can be computed from it")
    names = workload.family.differentiable(workload.problem)
    sampled, complete = _output_gradients(workload, outputs, sample, seed)
    inputs = {name: workload.inputs[name] for name in names}
    results = by_name(names_of, outputs, gradients(outputs, inputs, complete))
    _require_finite(results)
    return results, sampled


def gradients(
    outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], grad_outputs: Sequence[Tensor]
) -> dict[str, Tensor]:
    """Return each input's gradient; raises RejectedError where there is none of its dtype."""
    if not inputs:
        return {}
    grad_outputs = [grad.to(out.dtype) for grad, out in zip(grad_outputs, outputs, strict=True)]
    grads = torch.autograd.grad(outputs, list(inputs.values()), grad_outputs, allow_unused=True)
    found: dict[str, Tensor] = {}
    for (name, tensor), grad in zip(inputs.items(), grads, strict=True):
        if grad is None:  # pyright: ignore[reportUnnecessaryComparison] of allow_unused
            raise RejectedError(f"grad_{name}: the operation is not differentiable in {name}")
        if grad.dtype != tensor.dtype:
            raise RejectedError(f"grad_{name}: dtype {grad.dtype}, expected {tensor.dtype}")
        found[name] = grad
    return found


def _output_gradients(
    workload: Workload, outputs: Sequence[Tensor], sample: Sample, seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Draw gradients of the sampled outputs, and embed them in zeros for the complete ones."""
    family, problem = workload.family, workload.problem
    blank = tuple(torch.zeros_like(out.detach()).requires_grad_() for out in outputs)
    with torch.enable_grad():
        views = family.select_outputs(problem, blank, sample)
    generator = torch.Generator(device=outputs[0].device).manual_seed(seed)
    sampled = [
        torch.randn(view.shape, generator=generator, dtype=view.dtype, device=view.device)
        for view in views
    ]
    if all(view is tensor for view, tensor in zip(views, blank, strict=True)):
        return sampled, sampled
    complete = torch.autograd.grad(views, blank, sampled)  # the adjoint of the selection
    return sampled, list(complete)


@contextmanager
def state_restored(workload: Workload) -> Generator[None, None, None]:
    """Put back what the operation updates in place: every call begins with the same state."""
    views = workload.family.updated(workload.problem, workload.inputs)
    before = {name: view.clone() for name, view in views.items()}
    try:
        yield
    finally:
        for name, view in views.items():
            view.copy_(before[name])


def _checked(workload: Workload, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Require outputs to be their own, and copy those that an update in place leaves in inputs."""
    updated = workload.family.updated(workload.problem, workload.inputs)
    named = dict(zip(workload.family.outputs, outputs, strict=False))
    device = next(iter(workload.inputs.values())).device
    gate_cheats.require_plain(named, device)
    own = {name: out for name, out in named.items() if name not in updated}
    gate_cheats.require_own_memory(own, workload.inputs)
    return tuple(out if name in own else out.clone() for name, out in named.items())


def by_name(
    names: Sequence[str], outputs: Sequence[Tensor], grads: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return detached outputs and gradients by name, a gradient's being `grad_` and its input's."""
    named = {name: out.detach() for name, out in zip(names, outputs, strict=False)}
    return named | {f"grad_{name}": grad.detach() for name, grad in grads.items()}


def select_results(
    workload: Workload, results: Mapping[str, Tensor], sample: Sample
) -> dict[str, Tensor]:
    """Return the part of complete results that the sample judges."""
    family, problem = workload.family, workload.problem
    grads = {name: results[f"grad_{name}"] for name in workload.inputs if f"grad_{name}" in results}
    outputs = tuple(value for name, value in results.items() if not name.startswith("grad_"))
    selected = family.select_inputs(problem, grads, sample) if grads else {}
    return by_name(family.outputs, family.select_outputs(problem, outputs, sample), selected)


def _require_declared(outputs: Sequence[Tensor], case: Case) -> None:
    if outputs[0].dtype != TORCH_DTYPES[case.dtype]:
        raise RejectedError(f"y: dtype {outputs[0].dtype}, expected {TORCH_DTYPES[case.dtype]}")


def _require_finite(results: Mapping[str, Tensor]) -> None:
    if (reason := gate_cheats.incomplete(results)) is not None:
        raise RejectedError(reason)


@contextmanager
def poisoned_memory() -> Generator[None, None, None]:
    """Fill newly allocated memory with NaN, so that what is never written shows."""
    mode = torch.get_deterministic_debug_mode()
    settings: Any = torch.utils.deterministic  # its attribute is not in the stubs
    filled = settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(mode)
