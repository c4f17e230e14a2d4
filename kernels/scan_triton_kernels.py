"""Triton kernels of the associative scan whose state is materialised: forward, output, backward.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]        y[t] = C[t] . h[t] + D x[t]

for channels (s6: d; ssd: head and place in the head) of N states. Steps compose as
(a, x) then (a', x') = (a' a, a' x + x'): a block of time is scanned in log depth by
`tl.associative_scan` (Blelloch 1990), blocks follow each other with a carry. The states of all
steps are written, (B, channels, N, L) in fp32, and read again by the output and by the backward,
which writes their gradients in the same way:

    G[t] = C[t] dy[t] + exp(dt[t+1] A) G[t+1]

A family is a choice of strides: one head per channel for s6; A the same for all states of a head
for ssd. All arithmetic is fp32. Offsets are 64-bit.
"""

import triton
import triton.language as tl

from mambench.kernels.rounding import rounded_product


@triton.jit
def _compose(decay, x, next_decay, next_x):
    return decay * next_decay, next_decay * x + next_x


@triton.jit
def _steps(
    dt_ptr, bias, t, valid, stride_time, dt_min, dt_max,
    SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
):  # fmt: skip
    """Return dt after bias, softplus and limits, 0 where not valid, and d dt / d dt_raw."""
    raw = tl.load(dt_ptr + t * stride_time, mask=valid, other=0.0).to(tl.float32) + bias
    if SOFTPLUS:
        small = tl.exp(-tl.abs(raw))
        dt = tl.maximum(raw, 0.0) + _log1p(small)
        slope = tl.where(raw >= 0, 1.0, small) / (1.0 + small)
    else:
        dt = raw
        slope = tl.full(raw.shape, 1.0, tl.float32)
    if LIMITED:
        slope = tl.where((dt >= dt_min) & (dt <= dt_max), slope, 0.0)
        dt = tl.minimum(tl.maximum(dt, dt_min), dt_max)
    return tl.where(valid, dt, 0.0), tl.where(valid, slope, 0.0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1], exact where 1 + x rounds to 1 (Kahan's correction)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, bias_ptr, entry_ptr, states_ptr,
    seqlen, d_state, headdim, heads_per_group, dt_min, dt_max,
    stride_x_batch, stride_x_time, stride_x_head, stride_x_chan,
    stride_dt_batch, stride_dt_time, stride_dt_head,
    stride_A_head, stride_A_state,
    stride_B_batch, stride_B_time, stride_B_group, stride_B_state,
    HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Write the states of all steps; a program does one channel of one sequence."""
    channel, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = channel // headdim
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside = n < d_state
    x_ptr += batch * stride_x_batch + head * stride_x_head + channel % headdim * stride_x_chan
    dt_ptr += batch * stride_dt_batch + head * stride_dt_head
    B_ptr += batch * stride_B_batch + head // heads_per_group * stride_B_group
    row = batch * tl.num_programs(0) + channel
    states_ptr += row * d_state * seqlen
    A = tl.load(A_ptr + head * stride_A_head + n * stride_A_state, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + head) if HAS_BIAS else 0.0
    carry = tl.zeros([BLOCK_N], tl.float32)
    if HAS_ENTRY:
        carry = tl.load(entry_ptr + row * d_state + n, mask=inside, other=0.0)
    column = tl.arange(0, BLOCK_L)
    for start in range(0, seqlen, BLOCK_L):
        t = (start + column).to(tl.int64)
        valid = t < seqlen
        both = inside[:, None] & valid[None, :]
        dt, _ = _steps(dt_ptr, bias, t, valid, stride_dt_time, dt_min, dt_max, SOFTPLUS, LIMITED)
        x = tl.load(x_ptr + t * stride_x_time, mask=valid, other=0.0).to(tl.float32)
        place = n[:, None] * stride_B_state + t[None, :] * stride_B_time
        B = tl.load(B_ptr + place, mask=both, other=0.0).to(tl.float32)
        decay = tl.exp(dt[None, :] * A[:, None])
        total, h = tl.associative_scan((decay, (dt * x)[None, :] * B), 1, _compose)
        h += total * carry[:, None]
        tl.store(states_ptr + n[:, None] * seqlen + t[None, :], h, mask=both)
        carry = tl.sum(tl.where(column[None, :] == BLOCK_L - 1, h, 0.0), axis=1)


@triton.jit
def output_kernel(
    states_ptr, x_ptr, C_ptr, D_ptr, z_ptr, out_ptr,
    seqlen, d_state, channels, headdim, heads_per_group,
    stride_x_batch, stride_x_time, stride_x_head, stride_x_chan,
    stride_z_batch, stride_z_time, stride_z_head, stride_z_chan,
    stride_out_batch, stride_out_time, stride_out_head, stride_out_chan,
    stride_C_batch, stride_C_time, stride_C_group, stride_C_state,
    stride_D_head, stride_D_chan,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Contract the states with C, add D x, multiply by silu(z): a block of time of one channel."""
    program, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    channel = program % channels  # neighbours share C
    head, chan = channel // headdim, channel % headdim
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    t = program // channels * BLOCK_L + tl.arange(0, BLOCK_L)
    valid = t < seqlen
    both = (n < d_state)[:, None] & valid[None, :]
    states_ptr += (batch * channels + channel) * d_state * seqlen
    h = tl.load(states_ptr + n[:, None] * seqlen + t[None, :], mask=both, other=0.0)
    C_ptr += batch * stride_C_batch + head // heads_per_group * stride_C_group
    place = n[:, None] * stride_C_state + t[None, :] * stride_C_time
    y = tl.sum(h * tl.load(C_ptr + place, mask=both, other=0.0).to(tl.float32), axis=0)
    if HAS_D:
        x_ptr += batch * stride_x_batch + head * stride_x_head + chan * stride_x_chan
        x = tl.load(x_ptr + t * stride_x_time, mask=valid, other=0.0).to(tl.float32)
        y += tl.load(D_ptr + head * stride_D_head + chan * stride_D_chan) * x
    if HAS_Z:
        z_ptr += batch * stride_z_batch + head * stride_z_head + chan * stride_z_chan
        z = tl.load(z_ptr + t * stride_z_time, mask=valid, other=0.0).to(tl.float32)
        y *= z / (1.0 + tl.exp(-z))
    out_ptr += batch * stride_out_batch + head * stride_out_head + chan * stride_out_chan
    tl.store(out_ptr + t * stride_out_time, y.to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit
def grad_states_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, bias_ptr, entry_ptr, states_ptr, dy_ptr, grad_last_ptr,
    grad_states_ptr, grad_x_ptr, grad_dt_ptr, grad_A_ptr, grad_entry_ptr,
    seqlen, d_state, headdim, heads_per_group, dt_min, dt_max,
    stride_x_batch, stride_x_time, stride_x_head, stride_x_chan,
    stride_dt_batch, stride_dt_time, stride_dt_head,
    stride_A_head, stride_A_state,
    stride_B_batch, stride_B_time, stride_B_group, stride_B_state,
    stride_C_batch, stride_C_time, stride_C_group, stride_C_state,
    HAS_BIAS: tl.constexpr, HAS_ENTRY: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMITED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Scan backwards in time: the gradients of states, x, dt_raw (per channel), A and the entry.

    dy, grad_x and grad_dt are (B, channels, L) fp32 and contiguous.
    """
    channel, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head = channel // headdim
    n = tl.arange(0, BLOCK_N).to(tl.int64)
    inside = n < d_state
    x_ptr += batch * stride_x_batch + head * stride_x_head + channel % headdim * stride_x_chan
    dt_ptr += batch * stride_dt_batch + head * stride_dt_head
    B_ptr += batch * stride_B_batch + head // heads_per_group * stride_B_group
    C_ptr += batch * stride_C_batch + head // heads_per_group * stride_C_group
    row = batch * tl.num_programs(0) + channel
    states_ptr += row * d_state * seqlen
    grad_states_ptr += row * d_state * seqlen
    A = tl.load(A_ptr + head * stride_A_head + n * stride_A_state, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + head) if HAS_BIAS else 0.0
    entry = tl.zeros([BLOCK_N], tl.float32)
    if HAS_ENTRY:
        entry = tl.load(entry_ptr + row * d_state + n, mask=inside, other=0.0)
    carry = tl.load(grad_last_ptr + row * d_state + n, mask=inside, other=0.0)
    grad_A = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    column = tl.arange(0, BLOCK_L)
    for start in range(0, seqlen, BLOCK_L):
        t = (seqlen - 1 - start - column).to(tl.int64)
        valid = t >= 0
        both = inside[:, None] & valid[None, :]
        # After the last step nothing decays: there the carry is the last state's own gradient.
        later, _ = _steps(
            dt_ptr, bias, t + 1, valid & (t + 1 < seqlen), stride_dt_time, dt_min, dt_max,
            SOFTPLUS, LIMITED,
        )  # fmt: skip
        place = n[:, None] * stride_C_state + t[None, :] * stride_C_time
        C = tl.load(C_ptr + place, mask=both, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * seqlen + t, mask=valid, other=0.0)
        total, grad = tl.associative_scan(
            (tl.exp(later[None, :] * A[:, None]), C * dy[None, :]), 1, _compose
        )
        grad += total * carry[:, None]
        tl.store(grad_states_ptr + n[:, None] * seqlen + t[None, :], grad, mask=both)
        carry = tl.sum(tl.where(column[None, :] == BLOCK_L - 1, grad, 0.0), axis=1)

        dt, slope = _steps(
            dt_ptr, bias, t, valid, stride_dt_time, dt_min, dt_max, SOFTPLUS, LIMITED
        )
        x = tl.load(x_ptr + t * stride_x_time, mask=valid, other=0.0).to(tl.float32)
        place = n[:, None] * stride_B_state + t[None, :] * stride_B_time
        B = tl.load(B_ptr + place, mask=both, other=0.0).to(tl.float32)
        before = states_ptr + n[:, None] * seqlen + (t - 1)[None, :]
        h = tl.load(before, mask=both & (t > 0)[None, :], other=0.0)
        h = tl.where((t == 0)[None, :], entry[:, None], h)
        by_inflow = tl.sum(tl.where(both, grad * B, 0.0), axis=0)
        by_decay = tl.where(both, grad * h * tl.exp(dt[None, :] * A[:, None]), 0.0)
        grad_A += by_decay * dt[None, :]
        grad_dt = (by_inflow * x + tl.sum(rounded_product(by_decay, A[:, None]), axis=0)) * slope
        tl.store(grad_x_ptr + row * seqlen + t, by_inflow * dt, mask=valid)
        tl.store(grad_dt_ptr + row * seqlen + t, grad_dt, mask=valid)
    tl.store(grad_A_ptr + row * d_state + n, tl.sum(grad_A, axis=1), mask=inside)
    if HAS_ENTRY:
        first = tl.zeros([BLOCK_N], tl.int64)
        dt, _ = _steps(
            dt_ptr, bias, first, inside, stride_dt_time, dt_min, dt_max, SOFTPLUS, LIMITED
        )
        tl.store(grad_entry_ptr + row * d_state + n, carry * tl.exp(dt * A), mask=inside)


@triton.jit
def grad_shared_kernel(
    x_ptr, dt_ptr, bias_ptr, states_ptr, grad_states_ptr, dy_ptr, grad_B_ptr, grad_C_ptr,
    seqlen, d_state, channels, headdim, per_split, splits, per_group, dt_min, dt_max,
    stride_x_batch, stride_x_time, stride_x_head, stride_x_chan,
    stride_dt_batch, stride_dt_time, stride_dt_head,
    HAS_BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMITED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Sum the gradients of B and C over some channels of a group, for a tile of states and time.

    grad_B, grad_C: (splits, B, G, N, L) fp32; a split holds `per_split` channels of a group.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    groups = channels // per_group
    part = tl.program_id(2).to(tl.int64)  # split, fastest; then group; then sequence
    split, group = part % splits, part // splits % groups
    batch = part // splits // groups
    valid = t < seqlen
    both = (n < d_state)[:, None] & valid[None, :]
    tile = n[:, None] * seqlen + t[None, :]
    grad_B = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    grad_C = tl.zeros([BLOCK_N, BLOCK_L], tl.float32)
    first = split * per_split
    for place in range(first, tl.minimum(first + per_split, per_group)):
        channel = group * per_group + place
        head = channel // headdim
        row = batch * channels + channel
        bias = tl.load(bias_ptr + head) if HAS_BIAS else 0.0
        dt, _ = _steps(
            dt_ptr + batch * stride_dt_batch + head * stride_dt_head, bias, t, valid,
            stride_dt_time, dt_min, dt_max, SOFTPLUS, LIMITED,
        )  # fmt: skip
        at = batch * stride_x_batch + head * stride_x_head + channel % headdim * stride_x_chan
        x = tl.load(x_ptr + at + t * stride_x_time, mask=valid, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * seqlen + t, mask=valid, other=0.0)
        grad = tl.load(grad_states_ptr + row * d_state * seqlen + tile, mask=both, other=0.0)
        h = tl.load(states_ptr + row * d_state * seqlen + tile, mask=both, other=0.0)
        grad_B += grad * (dt * x)[None, :]
        grad_C += h * dy[None, :]
    slab = ((split * (tl.num_programs(2) // splits // groups) + batch) * groups + group) * d_state
    tl.store(grad_B_ptr + slab * seqlen + tile, grad_B, mask=both)
    tl.store(grad_C_ptr + slab * seqlen + tile, grad_C, mask=both)
