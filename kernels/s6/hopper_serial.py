"""Selective scan (Mamba-1, S6), forward, for Hopper, serial in time: the second Gluon kernel.

Mathematics, shapes and precision are those of `hopper_kernel`. There a warp's lanes divide time, so
that few channels keep a GPU busy; here they divide states and channels, and every thread walks all
steps of its states. That saves the first pass over a run and the scan over lanes, and leaves no
long chain but the state itself.

A warp holds LANES states (times STATES in registers) of 32 / LANES channels (times CHANNELS in
registers). A block of WARPS_N x WARPS_D warps stages TILE steps in shared memory as fp32: dt after
softplus, dt u, B and C, each widened or computed once for the block. Time runs in registers, STEPS
at a time. The sum over states is taken across lanes for LANES steps at once, each lane ending with
the sum of one step, and across warps when the block's outputs are collected.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambench.kernels.s6.hopper_lanes import (
    affine,
    first,
    last,
    silu,
    softplus,
    sum_steps_over_lanes,
    to_fp32,
)


@gluon.jit
def _in_order(sums, TILE: gl.constexpr, WARPS_N: gl.constexpr, BLOCK: gl.constexpr):
    """Join (step / LANES, warp, step % LANES, channel) tensors to (step, warp, channel)."""
    if len(sums) == 1:
        joined = gl.permute(sums[0], [0, 2, 1, 3])
    elif len(sums) == 2:
        joined = gl.permute(gl.join(sums[0], sums[1]), [4, 0, 2, 1, 3])
    elif len(sums) == 4:
        even, odd = gl.join(sums[0], sums[2]), gl.join(sums[1], sums[3])
        joined = gl.permute(gl.join(even, odd), [4, 5, 0, 2, 1, 3])
    else:
        gl.static_assert(len(sums) == 8)
        a, b = gl.join(sums[0], sums[4]), gl.join(sums[2], sums[6])
        c, d = gl.join(sums[1], sums[5]), gl.join(sums[3], sums[7])
        joined = gl.join(gl.join(a, b), gl.join(c, d))
        joined = gl.permute(joined, [4, 5, 6, 0, 2, 1, 3])
    return gl.reshape(joined, [TILE, WARPS_N, BLOCK])


@gluon.jit(
    do_not_specialize=["seqlen_units", "d_inner", "ngroups", "blocks_per_group", "n_checkpoints"]
)
def serial_scan_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    out_ptr, last_state_ptr, checkpoints_ptr,
    seqlen_units, d_inner, ngroups, blocks_per_group, n_checkpoints,
    D_STATE: gl.constexpr, N: gl.constexpr,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    CHECKPOINT_EVERY: gl.constexpr, MASK_CHANNELS: gl.constexpr, UNIT: gl.constexpr,
    LANES: gl.constexpr, CHANNELS: gl.constexpr, WARPS_N: gl.constexpr, WARPS_D: gl.constexpr,
    TILE: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Scan BLOCK channels of one group and batch element over the whole sequence.

    seqlen is seqlen_units * UNIT, so that the compiler knows how far rows are aligned. N is D_STATE
    padded to a power of two; padded states stay zero. CHECKPOINT_EVERY is a multiple of TILE.
    """
    WARPS: gl.constexpr = WARPS_N * WARPS_D
    BLOCK: gl.constexpr = 32 // LANES * CHANNELS * WARPS_D
    STATES: gl.constexpr = N // (LANES * WARPS_N)
    # (step, state, channel); then what is left of it
    FULL: gl.constexpr = gl.BlockedLayout(
        [STEPS, 1, 1], [1, LANES, 32 // LANES], [1, WARPS_N, WARPS_D], [0, 1, 2]
    )
    STEP_CHANNEL: gl.constexpr = gl.SliceLayout(1, FULL)
    STEP_STATE: gl.constexpr = gl.SliceLayout(2, FULL)
    STATE_CHANNEL: gl.constexpr = gl.SliceLayout(0, FULL)
    # u, delta, z and out, (step, channel): a thread's VEC steps are 16 bytes, if all have as much
    element: gl.constexpr = u_ptr.dtype.element_ty
    WHOLE: gl.constexpr = 16 // (element.primitive_bitwidth // 8)
    SHARE: gl.constexpr = TILE * BLOCK // (32 * WARPS)
    VEC: gl.constexpr = WHOLE if SHARE > WHOLE else (SHARE if SHARE > 0 else 1)
    ALONG: gl.constexpr = TILE // VEC if TILE // VEC < 32 else 32
    PARTS: gl.constexpr = gl.BlockedLayout(
        [VEC, WARPS_N, 1], [ALONG, 1, 32 // ALONG], [1, 1, WARPS], [0, 1, 2]
    )
    IO: gl.constexpr = gl.SliceLayout(1, PARTS)
    RUNS: gl.constexpr = TILE // WHOLE if TILE // WHOLE < 32 else 32
    ROWS: gl.constexpr = gl.BlockedLayout([WHOLE, 1], [RUNS, 32 // RUNS], [1, WARPS], [0, 1])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [0, 1])
    SHARED3: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [0, 2, 1])
    seqlen = seqlen_units * UNIT

    # which channels
    pid = gl.program_id(0)
    blocks_per_batch = ngroups * blocks_per_group
    batch = (pid // blocks_per_batch).to(gl.int64)
    group = pid % blocks_per_batch // blocks_per_group
    group_channels = d_inner // ngroups
    first_channel = pid % blocks_per_group * BLOCK
    in_group = first_channel + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, STATE_CHANNEL))
    io_in_group = first_channel + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, IO))
    live = in_group < group_channels
    io_live = io_in_group < group_channels
    if MASK_CHANNELS:  # dead channels compute the group's last one and store nothing
        in_group = gl.minimum(in_group, group_channels - 1)
        io_in_group = gl.minimum(io_in_group, group_channels - 1)
    channel = group * group_channels + in_group
    io_channel = group * group_channels + io_in_group
    state = gl.arange(0, N, layout=gl.SliceLayout(1, STATE_CHANNEL))
    at_state = channel.to(gl.int64)[None, :] * D_STATE + state[:, None]
    keep_state = (state < D_STATE)[:, None] & live[None, :]
    if D_STATE == N:
        A2 = gl.load(A_ptr + at_state) * 1.4426950408889634
    else:
        real = (state < D_STATE)[:, None] & (channel >= 0)[None, :]
        A2 = gl.load(A_ptr + at_state, mask=real, other=0.0) * 1.4426950408889634
    bias = gl.load(bias_ptr + io_channel) if HAS_BIAS else io_channel
    skip = gl.load(D_ptr + io_channel) if HAS_D else io_channel

    # where the rows are
    io_step = gl.arange(0, TILE, layout=gl.SliceLayout(1, IO))[:, None]
    io_step = io_step + gl.full([TILE, BLOCK], 0, gl.int32, layout=IO)
    io_offset = ((batch * d_inner + io_channel) * seqlen)[None, :] + io_step
    row = gl.arange(0, N, layout=gl.SliceLayout(0, ROWS))
    row_step = gl.arange(0, TILE, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([TILE, N], 0, gl.int32, layout=ROWS)
    row_real = (row < D_STATE)[None, :]
    row_offset = ((batch * ngroups + group) * D_STATE + row) * seqlen
    row_offset = row_offset[None, :] + row_step

    dt_smem = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], SHARED)
    x_smem = gl.allocate_shared_memory(gl.float32, [TILE, BLOCK], SHARED)
    B_smem = gl.allocate_shared_memory(gl.float32, [TILE, N], SHARED)
    C_smem = gl.allocate_shared_memory(gl.float32, [TILE, N], SHARED)
    y_smem = gl.allocate_shared_memory(gl.float32, [TILE, WARPS_N, BLOCK], SHARED3)

    first_step = gl.arange(0, STEPS, layout=gl.SliceLayout(1, STEP_CHANNEL)) == 0
    first_step = gl.expand_dims(gl.expand_dims(first_step, 1), 1)
    h = gl.full([N, BLOCK], 0.0, gl.float32, layout=STATE_CHANNEL)
    u_next = gl.load(u_ptr + io_offset, mask=io_step < seqlen, other=0.0)
    delta_next = gl.load(delta_ptr + io_offset, mask=io_step < seqlen, other=0.0)
    B_next = gl.load(B_ptr + row_offset, mask=(row_step < seqlen) & row_real, other=0.0)
    C_next = gl.load(C_ptr + row_offset, mask=(row_step < seqlen) & row_real, other=0.0)
    for start in range(0, seqlen, TILE):
        u = u_next
        u_wide = to_fp32(u)
        dt = to_fp32(delta_next)
        if HAS_BIAS:
            dt += bias[None, :]
        if SOFTPLUS:
            dt = softplus(dt)
        dt = gl.where(start + io_step < seqlen, dt, 0.0)  # steps past the end keep the state
        dt_smem.store(dt)
        x_smem.store(u_wide * dt)
        B_smem.store(to_fp32(B_next))
        C_smem.store(to_fp32(C_next))
        gl.thread_barrier()
        after = start + TILE
        io_mask = after + io_step < seqlen
        row_mask = (after + row_step < seqlen) & row_real
        u_next = gl.load(u_ptr + after + io_offset, mask=io_mask, other=0.0)
        delta_next = gl.load(delta_ptr + after + io_offset, mask=io_mask, other=0.0)
        B_next = gl.load(B_ptr + after + row_offset, mask=row_mask, other=0.0)
        C_next = gl.load(C_ptr + after + row_offset, mask=row_mask, other=0.0)
        if HAS_Z:
            z = gl.load(z_ptr + start + io_offset, mask=start + io_step < seqlen, other=0.0)
        if CHECKPOINT_EVERY > 0:  # noqa: SIM102 (known when compiling)
            if start % CHECKPOINT_EVERY == 0:
                slot = (batch * n_checkpoints + start // CHECKPOINT_EVERY) * d_inner * D_STATE
                gl.store(checkpoints_ptr + slot + at_state, h, mask=keep_state)
        sums = ()  # kept in registers: a store to shared memory here would cost a barrier each
        for s in gl.static_range(TILE // STEPS):
            dt_run = gl.expand_dims(dt_smem.slice(s * STEPS, STEPS, 0).load(STEP_CHANNEL), 1)
            x_run = gl.expand_dims(x_smem.slice(s * STEPS, STEPS, 0).load(STEP_CHANNEL), 1)
            B_run = gl.expand_dims(B_smem.slice(s * STEPS, STEPS, 0).load(STEP_STATE), 2)
            C_run = gl.expand_dims(C_smem.slice(s * STEPS, STEPS, 0).load(STEP_STATE), 2)
            decay = gl.exp2(dt_run * gl.expand_dims(A2, 0))
            inflow = x_run * B_run
            inflow = gl.where(first_step, inflow + decay * gl.expand_dims(h, 0), inflow)
            _, states = gl.associative_scan((decay, inflow), 0, affine)
            h = gl.reduce(states, 0, last)
            parts = gl.reshape(states * C_run, [STEPS, STATES, WARPS_N * LANES, BLOCK])
            parts = sum_steps_over_lanes(gl.sum(parts, 1), LANES)
            parts = gl.reshape(parts, [STEPS // LANES, LANES, WARPS_N, LANES, BLOCK])
            sums = sums + (gl.reduce(parts, 1, first),)  # noqa: RUF005
        y_smem.store(_in_order(sums, TILE, WARPS_N, BLOCK))
        gl.thread_barrier()
        y = gl.sum(y_smem.load(PARTS), 1)
        if HAS_D:
            y += to_fp32(u) * skip[None, :]
        if HAS_Z:
            y *= silu(to_fp32(z))
        keep = start + io_step < seqlen
        if MASK_CHANNELS:
            keep = keep & io_live[None, :]
        gl.store(out_ptr + start + io_offset, y.to(element), mask=keep)
    slot = batch * d_inner * D_STATE
    gl.store(last_state_ptr + slot + at_state, h, mask=keep_state)
