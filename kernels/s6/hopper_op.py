"""Selective scan (S6) on Hopper as a public operation: Gluon kernels, or a Triton backward."""

from typing import Any

import torch
from torch import Tensor

from mambench.kernels.registered import (
    Operation,
    Options,
    Results,
    Tensors,
    differentiated_once,
    is_traced,
    needs_gradient,
    register,
)
from mambench.kernels.s6 import hopper_backward
from mambench.kernels.s6.arguments import S6_OPTIONS, S6_TENSORS, check_arguments
from mambench.kernels.s6.hopper_scan import scan_forward, supported
from mambench.kernels.s6.triton_config import chunk_size
from mambench.kernels.s6.triton_scan import (
    _Inputs as Inputs,  # pyright: ignore[reportPrivateUsage]
)
from mambench.kernels.s6.triton_scan import scan_backward


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    initial_state: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the selective scan of u, differentiable once in every tensor argument.

    Args:
        u, delta, z: (B, D, L), all fp32, fp16 or bf16; copied where they are not contiguous.
        A: (D, N) fp32, at most 256 states.
        B, C: (B, G, N, L) or (B, N, L), u's dtype; a group serves D / G consecutive channels.
        D, delta_bias: (D,) fp32.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.
        initial_state: refused; the Triton variant starts from one.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state (B, D, N) fp32).

    Raises:
        ValueError, TypeError: see `check_arguments`; u is of none of the dtypes above.
    """
    if initial_state is not None:
        raise ValueError(
            "the Hopper scan starts from zero, got initial_state: "
            "use the Triton variant (mambench.kernels.s6.triton_scan)"
        )
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    traced = is_traced()
    if traced or u.dim() != 3 or A.dim() != 2:  # else an eager call's first of a kind does
        check_arguments(*tensors)
        if (reason := supported(d_state=A.shape[1], dtype=u.dtype)) is not None:
            raise TypeError(reason)
    if traced:
        out, last = _traced(tensors, (delta_softplus,))
    elif needs_gradient(tensors):
        out, last = _SelectiveScan.apply(delta_softplus, *tensors)
    else:  # without the cost of a graph node, and without states for a backward
        out, last, _ = scan_forward(*tensors, delta_softplus)
    return (out, last) if return_last_state else out


class _SelectiveScan(torch.autograd.Function):
    """Saves the inputs and the states that the backward replays from."""

    @staticmethod
    def forward(ctx: Any, delta_softplus: bool, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, last, kept = _forward(tensors, (delta_softplus,), True)
        ctx.save_for_backward(kept, *tensors)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *kept, tensors = _split(ctx.saved_tensors)
        if hasattr(
            ctx, "maybe_clear_saved_tensors"
        ):  # unless the graph is to be gone through again
            ctx.maybe_clear_saved_tensors()
        return (None, *_gradients(dout, dlast, kept, tensors, (ctx.delta_softplus,)))


def _split(saved: Tensors) -> tuple[Tensor, Tensors]:
    """Return the kept states and the tensors."""
    return saved[0], saved[1:]


def _forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    """Return out, the last state and, if `keep`, the states that the backward starts from."""
    every = _checkpoint_every(*_sized(tensors)) if keep else None
    out, last, kept = scan_forward(*tensors, *options, checkpoint_every=every)
    return out, last, last.new_empty(0) if kept is None else kept


def _sized(tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors whose sizes decide how the backward runs: u, A and B."""
    return tensors[0], tensors[2], tensors[3]


def _checkpoint_every(u: Tensor, A: Tensor, B: Tensor) -> int:
    config = hopper_backward.configuration(u, A.shape[1], B.shape[1])
    return chunk_size(A.shape[1]) if config is None else config.chunk


def _gradients(
    dout: Tensor | None,
    dlast: Tensor | None,
    kept: Tensor | list[Tensor],
    tensors: Tensors,
    options: Options,
) -> tuple[Tensor | None, ...]:
    """Return the gradient of every tensor, None for those not given.

    A list of the kept states is emptied where they can be freed before the rest is allocated.
    """
    u, A, B = _sized(tensors)
    if dout is None:
        dout = torch.zeros_like(u)
    config = hopper_backward.configuration(u, A.shape[1], B.shape[1])
    if config is None:
        states = kept if isinstance(kept, Tensor) else kept[0]
        inputs, dout = Inputs(*tensors, *options), dout.contiguous()
        return scan_backward(inputs, states, dout, dlast)[:8]
    softplus = options[0]
    return hopper_backward.scan_backward(tensors, softplus, kept, dout, dlast, config=config)


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    u, A = tensors[0], tensors[2]
    batch, d_inner, seqlen = u.shape
    states = (d_inner, A.shape[1])
    # A compiler may not know the sizes yet: what is kept how often is decided for these alone.
    sized = (t.new_empty(tuple(map(int, t.shape))) for t in _sized(tensors))
    every = _checkpoint_every(*sized)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": u.device}
    kept = (batch, (seqlen + every - 1) // every, *states) if keep else (0,)
    return u.new_empty(u.shape), torch.empty((batch, *states), **fp32), torch.empty(kept, **fp32)


def _traced_backward(
    dout: Tensor | None, dlast: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    gradients = _gradients(dout, dlast, kept, tensors, options)
    return [gradient for gradient in gradients if gradient is not None]


_traced = register(
    Operation(
        name="s6_hopper",
        tensors=S6_TENSORS[:-1],
        options=S6_OPTIONS,
        forward=_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
