"""Selective scan (Mamba-1, S6), forward, for Hopper: the Gluon kernel.

    dt_t = softplus(delta_t + bias)                                   per channel d
    h_t,n = exp(dt_t A_n) h_(t-1),n + dt_t u_t B_t,n                  per channel d and state n
    y_t = sum_n C_t,n h_t,n + D u_t;   out_t = y_t * silu(z_t)

after "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", section 3.3 and
algorithm 2. Shapes as in `hopper_scan.scan_forward`. States, sums and exponentials are fp32.

A warp owns CHANNELS channels and walks the sequence in tiles of 32 lanes x 16 steps: every lane
has RUN = 16 consecutive steps in registers. For each state it

1. takes the RUN decays once (the exponentials, kept in registers) and runs the lane's steps from a
   zero state, which gives the lane's own contribution to the state at its end;
2. scans these ends over the lanes by shuffles, with the carry of the previous tile entering lane
   0, for the state *before* each lane's run. The decay over a lane's run is one exponential of its
   summed dt, not a product;
3. runs the lane's steps again from there and adds C h to y.

So every exponential is computed once and nothing of size L x N leaves the registers. B and C of a
block of N (16) states come by cp.async into a double buffer that all warps of the block share.
The carries of 16 states live in one register per channel: a queue over the lanes that moves one
place a state; its readers are lanes 0 and 1 and its writer lane 31.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from mambench.kernels.s6.hopper_lanes import (
    affine,
    lane_above,
    lane_from,
    lane_scan,
    last,
    silu,
    softplus,
    to_fp32,
)


@gluon.jit
def _copy_block(smem, pointer, mask, ASYNC: gl.constexpr):
    """Copy to shared memory, zero where masked; by cp.async unless elements are too narrow."""
    if ASYNC:
        async_copy.async_copy_global_to_shared(smem, pointer, mask=mask)
    else:
        smem.store(gl.load(pointer, mask=mask, other=0.0))


@gluon.jit
def _copy_rows(
    smem, first, pointer, rows, start, seqlen,
    ROWS: gl.constexpr, TIME: gl.constexpr, ASYNC: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Copy a tile of ROWS rows, zero past the end or the last row, GROUP rows at a time.

    For rows that are not aligned to 16 bytes: a loop, because copying them all at once needs a
    register pair for every few bytes.
    """
    lanes = gl.arange(0, 32, layout=gl.SliceLayout(1, TIME))
    steps = gl.arange(0, 16, layout=gl.SliceLayout(0, TIME))
    time = start + gl.expand_dims(lanes, 1) * 16 + gl.expand_dims(steps, 0)
    for base in range(0, ROWS, GROUP):
        if ASYNC:
            for i in gl.static_range(GROUP):
                mask = (time < seqlen) & (base + i < rows)
                at = pointer + (base + i).to(gl.int64) * seqlen + time
                async_copy.async_copy_global_to_shared(smem.index(first + base + i), at, mask=mask)
        else:  # all loads of a group before its stores
            values = ()
            for i in gl.static_range(GROUP):
                mask = (time < seqlen) & (base + i < rows)
                at = pointer + (base + i).to(gl.int64) * seqlen + time
                values = values + (gl.load(at, mask=mask, other=0.0),)  # noqa: RUF005
            for i in gl.static_range(GROUP):
                smem.index(first + base + i).store(values[i])


