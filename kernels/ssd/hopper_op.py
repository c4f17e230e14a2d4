"""State-space duality on Hopper as a public operation: forward in Gluon, backward in Triton."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.kernels.ssd.arguments import check_arguments
from mambench.kernels.ssd.hopper_ssd import DEFAULT, Config, plan_hopper, run_forward
from mambench.kernels.ssd.triton_launch import Launch, Operands


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the SSD operation, differentiable in every tensor argument.

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

    Returns:
        out (B, L, H, P) in x's dtype, or (out, final_states (B, H, P, N) fp32).

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, or is beyond the kernels' sizes.
    """
    check_arguments(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_limit)
    config = DEFAULT if segments is None else Config(segments=segments)
    plan = plan_hopper(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, config=config)
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_states)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, final = _Ssd.apply(plan, return_final_states, *tensors)
    else:  # without the cost of a graph node
        operands = Operands.laid_out(*tensors)
        out, final, _ = run_forward(plan, operands, return_final_states=return_final_states)
    return (out, final) if return_final_states else out


class _Ssd(torch.autograd.Function):
    """Saves the inputs and what enters each segment, as the portable backward takes them up."""

    @staticmethod
    def forward(ctx: Any, plan: Launch, return_final_states: bool, *tensors: Tensor | None) -> Any:
        operands = Operands.laid_out(*tensors)
        out, final, entries = run_forward(plan, operands, return_final_states=return_final_states)
        ctx.plan = plan
        ctx.save_for_backward(*operands.all(), entries)
        ctx.set_materialize_grads(False)
        return out, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dfinal: Tensor | None) -> Any:
        from mambench.kernels.ssd.triton_ssd_backward import run_backward

        *tensors, entries = ctx.saved_tensors
        names = Operands.__dataclass_fields__
        operands = Operands(**dict(zip(names, tensors, strict=True)))
        wanted = dict(zip(names, ctx.needs_input_grad[2:], strict=True))
        gradients = run_backward(ctx.plan, operands, entries, dout, dfinal)
        return None, None, *(gradients.get(name) if wanted[name] else None for name in names)
