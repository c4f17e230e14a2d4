"""Triton kernels of the selective scan's backward; `triton_scan` launches them.

With dh_t the gradient of the state after step t and r_t = decay_t dh_t what step t - 1 gets of it:

    dh_t = C_t dy_t + r_{t+1}              dx_t = sum_n B_t dh_t           (x = dt u)
    q_t  = r_t h_{t-1}, the gradient of dt_t A                            dA = sum_t q_t dt_t
    dB_t = sum_d dh_t x_t                  dC_t = sum_d dy_t h_t
    ddt_t = sum_n q_t A + u_t dx_t         du_t = dt_t dx_t + D dy_t

A program walks one segment of time of some blocks of channels from its end to its beginning, chunk
by chunk. Within a chunk it first computes what needs no state (dt, its derivative, dy), then
replays the forward from the state that was kept and notes the state before every tile, all in a
scratch buffer of its own, small enough for the second-level cache. (Computed with the rest, the
softplus would be repeated in every lane that needs dt.) Then it takes the tiles in reverse, with
states and their gradients in registers. dB and dC are summed over a program's channels, block after
block in a fixed order, and over programs by `sum_partials`.

A thread must hold several states and several channels: sums over states and sums over channels then
both begin in registers. So tensors are (TILE, OUTER, N, INNER), the channels of a block being OUTER
times INNER: INNER of them and 32 / INNER states lie across a warp's lanes, the rest in registers.
"""

import triton
import triton.language as tl

from mambench.kernels.rounding import rounded_product
from mambench.kernels.s6.triton_parts import (
    COUNTS,
    LN2,
    LOG2E,
    combine,
    combine_keeping_input,
    locate,
    pick_right,
    sigmoid,
    softplus,
    widen,
)


