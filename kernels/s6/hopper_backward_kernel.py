"""Selective scan (Mamba-1, S6), backward, for Hopper, of up to 16 states: parallel over time.

With dh_t the gradient of the state after step t and r_t = decay_t dh_t what step t - 1 gets of it:

    dh_t = C_t dy_t + r_{t+1}              dx_t = sum_n B_t dh_t           (x = dt u)
    q_t  = r_t h_{t-1}, the gradient of dt_t A                            dA = sum_t q_t dt_t
    dB_t = sum_d dh_t x_t                  dC_t = sum_d dy_t h_t
    ddt_t = sum_n q_t A + u_t dx_t         du_t = dt_t dx_t + D dy_t

A block of WARPS warps walks one segment of time of BLOCK channels from its end to its beginning, a
chunk (the steps between two states that the forward kept) at a time. What later segments pass back
has been made before by `segment_adjoint_kernel`, of which a block
combines what it needs. Within a chunk it

1. stages dt after softplus, dt u, dy, B and C in shared memory as fp32;
2. replays the forward from the kept state and notes the state before every TILE steps;
3. takes the tiles from last to first: replays a tile with states and decays in registers, and walks
   it back.

A warp's lanes are 4 of states times 8 of channels; a thread holds 4 states of CHANNELS channels, so
that sums over states and over channels both begin in registers. Over lanes they are taken by
exchanges that halve what a lane holds, so that a lane ends with the sum of one channel or state.
dB and dC are summed over the block's channels in a fixed order and written as fp32 partial sums.

All of a chunk's loads are under way at once, and so are those of the partial sums that a block adds
up, while states are replayed: what is done once a chunk waits more than it computes.
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
def load_states(ptr, mask, layout: gl.constexpr):
    """Load states, with zeros where they are none, to a layout of the same elements in a thread."""
    return gl.convert_layout(gl.load(ptr, mask=mask, other=0.0), layout)


@gluon.jit
def acquired(counter_ptr):
    """Return a counter's value; what was written before it was counted is visible from here on."""
    return gl.inline_asm_elementwise(
        "ld.acquire.gpu.global.u32 $0, [$1];",
        "=r,l",
        [counter_ptr.to(gl.int64)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def acquire(counter_ptr, count):
    """Wait until a counter has reached a count, each thread for itself.

    Not by one thread for all: where nothing uses what that loads, ptxas 12.8 has been seen to lose
    the predicate of that thread, also for the count that follows.
    """
    seen = acquired(counter_ptr)
    while seen < count:
        seen = acquired(counter_ptr)


@gluon.jit
def count_in(counter_ptr):
    """Add 1 to a counter once all the block's threads are here, and their writes visible."""
    gl.thread_barrier()
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
def tile_layout(share, warps):
    """(source, share, 32) tiles: a warp has 32 columns, different ones of the share first."""
    along = min(share, warps)
    return gl.BlockedLayout([1, 1, 1], [1, 1, 32], [warps // along, along, 1], [2, 1, 0])


@gluon.jit
def load_sums(
    part_ptr, block_stride, step_stride, block, blocks, begin, live,
    CHUNK: gl.constexpr, SHARE: gl.constexpr, EVEN: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Load some blocks' partial sums of dB and dC, from `begin` on, of this block's SHARE steps.

    part_ptr: of the first block's first step in the chunk; live: whether there are any. EVEN:
    blocks divide, so that all that are asked for are there.
    """
    TILE: gl.constexpr = tile_layout(SHARE, WARPS)
    APART: gl.constexpr = WARPS // min(SHARE, WARPS)  # sources at once
    source = gl.arange(0, APART, layout=gl.SliceLayout(1, gl.SliceLayout(2, TILE)))
    source = gl.expand_dims(gl.expand_dims(source, 1), 2)
    step = gl.arange(0, SHARE, layout=gl.SliceLayout(0, gl.SliceLayout(2, TILE)))
    step = gl.expand_dims(gl.expand_dims(block * SHARE + step, 0), 2)
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, TILE)))
    place = gl.expand_dims(gl.expand_dims(place, 0), 1)
    at = part_ptr + begin * block_stride + (source * block_stride + step * step_stride + place)
    sums = ()
    for i in gl.static_range(64 // SHARE // APART):
        place_at = at + i * APART * block_stride
        mask = live & (step < CHUNK)
        if not EVEN:
            mask = mask & (begin + i * APART + source < blocks)
        part = gl.load(place_at, mask=mask, other=0.0, cache_modifier=".cg")
        sums = sums + (part,)  # noqa: RUF005
    return sums


@gluon.jit
def add_up(sums):
    """Add up loaded partial sums, those of a thread first."""
    total = sums[0]
    for i in gl.static_range(1, len(sums)):
        total += sums[i]
    return gl.sum(total, 0)


@gluon.jit
def add_up_steps(
    sums, part_ptr, block_stride, step_stride, block, blocks,
    dBC_ptr, row, batch_groups, seqlen, start,
    D_STATE: gl.constexpr, CHUNK: gl.constexpr, SHARE: gl.constexpr, EVEN: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the blocks' partial sums of dB and dC, in a fixed order, of this block's SHARE steps.

    sums: the first of them, from `load_sums`; start: the chunk's first step.
    """
    SOURCES: gl.constexpr = 64 // SHARE
    TILE: gl.constexpr = tile_layout(SHARE, WARPS)
    total = add_up(sums)
    for begin in range(SOURCES, blocks, SOURCES):
        more = load_sums(
            part_ptr,
            block_stride,
            step_stride,
            block,
            blocks,
            begin,
            True,
            CHUNK,
            SHARE,
            EVEN,
            WARPS,
        )
        total += add_up(more)
    t = gl.arange(0, SHARE, layout=gl.SliceLayout(1, gl.SliceLayout(0, TILE)))
    t = (block * SHARE + t)[:, None]
    place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, TILE)))[None, :]
    state = place % 16
    out = ((place // 16 * batch_groups + row) * D_STATE + state) * seqlen + start + t
    mask = (t < CHUNK) & (start + t < seqlen) & (state < D_STATE)
    gl.store(dBC_ptr + out, total.to(dBC_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def quotient(number, divisor):
    """number // divisor of numbers from 0 to a million."""
    return ((number.to(gl.float32) + 0.5) * (1.0 / divisor)).to(gl.int32)


@gluon.jit
def add_up_records(
    record_ptr, record_row, record_chunk, record_channel, row, rows, items, segments,
    segment_chunks, first_channel, group_channels, group,
    dA_ptr, dD_ptr, dbias_ptr,
    HAS_D: gl.constexpr, HAS_BIAS: gl.constexpr, D_STATE: gl.constexpr, BLOCK: gl.constexpr,
    BY_ITEM: gl.constexpr, SHARE: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Add up the rows' sums of dA, dD and dbias, in a fixed order, of this block's SHARE channels.

    A channel's record is D_STATE sums of dA, one of dD and one of dbias; a row's is where its last
    item ended if BY_ITEM.
    """
    SOURCES: gl.constexpr = 64 // SHARE
    TILE: gl.constexpr = tile_layout(SHARE, WARPS)
    source = gl.arange(0, SOURCES, layout=gl.SliceLayout(1, gl.SliceLayout(2, TILE)))
    source = gl.expand_dims(gl.expand_dims(source, 1), 2)
    in_block = gl.arange(0, SHARE, layout=gl.SliceLayout(0, gl.SliceLayout(2, TILE)))
    in_block = gl.expand_dims(gl.expand_dims(row * SHARE + in_block, 0), 2)
    column = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, TILE)))
    column = gl.expand_dims(gl.expand_dims(column, 0), 1)
    channel = (group * group_channels + first_channel + in_block).to(gl.int64)
    live = (in_block < BLOCK) & (first_channel + in_block < group_channels)
    own = gl.arange(0, SHARE, layout=gl.SliceLayout(1, gl.SliceLayout(0, TILE)))
    own = (row * SHARE + own)[:, None]
    own_live = (own < BLOCK) & (first_channel + own < group_channels)
    own = (group * group_channels + first_channel + own).to(gl.int64)
    for first_column in range(0, D_STATE + 2, 32):
        total = gl.full([SHARE, 32], 0.0, gl.float32, layout=gl.SliceLayout(0, TILE))
        for begin in range(0, rows, SOURCES):
            which = begin + source
            if BY_ITEM:
                item = which + quotient(items - 1 - which, rows) * rows
                batch = quotient(item, segments)
                at = batch.to(gl.int64) * record_row
                at += ((item - batch * segments) * segment_chunks).to(gl.int64) * record_chunk
            else:
                at = which.to(gl.int64) * record_row
            at = at + channel * record_channel + first_column + column
            mask = (which < rows) & live & (first_column + column < D_STATE + 2)
            tile = gl.load(record_ptr + at, mask=mask, other=0.0, cache_modifier=".cg")
            total += gl.sum(tile, 0)
        place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(0, TILE)))[None, :]
        place = first_column + place
        gl.store(dA_ptr + own * D_STATE + place, total, mask=own_live & (place < D_STATE))
        if HAS_D:
            gl.store(dD_ptr + own + 0 * place, total, mask=own_live & (place == D_STATE))
        if HAS_BIAS:
            gl.store(dbias_ptr + own + 0 * place, total, mask=own_live & (place == D_STATE + 1))


@gluon.jit
def replay(
    h, A2, dt_rows, xy_rows, B_smem, tile,
    TILE: gl.constexpr, CHAN: gl.constexpr, STATE: gl.constexpr,
):  # fmt: skip
    """Return the state after a tile, of that before it."""
    for s in gl.static_range(TILE):
        step = tile * TILE + s
        decay = gl.exp2(over_states(dt_rows.index(step).load(CHAN)) * A2)
        x = over_states(xy_rows.index(2 * step).load(CHAN))
        h = decay * h + x * over_channels(B_smem.index(step).load(STATE))
    return h


@gluon.jit
def load_rows(ptr, step, seqlen, live, PIECES: gl.constexpr, STEPS: gl.constexpr):
    """Load the pieces of a chunk of rows, all under way at once; ptr and step of the first."""
    rows = ()
    for piece in gl.static_range(PIECES):
        mask = (step + piece * STEPS < seqlen) & live
        rows = rows + (gl.load(ptr + piece * STEPS, mask=mask, other=0.0),)  # noqa: RUF005
    return rows


@gluon.jit
def load_tokens(
    u_ptr, delta_ptr, dout_ptr, z_ptr, offset, step, seqlen, live,
    HAS_Z: gl.constexpr, PIECES: gl.constexpr, STEPS: gl.constexpr,
):  # fmt: skip
    """Load a chunk of u, delta, dout and, if there is one, z, all under way at once."""
    us = load_rows(u_ptr + offset, step, seqlen, live, PIECES, STEPS)
    dts = load_rows(delta_ptr + offset, step, seqlen, live, PIECES, STEPS)
    dys = load_rows(dout_ptr + offset, step, seqlen, live, PIECES, STEPS)
    zs = dys
    if HAS_Z:
        zs = load_rows(z_ptr + offset, step, seqlen, live, PIECES, STEPS)
    return us, dts, dys, zs


@gluon.jit
def write_rows(
    ptr, smem, first, step, seqlen, live,
    PIECES: gl.constexpr, STEPS: gl.constexpr, BLOCK: gl.constexpr, IO: gl.constexpr,
):  # fmt: skip
    """Write a chunk of rows from shared memory, from `first` on; each thread what it put there."""
    for piece in gl.static_range(PIECES):
        mask = (step + piece * STEPS < seqlen) & live
        value = smem.index(piece).slice(first, BLOCK, 2).load(IO)
        gl.store(ptr + piece * STEPS, value.to(ptr.dtype.element_ty), mask=mask)


@gluon.jit(
    do_not_specialize=[
        "seqlen_units", "d_inner", "ngroups", "blocks_per_group", "segment_chunks", "segments",
        "idle", "r_batch", "r_segment", "r_channel", "n_chunks",
        "moved_batch", "moved_chunk", "moved_channel",
    ]
)  # fmt: skip
def segment_adjoint_kernel(
    delta_ptr, A_ptr, C_ptr, z_ptr, bias_ptr, dout_ptr,
    r_ptr,  # (B, segments, D, D_STATE) fp32, by strides
    total_ptr,  # (B, segments, D) fp32
    kept_ptr,  # (B, chunks, D, D_STATE) fp32
    moved_ptr,  # the same by strides
    seqlen_units, d_inner, ngroups, blocks_per_group, segment_chunks, segments,
    idle, r_batch, r_segment, r_channel, n_chunks, moved_batch, moved_chunk, moved_channel,
    D_STATE: gl.constexpr, STATE_BLOCKS: gl.constexpr,
    HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr, MOVE: gl.constexpr,
    CHUNK: gl.constexpr, UNIT: gl.constexpr, CHANNELS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """Compute r at a segment's beginning from zero at its end, and the segment's sum of dt.

    For all segments but the first; one block of 16 states in each thread block. MOVE: copy the
    kept states on the way, those of the first segment too, to strides in MOVE elements.
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
    WIDE: gl.constexpr = gl.BlockedLayout(  # see scan_backward_kernel
        [1, STATES, 1, CHANNELS], [LANES, 1, 8, 1], [1, 1, WARPS, 1], [1, 3, 0, 2]
    )
    WIDE_CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, WIDE))
    WIDE_STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, WIDE))
    RUN: gl.constexpr = 16
    RUNS: gl.constexpr = 4 // CHANNELS
    STEPS: gl.constexpr = RUN * RUNS
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

    pid = gl.program_id(0)
    block = pid % blocks_per_group
    pid = pid // blocks_per_group
    k = pid % STATE_BLOCKS
    pid = pid // STATE_BLOCKS
    group = pid % ngroups
    pid = pid // ngroups
    if MOVE:
        segment = pid % segments
        batch = (pid // segments).to(gl.int64)
    else:
        segment = idle + pid % (segments - idle)
        batch = (pid // (segments - idle)).to(gl.int64)
    group_channels = d_inner // ngroups
    first_channel = block * BLOCK
    places = gl.arange(0, PLACES, layout=gl.SliceLayout(1, WIDE_CHAN))
    inner = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, WIDE_CHAN))
    in_group = first_channel + places[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    state_lanes = gl.arange(0, LANES, layout=gl.SliceLayout(1, WIDE_STATE))
    states = gl.arange(0, STATES, layout=gl.SliceLayout(0, WIDE_STATE))
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
    io_offset = over_states((batch * d_inner + io_channel) * seqlen) + io_step
    bias = over_states(gl.load(bias_ptr + io_channel)) if HAS_BIAS else 0.0
    row = gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS)) + k * 16
    row_step = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([CHUNK, 16], 0, gl.int32, layout=ROWS)
    row_offset = (((batch * ngroups + group) * D_STATE + row) * seqlen)[None, :] + row_step

    rows = gl.allocate_shared_memory(gl.float32, [CHUNK * 2, PLACES, CHANNELS], PLAIN)
    rows_io = rows._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    C_smem = gl.allocate_shared_memory(gl.float32, [CHUNK, LANES, STATES], PLAIN)
    C_flat = C_smem._reinterpret(gl.float32, [CHUNK, 16], PLAIN)

    A2 = load_states(A_ptr + at_state, live, FULL) * 1.4426950408889634
    r = gl.full([LANES, STATES, PLACES, CHANNELS], 0.0, gl.float32, layout=FULL)
    total = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))
    begin = segment * segment_chunks * CHUNK
    end = gl.minimum(begin + segment_chunks * CHUNK, seqlen)
    count = (end - begin + CHUNK - 1) // CHUNK
    alive = io_live & (segment >= idle)
    moved = over_states(channel * (moved_channel.to(gl.int64) * MOVE)) + over_channels(state)
    start = begin + (count - 1) * CHUNK
    dts = load_rows(delta_ptr + start + io_offset, start + io_step, seqlen, alive, PIECES, STEPS)
    dys = load_rows(dout_ptr + start + io_offset, start + io_step, seqlen, alive, PIECES, STEPS)
    if HAS_Z:
        zs = load_rows(z_ptr + start + io_offset, start + io_step, seqlen, alive, PIECES, STEPS)
    row_mask = (start + row_step < seqlen) & (row < D_STATE)[None, :]
    C_rows = gl.load(C_ptr + start + row_offset, mask=row_mask, other=0.0)
    for back in range(0, count):
        start = begin + (count - 1 - back) * CHUNK
        chunk = (segment * segment_chunks + count - 1 - back).to(gl.int64)
        if MOVE:
            row_at = (batch * n_chunks + chunk) * d_inner * D_STATE
            h = gl.load(kept_ptr + row_at + at_state, mask=live, other=0.0)
        if segment >= idle:
            for piece in gl.static_range(PIECES):
                dt = to_fp32(dts[piece])
                dy = to_fp32(dys[piece])
                if HAS_Z:
                    z = to_fp32(zs[piece])
                    dy *= z * sigmoid(z)
                if HAS_BIAS:
                    dt += bias
                if SOFTPLUS:
                    dt = softplus(dt)
                dt = gl.where((start + piece * STEPS + io_step < seqlen) & io_live, dt, 0.0)
                total += gl.sum(dt, 1)
                rows_io.index(piece).slice(0, BLOCK, 2).store(dt)
                rows_io.index(piece).slice(BLOCK, BLOCK, 2).store(dy)
            C_flat.store(to_fp32(C_rows))
            now = start - CHUNK  # of the next chunk, whose loads begin
            more = alive & (back < count - 1)
            dts = load_rows(delta_ptr + now + io_offset, now + io_step, seqlen, more, PIECES, STEPS)
            dys = load_rows(dout_ptr + now + io_offset, now + io_step, seqlen, more, PIECES, STEPS)
            if HAS_Z:
                zs = load_rows(z_ptr + now + io_offset, now + io_step, seqlen, more, PIECES, STEPS)
            row_mask = (row_step >= 0) & (row < D_STATE)[None, :] & (back < count - 1)
            C_rows = gl.load(C_ptr + now + row_offset, mask=row_mask, other=0.0)
            for step_back in range(0, CHUNK // 8):
                for s in gl.static_range(8):
                    step = CHUNK - 1 - s - step_back * 8
                    decay = gl.exp2(over_states(rows.index(2 * step).load(CHAN)) * A2)
                    dy_step = over_states(rows.index(2 * step + 1).load(CHAN))
                    r = decay * (over_channels(C_smem.index(step).load(STATE)) * dy_step + r)
        if MOVE:
            place = (batch * moved_batch + chunk * moved_chunk) * MOVE
            gl.store(moved_ptr + place + moved, h, mask=live)
    place = batch * r_batch + segment.to(gl.int64) * r_segment
    place = place + over_states(channel) * r_channel.to(gl.int64) + over_channels(state)
    gl.store(r_ptr + place, gl.convert_layout(r, WIDE), mask=live & (segment >= idle))
    per_channel = segment_row * d_inner + group * group_channels + io_in_group
    keep = (io_in_group < group_channels) & (k == 0) & (segment >= idle)
    gl.store(total_ptr + per_channel, gl.sum(total, 0), mask=keep)


@gluon.jit(
    do_not_specialize=[
        "batches", "seqlen_units", "d_inner", "ngroups", "blocks_per_group", "n_chunks",
        "segment_chunks", "segments", "rows", "kept_batch", "kept_chunk", "kept_channel",
        "r_batch", "r_segment", "r_channel",
    ]
)  # fmt: skip
def scan_backward_kernel(
    u_ptr, delta_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, bias_ptr, dout_ptr,
    kept_ptr,  # (B, chunks, D, D_STATE) fp32, by strides: the state before each chunk
    r_ptr,  # (B, segments, D, D_STATE) fp32, by strides: passed back to each segment
    du_ptr, ddelta_ptr, dz_ptr,
    part_ptr,  # fp32, partial sums of dB and dC: scratch, or ddelta itself
    record_ptr,  # fp32, a row's sums of dA, dD and dbias: scratch, or du itself
    counter_ptr,  # int32, zero: 64 for each (row, group), then 64 for each block of channels
    dA_ptr, dD_ptr, dbias_ptr,  # (D, D_STATE), (D,), (D,) fp32
    dBC_ptr,  # (2, B, G, D_STATE, L)
    batches, seqlen_units, d_inner, ngroups, blocks_per_group, n_chunks, segment_chunks, segments,
    rows, kept_batch, kept_chunk, kept_channel, r_batch, r_segment, r_channel,
    D_STATE: gl.constexpr,
    HAS_D: gl.constexpr, HAS_Z: gl.constexpr, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr,
    HAS_R: gl.constexpr, IN_PLACE: gl.constexpr, KEPT_UNIT: gl.constexpr, CHUNK: gl.constexpr,
    UNIT: gl.constexpr, CHANNELS: gl.constexpr, TILE: gl.constexpr, WARPS: gl.constexpr,
    STEP_SHARE: gl.constexpr, CHANNEL_SHARE: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """Write all gradients. All blocks must be on the GPU at once: they wait for each other.

    rows x G x blocks_per_group blocks; those of a row go through the same items (batch, segment)
    together and add up their partial sums as they go.

    seqlen is seqlen_units * UNIT, so that the compiler knows how far rows are aligned. kept_ptr
    may be memory of du, a chunk's state in the chunk's place: it is read before du is written.
    Strides of kept and r are in KEPT_UNIT elements.
    """
    LANES: gl.constexpr = 4  # of states
    STATES: gl.constexpr = 4  # of a thread
    PLACES: gl.constexpr = 8 * WARPS  # lanes of channels, over all warps
    BLOCK: gl.constexpr = PLACES * CHANNELS
    TILES: gl.constexpr = CHUNK // TILE
    element: gl.constexpr = u_ptr.dtype.element_ty
    WORD: gl.constexpr = element.primitive_bitwidth // 8
    # (state lane, state, channel lane, channel); then what is left of it
    FULL: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS], [LANES, 1, 8, 1], [1, 1, WARPS, 1], [3, 1, 0, 2]
    )
    CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, FULL))
    STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, FULL))
    # the same elements in a thread, but states first: for accesses to global memory of 4 states
    WIDE: gl.constexpr = gl.BlockedLayout(
        [1, STATES, 1, CHANNELS], [LANES, 1, 8, 1], [1, 1, WARPS, 1], [1, 3, 0, 2]
    )
    WIDE_CHAN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, WIDE))
    WIDE_STATE: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(3, WIDE))
    # rows of u, delta and so on: (run of steps, step, channel), a thread's steps being contiguous;
    # two lanes along time, so that a warp's access touches 16 rows: with one the 32 bound it
    RUN: gl.constexpr = 16
    RUNS: gl.constexpr = 4 // CHANNELS  # a piece gives every thread 16 steps
    STEPS: gl.constexpr = RUN * RUNS
    PIECES: gl.constexpr = CHUNK // STEPS
    IO: gl.constexpr = gl.BlockedLayout([1, 8, 1], [1, 2, 16], [1, 1, WARPS], [1, 2, 0])
    HELD: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 16, 2], [1, WARPS, 1], [2, 1, 0])
    STEP_IO: gl.constexpr = gl.SliceLayout(2, IO)
    CHAN_IO: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, IO))
    ROWS: gl.constexpr = gl.BlockedLayout([8, 1], [2, 16], [WARPS, 1], [0, 1])
    PARTIAL: gl.constexpr = gl.BlockedLayout([1, WARPS, 1], [1, 1, 32], [WARPS, 1, 1], [2, 1, 0])
    PLAIN: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    PLAIN3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    PRIVATE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 0, 2, 1])
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
    first_channel = block * BLOCK
    places = gl.arange(0, PLACES, layout=gl.SliceLayout(1, WIDE_CHAN))
    inner = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, WIDE_CHAN))
    in_group = first_channel + places[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    state_lanes = gl.arange(0, LANES, layout=gl.SliceLayout(1, WIDE_STATE))
    states = gl.arange(0, STATES, layout=gl.SliceLayout(0, WIDE_STATE))
    state = state_lanes[:, None] * STATES + states[None, :]
    at_state = over_states(channel * D_STATE) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
    WORDS: gl.constexpr = CHUNK * WORD // 4  # of a chunk of a row of du, in fp32
    words = (seqlen * WORD // 4).to(gl.int64)
    if IN_PLACE:
        block_stride = words * BLOCK
        step_stride = words
    else:
        block_stride = words * 0 + CHUNK * 32
        step_stride = words * 0 + 32

    io_in_group = first_channel + gl.arange(0, BLOCK, layout=CHAN_IO)
    io_live = over_states(io_in_group < group_channels)
    io_channel = group * group_channels + gl.minimum(io_in_group, group_channels - 1)
    runs = gl.arange(0, RUNS, layout=gl.SliceLayout(1, STEP_IO))
    steps = gl.arange(0, RUN, layout=gl.SliceLayout(0, STEP_IO))
    io_step = gl.expand_dims(runs[:, None] * RUN + steps[None, :], 2)
    io_step = io_step + gl.full([RUNS, RUN, BLOCK], 0, gl.int32, layout=IO)
    bias = over_states(gl.load(bias_ptr + io_channel)) if HAS_BIAS else 0.0
    skip = over_states(gl.load(D_ptr + io_channel)) if HAS_D else 0.0

    row = gl.arange(0, 16, layout=gl.SliceLayout(0, ROWS))
    row_step = gl.arange(0, CHUNK, layout=gl.SliceLayout(1, ROWS))[:, None]
    row_step = row_step + gl.full([CHUNK, 16], 0, gl.int32, layout=ROWS)
    part_step = gl.arange(0, TILE, layout=gl.SliceLayout(1, gl.SliceLayout(1, PARTIAL)))[:, None]
    part_place = gl.arange(0, 32, layout=gl.SliceLayout(0, gl.SliceLayout(1, PARTIAL)))[None, :]

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
    sums = xy_rows._reinterpret(gl.float32, [TILES, TILE, 2 * BLOCK], PLAIN)
    sums_io = sums._reinterpret(gl.float32, [PIECES, RUNS, RUN, 2 * BLOCK], PLAIN3)
    if HAS_Z:
        # sums over states of y, from the end of the notes: those of later tiles are used up
        PARTS: gl.constexpr = 16 // TILE
        y_smem = opening._reinterpret(gl.float32, [PARTS * TILES, TILE, BLOCK], PLAIN)
        y_io = opening._reinterpret(gl.float32, [PARTS * PIECES, RUNS, RUN, BLOCK], PLAIN3)

    if IN_PLACE:  # of the last chunk but one, until all have read the sums that are in its place
        held_smem = gl.allocate_shared_memory(element, [PIECES, RUNS, BLOCK, RUN], PLAIN3)
    zero = gl.full([LANES, STATES, PLACES, CHANNELS], 0.0, gl.float32, layout=FULL)
    dA = zero
    r = zero
    A2 = load_states(A_ptr + at_state, live, FULL) * LOG2E
    dD = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))
    dbias = gl.full([RUNS, BLOCK], 0.0, gl.float32, layout=gl.SliceLayout(1, IO))

    iteration = pid * 0  # of (item, chunk)
    # the partial sums that are not added up yet: where they are, and of what
    old_at = words * 0
    old_row = words * 0
    old_start = pid * 0
    batch = words * 0
    start = pid * 0
    held_row = words * 0
    held_start = pid * 0
    for item in range(team, items, rows):
        batch = (item // segments).to(gl.int64)
        segment = item % segments
        io_offset = over_states((batch * d_inner + io_channel) * seqlen) + io_step
        shared_row = batch * ngroups + group
        row_offset = ((shared_row * D_STATE + row) * seqlen)[None, :] + row_step
        r_at = over_states(channel * (r_channel.to(gl.int64) * KEPT_UNIT)) + over_channels(state)
        r_at += (batch * r_batch + segment.to(gl.int64) * r_segment) * KEPT_UNIT
        r = zero
        if HAS_R:
            r = load_states(r_ptr + r_at, live, FULL)
        first_chunk = segment * segment_chunks
        count = gl.minimum(segment_chunks, n_chunks - first_chunk)
        # the items that come next
        next_item = item + rows
        next_first = next_item % segments * segment_chunks
        next_last = next_first + gl.minimum(segment_chunks, n_chunks - next_first) - 1
        next_batch = (next_item // segments).to(gl.int64)
        if IN_PLACE:
            then_item = next_item + rows
            then_first = then_item % segments * segment_chunks
            then_last = then_first + gl.minimum(segment_chunks, n_chunks - then_first) - 1
            then_batch = (then_item // segments).to(gl.int64)
            if next_last > next_first:
                then_item = next_item
                then_last = next_last - 1
                then_batch = next_batch
        for back in range(0, count):
            chunk = first_chunk + count - 1 - back
            start = chunk * CHUNK
            left = count - 1 - back
            final = (left == 0) & (next_item >= items)
            if IN_PLACE:  # the partial sums' place: ddelta of the next chunk but one
                beyond = ((left == 1) & (next_item >= items)) | ((left == 0) & (then_item >= items))
                has_held = beyond & (not final) & (iteration > 0)
                own = final | has_held
                part_batch = batch
                part_chunk = chunk
                if not own:
                    if (left >= 2) | ((left == 1) & beyond):  # of two chunks the first
                        part_chunk = gl.maximum(chunk - 2, first_chunk)
                    elif (left == 1) | beyond:
                        part_chunk = next_last
                        part_batch = next_batch
                    else:
                        part_chunk = then_last
                        part_batch = then_batch
                part_at = part_batch * d_inner + group * group_channels
                part_at = part_at * words + part_chunk.to(gl.int64) * WORDS
            us, dts, dys, zs = load_tokens(
                u_ptr, delta_ptr, dout_ptr, z_ptr, start + io_offset, start + io_step, seqlen,
                io_live, HAS_Z, PIECES, STEPS,
            )  # fmt: skip
            row_mask = (start + row_step < seqlen) & (row < D_STATE)[None, :]
            at_row = row_offset + start
            B_row = gl.load(B_ptr + at_row, mask=row_mask, other=0.0)
            C_row = gl.load(C_ptr + at_row, mask=row_mask, other=0.0)
            kept_row = first_channel + anew(places)[:, None] * CHANNELS + inner[None, :]
            kept_row = (group * group_channels + kept_row) * (kept_channel.to(gl.int64) * KEPT_UNIT)
            kept_row += (batch * kept_batch + chunk.to(gl.int64) * kept_chunk) * KEPT_UNIT
            kept = over_states(kept_row) + over_channels(state)
            h = gl.load(kept_ptr + kept, mask=live, other=0.0)
            for piece in gl.static_range(PIECES):
                io_mask = (start + piece * STEPS + io_step < seqlen) & io_live
                dt = to_fp32(dts[piece])
                dy = to_fp32(dys[piece])
                if HAS_Z:
                    z = to_fp32(zs[piece])
                    dy *= z * sigmoid(z)
                if HAS_BIAS:
                    dt += bias
                if SOFTPLUS:
                    dt = softplus(dt)
                dt = gl.where(io_mask, dt, 0.0)  # steps past the end keep the state
                dt_io.index(piece).store(dt)
                xy_io.index(piece).slice(0, BLOCK, 2).store(dt * to_fp32(us[piece]))
                xy_io.index(piece).slice(BLOCK, BLOCK, 2).store(dy)
            B_flat.store(to_fp32(B_row))
            C_flat.store(to_fp32(C_row))
            h = gl.convert_layout(h, FULL)

            # the sums of the chunk before, at first none: under way during what follows
            acquire(written_ptr, iteration * blocks_per_group)
            sums_before = load_sums(
                part_ptr + old_at, block_stride, step_stride, anew(block), blocks_per_group, 0,
                iteration > 0, CHUNK, STEP_SHARE, EVEN, WARPS,
            )  # fmt: skip

            # the state before each tile
            for tile in range(TILES - 1):
                opening.index(tile).store(h)
                h = replay(h, A2, dt_rows, xy_rows, B_smem, tile, TILE, CHAN, STATE)
            opening.index(TILES - 1).store(h)

            if not IN_PLACE:
                slot = iteration % 2 * rows + team
                part_at = (slot * ngroups + group).to(gl.int64) * blocks_per_group
                part_at = part_at * (CHUNK * 32)
            if iteration > 0:
                add_up_steps(
                    sums_before, part_ptr + old_at, block_stride, step_stride, anew(block),
                    blocks_per_group, dBC_ptr, old_row, batches * ngroups, seqlen, old_start,
                    D_STATE, CHUNK, STEP_SHARE, EVEN, WARPS,
                )  # fmt: skip
                if IN_PLACE:  # noqa: SIM102 (known when compiling)
                    if final & (iteration == 1):  # of two chunks: their sums have one place
                        count_in(read_ptr)
                        acquire(read_ptr, blocks_per_group)

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
                sums.index(tile).store(of_x)
                if HAS_Z:
                    of_y = stack_steps(sums_y)
                    if CHANNELS == 2:
                        of_y = gl.reshape(of_y, [2, 2, PLACES, TILE // 2])
                        of_y = gl.permute(of_y, [3, 0, 2, 1])
                    else:
                        of_y = gl.permute(of_y, [2, 1, 0])
                    of_y = gl.reshape(of_y, [TILE, BLOCK])
                    y_smem.index((PARTS - 1) * TILES + tile).store(of_y)
                part = gl.sum(part_smem.load(PARTIAL), 1)
                at = block * block_stride + (tile * TILE + part_step) * step_stride
                gl.store(part_ptr + part_at + at + part_place, part)
            # the inputs again
            us, dts, dys, zs = load_tokens(
                u_ptr, delta_ptr, dout_ptr, z_ptr, start + io_offset, start + io_step, seqlen,
                io_live, HAS_Z, PIECES, STEPS,
            )  # fmt: skip
            count_in(written_ptr)
            iteration += 1
            old_at = part_at
            old_row = shared_row
            old_start = start

            # du, ddelta and dz
            for piece in gl.static_range(PIECES):
                now = start + piece * STEPS
                io_mask = (now + io_step < seqlen) & io_live
                u = to_fp32(us[piece])
                dy = to_fp32(dys[piece])
                if HAS_Z:
                    z = to_fp32(zs[piece])
                    gate = sigmoid(z)
                    y = y_io.index((PARTS - 1) * PIECES + piece).load(IO)
                    if HAS_D:
                        y += skip * u
                    dz = dy * y * (gate * (1.0 + z * (1.0 - gate)))
                    gl.store(dz_ptr + now + io_offset, dz.to(element), mask=io_mask)
                    dy *= z * gate
                dx = sums_io.index(piece).slice(0, BLOCK, 2).load(IO)
                dlog = sums_io.index(piece).slice(BLOCK, BLOCK, 2).load(IO)
                ddelta = dlog * 0.6931471805599453 + u * dx
                if SOFTPLUS:
                    raw = to_fp32(dts[piece])
                    if HAS_BIAS:
                        raw += bias
                    ddelta *= sigmoid(raw)
                du = dt_io.index(piece).load(IO) * dx
                if HAS_D:
                    du += skip * dy
                    dD += gl.sum(dy * u, 1)
                if HAS_BIAS:
                    dbias += gl.sum(gl.where(io_mask, ddelta, 0.0), 1)
                direct = io_mask
                if IN_PLACE:
                    if final:  # until their memory is free; a thread reads its own
                        sums_io.index(piece).slice(BLOCK, BLOCK, 2).store(ddelta)
                        dt_io.index(piece).store(du)
                    if has_held:
                        held_smem.index(piece).store(gl.permute(ddelta.to(element), [0, 2, 1]))
                    gl.store(du_ptr + now + io_offset, du.to(element), mask=io_mask & (not final))
                    direct = io_mask & (not own)
                else:
                    gl.store(du_ptr + now + io_offset, du.to(element), mask=io_mask)
                gl.store(ddelta_ptr + now + io_offset, ddelta.to(element), mask=direct)
            if IN_PLACE:  # noqa: SIM102 (known when compiling)
                if has_held:
                    held_row = batch
                    held_start = start

    # what a row has summed up goes through memory that is free, to the sum of all rows
    if IN_PLACE:
        record_row = words * d_inner
        record_chunk = words * 0 + WORDS
        record_channel = words
        own_record = batch * record_row + start // CHUNK * record_chunk
    else:
        record_channel = words * 0 + (D_STATE + 4)
        record_row = record_channel * d_inner
        record_chunk = words * 0
        own_record = team * record_row
    in_group = first_channel + anew(places)[:, None] * CHANNELS + inner[None, :]
    channel = (group * group_channels + in_group).to(gl.int64)
    at = own_record + over_states(channel * record_channel) + over_channels(state)
    live = over_states(in_group < group_channels) & (over_channels(state) < D_STATE)
    gl.store(record_ptr + at, gl.convert_layout(dA, WIDE), mask=live)
    at = own_record + (group * group_channels + io_in_group) * record_channel + D_STATE
    gl.store(record_ptr + at, gl.sum(dD, 0), mask=io_in_group < group_channels)
    gl.store(record_ptr + at + 1, gl.sum(dbias, 0), mask=io_in_group < group_channels)
    count_in(column_ptr)
    acquire(written_ptr, iteration * blocks_per_group)
    sums_before = load_sums(
        part_ptr + old_at, block_stride, step_stride, block, blocks_per_group, 0, True,
        CHUNK, STEP_SHARE, EVEN, WARPS,
    )  # fmt: skip
    add_up_steps(
        sums_before, part_ptr + old_at, block_stride, step_stride, block, blocks_per_group, dBC_ptr,
        old_row, batches * ngroups, seqlen, old_start, D_STATE, CHUNK, STEP_SHARE, EVEN, WARPS,
    )  # fmt: skip
    if IN_PLACE:
        count_in(read_ptr)
    acquire(column_ptr, rows)
    add_up_records(
        record_ptr, record_row, record_chunk, record_channel, team, rows, items, segments,
        segment_chunks, first_channel, group_channels, group, dA_ptr, dD_ptr, dbias_ptr,
        HAS_D, HAS_BIAS, D_STATE, BLOCK, IN_PLACE, CHANNEL_SHARE, WARPS,
    )  # fmt: skip
    if IN_PLACE:
        count_in(column_ptr + 32)
        if iteration > 2:  # all have read the sums in the place of the last chunk but one
            held_at = over_states((held_row * d_inner + io_channel) * seqlen) + io_step + held_start
            for piece in gl.static_range(PIECES):
                mask = (held_start + piece * STEPS + io_step < seqlen) & io_live
                held = gl.permute(held_smem.index(piece).load(HELD), [0, 2, 1])
                gl.store(ddelta_ptr + held_at + piece * STEPS, held, mask=mask)
        io_at = over_states((batch * d_inner + io_channel) * seqlen) + io_step + start
        io_now = start + io_step
        acquire(read_ptr, gl.where(iteration == 2, 2, 1) * blocks_per_group)
        write_rows(
            ddelta_ptr + io_at, sums_io, BLOCK, io_now, seqlen, io_live, PIECES, STEPS, BLOCK, IO
        )
        acquire(column_ptr + 32, rows)
        write_rows(du_ptr + io_at, dt_io, 0, io_now, seqlen, io_live, PIECES, STEPS, BLOCK, IO)
