"""Selective scan (S6) on Hopper as a public operation: Gluon kernels, or a Triton backward."""

from typing import Any

import torch
from torch import Tensor

from mambench.kernels.s6 import hopper_backward
from mambench.kernels.s6.arguments import check_arguments
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
) -> Tensor | tuple[Tensor, Tensor]:
    """Return the selective scan of u, differentiable in every tensor argument.

    Args:
        u, delta, z: (B, D, L), all fp32, fp16 or bf16; copied where they are not contiguous.
        A: (D, N) fp32, at most 256 states.
        B, C: (B, G, N, L) or (B, N, L), u's dtype; a group serves D / G consecutive channels.
        D, delta_bias: (D,) fp32.
        delta_softplus: apply softplus to delta + delta_bias.
        return_last_state: also return the state after the last step.

    Returns:
        out (B, D, L) in u's dtype, or (out, last state (B, D, N) fp32).

    Raises:
        ValueError, TypeError: see `check_arguments`; u is of none of the dtypes above.
    """
    B = B.unsqueeze(1) if B.dim() == 3 else B
    C = C.unsqueeze(1) if C.dim() == 3 else C
    check_arguments(u, delta, A, B, C, D, z, delta_bias)
    if (reason := supported(d_state=A.shape[1], dtype=u.dtype)) is not None:
        raise TypeError(reason)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out, last = _SelectiveScan.apply(*tensors, delta_softplus)
    else:  # without the cost of a graph node, and without states for a backward
        with torch.cuda.device_of(u):
            out, last, _ = scan_forward(*tensors, delta_softplus)
    return (out, last) if return_last_state else out


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        config = hopper_backward.configuration(u, A.shape[1])
        every = chunk_size(A.shape[1]) if config is None else config.chunk
        with torch.cuda.device_of(u):
            out, last, kept = scan_forward(*tensors, delta_softplus, checkpoint_every=every)
        ctx.backward_config = config
        ctx.save_for_backward(*tensors, kept)
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(False)
        return out, last

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        inputs = Inputs(*tensors, ctx.delta_softplus)
        if dout is None:
            dout = torch.zeros_like(inputs.u)
        elif dout.stride(-1) != 1:
            dout = dout.contiguous()
        config = ctx.backward_config
        if config is None:
            return (*scan_backward(inputs, kept, dout, dlast)[:8], None)
        return (*hopper_backward.scan_backward(inputs, kept, dout, dlast, config=config), None)
