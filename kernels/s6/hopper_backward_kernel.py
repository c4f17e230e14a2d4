"""Selective scan (Mamba-1, S6), backward, for Hopper: the Gluon kernel, parallel over time.

With dh_t the gradient of the state after step t and r_t = decay_t dh_t what step t - 1 gets of it:

    dh_t = C_t dy_t + r_{t+1}              dx_t = sum_n B_t dh_t           (x = dt u)
    q_t  = r_t h_{t-1}, the gradient of dt_t A                            dA = sum_t q_t dt_t
    dB_t = sum_d dh_t x_t                  dC_t = sum_d dy_t h_t
    ddt_t = sum_n q_t A + u_t dx_t         du_t = dt_t dx_t + D dy_t

A block of WARPS warps walks one segment of time of BLOCK channels from its end to its beginning, a
chunk (the steps between two states that the forward kept) at a time. What later segments pass back
has been made before by `segment_adjoint_kernel`, of which a block
combines what it needs. Within a chunk it

1. stages dt after softplus, dt u and dy in shared memory as fp32, and for each block of 16 states
   B and C;
2. replays the forward from the kept state and notes the state before every TILE steps;
3. takes the tiles from last to first: replays a tile with states and decays in registers, and walks
   it back.

A warp's lanes are 4 of states times 8 of channels; a thread holds 4 states of CHANNELS channels, so
that sums over states and over channels both begin in registers. Over lanes they are taken by
exchanges that halve what a lane holds, so that a lane ends with the sum of one channel or state.
dB and dC are summed over the block's channels in a fixed order and written as fp32 partial sums.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambench.kernels.s6.hopper_lanes import first, softplus, sum_steps_over_lanes, to_fp32


@gluon.jit
def sum_channels_over_lanes(of_B, of_C):
    """Sum 4 states' dB and dC over the 8 lanes of channels (lane bits 2 to 4).

    The first register then holds the sum of state lane bits 2, 3 of dB, or of dC where bit 4 is
    set; the others nothing of use.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q, r; .reg .b32 l, i; .reg .f32 k0, k1, k2, k3, s0, s1, s2, s3;
        mov.u32 l, %laneid;
        and.b32 i, l, 16; setp.ne.b32 r, i, 0;
        and.b32 i, l, 8; setp.ne.b32 q, i, 0;
        and.b32 i, l, 4; setp.ne.b32 p, i, 0;
        selp.f32 s0, $4, $8, r; selp.f32 k0, $8, $4, r;
        selp.f32 s1, $5, $9, r; selp.f32 k1, $9, $5, r;
        selp.f32 s2, $6, $10, r; selp.f32 k2, $10, $6, r;
        selp.f32 s3, $7, $11, r; selp.f32 k3, $11, $7, r;
        shfl.sync.bfly.b32 s0, s0, 16, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s1, s1, 16, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s2, s2, 16, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s3, s3, 16, 0x1f, 0xffffffff;
        add.f32 k0, k0, s0; add.f32 k1, k1, s1; add.f32 k2, k2, s2; add.f32 k3, k3, s3;
        selp.f32 s0, k0, k2, q; selp.f32 k0, k2, k0, q;
        selp.f32 s1, k1, k3, q; selp.f32 k1, k3, k1, q;
        shfl.sync.bfly.b32 s0, s0, 8, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s1, s1, 8, 0x1f, 0xffffffff;
        add.f32 k0, k0, s0; add.f32 k1, k1, s1;
        selp.f32 s0, k0, k1, p; selp.f32 k0, k1, k0, p;
        shfl.sync.bfly.b32 s0, s0, 4, 0x1f, 0xffffffff;
        add.f32 $0, k0, s0;
        mov.f32 $1, 0f00000000; mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000;
        }""",
        "=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f",
        [of_B, of_C],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def sum_states_over_lanes(left, right):
    """Sum two quantities of 2 channels over the 4 lanes of states (lane bits 0 and 1).

    The first register then holds the sum of channel lane bit 0, of `right` where bit 1 is set.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p, q; .reg .b32 l, i; .reg .f32 k0, k1, s0, s1;
        mov.u32 l, %laneid;
        and.b32 i, l, 2; setp.ne.b32 q, i, 0;
        and.b32 i, l, 1; setp.ne.b32 p, i, 0;
        selp.f32 s0, $2, $4, q; selp.f32 k0, $4, $2, q;
        selp.f32 s1, $3, $5, q; selp.f32 k1, $5, $3, q;
        shfl.sync.bfly.b32 s0, s0, 2, 0x1f, 0xffffffff;
        shfl.sync.bfly.b32 s1, s1, 2, 0x1f, 0xffffffff;
        add.f32 k0, k0, s0; add.f32 k1, k1, s1;
        selp.f32 s0, k0, k1, p; selp.f32 k0, k1, k0, p;
        shfl.sync.bfly.b32 s0, s0, 1, 0x1f, 0xffffffff;
        add.f32 $0, k0, s0;
        mov.f32 $1, 0f00000000;
        }""",
        "=&f,=&f,f,f,f,f",
        [left, right],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;",
        "=f,f",
        [1.0 + gl.exp2(x * -1.4426950408889634)],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def stack_steps(parts):
    """Join 2, 4 or 8 (lane, channel lane) tensors to one with the steps as last dimension."""
    if len(parts) == 2:
        joined = gl.join(parts[0], parts[1])
    elif len(parts) == 4:
        joined = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    else:
        gl.static_assert(len(parts) == 8)
        even = gl.join(gl.join(parts[0], parts[4]), gl.join(parts[2], parts[6]))
        odd = gl.join(gl.join(parts[1], parts[5]), gl.join(parts[3], parts[7]))
        joined = gl.join(even, odd)
    return gl.reshape(joined, [joined.shape[0], joined.shape[1], len(parts)])


@gluon.jit
def anew(x):
    """Return integers that the compiler takes for others: to compute from again, not to hold."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def over_states(row):
    """Give a (channel lane, channel) tensor the dimensions of states."""
    return gl.expand_dims(gl.expand_dims(row, 0), 1)