@gluon.jit(
    do_not_specialize=[
        "seqlen_units",
        "d_inner",
        "ngroups",
        "d_state",
        "blocks_per_group",
        "n_checkpoints",
    ]
)
def scan_forward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr,
    out_ptr, last_state_ptr, checkpoints_ptr,
    seqlen_units, d_inner, ngroups, d_state, blocks_per_group, n_checkpoints,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    CHECKPOINT_EVERY: gl.constexpr, MASK_CHANNELS: gl.constexpr, MASK_STATES: gl.constexpr,
    STATE_BLOCKS: gl.constexpr, UNIT: gl.constexpr, WIDE: gl.constexpr,
    CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Scan WARPS * CHANNELS channels of one group and batch element over the whole sequence.

    seqlen is seqlen_units * UNIT, so that the compiler knows how far rows are aligned. WIDE keeps B
    and C in shared memory as fp32 (widened once for all warps) instead of in their own type.
    """
    RUN: gl.constexpr = 16
    N: gl.constexpr = 16
    TILE: gl.constexpr = 32 * RUN
    BLOCK: gl.constexpr = WARPS * CHANNELS
    # (channel, lane, step); then what is left of it: (channel, lane), (lane, step), (channel,)
    FULL: gl.constexpr = gl.BlockedLayout([CHANNELS, 1, RUN], [1, 32, 1], [WARPS, 1, 1], [2, 1, 0])
    RUNS: gl.constexpr = gl.SliceLayout(2, FULL)
    TIME: gl.constexpr = gl.SliceLayout(0, FULL)
    CHAN: gl.constexpr = gl.SliceLayout(1, RUNS)
    element: gl.constexpr = u_ptr.dtype.element_ty
    WIDTH: gl.constexpr = element.primitive_bitwidth // 8
    ASYNC: gl.constexpr = UNIT * WIDTH >= 4  # cp.async copies 4, 8 or 16 bytes
    ALIGNED: gl.constexpr = UNIT * WIDTH >= 16
    STAGED: gl.constexpr = WIDTH == 2  # z and out by shared memory; in fp32 there is no room
    GROUP: gl.constexpr = 4
    VEC: gl.constexpr = UNIT if UNIT * WIDTH <= 16 else 16 // WIDTH
    # a lane's run is 32 or 64 bytes: the swizzle spreads 16-byte pieces over all banks
    SWIZZLE: gl.constexpr = gl.SwizzledSharedLayout(16 // WIDTH, 8 // WIDTH, WIDTH, [1, 0])
    SWIZZLE3: gl.constexpr = gl.SwizzledSharedLayout(16 // WIDTH, 8 // WIDTH, WIDTH, [2, 1, 0])
    COPY: gl.constexpr = gl.BlockedLayout(
        [1, VEC], [32 // (RUN // VEC), RUN // VEC], [WARPS, 1], [1, 0]
    )
    COPY3: gl.constexpr = gl.BlockedLayout(
        [1, 1, VEC], [1, 32 // (RUN // VEC), RUN // VEC], [WARPS, 1, 1], [2, 1, 0]
    )
    seqlen = seqlen_units * UNIT

    # which channels
    pid = gl.program_id(0)
    blocks_per_batch = ngroups * blocks_per_group
    batch = (pid // blocks_per_batch).to(gl.int64)
    group = pid % blocks_per_batch // blocks_per_group
    group_channels = d_inner // ngroups
    first_channel = pid % blocks_per_group * BLOCK
    in_group = first_channel + gl.arange(0, BLOCK, layout=CHAN)
    live = in_group < group_channels
    if MASK_CHANNELS:  # dead channels compute the group's last one and store nothing
        in_group = gl.minimum(in_group, group_channels - 1)
    channel = group * group_channels + in_group
    row = batch * d_inner + channel
    bias = gl.load(bias_ptr + channel) if HAS_BIAS else channel
    skip = gl.load(D_ptr + channel) if HAS_D else channel

    lane = gl.arange(0, 32, layout=gl.SliceLayout(0, RUNS))[None, :]
    lane = lane + gl.full([BLOCK, 32], 0, gl.int32, layout=RUNS)
    queue_source = gl.where(lane <= 1, 17, gl.minimum(lane + 1, 31))
    steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(0, FULL)))
    first_step = gl.expand_dims(gl.expand_dims(steps, 0), 0) == 0
    lanes = gl.arange(0, 32, layout=gl.SliceLayout(1, TIME))
    time = gl.expand_dims(gl.expand_dims(lanes, 1) * RUN + gl.expand_dims(steps, 0), 0)

    # u, delta, z and out: tiles of (channel, lane, step)
    io_in_group = first_channel + gl.arange(
        0, BLOCK, layout=gl.SliceLayout(1, gl.SliceLayout(2, COPY3))
    )
    io_live = gl.expand_dims(gl.expand_dims(io_in_group < group_channels, 1), 2)
    io_lanes = gl.arange(0, 32, layout=gl.SliceLayout(1, gl.SliceLayout(0, COPY3)))
    io_steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, gl.SliceLayout(0, COPY3)))
    io_time = gl.expand_dims(gl.expand_dims(io_lanes, 1) * RUN + gl.expand_dims(io_steps, 0), 0)
    io_time = io_time + gl.full([BLOCK, 32, RUN], 0, gl.int32, layout=COPY3)
    io_row = (batch * d_inner + group * group_channels + io_in_group) * seqlen
    io_offset = gl.expand_dims(gl.expand_dims(io_row, 1), 2) + io_time
    block_row = (batch * d_inner + group * group_channels + first_channel) * seqlen
    block_channels = group_channels - first_channel
    u_smem = gl.allocate_shared_memory(element, [BLOCK, 32, RUN], SWIZZLE3)
    delta_smem = gl.allocate_shared_memory(element, [BLOCK, 32, RUN], SWIZZLE3)
    u_rows = u_smem._reinterpret(element, [BLOCK, 32, RUN], SWIZZLE)
    delta_rows = delta_smem._reinterpret(element, [BLOCK, 32, RUN], SWIZZLE)
    if ALIGNED:
        _copy_block(u_smem, u_ptr + io_offset, (io_time < seqlen) & io_live, ASYNC)
        _copy_block(delta_smem, delta_ptr + io_offset, (io_time < seqlen) & io_live, ASYNC)
    else:
        _copy_rows(
            u_rows, 0, u_ptr + block_row, block_channels, 0, seqlen, BLOCK, COPY, ASYNC, GROUP
        )
        _copy_rows(
            delta_rows, 0, delta_ptr + block_row, block_channels, 0, seqlen,
            BLOCK, COPY, ASYNC, GROUP,
        )  # fmt: skip
    if HAS_Z and STAGED:
        z_smem = gl.allocate_shared_memory(element, [BLOCK, 32, RUN], SWIZZLE3)
        z_rows = z_smem._reinterpret(element, [BLOCK, 32, RUN], SWIZZLE)

    # B and C: two buffers of N states of a tile, also as rows of (state, lane)
    B_smem = gl.allocate_shared_memory(element, [2 * N, 32, RUN], SWIZZLE)
    C_smem = gl.allocate_shared_memory(element, [2 * N, 32, RUN], SWIZZLE)
    B_rows = B_smem._reinterpret(element, [2, N * 32, RUN], SWIZZLE)
    C_rows = C_smem._reinterpret(element, [2, N * 32, RUN], SWIZZLE)
    if WIDE:
        SWIZZLE_WIDE: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
        B_wide = gl.allocate_shared_memory(gl.float32, [N, 32, RUN], SWIZZLE_WIDE)
        C_wide = gl.allocate_shared_memory(gl.float32, [N, 32, RUN], SWIZZLE_WIDE)
        B_wide_rows = B_wide._reinterpret(gl.float32, [N * 32, RUN], SWIZZLE_WIDE)
        C_wide_rows = C_wide._reinterpret(gl.float32, [N * 32, RUN], SWIZZLE_WIDE)
    copy_row = gl.arange(0, N * 32, layout=gl.SliceLayout(1, COPY))
    copy_state = gl.expand_dims(copy_row // 32, 1)
    copy_step = gl.arange(0, RUN, layout=gl.SliceLayout(0, COPY))
    copy_time = gl.expand_dims(copy_row % 32 * RUN, 1) + gl.expand_dims(copy_step, 0)
    copy_offset = copy_state * seqlen + copy_time
    group_row = (batch * ngroups + group) * d_state * seqlen
    B_row = B_ptr + group_row + copy_offset
    C_row = C_ptr + group_row + copy_offset
    copy_mask = copy_time < seqlen
    if MASK_STATES:
        copy_mask = copy_mask & (copy_state < d_state)
    if ALIGNED:
        _copy_block(B_rows.index(0), B_row, copy_mask, ASYNC)
        _copy_block(C_rows.index(0), C_row, copy_mask, ASYNC)
    else:
        _copy_rows(B_smem, 0, B_ptr + group_row, d_state, 0, seqlen, N, COPY, ASYNC, GROUP)
        _copy_rows(C_smem, 0, C_ptr + group_row, d_state, 0, seqlen, N, COPY, ASYNC, GROUP)
    async_copy.commit_group()

    # A, in units of log2
    A_COPY: gl.constexpr = gl.BlockedLayout([1, 1], [N, 32 // N], [1, WARPS], [0, 1])
    A_smem = gl.allocate_shared_memory(
        gl.float32, [STATE_BLOCKS * N, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    A_blocks = A_smem._reinterpret(
        gl.float32, [STATE_BLOCKS, N, BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    )
    A_channel = first_channel + gl.arange(0, BLOCK, layout=gl.SliceLayout(0, A_COPY))
    A_channel = group * group_channels + gl.minimum(A_channel, group_channels - 1)
    A_row = A_ptr + gl.expand_dims(A_channel.to(gl.int64) * d_state, 0)
    for k in range(STATE_BLOCKS):
        A_state = k * N + gl.arange(0, N, layout=gl.SliceLayout(1, A_COPY))
        A_state = gl.expand_dims(gl.minimum(A_state, d_state - 1), 1)
        A_blocks.index(k).store(gl.load(A_row + A_state) * 1.4426950408889634)

    queue = gl.full([BLOCK, 32], 0.0, gl.float32, layout=RUNS)
    if STATE_BLOCKS > 1:
        FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        queues = gl.allocate_shared_memory(gl.float32, [STATE_BLOCKS, BLOCK, 32], FLAT)
        for k in range(STATE_BLOCKS):
            queues.index(k).store(queue)

    buffer = 0
    for start in range(0, seqlen, TILE):
        async_copy.wait_group(0)
        gl.thread_barrier()
        u = to_fp32(u_smem.load(FULL))
        dt = to_fp32(delta_smem.load(FULL))
        if HAS_BIAS:
            dt += gl.expand_dims(gl.expand_dims(bias, 1), 2)
        if SOFTPLUS:
            dt = softplus(dt)
        if start + TILE > seqlen:
            dt = gl.where(start + time < seqlen, dt, 0.0)  # steps past the end keep the state
        x = u * dt
        y = u * gl.expand_dims(gl.expand_dims(skip, 1), 2) if HAS_D else gl.full_like(u, 0.0)
        dt_before = lane_above(gl.sum(dt, 2))  # the dt of the previous lane's run, summed
        if not WIDE:
            gl.thread_barrier()  # the buffers of u and delta are free
        for k in range(STATE_BLOCKS):
            if STATE_BLOCKS > 1:  # noqa: SIM102 of compile time, the other is not
                if k > 0:
                    async_copy.wait_group(0)
                    gl.thread_barrier()
            if WIDE:
                B_wide_rows.store(to_fp32(B_rows.index(buffer).load(COPY)))
                C_wide_rows.store(to_fp32(C_rows.index(buffer).load(COPY)))
                gl.thread_barrier()  # and the buffers of u and delta are free
            # fetch the next block of states, or the next tile's first; once a tile its u and delta
            wrap = k + 1 == STATE_BLOCKS
            next_start = gl.where(wrap, start + TILE, start)
            next_state = gl.where(wrap, 0, (k + 1) * N)
            next_offset = next_state.to(gl.int64) * seqlen + next_start
            if ALIGNED:
                next_mask = next_start + copy_time < seqlen
                if MASK_STATES:
                    next_mask = next_mask & (next_state + copy_state < d_state)
                _copy_block(B_rows.index(buffer ^ 1), B_row + next_offset, next_mask, ASYNC)
                _copy_block(C_rows.index(buffer ^ 1), C_row + next_offset, next_mask, ASYNC)
            else:
                next_row = group_row + next_state.to(gl.int64) * seqlen
                left = d_state - next_state
                other = (buffer ^ 1) * N
                _copy_rows(
                    B_smem, other, B_ptr + next_row, left, next_start, seqlen, N, COPY, ASYNC, GROUP
                )
                _copy_rows(
                    C_smem, other, C_ptr + next_row, left, next_start, seqlen, N, COPY, ASYNC, GROUP
                )
            if k == 0:
                after = start + TILE
                if ALIGNED:
                    io_mask = (after + io_time < seqlen) & io_live
                    _copy_block(u_smem, u_ptr + after + io_offset, io_mask, ASYNC)
                    _copy_block(delta_smem, delta_ptr + after + io_offset, io_mask, ASYNC)
                else:
                    _copy_rows(
                        u_rows, 0, u_ptr + block_row, block_channels, after, seqlen,
                        BLOCK, COPY, ASYNC, GROUP,
                    )  # fmt: skip
                    _copy_rows(
                        delta_rows, 0, delta_ptr + block_row, block_channels, after, seqlen,
                        BLOCK, COPY, ASYNC, GROUP,
                    )  # fmt: skip
                if HAS_Z and STAGED:
                    if ALIGNED:
                        io_mask = (start + io_time < seqlen) & io_live
                        _copy_block(z_smem, z_ptr + start + io_offset, io_mask, ASYNC)
                    else:
                        _copy_rows(
                            z_rows, 0, z_ptr + block_row, block_channels, start, seqlen,
                            BLOCK, COPY, ASYNC, GROUP,
                        )  # fmt: skip
            async_copy.commit_group()
            if not WIDE:
                gl.thread_barrier()  # here, or the compiler places one inside the loop
            if STATE_BLOCKS > 1:
                queue = queues.index(k).load(RUNS)
            for n in range(0, N):
                A2 = A_smem.index(k * N + n).load(CHAN)
                if WIDE:
                    B = B_wide.index(n).load(TIME)
                else:
                    B = to_fp32(B_smem.index(buffer * N + n).load(TIME))
                decay = gl.exp2(dt * gl.expand_dims(gl.expand_dims(A2, 1), 2))
                run_decay = gl.exp2(dt_before * gl.expand_dims(A2, 1))
                inflow = x * gl.expand_dims(B, 0)
                _, local_h = gl.associative_scan((decay, inflow), 2, affine)
                local_end = gl.reduce(local_h, 2, last)
                h_in = lane_scan(run_decay, local_end, queue, lane)
                inflow = gl.where(first_step, inflow + decay * gl.expand_dims(h_in, 2), inflow)
                _, h = gl.associative_scan((decay, inflow), 2, affine)
                if CHECKPOINT_EVERY > 0:
                    when = start + lane * RUN
                    slot = batch * n_checkpoints + when // CHECKPOINT_EVERY
                    slot = slot * d_inner + gl.expand_dims(channel, 1)
                    keep = (when % CHECKPOINT_EVERY == 0) & (when < seqlen)
                    if MASK_CHANNELS:
                        keep = keep & gl.expand_dims(live, 1)
                    if MASK_STATES:
                        keep = keep & (k * N + n < d_state)
                    gl.store(checkpoints_ptr + (slot * d_state + k * N + n), h_in, mask=keep)
                if WIDE:
                    C = C_wide.index(n).load(TIME)
                else:
                    C = to_fp32(C_smem.index(buffer * N + n).load(TIME))
                y += h * gl.expand_dims(C, 0)
                end = gl.reduce(h, 2, last)
                queue = gl.where(lane == 31, end, lane_from(queue, queue_source))
            if STATE_BLOCKS > 1:
                queues.index(k).store(queue)
            buffer = buffer ^ 1
        if STAGED:
            if HAS_Z:
                async_copy.wait_group(0)
                gl.thread_barrier()
                y *= silu(to_fp32(z_smem.load(FULL)))
            out = gl.convert_layout(y.to(element), COPY3)
            keep = (start + io_time < seqlen) & io_live
            gl.store(out_ptr + start + io_offset, out, mask=keep)
        else:
            at = gl.expand_dims(gl.expand_dims(row * seqlen, 1), 2) + (start + time)
            keep = (start + time < seqlen) & gl.expand_dims(gl.expand_dims(live, 1), 2)
            if HAS_Z:
                y *= silu(gl.load(z_ptr + at, mask=keep, other=0.0))
            gl.store(out_ptr + at, y, mask=keep)
    async_copy.wait_group(0)

    # a queue holds state 0 in lane 0 and state n in lane 16 + n
    held = gl.where(lane == 0, 0, lane - 16)
    for k in range(STATE_BLOCKS):
        if STATE_BLOCKS > 1:
            queue = queues.index(k).load(RUNS)
        keep = (lane == 0) | (lane > 16)
        if MASK_CHANNELS:
            keep = keep & gl.expand_dims(live, 1)
        if MASK_STATES:
            keep = keep & (k * N + held < d_state)
        slot = gl.expand_dims(row, 1) * d_state + k * N + held
        gl.store(last_state_ptr + slot, queue, mask=keep)