@triton.jit(do_not_specialize=COUNTS)
def segment_adjoint(
    delta_ptr,
    A_ptr,
    C_ptr,
    z_ptr,
    bias_ptr,
    dout_ptr,
    end_ptr,  # (B, segments, D, N_TRUE) fp32
    sum_ptr,  # (B, segments, D) fp32
    L,
    D,
    G,
    SEGMENT,
    segments,
    blocks,
    stride_delta_b,
    stride_delta_d,
    stride_z_b,
    stride_z_d,
    stride_dout_b,
    stride_dout_d,
    stride_C_b,
    stride_C_g,
    stride_C_n,
    N_TRUE: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Compute r at each segment's beginning, from zero at its end, and the segment's sum of dt.

    r = sum_t exp(A (dt_1 + ... + dt_t)) C_t dy_t, so that time can run forwards. Not for segment 0.
    """
    pid = tl.program_id(0)
    block = pid % blocks
    segment = 1 + (pid // blocks) % (segments - 1)
    b = (pid // (blocks * (segments - 1))).to(tl.int64)
    group, first, end = locate(block, D, G, BLOCK)
    d = first + tl.arange(0, BLOCK)
    n = tl.arange(0, N)
    t = tl.arange(0, TILE)
    valid = d < end
    d64 = d.to(tl.int64)
    state_mask = valid[None, :] & (n < N_TRUE)[:, None]
    rate = tl.load(A_ptr + d64[None, :] * N_TRUE + n[:, None], mask=state_mask, other=0.0) * LOG2E
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=valid, other=0.0)
    delta_ptrs = delta_ptr + b * stride_delta_b + (d64 * stride_delta_d)[None, :] + t[:, None]
    dout_ptrs = dout_ptr + b * stride_dout_b + (d64 * stride_dout_d)[None, :] + t[:, None]
    if HAS_Z:
        z_ptrs = z_ptr + b * stride_z_b + (d64 * stride_z_d)[None, :] + t[:, None]
    C_ptrs = (
        C_ptr
        + b * stride_C_b
        + group.to(tl.int64) * stride_C_g
        + (n.to(tl.int64) * stride_C_n)[None, :]
        + t[:, None]
    )
    r = tl.zeros([N, BLOCK], tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    begin = segment * SEGMENT
    for start in range(begin, tl.minimum(begin + SEGMENT, L), TILE):
        inside = (start + t < L)[:, None]
        mask = inside & valid[None, :]
        dt = tl.load(delta_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dout_ptrs + start, mask=mask, other=0.0).to(tl.float32)
        C = tl.load(C_ptrs + start, mask=inside & (n < N_TRUE)[None, :], other=0.0)
        C = widen(C, ASSEMBLY)
        if HAS_Z:
            z = tl.load(z_ptrs + start, mask=mask, other=0.0).to(tl.float32)
            dy *= z * sigmoid(z)
        if HAS_BIAS:
            dt += bias[None, :]
        if SOFTPLUS:
            dt = softplus(dt)
        dt = tl.where(inside, dt, 0.0)
        elapsed = total[None, :] + tl.cumsum(dt, 0)
        total += tl.sum(dt, 0)
        decay = tl.exp2(elapsed[:, None, :] * rate[None, :, :])
        r += tl.sum(decay * (dy[:, None, :] * C[:, :, None]), 0)
    row = (b * segments + segment) * D + d
    tl.store(end_ptr + row[None, :] * N_TRUE + n[:, None], r, mask=state_mask)
    tl.store(sum_ptr + row, total, mask=valid)


@triton.jit
def prepare(
    delta_ptr,
    bias_ptr,
    dout_ptr,
    z_ptr,
    scratch_ptrs,  # (AHEAD, BLOCK): dt of the chunk's first steps; then its derivative, then dy
    d,
    valid,
    first,
    L,
    stride_delta_d,
    stride_dout_d,
    stride_z_d,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):
    """Write a chunk's dt, ddt / ddelta and dy, zero beyond the sequence, AHEAD steps at a time."""
    d64 = d.to(tl.int64)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + d, mask=valid, other=0.0)
    for step in range(0, CHUNK, AHEAD):
        t = first + step + tl.arange(0, AHEAD)
        mask = (t < L)[:, None] & valid[None, :]
        dt = tl.load(delta_ptr + (d64 * stride_delta_d)[None, :] + t[:, None], mask=mask, other=0.0)
        dy = tl.load(dout_ptr + (d64 * stride_dout_d)[None, :] + t[:, None], mask=mask, other=0.0)
        dt = dt.to(tl.float32)
        dy = dy.to(tl.float32)
        if HAS_BIAS:
            dt += bias[None, :]
        if SOFTPLUS:
            tl.store(scratch_ptrs + BLOCK * CHUNK + step, sigmoid(dt))
            dt = softplus(dt)
        if HAS_Z:
            z = tl.load(z_ptr + (d64 * stride_z_d)[None, :] + t[:, None], mask=mask, other=0.0)
            z = z.to(tl.float32)
            dy *= z * sigmoid(z)
        tl.store(scratch_ptrs + step, tl.where(mask, dt, 0.0))
        tl.store(scratch_ptrs + 2 * BLOCK * CHUNK + step, dy)