@gluon.jit
def over_channels(row):
    """Give a (state lane, state) tensor the dimensions of channels."""
    return gl.expand_dims(gl.expand_dims(row, 2), 3)


@gluon.jit
def passed_back(
    end_ptr, total_ptr, dlast_ptr, A2, at_state, channel, live, live_channel,
    batch, segment, segments, d_inner, state_size, zero, HAS_LAST: gl.constexpr,
):  # fmt: skip
    """Return what all later segments pass back to one, from what each gives of its own."""
    r = zero
    if HAS_LAST:
        r = gl.load(dlast_ptr + batch * state_size + at_state, mask=live, other=0.0)
    for back in range(0, segments - 1 - segment):
        row = batch * segments + (segments - 1 - back)
        end = gl.load(end_ptr + row * state_size + at_state, mask=live, other=0.0)
        total = gl.load(total_ptr + row * d_inner + channel, mask=live_channel, other=0.0)
        r = gl.exp2(over_states(total) * A2) * r + end
    return r


@gluon.jit(
    do_not_specialize=[
        "seqlen_units", "pitch_units", "d_inner", "ngroups", "blocks_per_group", "segment_chunks",
        "segments",
    ]
)  # fmt: skip
def segment_adjoint_kernel(
    delta_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, dout_ptr,
    end_ptr,  # (B, segments, D, D_STATE) fp32
    total_ptr,  # (B, segments, D) fp32
    seqlen_units, pitch_units, d_inner, ngroups, blocks_per_group, segment_chunks, segments,
    D_STATE: gl.constexpr, STATE_BLOCKS: gl.constexpr,
    HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    CHUNK: gl.constexpr, UNIT: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Compute r at a segment's beginning from zero at its end, and the segment's sum of dt.

    For all segments but the first; one block of 16 states in each thread block.
    """
    LANES: gl.constexpr = 4
    STATES: gl.constexpr = 4
    PLACES: gl.constexpr = 8 * WARPS
    BLOCK: gl.constexpr = PLACES * CHANNELS
    FULL: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS], [LANES, 1, 8, 1], [1, 1, WARPS, 1], [3, 1, 0, 2]
    )
    CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, FULL))
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, FULL))
    RUN: gl.constexpr = 16
    RUNS: gl.constexpr = 4 // CHANNELS
    PIECES: gl.constexpr = CHUNK // (RUN * RUNS)
    RUN_WARPS: gl.constexpr = RUNS if RUNS < WARPS else WARPS
    IO: gl.constexpr = gl.BlockedLayout(
        [1, RUN, 1], [1, 1, 32], [RUN_WARPS, 1, WARPS // RUN_WARPS], [1, 2, 0]
    )
    STEP_IO: gl.constexpr = gl.SliceLayout(2, IO)
    CHAN_IO: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, IO))
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [WARPS, 1], [0, 1])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    seqlen = seqlen_units * UNIT
    pitch = pitch_units * UNIT

    pid = gl.program_id(0)
    block = pid % blocks_per_group
    pid = pid // blocks_per_group
    k = pid % STATE_BLOCKS
    pid = pid // STATE_BLOCKS
    group = pid % ngroups
    pid = pid // ngroups
    segment = 1 + pid % (segments - 1)
    batch = (pid // (segments - 1)).to(gl.int64)
    group_channels = d_inner // ngroups
    first_channel = block * BLOCK
    places = gl.arange(0, PLACES, layout=gl.SliceLayout(1, CHAN))
    inner = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, CHAN))
    in_group = first_channel + places[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    state_lanes = gl.arange(0, LANES, layout=gl.SliceLayout(1, STATE))
    states = gl.arange(0, STATES, layout=gl.SliceLayout(0, STATE))
    state = k * 16 + state_lanes[:, None] * STATES + states[None, :]
    at_state = over_states(channel * D_STATE) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
    segment_row = batch * segments + segment
    io_in_group = first_channel + gl.arange(0, BLOCK, layout=CHAN_IO)
    io_live = over_states(io_in_group < group_channels)
    io_channel = group * group_channels + gl.minimum(io_in_group, group_channels - 1)
    runs = gl.arange(0, RUNS, layout=gl.SliceLayout(1, STEP_IO))
    steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, STEP_IO))
    io_step = gl.expand_dims(runs[:, None] * RUN + steps[None, :], 2)
    io_step = io_step + gl.full([RUNS, RUN, BLOCK], 0, gl.int32, layout=IO)
    io_offset = over_states((batch * d_inner + io_channel) * pitch) + io_step
    bias = over_states(gl.load(bias_ptr + io_channel)) if HAS_BIAS else 0.0
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS)) + k * 16
    row_step = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([CHUNK, 16], 0, gl.int32, layout=ROWS)
    row_offset = (((batch * ngroups + group) * D_STATE + row) * pitch)[None, :] + row_step

    rows = gl.allocate_shared_memory(gl.float32, [CHUNK * 2, PLACES, CHANNELS], PLAIN)
    rows_io = rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    C_smem = gl.allocate_shared_memory(gl.float32, [CHUNK, LANES, STATES], PLAIN)
    C_flat = C_smem._reinterpret(gl.float32, [CHUNK, 16], PLAIN)

    A2 = gl.load(A_ptr + at_state, mask=live, other=0.0) * 1.4426950408889634
    r = gl.full([LANES, STATES, PLACES, CHANNELS], 0.0, gl.float32, layout=FULL)
    total = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))
    begin = segment * segment_chunks * CHUNK
    end = gl.minimum(begin + segment_chunks * CHUNK, seqlen)
    for back in range(0, (end - begin + CHUNK - 1) // CHUNK):
        start = begin + ((end - begin - 1) // CHUNK - back) * CHUNK
        for piece in range(PIECES):
            now = start + piece * (RUN * RUNS)
            io_mask = (now + io_step < seqlen) & io_live
            dt = to_fp32(gl.load(delta_ptr + now + io_offset, mask=io_mask, other=0.0))
            dy = to_fp32(gl.load(dout_ptr + now + io_offset, mask=io_mask, other=0.0))
            if HAS_Z:
                z = to_fp32(gl.load(z_ptr + now + io_offset, mask=io_mask, other=0.0))
                dy *= z * sigmoid(z)
            if HAS_BIAS:
                dt += bias
            if SOFTPLUS:
                dt = softplus(dt)
            dt = gl.where(io_mask, dt, 0.0)
            total += gl.sum(dt, 1)
            rows_io.index(piece).slice(0, BLOCK, 2).store(dt)
            rows_io.index(piece).slice(BLOCK, BLOCK, 2).store(dy)
        row_mask = (start + row_step < seqlen) & (row < D_STATE)[None, :]
        C_flat.store(to_fp32(gl.load(C_ptr + start + row_offset, mask=row_mask, other=0.0)))
        for step_back in range(0, CHUNK // 8):
            for s in gl.static_range(8):
                step = CHUNK - 1 - s - step_back * 8
                decay = gl.exp2(over_states(rows.index(2 * step).load(CHAN)) * A2)
                dy_step = over_states(rows.index(2 * step + 1).load(CHAN))
                r = decay * (over_channels(C_smem.index(step).load(STATE)) * dy_step + r)
    gl.store(end_ptr + segment_row * d_inner.to(gl.int64) * D_STATE + at_state, r, mask=live)
    per_channel = segment_row * d_inner + group * group_channels + io_in_group
    keep = (io_in_group < group_channels) & (k == 0)
    gl.store(total_ptr + per_channel, gl.sum(total, 0), mask=keep)


@gluon.jit(
    do_not_specialize=[
        "batches",
        "seqlen_units", "pitch_units", "d_inner", "ngroups", "blocks_per_group",
        "n_chunks", "segment_chunks", "segments", "kept_batch", "kept_chunk", "kept_channel",
    ]
)  # fmt: skip
def scan_backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dout_ptr,
    kept_ptr,  # (B, chunks, D, D_STATE) fp32, by strides: the state before each chunk
    end_ptr, total_ptr,  # of `segment_adjoint_kernel`
    dlast_ptr,  # (B, D, D_STATE) fp32
    r_ptr,  # (B, segments, D, D_STATE) fp32, for more than 16 states: scratch
    first_ptr,  # (B, D, D_STATE) fp32: r at the beginning, for what comes before
    du_ptr, ddelta_ptr, dz_ptr,
    dA_ptr,  # (B, segments, D, D_STATE) fp32
    dD_ptr, dbias_ptr,  # (B, segments, D) fp32
    dBC_ptr,  # (blocks_per_group, B, G, STATE_BLOCKS, L, 2, 16) fp32
    batches, seqlen_units, pitch_units, d_inner, ngroups, blocks_per_group,
    n_chunks, segment_chunks, segments, kept_batch, kept_chunk, kept_channel,
    D_STATE: gl.constexpr, STATE_BLOCKS: gl.constexpr,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    HAS_LAST: gl.constexpr, PASS_ON: gl.constexpr, CHUNK: gl.constexpr, UNIT: gl.constexpr,
    CHANNELS: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Write all gradients: the parameters' per batch and segment, those of B and C per block.

    seqlen is seqlen_units * UNIT, so that the compiler knows how far rows are aligned. It may be
    that of a window of longer rows, pitch_units * UNIT apart: tensors over time then begin at the
    window's first step, kept_ptr at its first state, and dBC is the window's alone. kept_ptr may
    be memory of du, a chunk's state in the chunk's place: it is read before du is written.
    """
    LANES: gl.constexpr = 4  # of states
    STATES: gl.constexpr = 4  # of a thread
    PLACES: gl.constexpr = 8 * WARPS  # lanes of channels, over all warps
    BLOCK: gl.constexpr = PLACES * CHANNELS
    TILES: gl.constexpr = CHUNK // TILE
    # (state lane, state, channel lane, channel); then what is left of it
    FULL: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS], [LANES, 1, 8, 1], [1, 1, WARPS, 1], [3, 1, 0, 2]
    )
    CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, FULL))
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, FULL))
    # rows of u, delta and so on: (run of steps, step, channel), a thread's steps being contiguous
    RUN: gl.constexpr = 16
    RUNS: gl.constexpr = 4 // CHANNELS  # a piece gives every thread one run
    PIECES: gl.constexpr = CHUNK // (RUN * RUNS)
    RUN_WARPS: gl.constexpr = RUNS if RUNS < WARPS else WARPS
    IO: gl.constexpr = gl.BlockedLayout(
        [1, RUN, 1], [1, 1, 32], [RUN_WARPS, 1, WARPS // RUN_WARPS], [1, 2, 0]
    )
    STEP_IO: gl.constexpr = gl.SliceLayout(2, IO)
    CHAN_IO: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, IO))
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [WARPS, 1], [0, 1])
    PARTIAL: gl.constexpr = gl.BlockedLayout([1, WARPS, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    PRIVATE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 0, 2, 1])
    element: gl.constexpr = u_ptr.dtype.element_ty
    LOG2E: gl.constexpr = 1.4426950408889634
    seqlen = seqlen_units * UNIT
    pitch = pitch_units * UNIT

    # which channels, which time
    pid = gl.program_id(0)
    block = pid % blocks_per_group
    group = pid // blocks_per_group % ngroups
    segment = pid // (blocks_per_group * ngroups) % segments
    batch = (pid // (blocks_per_group * ngroups * segments)).to(gl.int64)
    group_channels = d_inner // ngroups
    first_channel = block * BLOCK
    places = gl.arange(0, PLACES, layout=gl.SliceLayout(1, CHAN))
    inner = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, CHAN))
    in_group = first_channel + places[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    state_lanes = gl.arange(0, LANES, layout=gl.SliceLayout(1, STATE))
    states = gl.arange(0, STATES, layout=gl.SliceLayout(0, STATE))
    state = state_lanes[:, None] * STATES + states[None, :]
    at_state = over_states(channel * D_STATE) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
    segment_row = batch * segments + segment
    state_size = d_inner.to(gl.int64) * D_STATE

    io_in_group = first_channel + gl.arange(0, BLOCK, layout=CHAN_IO)
    io_live = over_states(io_in_group < group_channels)
    io_channel = group * group_channels + gl.minimum(io_in_group, group_channels - 1)
    runs = gl.arange(0, RUNS, layout=gl.SliceLayout(1, STEP_IO))
    steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, STEP_IO))
    io_step = gl.expand_dims(runs[:, None] * RUN + steps[None, :], 2)
    io_step = io_step + gl.full([RUNS, RUN, BLOCK], 0, gl.int32, layout=IO)
    io_offset = over_states((batch * d_inner + io_channel) * pitch) + io_step
    bias = over_states(gl.load(bias_ptr + io_channel)) if HAS_BIAS else 0.0
    skip = over_states(gl.load(D_ptr + io_channel)) if HAS_D else 0.0

    row = gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS))
    row_step = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([CHUNK, 16], 0, gl.int32, layout=ROWS)
    row_offset = (((batch * ngroups + group) * D_STATE + row) * pitch)[None, :] + row_step
    part_step = gl.arange(0, TILE, layout=gl.SliceLayout(1, gl.SliceLayout(1, PARTIAL)))[:, None]
    part_place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTIAL)))[None, :]
    part_row = (block.to(gl.int64) * batches + batch) * ngroups + group

    dt_rows = gl.allocate_shared_memory(gl.float32, [CHUNK, PLACES, CHANNELS], PLAIN)
    dt_io = dt_rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, BLOCK], PLAIN3)
    xy_rows = gl.allocate_shared_memory(gl.float32, [CHUNK * 2, PLACES, CHANNELS], PLAIN)
    xy_io = xy_rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    B_smem = gl.allocate_shared_memory(gl.float32, [CHUNK, LANES, STATES], PLAIN)
    C_smem = gl.allocate_shared_memory(gl.float32, [CHUNK, LANES, STATES], PLAIN)
    B_flat = B_smem._reinterpret(gl.float32, [CHUNK, 16], PLAIN)
    C_flat = C_smem._reinterpret(gl.float32, [CHUNK, 16], PLAIN)
    opening = gl.allocate_shared_memory(
        gl.float32, [TILES, LANES, STATES, PLACES, CHANNELS], PRIVATE
    )
    part_smem = gl.allocate_shared_memory(gl.float32, [TILE, WARPS, 32], PLAIN3)
    # sums over states, (step, dx or dlog, channel): in the place of x and dy once these are used up
    if STATE_BLOCKS > 1:
        sums = gl.allocate_shared_memory(gl.float32, [TILES, TILE, 2 * BLOCK], PLAIN)
    else:
        sums = xy_rows._reinterpret(gl.float32, [TILES, TILE, 2 * BLOCK], PLAIN)
    sums_io = sums._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    if HAS_Z:
        y_smem = gl.allocate_shared_memory(gl.float32, [TILES, TILE, BLOCK], PLAIN)
        y_io = y_smem._reinterpret(gl.float32, [PIECES, RUNS, RUN, BLOCK], PLAIN3)

    zero = gl.full([LANES, STATES, PLACES, CHANNELS], 0.0, gl.float32, layout=FULL)
    dA = zero
    r = zero
    if STATE_BLOCKS == 1:
        A2 = gl.load(A_ptr + at_state, mask=live, other=0.0) * LOG2E
        r = passed_back(
            end_ptr, total_ptr, dlast_ptr, A2, at_state, channel, live, in_group < group_channels,
            batch, segment, segments, d_inner, state_size, zero, HAS_LAST,
        )  # fmt: skip
    else:  # r and dA wait in global memory for their block's turn; a thread reads what it wrote
        for k in range(STATE_BLOCKS):
            keep = live & (over_channels(state) + k * 16 < D_STATE)
            A2 = gl.load(A_ptr + at_state + k * 16, mask=keep, other=0.0) * LOG2E
            r = passed_back(
                end_ptr, total_ptr, dlast_ptr, A2, at_state + k * 16, channel, keep,
                in_group < group_channels, batch, segment, segments, d_inner, state_size, zero,
                HAS_LAST,
            )  # fmt: skip
            gl.store(r_ptr + segment_row * state_size + at_state + k * 16, r, mask=keep)
    dD = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))
    dbias = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))

    first_chunk = segment * segment_chunks
    end_chunk = gl.minimum(first_chunk + segment_chunks, n_chunks)
    for back in range(0, end_chunk - first_chunk):
        chunk = end_chunk - 1 - back
        start = chunk * CHUNK
        for piece in range(PIECES):
            now = start + piece * (RUN * RUNS)
            io_mask = (now + io_step < seqlen) & io_live
            u = to_fp32(gl.load(u_ptr + now + io_offset, mask=io_mask, other=0.0))
            dt = to_fp32(gl.load(delta_ptr + now + io_offset, mask=io_mask, other=0.0))
            dy = to_fp32(gl.load(dout_ptr + now + io_offset, mask=io_mask, other=0.0))
            if HAS_Z:
                z = to_fp32(gl.load(z_ptr + now + io_offset, mask=io_mask, other=0.0))
                dy *= z * sigmoid(z)
            if HAS_BIAS:
                dt += bias
            if SOFTPLUS:
                dt = softplus(dt)
            dt = gl.where(io_mask, dt, 0.0)  # steps past the end keep the state
            dt_io.index(piece).store(dt)
            xy_io.index(piece).slice(0, BLOCK, 2).store(dt * u)
            xy_io.index(piece).slice(BLOCK, BLOCK, 2).store(dy)

        for k in range(STATE_BLOCKS):
            row_mask = (start + row_step < seqlen) & (k * 16 + row < D_STATE)[None, :]
            at_row = row_offset + k.to(gl.int64) * 16 * pitch + start
            B_flat.store(to_fp32(gl.load(B_ptr + at_row, mask=row_mask, other=0.0)))
            C_flat.store(to_fp32(gl.load(C_ptr + at_row, mask=row_mask, other=0.0)))
            keep = live & (over_channels(state) + k * 16 < D_STATE)
            kept_row = first_channel + anew(places)[:, None] * CHANNELS + inner[None, :]
            kept_row = (group * group_channels + kept_row) * kept_channel.to(gl.int64)
            kept_row += batch * kept_batch + chunk.to(gl.int64) * kept_chunk
            kept = over_states(kept_row) + over_channels(state) + k * 16
            h = gl.load(kept_ptr + kept, mask=keep, other=0.0)
            if STATE_BLOCKS > 1:
                A2 = gl.load(A_ptr + at_state + k * 16, mask=keep, other=0.0) * LOG2E
                own = segment_row * state_size + at_state + k * 16
                r = gl.load(r_ptr + own, mask=keep, other=0.0)
                dA = gl.load(dA_ptr + own, mask=keep & (back > 0), other=0.0)

            # the state before each tile
            for tile in range(TILES - 1):
                opening.index(tile).store(h)
                for s in gl.static_range(TILE):
                    step = tile * TILE + s
                    decay = gl.exp2(over_states(dt_rows.index(step).load(CHAN)) * A2)
                    x = over_states(xy_rows.index(2 * step).load(CHAN))
                    h = decay * h + x * over_channels(B_smem.index(step).load(STATE))
            opening.index(TILES - 1).store(h)

            for tile_back in range(TILES):
                tile = TILES - 1 - tile_back
                h = opening.index(tile).load(FULL)
                decays = ()
                before = ()
                for s in gl.static_range(TILE):
                    step = tile * TILE + s
                    decay = gl.exp2(over_states(dt_rows.index(step).load(CHAN)) * A2)
                    x = over_states(xy_rows.index(2 * step).load(CHAN))
                    before = before + (h,)  # noqa: RUF005
                    decays = decays + (decay,)  # noqa: RUF005
                    h = decay * h + x * over_channels(B_smem.index(step).load(STATE))
                sums_BC = ()
                sums_x = ()
                sums_log = ()
                sums_y = ()
                for s in gl.static_range(TILE - 1, -1, -1):
                    step = tile * TILE + s
                    dt_step = over_states(dt_rows.index(step).load(CHAN))
                    x = over_states(xy_rows.index(2 * step).load(CHAN))
                    dy_step = over_states(xy_rows.index(2 * step + 1).load(CHAN))
                    B = over_channels(B_smem.index(step).load(STATE))
                    C = over_channels(C_smem.index(step).load(STATE))
                    dh = C * dy_step + r
                    r = decays[s] * dh
                    q = r * before[s]
                    dA += q * dt_step
                    after = h if s == TILE - 1 else before[(s + 1) % TILE]
                    of_B = gl.sum(dh * x, 3)
                    of_C = gl.sum(after * dy_step, 3)
                    of_BC = gl.reduce(sum_channels_over_lanes(of_B, of_C), 1, first)
                    sums_BC = (of_BC,) + sums_BC  # noqa: RUF005
                    of_x = gl.sum(dh * B, 1)
                    of_log = gl.sum(q * A2, 1)
                    if HAS_Z:
                        of_y = gl.sum(after * C, 1)
                    if CHANNELS == 2:
                        of_x = gl.reduce(sum_states_over_lanes(of_x, of_log), 2, first)
                        if HAS_Z:  # of two steps at once
                            if s % 2 == 1:
                                later_y = of_y
                            else:
                                of_y = gl.reduce(sum_states_over_lanes(of_y, later_y), 2, first)
                                sums_y = (of_y,) + sums_y  # noqa: RUF005
                    else:
                        of_x = gl.reduce(sum_steps_over_lanes(of_x, 4), 2, first)
                        of_log = gl.reduce(sum_steps_over_lanes(of_log, 4), 2, first)
                        sums_log = (of_log,) + sums_log  # noqa: RUF005
                        if HAS_Z:
                            of_y = gl.reduce(sum_steps_over_lanes(of_y, 4), 2, first)
                            sums_y = (of_y,) + sums_y  # noqa: RUF005
                    sums_x = (of_x,) + sums_x  # noqa: RUF005

                of_BC = gl.reshape(stack_steps(sums_BC), [LANES, WARPS, 2, STATES, TILE])
                of_BC = gl.permute(of_BC, [4, 1, 2, 0, 3])
                part_smem.store(gl.reshape(of_BC, [TILE, WARPS, 32]))
                if CHANNELS == 2:
                    of_x = gl.reshape(stack_steps(sums_x), [2, 2, PLACES, TILE])
                    of_x = gl.reshape(gl.permute(of_x, [3, 0, 2, 1]), [TILE, 2 * BLOCK])
                else:
                    of_x = gl.join(stack_steps(sums_x), stack_steps(sums_log))
                    of_x = gl.reshape(gl.permute(of_x, [2, 3, 1, 0]), [TILE, 2 * BLOCK])
                if STATE_BLOCKS > 1:
                    SUMS: gl.constexpr = of_x.type.layout
                    so_far = sums.index(tile).load(SUMS)
                    of_x += gl.where(k > 0, so_far, 0.0)
                sums.index(tile).store(of_x)
                if HAS_Z:
                    of_y = stack_steps(sums_y)
                    if CHANNELS == 2:
                        of_y = gl.reshape(of_y, [2, 2, PLACES, TILE // 2])
                        of_y = gl.permute(of_y, [3, 0, 2, 1])
                    else:
                        of_y = gl.permute(of_y, [2, 1, 0])
                    of_y = gl.reshape(of_y, [TILE, BLOCK])
                    if STATE_BLOCKS > 1:
                        SUMS_Y: gl.constexpr = of_y.type.layout
                        so_far = y_smem.index(tile).load(SUMS_Y)
                        of_y += gl.where(k > 0, so_far, 0.0)
                    y_smem.index(tile).store(of_y)
                part = gl.sum(part_smem.load(PARTIAL), 1)
                at = (
                    (part_row * STATE_BLOCKS + k) * seqlen + (start + tile * TILE + part_step)
                ) * 32
                gl.store(
                    dBC_ptr + at + part_place, part, mask=start + tile * TILE + part_step < seqlen
                )
            if STATE_BLOCKS > 1:
                gl.store(r_ptr + own, r, mask=keep)
                gl.store(dA_ptr + own, dA, mask=keep)
                if PASS_ON:  # the last time it is the segment's
                    before_first = first_ptr + batch * state_size + at_state + k * 16
                    gl.store(before_first, r, mask=keep & (segment == 0))

        # du, ddelta and dz, from the inputs again
        for piece in range(PIECES):
            now = start + piece * (RUN * RUNS)
            io_mask = (now + io_step < seqlen) & io_live
            u = to_fp32(gl.load(u_ptr + now + io_offset, mask=io_mask, other=0.0))
            dy = to_fp32(gl.load(dout_ptr + now + io_offset, mask=io_mask, other=0.0))
            if HAS_Z:
                z = to_fp32(gl.load(z_ptr + now + io_offset, mask=io_mask, other=0.0))
                gate = sigmoid(z)
                y = y_io.index(piece).load(IO)
                if HAS_D:
                    y += skip * u
                dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                gl.store(dz_ptr + now + io_offset, dz.to(element), mask=io_mask)
                dy *= z * gate
            dx = sums_io.index(piece).slice(0, BLOCK, 2).load(IO)
            ddelta = (
                sums_io.index(piece).slice(BLOCK, BLOCK, 2).load(IO) * 0.6931471805599453 + u * dx
            )
            if SOFTPLUS:
                raw = to_fp32(gl.load(delta_ptr + now + io_offset, mask=io_mask, other=0.0))
                if HAS_BIAS:
                    raw += bias
                ddelta *= sigmoid(raw)
            du = dt_io.index(piece).load(IO) * dx
            if HAS_D:
                du += skip * dy
                dD += gl.sum(dy * u, 1)
            if HAS_BIAS:
                dbias += gl.sum(gl.where(io_mask, ddelta, 0.0), 1)
            gl.store(du_ptr + now + io_offset, du.to(element), mask=io_mask)
            gl.store(ddelta_ptr + now + io_offset, ddelta.to(element), mask=io_mask)

    if STATE_BLOCKS == 1:
        in_group = first_channel + anew(places)[:, None] * CHANNELS + inner[None, :]
        channel = (group * group_channels + in_group).to(gl.int64)
        at_state = over_states(channel * D_STATE) + over_channels(state)
        live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
        gl.store(dA_ptr + segment_row * state_size + at_state, dA, mask=live)
        if PASS_ON:
            gl.store(first_ptr + batch * state_size + at_state, r, mask=live & (segment == 0))
    per_channel = segment_row * d_inner + group * group_channels + io_in_group
    if HAS_D:
        gl.store(dD_ptr + per_channel, gl.sum(dD, 0), mask=io_in_group < group_channels)
    if HAS_BIAS:
        gl.store(dbias_ptr + per_channel, gl.sum(dbias, 0), mask=io_in_group < group_channels)
