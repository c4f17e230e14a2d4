"""RMS normalisation in Triton, gated by SiLU or not: forward, and backward without atomics.

    g = x silu(z), or x;    rstd = (mean(g^2) + eps)^(-1/2);    out = g rstd weight
    dn = dout weight;       dg = rstd (dn - n mean(dn n)),  n = g rstd;    dweight = sum dout n
    dx = dg silu(z) + residual;    dz = dg x silu'(z)

over the last axis (Zhang and Sennrich 2019; the gate before the norm as in Mamba-2, Dao and Gu
2024, figure 6). Rows may be strided; everything is computed in fp32. A program holds whole rows in
registers, so that every value is read once. Kept for the backward is rstd; `residual` is a gradient
that reaches x on another way, and the backward can give `out` again, which a weight's gradient
after the norm needs: both save a pass over memory.
"""

import triton
import triton.language as tl

from mambench.kernels.activations import sigmoid
from mambench.kernels.rounding import rounded_product


@triton.jit
def rms_norm_forward(
    x_ptr, z_ptr, weight_ptr, out_ptr, rstd_ptr,
    rows, width, stride_x, stride_z, stride_out, eps,
    GATED: tl.constexpr, ASSEMBLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Normalise ROWS rows of `width` values; BLOCK is the width's next power of two."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * stride_x + column[None, :]
    g = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        at = row[:, None] * stride_z + column[None, :]
        z = tl.load(z_ptr + at, mask=mask, other=0.0).to(tl.float32)
        g *= z * sigmoid(z, ASSEMBLY)
    weight = tl.load(weight_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(rounded_product(g, g), 1) / width + eps)
    out = g * rstd[:, None] * weight[None, :]
    at = row[:, None] * stride_out + column[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit
def rms_norm_backward(
    x_ptr, z_ptr, weight_ptr, rstd_ptr, dout_ptr, residual_ptr,
    dx_ptr, dz_ptr, out_ptr, partial_ptr,
    rows, width, stride_x, stride_z, stride_dout, stride_residual, stride_dx, stride_dz,
    stride_out,
    GATED: tl.constexpr, ASSEMBLY: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    GIVE_OUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back through every n-th ROWS rows, n being the number of programs.

    partial (programs, width) fp32 gets the program's part of the weight's gradient.
    """
    column = tl.arange(0, BLOCK)
    inside = column < width
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
        row = row.to(tl.int64)[:, None]
        x = tl.load(x_ptr + row * stride_x + column[None, :], mask=mask, other=0.0)
        dout = tl.load(dout_ptr + row * stride_dout + column[None, :], mask=mask, other=0.0)
        x, dout = x.to(tl.float32), dout.to(tl.float32)
        n = x
        if GATED:
            z = tl.load(z_ptr + row * stride_z + column[None, :], mask=mask, other=0.0)
            z = z.to(tl.float32)
            gate = sigmoid(z, ASSEMBLY)
            silu = z * gate
            n *= silu
        n *= rstd  # in the order of the forward: `out` has its bits
        dn = dout * weight
        dweight += dout * n
        dg = rstd * (dn - n * (tl.sum(rounded_product(dn, n), 1) / width)[:, None])
        dx = dg
        if GATED:
            dz = dg * x * (gate + silu * (1.0 - gate))
            at = dz_ptr + row * stride_dz + column[None, :]
            tl.store(at, dz.to(dz_ptr.dtype.element_ty), mask=mask)
            dx *= silu
        if HAS_RESIDUAL:
            at = residual_ptr + row * stride_residual + column[None, :]
            dx += tl.load(at, mask=mask, other=0.0).to(tl.float32)
        at = dx_ptr + row * stride_dx + column[None, :]
        tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if GIVE_OUT:
            at = out_ptr + row * stride_out + column[None, :]
            tl.store(at, (n * weight).to(out_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + tl.program_id(0).to(tl.int64) * width + column
    tl.store(at, tl.sum(dweight, 0), mask=inside)


@triton.jit
def rms_norm_sum_partials(
    partial_ptr, dweight_ptr, parts, width, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr
):
    """Add up the partial sums (parts, width) of the weight's gradient in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK], tl.float32)
    at = partial_ptr + part.to(tl.int64)[:, None] * width + column[None, :]
    for first in range(0, parts, BLOCK_P):
        mask = (first + part < parts)[:, None] & (column < width)[None, :]
        total += tl.load(at, mask=mask, other=0.0)
        at += BLOCK_P * width
    summed = tl.sum(total, 0).to(dweight_ptr.dtype.element_ty)
    tl.store(dweight_ptr + column, summed, mask=column < width)