@triton.jit(do_not_specialize=["batch", *COUNTS, "partials"])
def scan_backward(
    u_ptr,
    delta_ptr,
    A_ptr,
    B_ptr,
    C_ptr,
    D_ptr,
    z_ptr,
    bias_ptr,
    dout_ptr,
    kept_ptr,  # (B, chunks, D, N_TRUE) fp32, from the forward
    start_ptr,  # (B, segments, D, N_TRUE) fp32: r at the segments' ends
    scratch_ptr,  # (programs, BLOCK * (N * CHUNK / TILE + 3 * CHUNK)) fp32
    du_ptr,
    ddelta_ptr,
    dz_ptr,
    dA_ptr,  # (B, segments, D, N_TRUE) fp32
    dD_ptr,  # (B, segments, D) fp32
    dbias_ptr,  # (B, segments, D) fp32
    dBC_ptr,  # (partials, 2, B, G, N_TRUE, L) fp32
    dfirst_ptr,  # (B, D, N_TRUE) fp32: of the state before the first step
    batch,
    L,
    D,
    G,
    SEGMENT,
    segments,
    blocks,
    partials,
    stride_u_b,
    stride_u_d,
    stride_delta_b,
    stride_delta_d,
    stride_z_b,
    stride_z_d,
    stride_dout_b,
    stride_dout_d,
    stride_B_b,
    stride_B_g,
    stride_B_n,
    stride_C_b,
    stride_C_g,
    stride_C_n,
    N_TRUE: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    OUTER: tl.constexpr,
    INNER: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    HAS_START: tl.constexpr,
    HAS_FIRST: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """Write all gradients: the parameters' per batch and segment, those of B and C per partial."""
    BLOCK: tl.constexpr = OUTER * INNER
    pid = tl.program_id(0)
    partial = pid % partials
    group = (pid // partials) % G
    segment = (pid // (partials * G)) % segments
    b = (pid // (partials * G * segments)).to(tl.int64)
    group_blocks = blocks // G
    group64 = group.to(tl.int64)
    size = tl.cast(D, tl.int64) * N_TRUE
    chunks = tl.cdiv(L, CHUNK)

    channel = tl.arange(0, OUTER)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    n = tl.arange(0, N)
    state_offset = channel[:, None, :] * N_TRUE + n[None, :, None]
    n64 = n.to(tl.int64)
    t = tl.arange(0, TILE)
    t3 = t[:, None, None]
    SCRATCH: tl.constexpr = BLOCK * (N * (CHUNK // TILE) + 3 * CHUNK)
    own_ptr = scratch_ptr + pid.to(tl.int64) * SCRATCH
    scratch_ptrs = own_ptr + channel[:, None, :] * N + n[None, :, None]
    dt_ptr = own_ptr + BLOCK * N * (CHUNK // TILE)
    dt_ptrs = dt_ptr + (channel * CHUNK)[None, :, :] + t3
    flat = tl.arange(0, BLOCK)
    ahead = tl.arange(0, AHEAD)
    B_ptrs = (
        B_ptr + b * stride_B_b + group64 * stride_B_g + (n64 * stride_B_n)[None, :] + t[:, None]
    )
    C_ptrs = (
        C_ptr + b * stride_C_b + group64 * stride_C_g + (n64 * stride_C_n)[None, :] + t[:, None]
    )
    shared_rows = ((b * G + group64) * N_TRUE + n64) * L
    shared_size = tl.cast(batch, tl.int64) * G * N_TRUE * L
    dB_ptrs = dBC_ptr + partial.to(tl.int64) * (2 * shared_size) + shared_rows[None, :] + t[:, None]
    first_step = segment * SEGMENT
    last_step = tl.minimum(first_step + SEGMENT, L)

    for block in range(partial, group_blocks, partials):
        d = group * (D // G) + block * BLOCK + channel
        valid = d < (group + 1) * (D // G)
        d64 = d.to(tl.int64)
        state_mask = valid[:, None, :] & (n < N_TRUE)[None, :, None]
        first = group * (D // G) + block * BLOCK
        block_states = first.to(tl.int64) * N_TRUE
        segment_row = b * segments + segment
        rate = tl.load(A_ptr + block_states + state_offset, mask=state_mask, other=0.0) * LOG2E
        if HAS_D:
            skip = tl.load(D_ptr + d, mask=valid, other=0.0)
        r = tl.zeros([OUTER, N, INNER], tl.float32)
        if HAS_START:
            r = tl.load(
                start_ptr + segment_row * size + block_states + state_offset,
                mask=state_mask,
                other=0.0,
            )
        dA = tl.zeros([OUTER, N, INNER], tl.float32)
        dD = tl.zeros([OUTER, INNER], tl.float32)
        dbias = tl.zeros([OUTER, INNER], tl.float32)
        u_ptrs = u_ptr + b * stride_u_b + (d64 * stride_u_d)[None, :, :] + t3
        d_flat = group * (D // G) + block * BLOCK + flat
        valid_flat = d_flat < (group + 1) * (D // G)
        if HAS_Z:
            dout_ptrs = dout_ptr + b * stride_dout_b + (d64 * stride_dout_d)[None, :, :] + t3
            z_ptrs = z_ptr + b * stride_z_b + (d64 * stride_z_d)[None, :, :] + t3
        write_offset = ((b * D + d64) * L)[None, :, :] + t3

        for back in range(0, tl.cdiv(last_step - first_step, CHUNK)):
            chunk = (last_step - 1) // CHUNK - back
            chunk_first = chunk * CHUNK
            tiles = tl.cdiv(tl.minimum(chunk_first + CHUNK, L) - chunk_first, TILE)
            prepare(
                delta_ptr + b * stride_delta_b,
                bias_ptr,
                dout_ptr + b * stride_dout_b,
                z_ptr + b * stride_z_b if HAS_Z else None,
                dt_ptr + (flat * CHUNK)[None, :] + ahead[:, None],
                d_flat,
                valid_flat,
                chunk_first,
                L,
                stride_delta_d,
                stride_dout_d,
                stride_z_d,
                CHUNK,
                AHEAD,
                BLOCK,
                HAS_Z,
                HAS_BIAS,
                SOFTPLUS,
            )
            tl.debug_barrier()  # the lanes that read are not those that wrote
            kept_row = (b * chunks + chunk) * size + block_states
            h = tl.load(kept_ptr + kept_row + state_offset, mask=state_mask, other=0.0)
            tl.store(scratch_ptrs, h)
            for tile in range(0, tiles - 1):
                start = chunk_first + tile * TILE
                shared_mask = (n < N_TRUE)[None, :]
                u = tl.load(u_ptrs + start, mask=valid[None, :, :], other=0.0).to(tl.float32)
                dt = tl.load(dt_ptrs + tile * TILE)
                B = widen(tl.load(B_ptrs + start, mask=shared_mask, other=0.0), ASSEMBLY)
                decay = tl.exp2(dt[:, :, None, :] * rate[None, :, :, :])
                x = (dt * u)[:, :, None, :] * B[:, None, :, None]
                x = tl.where(t3[:, :, :, None] == 0, x + decay * h[None, :, :, :], x)
                _, states = tl.associative_scan((decay, x), 0, combine)
                h = tl.reduce(states, 0, pick_right)
                tl.store(scratch_ptrs + (tile + 1) * (BLOCK * N), h)
            tl.debug_barrier()

            for tile_back in range(0, tiles):
                tile = tiles - 1 - tile_back
                start = chunk_first + tile * TILE
                inside = start + t < L
                mask = inside[:, None, None] & valid[None, :, :]
                shared_mask = inside[:, None] & (n < N_TRUE)[None, :]
                u = tl.load(u_ptrs + start, mask=mask, other=0.0).to(tl.float32)
                dt = tl.load(dt_ptrs + tile * TILE)
                dy = tl.load(dt_ptrs + 2 * BLOCK * CHUNK + tile * TILE)
                B = widen(tl.load(B_ptrs + start, mask=shared_mask, other=0.0), ASSEMBLY)
                C = widen(tl.load(C_ptrs + start, mask=shared_mask, other=0.0), ASSEMBLY)
                h = tl.load(scratch_ptrs + tile * (BLOCK * N))
                x = dt * u

                # forward again: the states after (h) and before (h_before) every step of the tile
                decay = tl.exp2(dt[:, :, None, :] * rate[None, :, :, :])
                opening = t3[:, :, :, None] == 0
                inputs = x[:, :, None, :] * B[:, None, :, None]
                inputs = tl.where(opening, inputs + decay * h[None, :, :, :], inputs)
                carried = tl.where(opening, h[None, :, :, :], -0.0)
                one = tl.full([TILE, OUTER, N, INNER], 1.0, tl.float32)
                _, states, _, before = tl.associative_scan(
                    (decay, inputs, one, carried), 0, combine_keeping_input
                )
                if HAS_Z:
                    y = tl.sum(states * C[:, None, :, None], 2)
                dC = tl.sum(tl.sum(states * dy[:, :, None, :], 1), 2)

                # and back: dh is what comes in, passed is what goes on to the step before
                decay_back = tl.flip(decay, 0)
                dh_own = tl.flip(dy[:, :, None, :] * C[:, None, :, None], 0)
                dh_own = tl.where(opening, dh_own + r[None, :, :, :], dh_own)
                _, passed, _, dh = tl.associative_scan(
                    (decay_back, decay_back * dh_own, one, dh_own), 0, combine_keeping_input
                )
                r = tl.reduce(passed, 0, pick_right)
                dh = tl.flip(dh, 0)
                q = tl.flip(passed, 0) * before
                dx = tl.sum(dh * B[:, None, :, None], 2)
                dlog = tl.sum(q * rate[None, :, :, :], 2)
                dA += tl.sum(q * dt[:, :, None, :], 0)
                dB = tl.sum(tl.sum(dh * x[:, :, None, :], 1), 2)

                ddelta = dlog * LN2 + u * dx
                if SOFTPLUS:
                    ddelta *= tl.load(dt_ptrs + BLOCK * CHUNK + tile * TILE)
                du = dt * dx
                if HAS_D:
                    du += skip[None, :, :] * dy
                    dD += tl.sum(rounded_product(dy, u), 0)
                if HAS_BIAS:
                    dbias += tl.sum(tl.where(mask, ddelta, 0.0), 0)
                element = du_ptr.dtype.element_ty
                tl.store(du_ptr + write_offset + start, du.to(element), mask=mask)
                tl.store(ddelta_ptr + write_offset + start, ddelta.to(element), mask=mask)
                if HAS_Z:
                    dout = tl.load(dout_ptrs + start, mask=mask, other=0.0).to(tl.float32)
                    z = tl.load(z_ptrs + start, mask=mask, other=0.0).to(tl.float32)
                    gate = sigmoid(z)
                    if HAS_D:
                        y += skip[None, :, :] * u
                    dz = dout * y * (gate * (1.0 + z * (1.0 - gate)))
                    tl.store(dz_ptr + write_offset + start, dz.to(element), mask=mask)
                if block > partial:
                    dB += tl.load(dB_ptrs + start, mask=shared_mask, other=0.0)
                    dC += tl.load(dB_ptrs + shared_size + start, mask=shared_mask, other=0.0)
                tl.store(dB_ptrs + start, dB, mask=shared_mask)
                tl.store(dB_ptrs + shared_size + start, dC, mask=shared_mask)
            tl.debug_barrier()  # the scratch is written again

        dA_ptrs = dA_ptr + segment_row * size + block_states + state_offset
        tl.store(dA_ptrs, dA, mask=state_mask)
        if HAS_FIRST:
            dfirst_ptrs = dfirst_ptr + b * size + block_states + state_offset
            tl.store(dfirst_ptrs, r, mask=state_mask & (segment == 0))
        if HAS_D:
            tl.store(dD_ptr + segment_row * D + d, dD, mask=valid)
        if HAS_BIAS:
            tl.store(dbias_ptr + segment_row * D + d, dbias, mask=valid)


@triton.jit(do_not_specialize=["partials"])
def sum_partials(
    partial_ptr,  # (partials, elements) fp32
    out_ptr,  # (elements,)
    partials,
    elements,
    BLOCK: tl.constexpr,
):
    """Add up the partial sums in order, so that the result is the same on every run."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = i < elements
    total = tl.zeros([BLOCK], tl.float32)
    ptrs = partial_ptr + i
    for _ in range(0, partials):
        total += tl.load(ptrs, mask=valid, other=0.0)
        ptrs += elements
    tl.store(out_ptr + i, total.to(out_ptr.dtype.element_ty), mask=valid)
