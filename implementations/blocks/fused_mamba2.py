"""The fused form of a Mamba-2 block: every tensor over tokens is read and written in place.

in_proj's output holds z, xBC and dt side by side, and so does its gradient: the backwards of the
gated norm and of the convolution write their columns of it. x, B and C lie side by side too, and
the convolution's backward reads their gradients from where the mixer left them.
"""

# autograd.Function has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.implementations.blocks.fused import INTO, JointGradient, as_matrix
from mambench.implementations.blocks.layers import NORM_EPS
from mambench.kernels.conv.triton_conv import conv_backward, conv_forward
from mambench.kernels.norm.triton_norm import norm_backward, norm_forward


def forward(block: Any, x: Tensor) -> Tensor:
    """Run a `Mamba2Block`: map x (B, L, d_model) to the same shape."""
    joint = JointGradient(block.widths)
    weights = (block.norm.weight, block.in_proj.weight)
    x, z, mixed, dt = _Projection.apply(x, *weights, block.widths, joint)
    conv = block.conv
    inner, B, C = _Convolution.apply(mixed, conv.weight, conv.bias, block.conv_widths, joint)
    y = block.mix(inner, dt, B, C)
    return _GatedOutput.apply(
        y.flatten(-2), z, block.gated_norm.weight, block.out_proj.weight, x, joint
    )


class _Projection(torch.autograd.Function):
    """norm(x) W^T in columns; x is handed through, so that its gradients meet in the norm's."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, widths: Any, joint: JointGradient
    ) -> tuple[Tensor, ...]:
        normed, rstd = norm_forward(x, scale, None, NORM_EPS)
        ctx.save_for_backward(x, scale, weight, rstd)
        ctx.joint = joint
        ctx.set_materialize_grads(False)
        out = torch.mm(as_matrix(normed), weight.T).view(*x.shape[:-1], -1)
        return x, *out.split(widths, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor | None, *given: Tensor | None) -> Any:
        x, scale, weight, rstd = ctx.saved_tensors
        dout = as_matrix(ctx.joint.joined(given, x))
        dnormed = torch.mm(dout, weight).view(x.shape)
        found = norm_backward(x, scale, None, rstd, dnormed, residual=residual, **INTO)
        assert found.out is not None
        dweight = torch.mm(dout.T, as_matrix(found.out))
        return found.dx, found.dweight, dweight, None, None


class _Convolution(torch.autograd.Function):
    """silu(conv(xBC)) in columns."""

    @staticmethod
    def forward(
        ctx: Any, mixed: Tensor, weight: Tensor, bias: Tensor, widths: Any, joint: JointGradient
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(mixed, weight, bias)
        ctx.widths, ctx.joint = widths, joint
        ctx.set_materialize_grads(False)
        out = conv_forward(mixed.transpose(1, 2), weight.T, bias, True)
        return out.transpose(1, 2).split(widths, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *given: Tensor | None) -> Any:
        mixed, weight, bias = ctx.saved_tensors
        ranges = tuple(
            (mixed.new_zeros(*mixed.shape[:2], width) if g is None else g).transpose(1, 2)
            for g, width in zip(given, ctx.widths, strict=True)
        )
        place = ctx.joint.columns(1, mixed)
        _, dweight, dbias = conv_backward(
            mixed.transpose(1, 2), weight.T, bias, ranges, True, dx=place.transpose(1, 2)
        )
        return place, dweight.T, dbias, None, None


class _GatedOutput(torch.autograd.Function):
    """x + norm(y silu(z)) W^T."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, z: Tensor, scale: Tensor, weight: Tensor, x: Tensor,
        joint: JointGradient,
    ) -> Tensor:  # fmt: skip
        normed, rstd = norm_forward(y, scale, z, NORM_EPS)
        ctx.save_for_backward(y, z, scale, weight, rstd)
        ctx.joint = joint
        return torch.addmm(as_matrix(x), as_matrix(normed), weight.T).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        y, z, scale, weight, rstd = ctx.saved_tensors
        rows = as_matrix(dout)
        dnormed = torch.mm(rows, weight).view(y.shape)
        place = ctx.joint.columns(0, z)
        found = norm_backward(y, scale, z, rstd, dnormed, dz=place, **INTO)
        assert found.out is not None
        dweight = torch.mm(rows.T, as_matrix(found.out))
        return found.dx, place, found.dweight, dweight, dout, None
