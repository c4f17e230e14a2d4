"""State-space duality on Hopper as a public operation: in Gluon, a gated backward in Triton."""

import math
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.prepared import Calls, Recording
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
from mambench.kernels.ssd.arguments import SSD_SEGMENTED, SSD_TENSORS, check_arguments
from mambench.kernels.ssd.hopper_ssd import (
    Config,
    fetched,
    plan_hopper,
    run_forward,
)
from mambench.kernels.ssd.triton_launch import Launch, Operands
from mambench.kernels.ssd.triton_ssd import traced_shapes
from mambench.kernels.ssd.triton_ssd_backward import Backward


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    segments: int | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the SSD operation, differentiable once in every tensor argument.

    Args:
        x: (B, L, H, P), bf16 or fp16; P a multiple of 8 up to 128.
        dt: (B, L, H), any floating dtype.
        A: (H,), not positive.
        B, C: (B, L, G, N), dtype of x; N a multiple of 8 up to 128, G divides H.
        chunk_size: accepted for the interface; the kernels choose their own.
        D: (H,) or (H, P).
        z: (B, L, H, P), dtype of x.
        dt_bias: (H,).
        initial_states: (B, H, P, N).
        dt_softplus: whether dt goes through softplus, after the bias.
        dt_limit: range that dt is clamped to, last.
        return_final_states: whether to return the final states too.
        segments: into how many segments time is divided; None: as fills the device.
        seq_idx, cu_seqlens: refused; the Triton variant takes several sequences in a row.

    Returns:
        out (B, L, H, P) in x's dtype, or (out, final_states (B, H, P, N) fp32).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or is beyond the kernels' sizes.
    """
    if seq_idx is not None or cu_seqlens is not None:
        raise ValueError(
            "the Hopper SSD takes one sequence a row, got seq_idx or cu_seqlens: "
            "use the Triton variant (mambench.kernels.ssd.triton_ssd)"
        )
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    options = (dt_softplus, *dt_limit, segments)
    if is_traced():
        check_arguments(*tensors, dt_limit)  # of an eager call the first of a kind does
        out, final = _traced(tensors, options)
    elif needs_gradient(tensors):
        out, final = _Ssd.apply(options, return_final_states, *tensors)
    else:  # without the cost of a graph node
        out, final, _ = _calls(tensors, (*options, return_final_states, False))
    return (out, final) if return_final_states else out


def _plan(x: Tensor, B: Tensor, options: Options, *, keep: bool = True) -> Launch:
    dt_softplus, lowest, highest, segments = options
    config = None if segments is None else Config(segments=segments)
    limit = (lowest, highest)
    return plan_hopper(x, B, dt_softplus=dt_softplus, dt_limit=limit, config=config, keep=keep)


def _run(recording: Recording, tensors: Tensors, options: Options) -> Any:
    *planned, return_final_states, keep = options
    plan = _plan(tensors[0], tensors[3], tuple(planned), keep=keep)
    return run_forward(
        recording,
        plan,
        Operands.of(tensors),
        return_final_states=return_final_states,
        keep=keep,
    )


def _ready(tensors: Tensors, options: Options) -> Tensors:
    """Check the arguments, and copy those that are not laid out as the kernels read them."""
    check_arguments(*tensors, options[1:3])
    return fetched(Operands.laid_out(*tensors)).all()


_calls = Calls(_run, _ready)


class _Ssd(torch.autograd.Function):
    """Saves the inputs and what enters each segment, as the portable backward takes them up."""

    @staticmethod
    def forward(
        ctx: Any, options: Options, return_final_states: bool, *tensors: Tensor | None
    ) -> Any:
        how = (*options, return_final_states, True)
        kept, (out, final, entries) = _calls.with_ready(tensors, how)
        ctx.options = options
        entries = None if entries is kept[8] else entries  # the initial states, of one segment
        ctx.save_for_backward(*kept, entries)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @differentiated_once
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> Any:
        *tensors, entries = ctx.saved_tensors
        found = _gradients(tuple(tensors), entries, (dout, dfinal), ctx.options)
        wanted = zip(found, ctx.needs_input_grad[2:], strict=True)
        return None, None, *(gradient if asked else None for gradient, asked in wanted)


def _traced_forward(tensors: Tensors, options: Options, keep: bool) -> Results:
    out, final, entries = _calls(tensors, (*options, True, keep))
    assert out is not None
    assert final is not None
    if entries is None or _plan(tensors[0], tensors[3], options).nsegments == 1:
        entries = final.new_empty(0)  # the initial states enter the only segment
    return out, final, entries


def _traced_shapes(tensors: Tensors, options: Options, keep: bool) -> Results:
    x, B = tensors[0], tensors[3]
    segments = 1
    if keep:  # a compiler may not know the sizes yet: the plan is made for these alone
        sized = (t.new_empty(tuple(map(int, t.shape))) for t in (x, B))
        segments = _plan(*sized, options).nsegments
    return traced_shapes(x, B, segments=segments)


def _traced_backward(
    dout: Tensor | None, dfinal: Tensor | None, kept: Tensor, tensors: Tensors, options: Options
) -> list[Tensor]:
    found = _gradients(tensors, kept if kept.numel() else None, (dout, dfinal), options)
    return [gradient for gradient in found if gradient is not None]


_gradients = Backward(_plan)
_traced = register(
    Operation(
        name="ssd_hopper",
        tensors=SSD_TENSORS[:-1],
        options=SSD_SEGMENTED,
        forward=_traced_forward,
        shapes=_traced_shapes,
        backward=_traced_backward,
    )
)
