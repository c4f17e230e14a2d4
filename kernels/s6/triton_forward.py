"""Triton kernels of the selective scan's forward; `triton_scan` launches them.

u, delta, z, out (B, D, L); A (D, N_TRUE) fp32; B, C (B, G, N_TRUE, L); D, delta_bias (D,) fp32. The
state is fp32, (N, BLOCK) of a program, N being N_TRUE rounded up to a power of two.

A program scans one segment of time of one block of channels. With a single segment that is all.
With several, `segment_end` first computes each segment's end state from a state of zero and its sum
of dt (exp(A sum dt) is the whole segment's decay), and `segment_start` combines them.
"""

import triton
import triton.language as tl

from mambench.kernels.s6.triton_parts import (
    COUNTS,
    LOG2E,
    combine,
    locate,
    pick_right,
    sigmoid,
    softplus,
    widen,
)


@triton.jit(do_not_specialize=COUNTS)
def segment_end(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    bias_ptr,
    end_ptr,  # (B, segments, D, N_TRUE) fp32
    sum_ptr,  # (B, segments, D) fp32
    L,
    D,
    G,
    SEGMENT,
    segments,
    blocks,
    stride_u_b,
    stride_u_d,
    stride_delta_b,
    stride_delta_d,
    stride_B_b,
    stride_B_g,
    stride_B_n,
    N_TRUE: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Compute the end state and the sum of dt of each segment but the last."""
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % (segments - 1)
    b = (pid // (blocks * (segments - 1))).to(tl.int64)
    group, first, end = locate(block, D, G, BLOCK)
    d = first + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    t = tl.arange(0, TILE)
    valid = d < end
    d64 = d.to(tl.int64)
    state_mask = valid[None, :] & (n < N_TRUE)[:, None]
    rate = tl.load(A_ptr + d64[None, :] * N_TRUE + n[:, None], mask=state_mask, other=0.0) * LOG2E
    bias = tl.zeros([BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=valid, other=0.0)
    u_ptrs = u_ptr + b * stride_u_b + (d64 * stride_u_d)[None, :] + t[:, None]
    delta_ptrs = delta_ptr + b * stride_delta_b + (d64 * stride_delta_d)[None, :] + t[:, None]
    B_ptrs = (
        B_ptr
        + b * stride_B_b
        + group.to(tl.int64) * stride_B_g
        + (n.to(tl.int64) * stride_B_n)[None, :]
        + t[:, None]
    )
    h = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    begin = segment * SEGMENT
    for start in range(begin, begin + SEGMENT, TILE):
        u = tl.load(u_ptrs + start, mask=valid[None, :], other=0.0).to(tl.float32)
        dt = tl.load(delta_ptrs + start, mask=valid[None, :], other=0.0).to(tl.float32)
        B = widen(tl.load(B_ptrs + start, mask=(n < N_TRUE)[None, :], other=0.0), ASSEMBLY)
        dt += bias[None, :]
        if SOFTPLUS:
            dt = softplus(dt)
        total += tl.sum(dt, 0)
        decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
        x = (dt * u)[:, None, :] * B[:, :, None]
        x = tl.where(t[:, None, None] == 0, x + decay * h[None, :, :], x)
        _, states = tl.associative_scan((decay, x), 0, combine)
        h = tl.reduce(states, 0, pick_right)
    row = (b * segments + segment) * D + d
    tl.store(end_ptr + row[None, :] * N_TRUE + n[:, None], h, mask=state_mask)
    tl.store(sum_ptr + row, total, mask=valid)


@triton.jit(do_not_specialize=["segments"])
def segment_start(
    A_ptr,
    end_ptr,  # (B, segments, D, N_TRUE) fp32
    sum_ptr,  # (B, segments, D) fp32
    start_ptr,  # (B, segments, D, N_TRUE) fp32
    D,
    segments,
    REVERSE: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    N_TRUE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Turn end states from zero into the states that segments start with.

    Forward: segment 0 is not written, it starts with zero or, if HAS_FIRST, with what start_ptr
    holds for it. Reverse: time runs backwards, and segment `segments` - 1 starts with what
    start_ptr holds for it.
    """
    size = D * N_TRUE
    state_blocks = tl.cdiv(size, BLOCK)
    b = (tl.program_id(0) // state_blocks).to(tl.int64)
    state = (tl.program_id(0) % state_blocks) * BLOCK + tl.arange(0, BLOCK)
    valid = state < size
    d = state // N_TRUE
    rate = tl.load(A_ptr + state, mask=valid, other=0.0) * LOG2E
    s = tl.arange(0, TILE)
    base = b * segments
    h = tl.zeros([BLOCK], tl.float32)
    if REVERSE:
        h = tl.load(start_ptr + (base + segments - 1) * size + state, mask=valid, other=0.0)
    elif HAS_FIRST:
        h = tl.load(start_ptr + base * size + state, mask=valid, other=0.0)
    for first in range(0, segments - 1, TILE):
        inside = (first + s < segments - 1)[:, None] & valid[None, :]
        source = first + s
        target = source + 1
        if REVERSE:
            source = segments - 1 - source
            target = source - 1
        row = base + source
        total = tl.load(sum_ptr + row[:, None] * D + d[None, :], mask=inside, other=0.0)
        x = tl.load(end_ptr + row[:, None] * size + state[None, :], mask=inside, other=0.0)
        decay = tl.exp2(total * rate[None, :])
        x = tl.where(s[:, None] == 0, x + decay * h[None, :], x)
        _, states = tl.associative_scan((decay, x), 0, combine)
        h = tl.reduce(states, 0, pick_right)
        tl.store(start_ptr + (base + target)[:, None] * size + state[None, :], states, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def scan_forward(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    start_ptr,  # (B, segments, D, N_TRUE) fp32
    out_ptr,
    last_ptr,  # (B, D, N_TRUE) fp32
    kept_ptr,  # (B, chunks, D, N_TRUE) fp32
    L,
    D,
    G,
    SEGMENT,
    segments,
    blocks,
    stride_u_b,
    stride_u_d,
    stride_delta_b,
    stride_delta_d,
    stride_z_b,
    stride_z_d,
    stride_B_b,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_g,
    stride_C_n,
    N_TRUE: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    SEGMENTED: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    KEEP: tl.constexpr,
):
    """Write out and the last state and, if KEEP, the state before every CHUNK-th step."""
    pid = tl.program_id(0)
    block = pid % blocks
    segment = (pid // blocks) % segments
    b = (pid // (blocks * segments)).to(tl.int64)
    group, first, end = locate(block, D, G, BLOCK)
    d = first + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    t = tl.arange(0, TILE)
    valid = d < end
    d64 = d.to(tl.int64)
    state_mask = valid[None, :] & (n < N_TRUE)[:, None]
    state_offset = tl.arange(0, BLOCK)[None, :] * N_TRUE + n[:, None]
    block_states = first.to(tl.int64) * N_TRUE
    size = tl.cast(D, tl.int64) * N_TRUE
    rate = tl.load(A_ptr + block_states + state_offset, mask=state_mask, other=0.0) * LOG2E
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=valid, other=0.0)
    if HAS_D:
        skip = tl.load(D_ptr + d, mask=valid, other=0.0)
    u_ptrs = u_ptr + b * stride_u_b + (d64 * stride_u_d)[None, :] + t[:, None]
    delta_ptrs = delta_ptr + b * stride_delta_b + (d64 * stride_delta_d)[None, :] + t[:, None]
    out_ptrs = out_ptr + ((b * D + d64) * L)[None, :] + t[:, None]
    if HAS_Z:
        z_ptrs = z_ptr + b * stride_z_b + (d64 * stride_z_d)[None, :] + t[:, None]
    group64 = group.to(tl.int64)
    n64 = n.to(tl.int64)
    B_ptrs = (
        B_ptr + b * stride_B_b + group64 * stride_B_g + (n64 * stride_B_n)[None, :] + t[:, None]
    )
    C_ptrs = (
        C_ptr + b * stride_C_b + group64 * stride_C_g + (n64 * stride_C_n)[None, :] + t[:, None]
    )

    h = tl.zeros([N, BLOCK], tl.float32)
    if SEGMENTED or HAS_FIRST:
        start_row = (b * segments + segment) * size + block_states
        started = state_mask
        if not HAS_FIRST:
            started = started & (segment > 0)
        h = tl.load(start_ptr + start_row + state_offset, mask=started, other=0.0)
    begin = segment * SEGMENT
    for start in range(begin, tl.minimum(begin + SEGMENT, L), TILE):
        if KEEP:  # noqa: SIM102 - decided when compiled, unlike the next
            if start % CHUNK == 0:
                kept_row = (b * tl.cdiv(L, CHUNK) + start // CHUNK) * size + block_states
                tl.store(kept_ptr + kept_row + state_offset, h, mask=state_mask)
        inside = (start + t < L)[:, None]
        mask = inside & valid[None, :]
        shared_mask = inside & (n < N_TRUE)[None, :]
        u = tl.load(u_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        dt = tl.load(delta_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        B = tl.load(B_ptrs + start, mask=shared_mask, other=0.0)
        C = tl.load(C_ptrs + start, mask=shared_mask, other=0.0)
        B = widen(B, ASSEMBLY)
        C = widen(C, ASSEMBLY)
        if HAS_BIAS:
            dt += bias[None, :]
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(inside, dt, 0.0)
        decay = tl.exp2(dt[:, None, :] * rate[None, :, :])
        x = (dt * u)[:, None, :] * B[:, :, None]
        x = tl.where(t[:, None, None] == 0, x + decay * h[None, :, :], x)
        _, states = tl.associative_scan((decay, x), 0, combine)
        h = tl.reduce(states, 0, pick_right)
        y = tl.sum(states * C[:, :, None], 1)
        if HAS_D:
            y += u * skip[None, :]
        if HAS_Z:
            z = tl.load(z_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            y *= z * sigmoid(z)
        tl.store(out_ptrs + start, y.to(out_ptr.dtype.element_ty), mask=mask)
    if segment == segments - 1:
        tl.store(last_ptr + b * size + block_states + state_offset, h, mask=state_mask)
