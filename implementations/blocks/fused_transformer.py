"""The fused form of a transformer layer: rotation in place, and the MLP as one function.

q, k and v stay where the projection put them; the rotation's backward puts their gradients side by
side again as it reads them. The MLP keeps its input and the projection's output.
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
from mambench.kernels.elementwise.triton_elementwise import (
    gated_product,
    gated_product_backward,
    rotate_,
    rotate_back,
)
from mambench.kernels.norm.triton_norm import norm_backward, norm_forward


def forward(block: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Run a `TransformerBlock`: map x (B, L, d_model) to the same shape."""
    weights = (block.attention_norm.weight, block.qkv.weight)
    x, q, k, v = _Projection.apply(x, *weights, cos, sin, block.heads)
    attended = as_matrix(block.mixer(q, k, v).flatten(-2))
    x = torch.addmm(as_matrix(x), attended, block.out.weight.T).view(x.shape)
    return _Mlp.apply(x, block.mlp_norm.weight, block.gate_up.weight, block.down.weight)


class _Projection(torch.autograd.Function):
    """q, k, v (B, L, H, P) of norm(x), rotated; x is handed through as in a Mamba-2 block."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, cos: Tensor, sin: Tensor,
        heads: tuple[int, int],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        normed, rstd = norm_forward(x, scale, None, NORM_EPS)
        ctx.save_for_backward(x, scale, weight, rstd, cos, sin)
        qkv = torch.mm(as_matrix(normed), weight.T).view(*x.shape[:2], 3, *heads)
        rotate_(qkv, cos, sin)
        return x, *qkv.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, residual: Tensor, dq: Tensor, dk: Tensor, dv: Tensor) -> Any:
        x, scale, weight, rstd, cos, sin = ctx.saved_tensors
        dqkv = rotate_back(dq, dk, dv, cos, sin).view(-1, weight.shape[0])
        dnormed = torch.mm(dqkv, weight).view(x.shape)
        found = norm_backward(x, scale, None, rstd, dnormed, residual=residual, **INTO)
        assert found.out is not None
        dweight = torch.mm(dqkv.T, as_matrix(found.out))
        return found.dx, found.dweight, dweight, None, None, None


class _Mlp(torch.autograd.Function):
    """x + (silu(gate) up) W_down^T, gate and up from norm(x)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        normed, rstd = norm_forward(x, scale, None, NORM_EPS)
        both = torch.mm(as_matrix(normed), gate_up.T)
        del normed
        ctx.save_for_backward(x, scale, gate_up, down, rstd, both)
        return torch.addmm(as_matrix(x), gated_product(both), down.T).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> Any:
        x, scale, gate_up, down, rstd, both = ctx.saved_tensors
        rows = as_matrix(dout)
        dboth, product = gated_product_backward(both, torch.mm(rows, down))
        ddown = torch.mm(rows.T, product)
        del product
        dnormed = torch.mm(dboth, gate_up).view(x.shape)
        found = norm_backward(x, scale, None, rstd, dnormed, residual=dout, **INTO)
        assert found.out is not None
        dgate_up = torch.mm(dboth.T, as_matrix(found.out))
        return found.dx, found.dweight, dgate_up, ddown
