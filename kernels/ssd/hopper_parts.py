"""The small launches around the SSD forward on Hopper: per-chunk preparation and the prefix.

Layouts and meaning of cum and cumj: triton_parts. With PDL (programmatic dependent launch) a launch
starts while the one before ends, and waits for its results only where it reads them.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from mambench.kernels.ssd.triton_parts import LEAST_A2, LEAST_LOG2_DECAY, LOG2_E, softplus

_PREPARE_SIZES = [
    "seqlen", "nchunks", "nheads", "dt_min", "dt_max", "ngroups",
    "stride_batch", "stride_token", "stride_head",
    "stride_B_batch", "stride_B_token", "stride_B_group",
    "stride_C_batch", "stride_C_token", "stride_C_group",
]  # fmt: skip


@triton.jit
def _decay_sums(
    dt_ptr, A_ptr, bias_ptr, cum_ptr, cumj_ptr,
    seqlen, nchunks, nheads, dt_min, dt_max, stride_batch, stride_token, stride_head,
    chunk, block, b,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """One chunk of BLOCK_H heads: dt after bias, softplus and limits; sums of its log-decay."""
    h = block * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * Q + tl.arange(0, Q)
    heads = h < nheads
    mask = (t < seqlen)[:, None] & heads[None, :]
    A2 = tl.load(A_ptr + h, mask=heads, other=0.0).to(tl.float32) * LOG2_E
    A2 = tl.maximum(A2, LEAST_A2, propagate_nan=tl.PropagateNan.ALL)
    offsets = t[:, None].to(tl.int64) * stride_token + h[None, :] * stride_head
    dt = tl.load(dt_ptr + b * stride_batch + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        dt += tl.load(bias_ptr + h, mask=heads, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.maximum(dt, dt_min, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.minimum(dt, dt_max, propagate_nan=tl.PropagateNan.ALL)
    dt = tl.where(mask, dt, 0.0)
    log_decay = dt * A2[None, :]
    log_decay = tl.maximum(log_decay, LEAST_LOG2_DECAY, propagate_nan=tl.PropagateNan.ALL)
    cum = tl.cumsum(log_decay, 0)
    out = (b * nheads + h[None, :]) * nchunks * Q + t[:, None]
    tl.store(cum_ptr + out, cum, mask=heads[None, :])
    log_dt = tl.log2(tl.where(dt > 0, dt, 1.0))
    tl.store(cumj_ptr + out, tl.where(dt > 0, cum - log_dt, float("inf")), mask=heads[None, :])


@triton.jit(do_not_specialize=_PREPARE_SIZES)
def prepare_kernel(
    dt_ptr, A_ptr, bias_ptr, cum_ptr, cumj_ptr, B_ptr, C_ptr, scores_ptr,
    seqlen, nchunks, nheads, dt_min, dt_max, ngroups,
    stride_batch, stride_token, stride_head,
    stride_B_batch, stride_B_token, stride_B_group,
    stride_C_batch, stride_C_token, stride_C_group,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, SCORES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk: first the scores of one group each, if wanted, then cum and cumj of BLOCK_H heads.

    scores (B, G, chunks, Q j, Q i) = B_j . C_i for i >= j, else 0.
    Grid (chunks, G if SCORES + ceil(H / BLOCK_H), B).
    """
    if PDL:
        cuda.gdc_launch_dependents()
    chunk = tl.program_id(0)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if SCORES:
        if part < ngroups:
            q = tl.arange(0, Q)
            n = tl.arange(0, BLOCK_N)
            t = (chunk * Q + q).to(tl.int64)
            mask = (t < seqlen)[:, None] & (n < N)[None, :]
            # TMA reads the same tensors: their strides are multiples of 16 bytes.
            B_ptr += tl.multiple_of(b * stride_B_batch + part.to(tl.int64) * stride_B_group, 8)
            C_ptr += tl.multiple_of(b * stride_C_batch + part.to(tl.int64) * stride_C_group, 8)
            rows_B = tl.multiple_of(t * stride_B_token, 8)
            rows_C = tl.multiple_of(t * stride_C_token, 8)
            B = tl.load(B_ptr + rows_B[:, None] + n[None, :], mask=mask, other=0.0)
            C = tl.load(C_ptr + rows_C[:, None] + n[None, :], mask=mask, other=0.0)
            scores = tl.dot(B, tl.trans(C))
            scores = tl.where(q[:, None] <= q[None, :], scores, 0.0)
            tile = ((b * ngroups + part) * nchunks + chunk) * Q * Q
            out = scores_ptr + tile + q[:, None] * Q + q[None, :]
            tl.store(out, scores.to(scores_ptr.dtype.element_ty))
        else:
            _decay_sums(
                dt_ptr, A_ptr, bias_ptr, cum_ptr, cumj_ptr,
                seqlen, nchunks, nheads, dt_min, dt_max, stride_batch, stride_token, stride_head,
                chunk, part - ngroups, b, Q, BLOCK_H, HAS_BIAS, SOFTPLUS,
            )  # fmt: skip
    else:
        _decay_sums(
            dt_ptr, A_ptr, bias_ptr, cum_ptr, cumj_ptr,
            seqlen, nchunks, nheads, dt_min, dt_max, stride_batch, stride_token, stride_head,
            chunk, part, b, Q, BLOCK_H, HAS_BIAS, SOFTPLUS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["nsegments"])
def prefix_kernel(
    slots_ptr, decay_ptr, start_ptr, nsegments,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, HAS_START: tl.constexpr, FIRST: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Turn each segment's own contribution into what enters the segment after it, in place.

    slots (B, H, segments, P, N) fp32 or bf16, decay (B, H, segments) log2; start (B, H, P, N) or
    none enters the first segment, which has a slot if FIRST. Grid (ceil(SIZE / BLOCK), B * H).
    """
    if PDL:
        cuda.gdc_launch_dependents()
    head = tl.program_id(1).to(tl.int64)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = e < SIZE
    carry = tl.zeros([BLOCK], dtype=tl.float32)
    if HAS_START:
        carry = tl.load(start_ptr + head * SIZE + e, mask=mask, other=0.0).to(tl.float32)
    slots_ptr += head * (nsegments - 1 + FIRST) * SIZE + e
    decay_ptr += head * nsegments
    if PDL:
        cuda.gdc_wait()
    if FIRST:
        tl.store(slots_ptr, carry.to(slots_ptr.dtype.element_ty), mask=mask)
        slots_ptr += SIZE
    own = tl.load(slots_ptr, mask=mask, other=0.0)
    decay = tl.load(decay_ptr)
    for k in tl.range(0, nsegments - 1):
        # The next segment's loads are in flight while this one's store waits.
        following = tl.minimum(k + 1, nsegments - 2)
        next_own = tl.load(slots_ptr + following * SIZE, mask=mask, other=0.0)
        next_decay = tl.load(decay_ptr + following)
        carry = carry * tl.exp2(decay) + own.to(tl.float32)
        tl.store(slots_ptr + k * SIZE, carry.to(slots_ptr.dtype.element_ty), mask=mask)
        own = next_own
        decay = next_decay
