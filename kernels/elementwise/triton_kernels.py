"""Rotary embedding and the SiLU-gated product of an MLP in Triton, forward and backward.

    q, k: (first, second) -> (first c - second s, second c + first s),   c, s by position and place
    out = silu(gate) up;   dgate = dout up silu'(gate),   dup = dout silu(gate)

Su et al. 2021 (channel i rotated with channel i + P / 2) and Shazeer 2020 (SwiGLU). Computed in
fp32. The rotation is done in place in the projection's output and undone for the gradients by the
opposite one, so that nothing is kept for it; the backward of the product can give `out` again.
"""

import triton
import triton.language as tl

from mambench.kernels.activations import sigmoid


@triton.jit
def _angle(cos_ptr, sin_ptr, position, place, mask, HALF: tl.constexpr):
    """Load cosine and sine of a position, from tables (L, P) whose sine is signed."""
    at = position * (2 * HALF) + place
    cos = tl.load(cos_ptr + at, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at + HALF, mask=mask, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit
def rotary_forward(
    qkv_ptr, cos_ptr, sin_ptr, seqlen, pairs, HALF: tl.constexpr, BLOCK: tl.constexpr
):
    """Rotate q and k of a token in place; qkv (B L, 3, H, P), pairs = H P of q and k together."""
    token = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    head, place = pair // HALF, pair % HALF
    cos, sin = _angle(cos_ptr, sin_ptr, token % seqlen, place, mask, HALF)
    at = qkv_ptr + token * 3 * pairs + head * (2 * HALF) + place
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    element = qkv_ptr.dtype.element_ty
    tl.store(at, (first * cos - second * sin).to(element), mask=mask)
    tl.store(at + HALF, (second * cos + first * sin).to(element), mask=mask)


@triton.jit
def _unrotate(
    grad_ptr, out_ptr, batch, time, stride_batch, stride_time, stride_head, cos, sin, pair, mask,
    HALF: tl.constexpr, ROTATED: tl.constexpr,
):  # fmt: skip
    """Rotate a token's gradient back into out, or copy it; all heads."""
    head, place = pair // HALF, pair % HALF
    at = grad_ptr + batch * stride_batch + time * stride_time + head * stride_head + place
    first = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=mask, other=0.0).to(tl.float32)
    if ROTATED:
        first, second = first * cos + second * sin, second * cos - first * sin
    at = out_ptr + head * (2 * HALF) + place
    tl.store(at, first.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(at + HALF, second.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rotary_backward(
    dq_ptr, dk_ptr, dv_ptr, cos_ptr, sin_ptr, dqkv_ptr, seqlen, pairs,
    stride_q_batch, stride_q_time, stride_q_head, stride_k_batch, stride_k_time, stride_k_head,
    stride_v_batch, stride_v_time, stride_v_head, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write a token's gradient of qkv, (3, H, P), from those of q, k and v; pairs = H P / 2."""
    token = tl.program_id(0).to(tl.int64)
    batch, time = token // seqlen, token % seqlen
    pair = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = pair < pairs
    cos, sin = _angle(cos_ptr, sin_ptr, time, pair % HALF, mask, HALF)
    out = dqkv_ptr + token * 6 * pairs
    _unrotate(
        dq_ptr, out, batch, time, stride_q_batch, stride_q_time, stride_q_head,
        cos, sin, pair, mask, HALF, True,
    )  # fmt: skip
    _unrotate(
        dk_ptr, out + 2 * pairs, batch, time, stride_k_batch, stride_k_time, stride_k_head,
        cos, sin, pair, mask, HALF, True,
    )  # fmt: skip
    _unrotate(
        dv_ptr, out + 4 * pairs, batch, time, stride_v_batch, stride_v_time, stride_v_head,
        cos, sin, pair, mask, HALF, False,
    )  # fmt: skip


@triton.jit
def gated_forward(gate_up_ptr, out_ptr, width, ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr):
    """Multiply one row's silu(gate) and up; gate_up (rows, 2 width), out (rows, width)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = gate_up_ptr + row * 2 * width + column
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(at + width, mask=mask, other=0.0).to(tl.float32)
    out = gate * sigmoid(gate, ASSEMBLY) * up
    tl.store(out_ptr + row * width + column, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gated_backward(
    gate_up_ptr, dout_ptr, dgate_up_ptr, width,
    ASSEMBLY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Go back through one row, and put the product again where dout was; all contiguous."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    at = row * 2 * width + column
    gate = tl.load(gate_up_ptr + at, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + at + width, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + row * width + column, mask=mask, other=0.0).to(tl.float32)
    share = sigmoid(gate, ASSEMBLY)
    silu = gate * share
    element = dgate_up_ptr.dtype.element_ty
    dgate = dout * up * (share + silu * (1.0 - share))
    tl.store(dgate_up_ptr + at, dgate.to(element), mask=mask)
    tl.store(dgate_up_ptr + at + width, (dout * silu).to(element), mask=mask)
    tl.store(dout_ptr + row * width + column, (silu * up).to(element), mask=mask)
