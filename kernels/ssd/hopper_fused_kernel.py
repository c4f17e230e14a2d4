"""The SSD forward on Hopper as one walk per block, with a look back at earlier segments. In Gluon.

A block serves one segment of time of two consumers' heads (see `hopper_kernel`, whose ring and
transposed products these are). It walks its segment twice: for the segment's own end state, then,
from what enters the segment, for the outputs; the second time most of x comes from L2.

    partition   warps  work
    consumers   4 + 4  the state of 64 channels of one head each, in registers; the outputs
    helper      4      what the decays need of dt, and the scores B C^T, into the ring
    producer    1      the ring's tiles of x, z, B and C, by TMA

Between the walks the blocks of the same heads hand their states on (`hopper_look_back`). The last
segment's own end state is nobody's and is not made.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import PropagateNan

from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK
from mambench.kernels.ssd.hopper_kernel import consumers_head, state_tile
from mambench.kernels.ssd.hopper_look_back import (
    anew,
    flat_from_state,
    flat_layout,
    look_back,
    publish,
    reset,
)
from mambench.kernels.ssd.hopper_rows import LEAST_A2, LEAST_LOG2_DECAY, LOG2_E, add, softplus

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_ALL = gl.constexpr(PropagateNan.ALL)
_RUNTIME_SIZES = [
    "seqlen", "dt_min", "dt_max", "stride_batch", "stride_token", "stride_head",
    "nchunks", "segment_chunks", "nsegments", "nheads", "pairs_per_group", "heads_per_group",
]  # fmt: skip


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Barriers of a stage: filled by TMA, completed by the helper, emptied by both consumers."""
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    made = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(loaded.index(i), count=1)
        mbarrier.init(made.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return loaded, made, empty


@gluon.jit
def _raw_steps(steps, heads, t, seqlen):
    """Load dt of heads at the tokens t, as fp32; 0 past the end. (heads, tokens)"""
    dt_ptr, stride_token, stride_head = steps
    offsets = (t.to(gl.int64) * stride_token)[None, :] + (heads * stride_head)[:, None]
    mask = (heads >= 0)[:, None] & (t < seqlen)[None, :]
    return gl.load(dt_ptr + offsets, mask=mask, other=0.0).to(gl.float32)


@gluon.jit
def _decay_rows(
    raw, inside, last, A2, bias, limits, HAS_BIAS: gl.constexpr, SOFTPLUS: gl.constexpr
):  # fmt: skip
    """Return cum, cumj (see triton_parts), exp2(cum) and exp2(total - cumj). (heads, tokens)"""
    dt_min, dt_max = limits
    dt = raw
    if HAS_BIAS:
        dt += bias[:, None]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = gl.maximum(dt, dt_min, propagate_nan=_ALL)
    dt = gl.minimum(dt, dt_max, propagate_nan=_ALL)
    dt = gl.where(inside[None, :], dt, 0.0)
    log_decay = gl.maximum(dt * A2[:, None], LEAST_LOG2_DECAY, propagate_nan=_ALL)
    cum = gl.associative_scan(log_decay, 1, add)
    log_dt = gl.log2(gl.where(dt > 0, dt, 1.0))
    cumj = gl.where(dt > 0, cum - log_dt, float("inf"))
    total = gl.sum(gl.where(last[None, :], cum, 0.0), axis=1)
    return cum, cumj, gl.exp2(cum), gl.exp2(total[:, None] - cumj)


@gluon.jit
def _helper(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _xs, _zs, Bs, Cs, scores_ring, rows_rings, _weights, _outs, loaded, made, _empty = tiles
    steps, limits, A_ptr, bias_ptr, seqlen = sources[1]
    dt_ptr, stride_batch, stride_token, stride_head = steps
    b, pair, first, own, count, sizes = work[1]
    _nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    STAGES: gl.constexpr = SIZES[3]
    HAS_BIAS: gl.constexpr = FEATURES[0]
    SOFTPLUS: gl.constexpr = FEATURES[1]
    ROWS: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [4, 1], [1, 0])
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    h0, _ = consumers_head(pair, 0, pairs_per_group, heads_per_group, P)
    h1, _ = consumers_head(pair, 1, pairs_per_group, heads_per_group, P)
    heads = gl.where(gl.arange(0, 2, layout=gl.SliceLayout(1, ROWS)) == 0, h0, h1)
    A2 = gl.maximum(gl.load(A_ptr + heads).to(gl.float32) * LOG2_E, LEAST_A2, propagate_nan=_ALL)
    bias = A2
    if HAS_BIAS:
        bias = gl.load(bias_ptr + heads).to(gl.float32)
    steps = (dt_ptr + b.to(gl.int64) * stride_batch, stride_token, stride_head)
    q = gl.arange(0, _Q, layout=gl.SliceLayout(0, ROWS))
    raw = _raw_steps(steps, heads, first * _Q + q, seqlen)
    for item in range(0, own + count):
        stage = item % STAGES
        t = (first + gl.where(item < own, item, item - own)) * _Q + q
        following = (first + gl.where(item + 1 < own, item + 1, item + 1 - own)) * _Q + q
        # The next chunk's steps are in flight while this one's are summed.
        next_raw = _raw_steps(steps, heads, following, seqlen)
        rows = _decay_rows(
            raw, t < seqlen, q == _Q - 1, A2, bias, limits, HAS_BIAS, SOFTPLUS
        )  # fmt: skip
        raw = next_raw
        mbarrier.wait(loaded.index(stage), (item // STAGES) & 1)  # so that the stage is free too
        for kind in gl.static_range(4):
            rows_rings[kind].index(stage).store(rows[kind])
        if item >= own:
            zero = gl.full([_Q, _Q], 0.0, gl.float32, layout=SCORES)
            C = Cs.index(stage).permute((1, 0))
            scores = warpgroup_mma(Bs.index(stage), C, zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            i = gl.arange(0, _Q, layout=gl.SliceLayout(0, SCORES))
            j = gl.arange(0, _Q, layout=gl.SliceLayout(1, SCORES))
            scores = gl.where(j[:, None] <= i[None, :], scores, 0.0)
            scores_ring.index(stage).store(scores.to(scores_ring.dtype))
        mbarrier.arrive(made.index(stage), count=1)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    xs, zs, Bs, Cs, _scores, _rows, _weights, _outs, loaded, _made, empty = tiles
    _out_desc, x_desc, z_desc, B_desc, C_desc = sources[0]
    b, pair, first, own, count, sizes = work[1]
    _nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    STAGES: gl.constexpr = SIZES[3]
    HAS_Z: gl.constexpr = FEATURES[3]
    group = pair // pairs_per_group
    itemsize: gl.constexpr = Bs.dtype.primitive_bitwidth // 8
    n_tile: gl.constexpr = Bs.shape[2] * _Q * itemsize
    x_tiles: gl.constexpr = 2 * _P * _Q * itemsize
    scanned: gl.constexpr = x_tiles * (2 if HAS_Z else 1) + 2 * n_tile
    for item in range(0, own + count):
        stage = item % STAGES
        mbarrier.wait(empty.index(stage), ((item // STAGES) & 1) ^ 1)
        bar = loaded.index(stage)
        if item < own:
            mbarrier.expect(bar, x_tiles + n_tile)
            t = (first + item) * _Q
        else:
            mbarrier.expect(bar, scanned)
            t = (first + item - own) * _Q
            tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        tma.async_copy_global_to_shared(B_desc, [b, group, t, 0], bar, Bs.index(stage))
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            x = xs.index(stage * 2 + which)
            tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
            if HAS_Z:  # noqa: SIM102 of compile time, the other is not
                if item >= own:
                    z = zs.index(stage * 2 + which)
                    tma.async_copy_global_to_shared(z_desc, [b, h, t, channel], bar, z)
    flags, segment, nsegments, npairs = work[0][4], work[0][7], work[0][8], work[0][9]
    if flags is not None:  # noqa: SIM102 of compile time, the other is not
        if segment == nsegments - 1:
            for which in gl.static_range(2):
                before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * (nsegments - 1)
                reset(flags + before, nsegments - 1)


@gluon.jit
def _row(ring, stage, which: gl.constexpr):
    """View one consumer's row of a stage as a vector."""
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return ring.index(stage)._reinterpret(gl.float32, [2, _Q], FLAT).index(which)


@gluon.jit
def _weighted(x, weights, stage, which: gl.constexpr, LEFT: gl.constexpr):
    """Return x^T scaled by its weight in the state that leaves the chunk."""
    weight = _row(weights, stage, which).load(gl.SliceLayout(0, LEFT))
    return (x.to(gl.float32) * weight[None, :]).to(x.dtype)


@gluon.jit
def _decayed(state, decays, stage, which: gl.constexpr, STATE: gl.constexpr):
    """Return the state decayed over a chunk."""
    total = _row(decays, stage, which).slice(_Q - 1, 1)
    return state * total.load(gl.SliceLayout(1, STATE))[:, None]


@gluon.jit
def _own_operand(
    which: gl.constexpr, tiles, item, end, LEFT: gl.constexpr, STATE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Wait for an item; its weighted x^T and log2 decay. From `end` on, those of the last one.

    The last one's stage is still held then: another's could be written meanwhile.
    """
    xs, _zs, _Bs, _Cs, _scores, rows_rings, _weights, _outs, loaded, made, _empty = tiles
    item = gl.minimum(item, end - 1)
    stage = item % STAGES
    parity = (item // STAGES) & 1
    mbarrier.wait(made.index(stage), parity)
    mbarrier.wait(loaded.index(stage), parity)
    x = xs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
    total = _row(rows_rings[0], stage, which).slice(_Q - 1, 1)
    log_decay = total.load(gl.SliceLayout(1, STATE))
    return _weighted(x, rows_rings[3], stage, which, LEFT), log_decay


@gluon.jit
def _own_state(which: gl.constexpr, tiles, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Walk a segment for its own end state and log2 decay."""
    _xs, _zs, Bs, _Cs, _scores, rows_rings, _weights, _outs, _loaded, _made, empty = tiles
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    log_decay = gl.full([1], 0.0, gl.float32, layout=gl.SliceLayout(1, STATE))
    scaled, following = _own_operand(which, tiles, 0, own, LEFT, STATE, STAGES)
    for item in range(0, own):
        stage = item % STAGES
        log_decay += following
        state = _decayed(state, rows_rings[2], stage, which, STATE)
        state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)
        # While the product is made, the next one's operand.
        scaled, following = _own_operand(which, tiles, item + 1, own, LEFT, STATE, STAGES)
        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(stage), count=1)
    return state, log_decay


@gluon.jit
def _next_weights(
    which: gl.constexpr, tiles, item, end, OUT: gl.constexpr, STAGES: gl.constexpr
):  # fmt: skip
    """Wait for an item and return its weights W. From `end` on, those of the last one."""
    _xs, _zs, _Bs, _Cs, scores_ring, rows_rings, all_weights, _outs, loaded, made, _empty = tiles
    item = gl.minimum(item, end - 1)
    stage = item % STAGES
    parity = (item // STAGES) & 1
    mbarrier.wait(made.index(stage), parity)
    mbarrier.wait(loaded.index(stage), parity)
    scores = scores_ring.index(stage).load(OUT)
    cum_i = _row(rows_rings[0], stage, which).load(gl.SliceLayout(0, OUT))
    cumj = _row(rows_rings[1], stage, which).load(gl.SliceLayout(1, OUT))
    # For i < j the scores are zero; the gap must only not overflow.
    decays = gl.exp2(gl.minimum(cum_i[None, :] - cumj[:, None], 126.0))
    return (scores.to(gl.float32) * decays).to(all_weights.dtype)


@gluon.jit
def _consumer(
    which: gl.constexpr, tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr
):
    xs, zs, Bs, Cs, _scores, rows_rings, all_weights, outs, loaded, _made, empty = tiles
    out_desc = sources[0][0]
    D_ptr, start, slots, decays, flags, kept, final, segment, nsegments, npairs = work[0]
    b, pair, first, own, count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    STAGES: gl.constexpr = SIZES[3]
    D_DIMS: gl.constexpr = FEATURES[2]
    HAS_Z: gl.constexpr = FEATURES[3]
    dtype: gl.constexpr = Bs.dtype
    BLOCK_N: gl.constexpr = Bs.shape[2]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    weights_tile = all_weights.index(which)
    out_tile = outs.index(which)
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    head = b.to(gl.int64) * nheads + h
    if slots is not None:
        before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * (nsegments - 1)
        flags += before
        decays += before
        slots += before * (_P * BLOCK_N)
        if own > 0:
            state, log_decay = _own_state(which, tiles, own, BLOCK_N, STAGES)
            FLAT: gl.constexpr = flat_layout(BLOCK_N)
            left = flat_from_state(state.to(slots.dtype.element_ty), BLOCK_N, FLAT)
            there = segment * (_P * BLOCK_N) + gl.arange(0, _P * BLOCK_N, layout=FLAT)
            gl.store(slots + there, left)
            one = gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
            gl.store(decays + segment + one, log_decay)
            publish(flags + segment)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    if start is not None:
        offsets, mask = state_tile(head, channel, P, N, BLOCK_N, STATE)
        state = gl.load(start + offsets, mask=mask, other=0.0).to(gl.float32)
    if slots is not None:  # noqa: SIM102 of compile time, the other is not
        if segment > 0:
            state = look_back(state, slots, decays, flags, segment, BLOCK_N, STATE)
    if kept is not None:
        offsets, mask = state_tile(
            head * nsegments + segment, anew(channel), P, N, BLOCK_N, STATE
        )  # fmt: skip
        gl.store(kept + offsets, state, mask=mask)
    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))
    if D_DIMS == 1:
        skip = gl.load(D_ptr + h + 0 * p).to(gl.float32)[:, None]
    elif D_DIMS == 2:
        skip = gl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(gl.float32)[:, None]
    end = own + count
    for item in range(own, end):
        stage = item % STAGES
        # What enters the chunk, before the chunk's own part: S C^T.
        entering = gl.convert_layout(state.to(dtype), LEFT)
        zero = gl.full([_P, _Q], 0.0, gl.float32, layout=OUT)
        mbarrier.wait(loaded.index(stage), (item // STAGES) & 1)
        C = Cs.index(stage).permute((1, 0))
        y = warpgroup_mma(entering, C, zero, use_acc=False, is_async=True)
        weights = _next_weights(which, tiles, item, end, OUT, STAGES)
        tma.store_wait(0)  # before a barrier that the output's tile is written after
        weights_tile.store(weights)
        fence_async_shared()
        x_tile = xs.index(stage * 2 + which)
        x = x_tile.permute((1, 0)).load(LEFT)
        scaled = _weighted(x, rows_rings[3], stage, which, LEFT)
        state = _decayed(state, rows_rings[2], stage, which, STATE)
        since_start = _row(rows_rings[2], stage, which).load(gl.SliceLayout(0, OUT))
        y = warpgroup_mma_wait(0, deps=(y,))
        y = y * since_start[None, :]
        if D_DIMS > 0:
            y += gl.convert_layout(x.to(gl.float32), OUT) * skip
        y = warpgroup_mma(x_tile.permute((1, 0)), weights_tile, y, is_async=True)
        state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)
        y = warpgroup_mma_wait(1, deps=(y,))
        if HAS_Z:
            z = zs.index(stage * 2 + which).permute((1, 0)).load(OUT).to(gl.float32)
            y *= z / (1.0 + gl.exp2(-z * LOG2_E))
        out_tile.permute((1, 0)).store(y.to(dtype))
        fence_async_shared()
        row = [b, h, (first + item - own) * _Q, channel]
        tma.async_copy_shared_to_global(out_desc, row, out_tile)
        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)
    if final is not None:  # noqa: SIM102 of compile time, the other is not
        if segment == nsegments - 1:
            offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
            gl.store(final + offsets, state, mask=mask)


@gluon.jit
def _consumer_0(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer(0, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer(1, tiles, sources, work, SIZES, FEATURES)


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def fused_kernel(
    out_desc, x_desc, z_desc, B_desc, C_desc,
    dt_ptr, A_ptr, bias_ptr, D_ptr, start, slots, decays, flags, kept, final,
    seqlen, dt_min, dt_max, stride_batch, stride_token, stride_head,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, HELPER_REGISTERS: gl.constexpr,
    SCORES: gl.constexpr, SCORES_LAYOUT: gl.constexpr,
    SOFTPLUS: gl.constexpr, D_DIMS: gl.constexpr,
):  # fmt: skip
    """The outputs, and the final states if there is a place for them. Grid (pairs, B, segments).

    start (B, H, P, N) enters the first segment, or zeros. Of more segments than one, slots
    (B, pairs, 2, segments - 1, 64 * BLOCK_N) take what each contributes, decays (B, pairs, 2,
    segments - 1) its log2 decay; flags, as many, are 0 and left 0 (see `kernels.flags`). kept
    (B, H, segments, P, N) fp32 takes what enters each segment. None: not wanted, or not there.
    """
    pair = gl.program_id(0)
    b = gl.program_id(1)
    segment = gl.program_id(2)
    first = segment * segment_chunks
    count = gl.minimum(segment_chunks, nchunks - first)
    own = gl.where(segment < nsegments - 1, count, 0)
    dtype: gl.constexpr = x_desc.dtype
    HAS_Z: gl.constexpr = z_desc is not None
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rows_rings = (  # cum, cumj, exp2(cum), exp2(total - cumj)
        gl.allocate_shared_memory(gl.float32, [STAGES, 2, _Q], ROWS),
        gl.allocate_shared_memory(gl.float32, [STAGES, 2, _Q], ROWS),
        gl.allocate_shared_memory(gl.float32, [STAGES, 2, _Q], ROWS),
        gl.allocate_shared_memory(gl.float32, [STAGES, 2, _Q], ROWS),
    )
    zs = xs
    if HAS_Z:
        zs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    scores_ring = gl.allocate_shared_memory(SCORES, [STAGES, _Q, _Q], SCORES_LAYOUT)
    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)
    loaded, made, empty = ring_barriers(STAGES)
    tiles = (xs, zs, Bs, Cs, scores_ring, rows_rings, weights, outs, loaded, made, empty)
    steps = (dt_ptr, stride_batch, stride_token, stride_head)
    sources = (
        (out_desc, x_desc, z_desc, B_desc, C_desc),
        (steps, (dt_min, dt_max), A_ptr, bias_ptr, seqlen),
    )
    sizes = (nheads, pairs_per_group, heads_per_group)
    ends = (
        D_ptr, start, slots, decays, flags, kept, final, segment, nsegments, gl.num_programs(0),
    )  # fmt: skip
    work = (ends, (b, pair, first, own, count, sizes))
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    FEATURES: gl.constexpr = (bias_ptr is not None, SOFTPLUS, D_DIMS, HAS_Z)
    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, FEATURES)),
            (_consumer_1, (tiles, sources, work, SIZES, FEATURES)),
            (_helper, (tiles, sources, work, SIZES, FEATURES)),
            (_producer, (tiles, sources, work, SIZES, FEATURES)),
        ],
        [4, 4, 1],
        [REGISTERS, HELPER_REGISTERS, 24],
    )
