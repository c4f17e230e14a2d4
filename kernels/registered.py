"""Our operations as operators that PyTorch knows, for torch.compile, torch.export and torch.func.

An eager call goes straight to an `autograd.Function`: the dispatcher of a registered operator costs
host time that a short scan does not have, and gains an eager call nothing. Where a call is traced
or transformed (`is_traced`) the tracer cannot look into a kernel, so there the operation is one
opaque operator with a fake kernel that knows the results' shapes, and its backward another.

torch.func's `grad` and `vjp` need an `autograd.Function` of the newer form around the operator:
what `torch.library.register_autograd` makes is of the older one (PyTorch 2.13). So there are two
ways to the same operator: one for compilers, one for transforms. `vmap` calls the operator once for
each element of the axis it maps, for a kernel sums a parameter's gradient over its batch: right for
gradients of each sample and for ensembles, and no faster than a loop. Not served: forward-mode
derivatives, second derivatives, and torch.func inside torch.compile; all of them raise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "mambench"

Tensors = tuple[Any, ...]  # each a Tensor, or None where it is optional
Options = tuple[Any, ...]
Results = tuple[Tensor, Tensor, Tensor]  # the output, the state after the last step, what is kept


@dataclass(frozen=True, kw_only=True)
class Operation:
    """An operation of tensors and options, and its gradient.

    Args:
        name: the operator's, in the namespace `mambench`; the gradient's is `<name>_backward`.
        tensors: the tensor arguments in a schema's words, such as "Tensor u" or "Tensor? z"; those
            of integers have no gradient.
        options: the others, such as "bool delta_softplus"; no gradient.
        forward: (tensors, options, keep) to results; nothing kept, an empty tensor, unless `keep`.
        shapes: (tensors, options, keep) to results without values, for tracing.
        backward: (grad_out or None, grad_state or None, kept, tensors, options) to the gradient of
            every floating-point tensor that is given, in order.
    """

    name: str
    tensors: tuple[str, ...]
    options: tuple[str, ...]
    forward: Callable[[Tensors, Options, bool], Results]
    shapes: Callable[[Tensors, Options, bool], Results]
    backward: Callable[[Tensor | None, Tensor | None, Tensor, Tensors, Options], Sequence[Tensor]]


def is_traced() -> bool:
    """Whether a compiler traces this code, or a transform of torch.func is around it."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active()  # what autograd.Function.apply asks, too


def needs_gradient(tensors: Tensors) -> bool:
    """Whether a result of these tensors will be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def differentiated_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make results of a backward raise where they are differentiated, at no cost where none is."""
    checked = once_differentiable(backward)

    def called(ctx: Any, *grads: Tensor | None) -> Any:
        return checked(ctx, *grads) if torch.is_grad_enabled() else backward(ctx, *grads)

    return called


def register(operation: Operation) -> Callable[[Tensors, Options], tuple[Tensor, Tensor]]:
    """Register an operation; returns a function of (tensors, options) for traced calls of it.

    That function returns the output and the state, and is differentiable once in every tensor.
    """
    count, name = len(operation.tensors), operation.name
    inputs = ", ".join((*operation.tensors, *operation.options))
    forward = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        lambda *given: operation.forward(given[:count], given[count:-1], given[-1]),
        mutates_args=(),
        schema=f"({inputs}, bool keep) -> (Tensor, Tensor, Tensor)",
    )
    backward = torch.library.custom_op(
        f"{NAMESPACE}::{name}_backward",
        lambda grad_out, grad_state, kept, *given: _separate(
            operation.backward(grad_out, grad_state, kept, given[:count], given[count:])
        ),
        mutates_args=(),
        schema=f"(Tensor? grad_out, Tensor? grad_state, Tensor kept, {inputs}) -> Tensor[]",
    )

    @forward.register_fake
    def _(*given: Any) -> Results:
        return operation.shapes(given[:count], given[count:-1], given[-1])

    @backward.register_fake
    def _(grad_out: Tensor | None, grad_state: Tensor | None, kept: Tensor, *given: Any) -> Any:
        return [t.new_empty(t.shape) for t in given[:count] if _has_gradient(t)]

    operators = getattr(torch.ops, NAMESPACE)
    forward_op, backward_op = (
        getattr(operators, each).default for each in (name, f"{name}_backward")
    )
    setup, differentiate = _autograd(count, backward_op)
    forward.register_autograd(differentiate, setup_context=setup)
    transformed = _transformable(count, forward_op, backward_op)

    def call(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            out, state, _ = forward_op(*tensors, *options, needs_gradient(tensors))
        else:
            out, state, _ = transformed(*tensors, *options, True)
        return out, state

    return call


def _autograd(count: int, backward: Callable[..., Any]) -> tuple[Any, Any]:
    """Return what `register_autograd` takes: save the tensors and what was kept, and go back."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Results) -> None:
        if not inputs[-1]:
            raise RuntimeError("expected keep=True where a gradient is needed, got False")
        ctx.save_for_backward(output[2], *inputs[:count])
        ctx.options = inputs[count:-1]
        ctx.set_materialize_grads(False)

    def differentiate(ctx: Any, grad_out: Any, grad_state: Any, _: Any) -> tuple[Any, ...]:
        kept, *tensors = ctx.saved_tensors
        gradients = iter(backward(grad_out, grad_state, kept, *tensors, *ctx.options))
        return (
            *(next(gradients) if _has_gradient(t) else None for t in tensors),
            *(None for _ in ctx.options),
            None,
        )

    return setup, differentiate


def _transformable(
    count: int, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Results]:
    """Return the operator as torch.func transforms it: two functions of the newer form."""
    setup, differentiate = _autograd(count, lambda *given: Backward.apply(*given))

    class Backward(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return tuple(backward(*given))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError("expected to be differentiated once, got a second time")

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
            return _one_by_one(Backward.apply, info.batch_size, in_dims, given)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*given: Any) -> Any:
            return tuple(forward(*given))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.mark_non_differentiable(output[2])
            setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

        @staticmethod
        def vmap(info: Any, in_dims: tuple[int | None, ...], *given: Any) -> Any:
            return _one_by_one(Forward.apply, info.batch_size, in_dims, given)

    return Forward.apply


def _one_by_one(
    call: Callable[..., Tensors], count: int, in_dims: tuple[int | None, ...], given: Tensors
) -> tuple[Tensors, tuple[int, ...]]:
    """Call for each element of the mapped axes; returns the results in rows, and their axis."""
    rows = [
        call(
            *(v if dim is None else v.select(dim, i) for v, dim in zip(given, in_dims, strict=True))
        )
        for i in range(count)
    ]
    results = tuple(torch.stack(each) for each in zip(*rows, strict=True))
    return results, (0,) * len(results)


def _has_gradient(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.is_floating_point()


def _separate(gradients: Sequence[Tensor]) -> list[Tensor]:
    """Copy what shares memory with one before it: an operator's results may not."""
    seen: set[int] = set()
    apart: list[Tensor] = []
    for gradient in gradients:
        memory = gradient.untyped_storage().data_ptr()
        apart.append(gradient.clone() if memory in seen else gradient.contiguous())
        seen.add(memory)
    return apart
