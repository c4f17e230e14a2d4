"""Selective scan (Mamba-1, S6), backward, for Hopper, of more than 16 states: all of a channel's.

The mathematics is that of `hopper_backward_kernel`, as are the parts of a warp: LANES_N lanes of
states times others of channels, 4 states of 2 channels in a thread. Here a block's warps hold all
states of its channels, WARPS_N of them, so that sums over states stay within the block, and few
segments of time fill the GPU; at 128 states and 2,048 channels one does.

A block walks a segment from its end to its beginning, a span (the steps between two states that the
forward kept) at a time. Of a span it

1. stages dt after softplus, dt u and dy in shared memory as fp32;
2. replays the forward and notes the state every MID steps in shared memory, if there are several;
3. of every MID steps, from last to first, replays the forward and notes the state every NOTE steps;
   takes tiles of TILE steps from last to first: replays a tile from the note before it, with states
   and decays in registers, and walks it back;
4. writes du, ddelta and dz.

So the forward may keep states so far apart that they fit into du. Partial sums of dB and dC are
written every EXCHANGE steps, by column (dB's states, then dC's) and step, and added up by all
blocks of the group, in a fixed order, an exchange later. Where the GPU cannot hold a block for
every channel, channels are divided among launches, and sums go on in fp32 from one to the next.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambench.kernels.s6.hopper_backward_kernel import (
    acquire,
    anew,
    count_in,
    load_states,
    over_channels,
    over_states,
    sigmoid,
    stack_steps,
    sum_channels_over_lanes,
    sum_states_over_lanes,
)
from mambench.kernels.s6.hopper_lanes import first, softplus, to_fp32


@gluon.jit
def sum_channels_over_4_lanes(of_B, of_C):
    """Sum 4 states' dB and dC over the 4 lanes of channels (lane bits 3 and 4).

    The first two registers then hold the sums of the first two states, or of the last two where
    bit 3 is set, of dB, or of dC where bit 4 is set; the others nothing of use.
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred q, r; .reg .b32 l, i; .reg .f32 k0, k1, k2, k3, s0, s1, s2, s3;
        mov.u32 l, %laneid;
        and.b32 i, l, 16; setp.ne.b32 r, i, 0;
        and.b32 i, l, 8; setp.ne.b32 q, i, 0;
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
        add.f32 $0, k0, s0; add.f32 $1, k1, s1;
        mov.f32 $2, 0f00000000; mov.f32 $3, 0f00000000;
        }""",
        "=&f,=&f,=&f,=&f,f,f,f,f,f,f,f,f",
        [of_B, of_C],
        dtype=gl.float32,
        is_pure=True,
        pack=4,
    )


@gluon.jit
def walk(h, A2, dt_rows, xy_rows, B_smem, step, row, STEPS: gl.constexpr, FULL: gl.constexpr):
    """Return the state STEPS steps on, from a step of the span and the row of B staged for it."""
    CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, FULL))
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, FULL))
    for s in gl.static_range(STEPS):
        decay = gl.exp2(over_states(dt_rows.index(step + s).load(CHAN)) * A2)
        x = over_states(xy_rows.index(2 * (step + s)).load(CHAN))
        h = decay * h + x * over_channels(B_smem.index(row + s).load(STATE))
    return h


@gluon.constexpr_function
def note_shape(notes):
    """(state warp, state lane, state, channel warp, channel lane, channel)."""
    return [int(n) for n in notes.shape][1:]


@gluon.jit
def take_notes(
    h, notes, A2, dt_rows, xy_rows, B_smem, C_smem, B_ptr, row_offset, row_step, row_real, begin,
    start, seqlen,
    LENGTH: gl.constexpr, NOTE: gl.constexpr, STAGE: gl.constexpr, TILE: gl.constexpr,
    FULL: gl.constexpr,
):  # fmt: skip
    """Note the state every NOTE of LENGTH steps, from step `begin` of the span from start on.

    h is the state before; steps after the last note are not gone through. B is staged in C's
    place, too.
    """
    GRAIN: gl.constexpr = NOTE if NOTE < STAGE else STAGE
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    N: gl.constexpr = B_smem.shape[1] * B_smem.shape[2]
    B_flat = B_smem._reinterpret(gl.float32, [STAGE, N], FLAT)
    C_flat = C_smem._reinterpret(gl.float32, [STAGE, N], FLAT)
    now = start + begin
    mask = (now + row_step < seqlen) & row_real
    rows = gl.load(B_ptr + now + row_offset, mask=mask, other=0.0)
    mask = (now + STAGE + row_step < seqlen) & row_real
    more_rows = gl.load(B_ptr + now + STAGE + row_offset, mask=mask, other=0.0)
    for stage in range(0, LENGTH, 2 * STAGE):
        gl.thread_barrier()
        B_flat.store(to_fp32(rows))
        C_flat.store(to_fp32(more_rows))
        gl.thread_barrier()
        now = start + begin + stage + 2 * STAGE
        real = row_real & (stage < LENGTH - 2 * STAGE)
        mask = (now + row_step < seqlen) & real
        rows = gl.load(B_ptr + now + row_offset, mask=mask, other=0.0)
        mask = (now + STAGE + row_step < seqlen) & real
        more_rows = gl.load(B_ptr + now + STAGE + row_offset, mask=mask, other=0.0)
        for half in gl.static_range(2):
            for part in range(STAGE // GRAIN):
                at = stage + half * STAGE + part * GRAIN
                if at % NOTE == 0:
                    notes.index(at // NOTE).store(gl.reshape(h, note_shape(notes)))
                if at // NOTE < LENGTH // NOTE - 1:
                    for tile in range(GRAIN // TILE):
                        row = part * GRAIN + tile * TILE
                        step = begin + stage + half * STAGE + row
                        staged = B_smem if half == 0 else C_smem
                        h = walk(h, A2, dt_rows, xy_rows, staged, step, row, TILE, FULL)


@gluon.jit
def noted(notes, which, FULL: gl.constexpr):
    """Return a note."""
    SHAPE: gl.constexpr = note_shape(notes)
    SIZES: gl.constexpr = [SHAPE[0] * SHAPE[1], SHAPE[2], SHAPE[3] * SHAPE[4], SHAPE[5]]
    like = gl.full(SIZES, 0.0, gl.float32, layout=FULL)
    LAYOUT: gl.constexpr = gl.reshape(like, SHAPE).type.layout
    return gl.convert_layout(gl.reshape(notes.index(which).load(LAYOUT), SIZES), FULL)


@gluon.jit
def signal(counter_ptr):
    """Add 1 to a counter, by one thread, that makes visible what was written before a barrier."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred p; .reg .b32 t;
        mov.u32 t, %tid.x; setp.eq.u32 p, t, 0;
        @p red.release.gpu.global.add.u32 [$1], 1;
        mov.u32 $0, t;
        }""",
        "=r,l",
        [counter_ptr.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.constexpr_function
def share_layout(share, warps):
    """(source, place) tiles: a thread has 4 places of a source, warps different places."""
    pieces = share // 4
    across = min(warps, pieces)
    lanes = min(32, pieces // across)
    return gl.BlockedLayout([1, 4], [32 // lanes, lanes], [warps // across, across], [1, 0])


@gluon.jit
def add_up_columns(
    part_ptr, block, blocks, dBC_ptr, sum_ptr, row, batch_groups, seqlen, start,
    D_STATE: gl.constexpr, N: gl.constexpr, EXCHANGE: gl.constexpr, SHARE: gl.constexpr,
    SOURCES: gl.constexpr, EVEN: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the blocks' partial sums of dB and dC, in a fixed order, of this block's SHARE places.

    part_ptr: of the first block; a place is a column (of 2 N) and one of the EXCHANGE steps from
    start. SOURCES are loaded at once; EVEN: without a mask, as blocks and places divide. sum_ptr:
    fp32 of dBC's shape, the sums so far of all launches but the LAST, for all but the FIRST.
    """
    PLACES: gl.constexpr = 2 * N * EXCHANGE
    TILE: gl.constexpr = share_layout(SHARE, WARPS)
    source = gl.arange(0, SOURCES, layout=gl.SliceLayout(1, TILE))[:, None]
    place = block * SHARE + gl.arange(0, SHARE, layout=gl.SliceLayout(0, TILE))
    at = part_ptr + (source * PLACES + place[None, :])
    total = gl.full([SHARE], 0.0, gl.float32, layout=gl.SliceLayout(0, TILE))
    for begin in range(0, blocks, SOURCES):
        if EVEN:
            tile = gl.load(at + begin * PLACES, cache_modifier=".cg")
        else:
            mask = (begin + source < blocks) & (place < PLACES)[None, :]
            tile = gl.load(at + begin * PLACES, mask=mask, other=0.0, cache_modifier=".cg")
        total += gl.sum(tile, 0)
    step = start + place % EXCHANGE
    column = place // EXCHANGE
    out = ((column // N * batch_groups + row) * D_STATE + column % N) * seqlen + step
    mask = (place < PLACES) & (step < seqlen) & (column % N < D_STATE)
    if not FIRST:
        total += gl.load(sum_ptr + out, mask=mask, other=0.0)
    if LAST:
        gl.store(dBC_ptr + out, total.to(dBC_ptr.dtype.element_ty), mask=mask)
    else:
        gl.store(sum_ptr + out, total, mask=mask)


@gluon.jit(
    do_not_specialize=[
        "batches", "seqlen_units", "d_inner", "ngroups", "blocks_per_group", "n_spans",
        "segment_spans", "segments", "rows", "r_batch", "r_segment", "r_channel", "first_block",
    ]
)  # fmt: skip
def scan_backward_wide_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dout_ptr,
    kept_ptr,  # fp32, the state before each span: (B, spans, D, D_STATE), or du itself
    head_ptr,  # (B, segments, D, D_STATE) fp32: the state before each segment, or None
    r_ptr,  # (B, segments, D, D_STATE) fp32, by strides: passed back to each segment
    du_ptr, ddelta_ptr, dz_ptr,
    part_ptr,  # fp32, partial sums of dB and dC: SLOTS sets of (rows, G, blocks, 2 N, EXCHANGE)
    sum_ptr,  # fp32, as dBC, or None: sums of dB and dC from launch to launch
    counter_ptr,  # int32, zero: 64 for each (row, group), then 64 for each block of channels
    dA_ptr, dD_ptr, dbias_ptr,  # (D, D_STATE), (D,), (D,) fp32
    dBC_ptr,  # (2, B, G, D_STATE, L)
    batches, seqlen_units, d_inner, ngroups, blocks_per_group, n_spans, segment_spans, segments,
    rows, r_batch, r_segment, r_channel, first_block,
    D_STATE: gl.constexpr, HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr,
    SOFTPLUS: gl.constexpr, HAS_R: gl.constexpr, IN_DU: gl.constexpr, BEFORE: gl.constexpr,
    HEADS: gl.constexpr, FIRST: gl.constexpr, LAST: gl.constexpr, SPAN: gl.constexpr,
    MID: gl.constexpr, STAGE: gl.constexpr, EXCHANGE: gl.constexpr, SLOTS: gl.constexpr,
    NOTE: gl.constexpr, TILE: gl.constexpr, UNIT: gl.constexpr, LANES_N: gl.constexpr,
    WARPS_N: gl.constexpr, WARPS_D: gl.constexpr, SHARE: gl.constexpr, SOURCES: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    """Write all gradients. All blocks must be on the GPU at once: they wait for each other.

    rows x G x blocks_per_group blocks, of each group those from first_block on; those of a row go
    through the same items (batch, segment) together and add up their partial sums as they go.

    seqlen is seqlen_units * UNIT, so that the compiler knows how far rows are aligned. IN_DU: the
    state before a span lies in the first whole words of that span of du, or of the one BEFORE it;
    both are written after that state was read. HEADS: that before a segment does not, as the span
    before is another's. STAGE steps of B and C are staged at a time. With one of SLOTS, partial
    sums are written over others when all have read these.
    """
    WARPS: gl.constexpr = WARPS_N * WARPS_D
    LANES_D: gl.constexpr = 32 // LANES_N
    LANES: gl.constexpr = LANES_N * WARPS_N  # of states, over all warps
    STATES: gl.constexpr = 4  # of a thread
    CHANNELS: gl.constexpr = 2
    PLACES: gl.constexpr = LANES_D * WARPS_D  # lanes of channels, over all warps
    WAYS: gl.constexpr = LANES // 4  # sums over 4 lanes of states, for each channel
    N: gl.constexpr = LANES * STATES
    BLOCK: gl.constexpr = PLACES * CHANNELS
    RATIO: gl.constexpr = NOTE // TILE
    TILES: gl.constexpr = SPAN // TILE
    GROUP: gl.constexpr = EXCHANGE // TILE
    PART: gl.constexpr = 2 * N * EXCHANGE
    element: gl.constexpr = u_ptr.dtype.element_ty
    WORD: gl.constexpr = element.primitive_bitwidth // 8
    # (state lane, state, channel lane, channel); then what is left of it
    FULL: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS],
        [LANES_N, 1, LANES_D, 1],
        [WARPS_N, 1, WARPS_D, 1],
        [3, 1, 0, 2],
    )
    CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, FULL))
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, FULL))
    # the same elements in a thread, but states first: for accesses to global memory of 4 states
    WIDE: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS],
        [LANES_N, 1, LANES_D, 1],
        [WARPS_N, 1, WARPS_D, 1],
        [1, 3, 0, 2],
    )
    WIDE_CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, WIDE))
    WIDE_STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, WIDE))
    # rows of u, delta and so on: (run of steps, step, channel), a thread's steps being contiguous
    RUN: gl.constexpr = 8
    RUNS: gl.constexpr = LANES_N // 2 * WARPS_N  # a piece gives every thread one run
    PIECE: gl.constexpr = RUN * RUNS
    PIECES: gl.constexpr = SPAN // PIECE
    IO: gl.constexpr = gl.BlockedLayout(
        [1, RUN, 1], [LANES_N // 2, 1, 2 * LANES_D], [WARPS_N, 1, WARPS_D], [1, 0, 2]
    )
    STEP_IO: gl.constexpr = gl.SliceLayout(2, IO)
    CHAN_IO: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, IO))
    # rows of B and C: (step, state)
    ALONG: gl.constexpr = min(STAGE // 8, WARPS)
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [ALONG, WARPS // ALONG], [0, 1])
    # what is summed over warps
    OF_STATES: gl.constexpr = gl.BlockedLayout(
        [WAYS, 1, 1], [1, LANES_N // 4, 4 * LANES_D], [1, WARPS_N, WARPS_D], [2, 1, 0]
    )
    OF_CHANNELS: gl.constexpr = gl.BlockedLayout(
        [TILE // WARPS_D, WARPS_D, 1], [1, 1, 32], [WARPS_D, 1, WARPS_N], [0, 2, 1]
    )
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    PRIVATE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [5, 1, 4, 0, 3, 2])
    LOG2E: gl.constexpr = 1.4426950408889634
    seqlen = seqlen_units * UNIT

    pid = gl.program_id(0)
    block = pid % blocks_per_group
    group = pid // blocks_per_group % ngroups
    team = pid // (blocks_per_group * ngroups)
    items = batches * segments
    written_ptr = counter_ptr + (team * ngroups + group) * 64  # partial sums of this many blocks
    read_ptr = written_ptr + 32
    column_ptr = counter_ptr + (rows * ngroups + group * blocks_per_group + block) * 64
    group_channels = d_inner // ngroups
    first_channel = (first_block + block) * BLOCK
    places = gl.arange(0, PLACES, layout=gl.SliceLayout(1, WIDE_CHAN))
    inner = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, WIDE_CHAN))
    in_group = first_channel + places[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    state_lanes = gl.arange(0, LANES, layout=gl.SliceLayout(1, WIDE_STATE))
    states = gl.arange(0, STATES, layout=gl.SliceLayout(0, WIDE_STATE))
    state = state_lanes[:, None] * STATES + states[None, :]
    at_state = over_states(channel * D_STATE) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)

    io_in_group = first_channel + gl.arange(0, BLOCK, layout=CHAN_IO)
    io_live = over_states(io_in_group < group_channels)
    io_channel = group * group_channels + gl.minimum(io_in_group, group_channels - 1)
    runs = gl.arange(0, RUNS, layout=gl.SliceLayout(1, STEP_IO))
    steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, STEP_IO))
    io_step = gl.expand_dims(runs[:, None] * RUN + steps[None, :], 2)
    io_step = io_step + gl.full([RUNS, RUN, BLOCK], 0, gl.int32, layout=IO)

    row = gl.arange(0, N, layout=gl.SliceLayout(0, ROWS))
    row_step = gl.arange(0, STAGE, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([STAGE, N], 0, gl.int32, layout=ROWS)
    row_real = (row < D_STATE)[None, :]

    dt_rows = gl.allocate_shared_memory(gl.float32, [SPAN, PLACES, CHANNELS], PLAIN)
    dt_io = dt_rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, BLOCK], PLAIN3)
    xy_rows = gl.allocate_shared_memory(gl.float32, [SPAN * 2, PLACES, CHANNELS], PLAIN)
    xy_io = xy_rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    # sums over states, (step, dx or dlog, channel): in the place of x and dy once these are used
    # up; and with a gate y in the place of dt
    sums = xy_rows._reinterpret(gl.float32, [TILES, TILE, 2 * BLOCK], PLAIN)
    y_sums = dt_rows._reinterpret(gl.float32, [TILES, TILE, BLOCK], PLAIN)
    B_smem = gl.allocate_shared_memory(gl.float32, [STAGE, LANES, STATES], PLAIN)
    C_smem = gl.allocate_shared_memory(gl.float32, [STAGE, LANES, STATES], PLAIN)
    B_flat = B_smem._reinterpret(gl.float32, [STAGE, N], PLAIN)
    C_flat = C_smem._reinterpret(gl.float32, [STAGE, N], PLAIN)
    if MID < SPAN:
        openings = gl.allocate_shared_memory(
            gl.float32, [SPAN // MID, WARPS_N, LANES_N, STATES, WARPS_D, LANES_D, CHANNELS], PRIVATE
        )
    notes = gl.allocate_shared_memory(
        gl.float32, [MID // NOTE, WARPS_N, LANES_N, STATES, WARPS_D, LANES_D, CHANNELS], PRIVATE
    )
    x_parts = gl.allocate_shared_memory(gl.float32, [GROUP, WAYS, TILE, 2 * BLOCK], PLAIN3)
    if HAS_Z:
        y_parts = gl.allocate_shared_memory(gl.float32, [GROUP, WAYS, TILE, BLOCK], PLAIN3)
    if WARPS_D > 1:
        BC_parts = gl.allocate_shared_memory(gl.float32, [TILE, WARPS_D, 2 * N], PLAIN3)

    zero = gl.full([LANES, STATES, PLACES, CHANNELS], 0.0, gl.float32, layout=FULL)
    dA = zero
    A2 = load_states(A_ptr + at_state, live, FULL) * LOG2E
    dD = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))
    dbias = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))

    iteration = pid * 0  # of (item, exchange)
    # the partial sums that are not added up yet: of what
    old_row = (pid * 0).to(gl.int64)
    old_start = pid * 0
    for item in range(team, items, rows):
        batch = (item // segments).to(gl.int64)
        segment = item % segments
        io_offset = over_states((batch * d_inner + io_channel) * seqlen) + io_step
        shared_row = batch * ngroups + group
        row_offset = ((shared_row * D_STATE + row) * seqlen)[None, :] + row_step
        r = zero
        if HAS_R:
            r_at = over_states(channel * r_channel.to(gl.int64)) + over_channels(state)
            r_at += batch * r_batch + segment.to(gl.int64) * r_segment
            r = load_states(r_ptr + r_at, live, FULL)
        first_span = segment * segment_spans
        count = gl.minimum(segment_spans, n_spans - first_span)
        for back in range(0, count):
            span = first_span + count - 1 - back
            start = span * SPAN
            bias = over_states(gl.load(bias_ptr + io_channel)) if HAS_BIAS else 0.0
            for piece in range(PIECES):
                now = start + piece * PIECE
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

            # the state before each note
            if IN_DU:
                kept_row = (batch * d_inner + channel) * seqlen
                kept = ((kept_row + (span - BEFORE) * SPAN) * WORD + 3) // 4
                kept = over_states(kept) + over_channels(state)
                there = span > (first_span if HEADS else 0)
            else:
                kept = (batch * n_spans + span) * d_inner * D_STATE + at_state
                there = span > 0
            h = load_states(kept_ptr + kept, live & there, FULL)
            if HEADS:
                head = (batch * segments + segment) * d_inner * D_STATE + at_state
                h += load_states(head_ptr + head, live & (span == first_span) & (span > 0), FULL)
            if MID < SPAN:
                take_notes(
                    h, openings, A2, dt_rows, xy_rows, B_smem, C_smem, B_ptr, row_offset, row_step,
                    row_real, pid * 0, start, seqlen, SPAN, MID, STAGE, TILE, FULL,
                )  # fmt: skip

            now = start + SPAN - STAGE
            row_mask = (now + row_step < seqlen) & row_real
            B_rows = gl.load(B_ptr + now + row_offset, mask=row_mask, other=0.0)
            C_rows = gl.load(C_ptr + now + row_offset, mask=row_mask, other=0.0)
            for chunk_back in range(SPAN // STAGE):
                chunk = SPAN // STAGE - 1 - chunk_back
                if chunk_back % (MID // STAGE) == 0:
                    mid = chunk // (MID // STAGE)
                    if MID < SPAN:
                        h = noted(openings, mid, FULL)
                    take_notes(
                        h, notes, A2, dt_rows, xy_rows, B_smem, C_smem, B_ptr, row_offset, row_step,
                        row_real, mid * MID, start, seqlen, MID, NOTE, STAGE, TILE, FULL,
                    )  # fmt: skip
                    gl.thread_barrier()
                now = start + chunk * STAGE
                B_flat.store(to_fp32(B_rows))
                C_flat.store(to_fp32(C_rows))
                gl.thread_barrier()
                for exchange_back in range(STAGE // EXCHANGE):
                    exchange = STAGE // EXCHANGE - 1 - exchange_back
                    slot = iteration % SLOTS * rows + team
                    part_at = (slot * ngroups + group).to(gl.int64) * blocks_per_group * PART
                    if iteration > 0:  # only now, when what was written has arrived
                        signal(written_ptr)
                    for tile_back in range(GROUP):
                        in_group_tile = GROUP - 1 - tile_back
                        in_chunk_tile = exchange * GROUP + in_group_tile
                        base = chunk * STAGE
                        tile = chunk * (STAGE // TILE) + in_chunk_tile
                        h = noted(notes, tile % (MID // TILE) // RATIO, FULL)
                        for late in range(in_chunk_tile // RATIO * RATIO, in_chunk_tile):
                            row_at = late * TILE
                            h = walk(
                                h, A2, dt_rows, xy_rows, B_smem, base + row_at, row_at, TILE, FULL
                            )
                        decays = ()
                        before = ()
                        for s in gl.static_range(TILE):
                            in_chunk = in_chunk_tile * TILE + s
                            step = base + in_chunk
                            decay = gl.exp2(over_states(dt_rows.index(step).load(CHAN)) * A2)
                            x = over_states(xy_rows.index(2 * step).load(CHAN))
                            before = before + (h,)  # noqa: RUF005
                            decays = decays + (decay,)  # noqa: RUF005
                            h = decay * h + x * over_channels(B_smem.index(in_chunk).load(STATE))
                        sums_BC = ()
                        sums_x = ()
                        sums_y = ()
                        for s in gl.static_range(TILE - 1, -1, -1):
                            in_chunk = in_chunk_tile * TILE + s
                            step = base + in_chunk
                            dt_step = over_states(dt_rows.index(step).load(CHAN))
                            x = over_states(xy_rows.index(2 * step).load(CHAN))
                            dy_step = over_states(xy_rows.index(2 * step + 1).load(CHAN))
                            B = over_channels(B_smem.index(in_chunk).load(STATE))
                            C = over_channels(C_smem.index(in_chunk).load(STATE))
                            dh = C * dy_step + r
                            r = decays[s] * dh
                            q = r * before[s]
                            dA += q * dt_step
                            after = h if s == TILE - 1 else before[(s + 1) % TILE]
                            of_B = gl.sum(dh * x, 3)
                            of_C = gl.sum(after * dy_step, 3)
                            if LANES_N == 4:
                                of_BC = gl.reduce(sum_channels_over_lanes(of_B, of_C), 1, first)
                            else:
                                of_BC = sum_channels_over_4_lanes(of_B, of_C)
                                of_BC = gl.reshape(of_BC, [LANES, 2, 2, PLACES])
                                of_BC = gl.reduce(of_BC, 1, first)
                                of_BC = gl.reshape(of_BC, [LANES * 2, PLACES])
                            sums_BC = (of_BC,) + sums_BC  # noqa: RUF005
                            of_x = gl.sum(dh * B, 1)
                            of_log = gl.sum(q * A2, 1)
                            of_x = gl.reduce(sum_states_over_lanes(of_x, of_log), 2, first)
                            sums_x = (of_x,) + sums_x  # noqa: RUF005
                            if HAS_Z:  # of two steps at once
                                of_y = gl.sum(after * C, 1)
                                if s % 2 == 1:
                                    later_y = of_y
                                else:
                                    of_y = gl.reduce(sum_states_over_lanes(of_y, later_y), 2, first)
                                    sums_y = (of_y,) + sums_y  # noqa: RUF005

                        of_x = gl.reshape(stack_steps(sums_x), [WAYS, 2, 2, PLACES, TILE])
                        of_x = gl.permute(of_x, [0, 4, 1, 3, 2])
                        of_x = gl.reshape(of_x, [WAYS, TILE, 2 * BLOCK])
                        x_parts.index(in_group_tile).store(of_x)
                        if HAS_Z:
                            of_y = stack_steps(sums_y)
                            of_y = gl.reshape(of_y, [WAYS, 2, 2, PLACES, TILE // 2])
                            of_y = gl.permute(of_y, [0, 4, 1, 3, 2])
                            of_y = gl.reshape(of_y, [WAYS, TILE, BLOCK])
                            y_parts.index(in_group_tile).store(of_y)
                        # not before: those of an exchange ago take their time to arrive
                        if (tile_back == 0) & (iteration > 0):
                            acquire(written_ptr, iteration * blocks_per_group)
                            old = (iteration - 1) % SLOTS * rows + team
                            old_at = (old * ngroups + group).to(gl.int64) * blocks_per_group * PART
                            add_up_columns(
                                part_ptr + old_at, anew(block), blocks_per_group, dBC_ptr, sum_ptr,
                                old_row, batches * ngroups, seqlen, old_start,
                                D_STATE, N, EXCHANGE, SHARE, SOURCES, EVEN, FIRST, LAST, WARPS,
                            )  # fmt: skip
                            if SLOTS == 1:
                                count_in(read_ptr)
                                acquire(read_ptr, iteration * blocks_per_group)
                        of_BC = stack_steps(sums_BC)
                        if LANES_N == 4:
                            of_BC = gl.reshape(of_BC, [LANES, WARPS_D, 2, STATES, TILE])
                            of_BC = gl.permute(of_BC, [1, 2, 0, 3, 4])
                        else:
                            of_BC = gl.reshape(of_BC, [LANES, 2, WARPS_D, 2, 2, TILE])
                            of_BC = gl.permute(of_BC, [2, 3, 0, 4, 1, 5])
                        if WARPS_D > 1:
                            of_BC = gl.reshape(of_BC, [WARPS_D, 2 * N, TILE])
                            of_BC = gl.permute(of_BC, [2, 0, 1])
                            BC_parts.store(of_BC)
                            part = gl.sum(BC_parts.load(OF_CHANNELS), 1)
                            part = gl.permute(part, [1, 0])
                        else:
                            part = gl.reshape(of_BC, [2 * N, TILE])
                        OF_PART: gl.constexpr = part.type.layout
                        column = gl.arange(0, 2 * N, layout=gl.SliceLayout(1, OF_PART))
                        at = gl.arange(0, TILE, layout=gl.SliceLayout(0, OF_PART))
                        at = column[:, None] * EXCHANGE + (in_group_tile * TILE + at)[None, :]
                        gl.store(part_ptr + part_at + block * PART + at, part)
                    iteration += 1
                    old_row = shared_row
                    old_start = now + exchange * EXCHANGE
                    before_now = now - STAGE  # of the chunk that is next, whose loads begin
                    row_mask = (before_now + row_step < seqlen) & row_real
                    row_mask = row_mask & (chunk > 0) & (exchange == 0)
                    B_rows = gl.load(B_ptr + before_now + row_offset, mask=row_mask, other=0.0)
                    C_rows = gl.load(C_ptr + before_now + row_offset, mask=row_mask, other=0.0)
                    gl.thread_barrier()
                    for i in gl.static_range(GROUP):
                        tile = (chunk * (STAGE // EXCHANGE) + exchange) * GROUP + i
                        sums.index(tile).store(gl.sum(x_parts.index(i).load(OF_STATES), 0))
                        if HAS_Z:
                            y_sums.index(tile).store(gl.sum(y_parts.index(i).load(OF_STATES), 0))

            # du, ddelta and dz, from the inputs again
            skip = over_states(gl.load(D_ptr + io_channel)) if HAS_D else 0.0
            for piece in range(PIECES):
                now = start + piece * PIECE
                io_mask = (now + io_step < seqlen) & io_live
                u = to_fp32(gl.load(u_ptr + now + io_offset, mask=io_mask, other=0.0))
                dy = to_fp32(gl.load(dout_ptr + now + io_offset, mask=io_mask, other=0.0))
                raw = to_fp32(gl.load(delta_ptr + now + io_offset, mask=io_mask, other=0.0))
                if HAS_BIAS:
                    raw += bias
                if HAS_Z:
                    z = to_fp32(gl.load(z_ptr + now + io_offset, mask=io_mask, other=0.0))
                    gate = sigmoid(z)
                    y = dt_io.index(piece).load(IO)
                    if HAS_D:
                        y += skip * u
                    dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                    gl.store(dz_ptr + now + io_offset, dz.to(element), mask=io_mask)
                    dy *= z * gate
                    dt = softplus(raw) if SOFTPLUS else raw
                else:
                    dt = dt_io.index(piece).load(IO)
                dx = xy_io.index(piece).slice(0, BLOCK, 2).load(IO)
                dlog = xy_io.index(piece).slice(BLOCK, BLOCK, 2).load(IO)
                ddelta = dlog * 0.6931471805599453 + u * dx
                if SOFTPLUS:
                    ddelta *= sigmoid(raw)
                du = dt * dx
                if HAS_D:
                    du += skip * dy
                    dD += gl.sum(dy * u, 1)
                if HAS_BIAS:
                    dbias += gl.sum(gl.where(io_mask, ddelta, 0.0), 1)
                gl.store(du_ptr + now + io_offset, du.to(element), mask=io_mask)
                gl.store(ddelta_ptr + now + io_offset, ddelta.to(element), mask=io_mask)

    signal(written_ptr)
    acquire(written_ptr, iteration * blocks_per_group)
    old = (iteration - 1) % SLOTS * rows + team
    old_at = (old * ngroups + group).to(gl.int64) * blocks_per_group * PART
    add_up_columns(
        part_ptr + old_at, block, blocks_per_group, dBC_ptr, sum_ptr, old_row, batches * ngroups,
        seqlen, old_start, D_STATE, N, EXCHANGE, SHARE, SOURCES, EVEN, FIRST, LAST, WARPS,
    )  # fmt: skip
    # one row after the other adds what it has summed up
    acquire(column_ptr, team)
    later = team > 0
    in_group = first_channel + anew(places)[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    at = over_states(channel * D_STATE) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
    dA = gl.convert_layout(dA, WIDE)
    dA += gl.load(dA_ptr + at, mask=live & later, other=0.0, cache_modifier=".cg")
    gl.store(dA_ptr + at, dA, mask=live)
    own = io_in_group < group_channels
    if HAS_D:
        total = gl.sum(dD, 0)
        total += gl.load(dD_ptr + io_channel, mask=own & later, other=0.0, cache_modifier=".cg")
        gl.store(dD_ptr + io_channel, total, mask=own)
    if HAS_BIAS:
        total = gl.sum(dbias, 0)
        total += gl.load(dbias_ptr + io_channel, mask=own & later, other=0.0, cache_modifier=".cg")
        gl.store(dbias_ptr + io_channel, total, mask=own)
    count_in(column_ptr)
