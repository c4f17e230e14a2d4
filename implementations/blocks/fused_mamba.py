"""The fused form of a Mamba block: time is contiguous from the first product to the last.

The scan takes u, delta, z and B, C with time contiguous, batch by batch. Products with the weights
from the left give that without a transposition: W x^T, for one sequence as it is, for several as a
batch of products. u alone goes through the convolution first, whose kernels take any strides: it
comes from one product over all tokens, (D, B L), and its gradient goes back to one. The gradient of
u comes from the scan and from the selection, and the convolution's backward adds them as it reads.
"""

# autograd.Function has no types.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambench.implementations.blocks.fused import INTO, as_matrix
from mambench.implementations.blocks.layers import NORM_EPS
from mambench.kernels.conv.triton_conv import conv_backward, conv_forward
from mambench.kernels.norm.triton_norm import norm_backward, norm_forward

_ADDED_UP = 4  # products that are added up one after the other


def forward(block: Any, x: Tensor) -> Tensor:
    """Run a `MambaBlock`: map x (B, L, d_model) to the same shape."""
    x, u, z = _Projection.apply(x, block.norm.weight, block.in_proj.weight)
    u, same_u = _Convolution.apply(u, block.conv.weight, block.conv.bias)
    delta, B, C = _Selection.apply(same_u, block.x_proj.weight, block.dt_proj.weight, block.widths)
    y = block.mix(u, delta, B, C, z)
    return _Output.apply(y, block.out_proj.weight, x)


def _left(weight: Tensor, columns: Tensor) -> Tensor:
    """Return W X of every X (k, L) of a batch: (B, m, L), contiguous."""
    if columns.shape[0] == 1:
        return torch.mm(weight, columns[0])[None]
    return torch.bmm(weight.expand(columns.shape[0], *weight.shape), columns)


def _summed(first: Tensor, second: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the sum over a batch of the products of (B, m, k) and (B, k, n), (m, n).

    Up to four are added up by the products themselves, more in as many sums as leave four to each,
    which are then added up: every addition rounds, and one in a product costs next to nothing.
    """
    batch = first.shape[0]
    sums = batch if batch % _ADDED_UP else batch // _ADDED_UP
    if batch <= _ADDED_UP:
        total = torch.mm(first[0], second[0], out=out)
        for index in range(1, batch):
            total.addmm_(first[index], second[index])
        return total
    parts = torch.bmm(first[:sums], second[:sums])
    for begin in range(sums, batch, sums):
        parts.baddbmm_(first[begin : begin + sums], second[begin : begin + sums])
    return torch.sum(parts, 0, out=out)


class _Projection(torch.autograd.Function):
    """W norm(x)^T in two halves, (B, D, L) each; x is handed through as in a Mamba-2 block.

    For several sequences u is strided, (L, B L, 1), and z is dense.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        normed, rstd = norm_forward(x, scale, None, NORM_EPS)
        ctx.save_for_backward(x, scale, weight, rstd)
        tokens = as_matrix(normed).T  # (d_model, B L)
        batch = x.shape[0]
        if batch == 1:
            return x, *torch.mm(weight, tokens)[None].chunk(2, 1)
        upper, lower = weight.chunk(2)
        u = torch.mm(upper, tokens).view(-1, batch, x.shape[1]).transpose(0, 1)
        return x, u, _left(lower, normed.transpose(1, 2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor, du: Tensor, dz: Tensor) -> Any:
        x, scale, weight, rstd = ctx.saved_tensors
        upper, lower = weight.chunk(2)
        du = du.transpose(0, 1).reshape(upper.shape[0], -1)  # (D, B L)
        dnormed = torch.mm(du.T, upper).view(x.shape)
        if x.shape[0] == 1:
            dnormed[0].addmm_(dz[0].T, lower)
        else:
            dnormed.baddbmm_(dz.transpose(1, 2), lower.expand(x.shape[0], *lower.shape))
        found = norm_backward(x, scale, None, rstd, dnormed, residual=residual, **INTO)
        normed = found.out
        assert normed is not None
        dweight = torch.empty_like(weight)
        dupper, dlower = dweight.chunk(2)
        torch.mm(du, as_matrix(normed), out=dupper)
        _summed(dz, normed, dlower)
        return found.dx, found.dweight, dweight


class _Convolution(torch.autograd.Function):
    """silu(conv(u)), given out twice: so the two gradients are added while they are read."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(u, weight, bias)
        out = conv_forward(u, weight.T, bias, True)
        return out.view(out.shape), out.view(out.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, more: Tensor) -> Any:
        u, weight, bias = ctx.saved_tensors
        batch, channels, seqlen = u.shape
        place = torch.empty((channels, batch, seqlen), dtype=u.dtype, device=u.device)
        place = place.transpose(0, 1)
        _, dweight, dbias = conv_backward(u, weight.T, bias, (dout,), True, more=more, dx=place)
        return place, dweight.T, dbias


class _Selection(torch.autograd.Function):
    """delta (B, D, L), B and C (B, G N, L) from u."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, x_proj: Tensor, dt_proj: Tensor, widths: tuple[int, ...]
    ) -> tuple[Tensor, ...]:
        selection = _left(x_proj, u)
        dt, B, C = selection.split(widths, 1)
        ctx.save_for_backward(u, x_proj, dt_proj, dt)
        # Small: the scan would copy them itself, again in its backward.
        return _left(dt_proj, dt), B.contiguous(), C.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ddelta: Tensor, dB: Tensor, dC: Tensor) -> Any:
        u, x_proj, dt_proj, dt = ctx.saved_tensors
        dselection = torch.cat((_left(dt_proj.T, ddelta), dB, dC), 1)
        ddt_proj = _summed(ddelta, dt.transpose(1, 2))
        dx_proj = _summed(dselection, u.transpose(1, 2))
        return _left(x_proj.T, dselection), dx_proj, ddt_proj, None


class _Output(torch.autograd.Function):
    """x + y^T W^T; y (B, D, L), x (B, L, d_model)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(y, weight)
        if x.shape[0] == 1:
            return torch.addmm(x[0], y[0].T, weight.T)[None]
        return torch.baddbmm(x, y.transpose(1, 2), weight.T.expand(x.shape[0], *weight.T.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        y, weight = ctx.saved_tensors
        columns = dout.transpose(1, 2)  # (B, d_model, L)
        return _left(weight.T, columns), _summed(columns, y.transpose(1, 2)), dout
