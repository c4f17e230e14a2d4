"""The SSD forward on Hopper as one walk per block. In Gluon.

It follows the launch that makes sums and scores, or makes them itself (`hopper_walk_alone`).

A block serves one segment of time of two consumers' heads (see `hopper_kernel`, whose transposed
products these are). It walks its segment twice: backwards for the segment's own end state, then,
from what enters the segment, forwards for the outputs. Between the walks the blocks of the same
heads hand their states on (`hopper_look_back`). The last segment's own end state is nobody's and is
not made; where there is one segment, nothing is handed on.

Chunks over which the decay is mild take half the instructions of others: it is split into a factor
of i and one of j, so that no weights are made. Both are counted from where half of the chunk's log
decay is over, so that there is place in bf16 for what decays by up to 2^-128 (from the chunk's
start: 2^-64). Chunks that decay by more are steep.
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

from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK, WITHIN_CHUNKS
from mambench.kernels.ssd.hopper_kernel import (
    consumers_head,
    let_next_launch,
    ring_barriers,
    row_of,
    scaled_state,
    state_tile,
    wait_for_launch_before,
)
from mambench.kernels.ssd.hopper_look_back import (
    anew,
    flat_from_state,
    flat_layout,
    look_back,
    publish,
    unknown,
)
from mambench.kernels.ssd.hopper_walk_alone import (
    fetch_for_scores,
    make_scores,
    prefetch_steps,
    prefetch_tiles,
    sums_within,
)
from mambench.kernels.ssd.hopper_walk_producer import place, producer

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
WITHIN = gl.constexpr(WITHIN_CHUNKS)
_LOG2_E = gl.constexpr(1.4426950408889634)
_LEAST_MILD = gl.constexpr(-128.0)  # log2 decay of a chunk: bf16 has the range of half of it
_RUNTIME_SIZES = [
    "nchunks", "segment_chunks", "nsegments", "nheads", "pairs_per_group", "heads_per_group",
    "seqlen", "dt_min", "dt_max", "stride_batch", "stride_token", "stride_head",
    "x_stride_batch", "x_stride_token", "x_stride_head",
]  # fmt: skip


@gluon.jit
def _row(cums, which: gl.constexpr, kind: gl.constexpr, stage, c, ALONE: gl.constexpr):
    """View chunk c's row of a kind, where it was fetched to or was made."""
    if ALONE:
        row = cums.index((which * 3 + kind) * WITHIN + c)
    else:
        row = row_of(cums, stage * 4 + which * 2 + kind)
    return row


@gluon.jit
def _own_operand(
    which: gl.constexpr, tiles, item, own, after, STAGES: gl.constexpr, LEFT: gl.constexpr,
    ALONE: gl.constexpr,
):  # fmt: skip
    """Return x^T weighted by its decay up to the segment's end, and the chunk's log2 decay."""
    xs, _zs, _Bs, _Cs, _scores, sums, _weights, _outs, full, _empty = tiles
    cums, totals = sums
    along: gl.constexpr = gl.SliceLayout(0, LEFT)
    stage = item % STAGES
    c = own - 1 - item
    mbarrier.wait(full.index(stage), (item // STAGES) & 1)
    if ALONE:
        total = totals.index(which * WITHIN + c).load(along)
        weight = _row(cums, which, 2, stage, c, ALONE).load(along)
    else:
        total = _row(cums, which, 0, stage, c, ALONE).slice(_Q - 1, 1).load(along)
        weight = gl.exp2(after + total - _row(cums, which, 1, stage, c, ALONE).load(along))
    x = xs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
    return (x.to(gl.float32) * weight[None, :]).to(x.dtype), total


@gluon.jit
def _own_state(
    which: gl.constexpr, tiles, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    ALONE: gl.constexpr,
):  # fmt: skip
    """Walk a segment backwards for its own end state and log2 decay.

    While a chunk's product is under way, the operand of the one before it is made.
    """
    _xs, _zs, Bs, _Cs, _scores, _cums, _weights, _outs, _full, empty = tiles
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    after = gl.full([1], 0.0, gl.float32, layout=gl.SliceLayout(0, LEFT))
    scaled, total = _own_operand(which, tiles, 0, own, after, STAGES, LEFT, ALONE)
    for item in range(0, own):
        state = warpgroup_mma(scaled, Bs.index(item % STAGES), state, is_async=True)
        after += total
        following = gl.minimum(item + 1, own - 1)
        scaled, total = _own_operand(which, tiles, following, own, after, STAGES, LEFT, ALONE)
        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(item % STAGES), count=1)
    return state, gl.convert_layout(after, gl.SliceLayout(1, STATE))


@gluon.jit
def _entering(
    which: gl.constexpr, tiles, work, head, channel, SIZES: gl.constexpr, ALONE: gl.constexpr
):  # fmt: skip
    """Walk a segment for its own end state, hand it on, and return what enters the segment."""
    _D_ptr, start, slots, decays, flags, _final, npairs = work[0]
    b, pair, segment, nsegments, _first, own, _count, _sizes = work[1]
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SIZE: gl.constexpr = _P * BLOCK_N
    if slots is not None:
        before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * (nsegments - 1)
        flags += before
        decays += before
        slots += before * SIZE
        if own > 0:
            state, log_decay = _own_state(which, tiles, own, BLOCK_N, STAGES, ALONE)
            FLAT: gl.constexpr = flat_layout(BLOCK_N)
            left = flat_from_state(state.to(slots.dtype.element_ty), BLOCK_N, FLAT)
            gl.store(slots + (segment * SIZE + gl.arange(0, SIZE, layout=FLAT)), left)
            one = gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
            gl.store(decays + segment + one, log_decay)
            publish(flags + segment)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    if start is not None:
        offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
        state = gl.load(start + offsets, mask=mask, other=0.0).to(gl.float32)
    if slots is not None:  # noqa: SIM102 of compile time, the other is not
        if segment > 0:
            state = look_back(state, slots, decays, flags, segment, BLOCK_N, STATE)
    return state


@gluon.jit
def _chunk(
    which: gl.constexpr, tiles, out_desc, row, state, skip, stage, c, middle,
    SIZES: gl.constexpr, FEATURES: gl.constexpr, MILD: gl.constexpr,
):  # fmt: skip
    """Write a chunk's outputs and return the state that leaves it.

    Where the decay over the chunk is mild, it is split into factors of i and of j, which x takes:
    the scores themselves are the weights then, and what comes of them is scaled at the end.

    middle: log2 decay from the chunk's start to where the factors are 1. The state is taken and
    returned as it is there; of a steep chunk as it is at the start, and at the end.
    """
    xs, zs, Bs, Cs, scores_ring, sums, all_weights, outs, _full, _empty = tiles
    cums, _totals = sums
    BLOCK_N: gl.constexpr = SIZES[2]
    D_DIMS: gl.constexpr = FEATURES[0]
    HAS_Z: gl.constexpr = FEATURES[1]
    ALONE: gl.constexpr = FEATURES[3]
    dtype: gl.constexpr = Bs.dtype
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    out_tile = outs.index(which)
    x_tile = xs.index(stage * 2 + which)
    B, C = Bs.index(stage), Cs.index(stage)
    scores_tile = scores_ring.index(stage)
    cum = _row(cums, which, 0, stage, c, ALONE)
    cumj = _row(cums, which, 1, stage, c, ALONE)
    zero = gl.full([_P, _Q], 0.0, gl.float32, layout=OUT)
    # What enters the chunk, before the chunk's own part: S C^T.
    entering = gl.convert_layout(state.to(dtype), LEFT)
    y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
    cum_i = cum.load(gl.SliceLayout(0, OUT))
    if MILD:
        x = x_tile.permute((1, 0)).load(LEFT)
        if ALONE:
            weight = cumj.load(gl.SliceLayout(0, LEFT))
        else:
            weight = gl.exp2(middle - cumj.load(gl.SliceLayout(0, LEFT)))
        scaled = (x.to(gl.float32) * weight[None, :]).to(dtype)
        y = warpgroup_mma(scaled, scores_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        since_middle = cum_i if ALONE else gl.exp2(cum_i - middle)
        tma.store_wait(0)
        gl.thread_barrier()
        y = warpgroup_mma_wait(1, deps=(y,))
        y = y * since_middle[None, :]
    else:
        weights_tile = all_weights.index(which)
        gap = cum_i[None, :] - cumj.load(gl.SliceLayout(1, OUT))[:, None]
        # For i < j the scores are zero; the gap must only not overflow.
        decays = gl.exp2(gl.minimum(gap, 126.0))
        weights_tile.store((scores_tile.load(OUT).to(gl.float32) * decays).to(dtype))
        fence_async_shared()
        tma.store_wait(0)
        x = x_tile.permute((1, 0)).load(LEFT)
        state, scaled = scaled_state(state, x, cum, cumj, LEFT, STATE)
        y = warpgroup_mma_wait(0, deps=(y,))
        y = y * gl.exp2(cum_i)[None, :]
        y = warpgroup_mma(x, weights_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        y = warpgroup_mma_wait(1, deps=(y,))
    if D_DIMS > 0:
        y += gl.convert_layout(x.to(gl.float32), OUT) * skip
    if HAS_Z:
        z = zs.index(stage * 2 + which).permute((1, 0)).load(OUT).to(gl.float32)
        y *= z / (1.0 + gl.exp2(-z * _LOG2_E))
    out_tile.permute((1, 0)).store(y.to(dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, row, out_tile)
    state = warpgroup_mma_wait(0, deps=(state,))
    return state


@gluon.jit
def _consumer(
    which: gl.constexpr, tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr
):
    _xs, _zs, Bs, _Cs, scores_ring, sums, _weights, _outs, full, empty = tiles
    cums, totals = sums
    out_desc = sources[0]
    D_ptr, _start, _slots, _decays, _flags, final, _npairs = work[0]
    b, pair, segment, nsegments, first, own, count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    D_DIMS: gl.constexpr = FEATURES[0]
    ALONE: gl.constexpr = FEATURES[3]
    # In fp16 the inverse of a decay has no place, and the scores are in fp32.
    MILD: gl.constexpr = Bs.dtype == gl.bfloat16 and scores_ring.dtype == gl.bfloat16
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    head = b.to(gl.int64) * nheads + h
    if ALONE:
        sums_within(which, tiles, work, h, FEATURES[4], _LEAST_MILD if MILD else None)
    state = _entering(which, tiles, work, head, channel, SIZES, ALONE)
    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))
    skip = p
    if D_DIMS == 1:
        skip = gl.load(D_ptr + h + 0 * p).to(gl.float32)[:, None]
    elif D_DIMS == 2:
        skip = gl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(gl.float32)[:, None]
    ahead = 0.0  # log2 decay from where the state is to the next chunk's start
    for c in range(0, count):
        stage, fill = place(c, own, STAGES)
        mbarrier.wait(full.index(stage), fill & 1)
        row = [b, h, (first + c) * _Q, channel]
        if MILD:
            if ALONE:
                last = totals.index(which * WITHIN + c)
            else:
                last = _row(cums, which, 0, stage, c, ALONE).slice(_Q - 1, 1)
            total = gl.sum(last.load(gl.SliceLayout(1, STATE)), axis=0)
            if total > _LEAST_MILD:
                middle = total * 0.5
                state = state * gl.exp2(ahead + middle)
                ahead = total - middle
                state = _chunk(
                    which, tiles, out_desc, row, state, skip, stage, c, middle, SIZES, FEATURES,
                    True,
                )  # fmt: skip
            else:
                # Or ptxas takes addresses of the steep path's tiles from the mild path's registers.
                steep = unknown(stage)
                state = state * gl.exp2(ahead)
                ahead = 0.0
                state = _chunk(
                    which, tiles, out_desc, row, state, skip, steep, c, 0.0, SIZES, FEATURES, False
                )  # fmt: skip
        else:
            state = _chunk(
                which, tiles, out_desc, row, state, skip, stage, c, 0.0, SIZES, FEATURES, False
            )  # fmt: skip
        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)
    if final is not None:  # noqa: SIM102 of compile time, the other is not
        if segment == nsegments - 1:
            if MILD:
                state = state * gl.exp2(ahead)
            offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
            gl.store(final + offsets, state, mask=mask)


@gluon.jit
def _consumer_or_maker(
    which: gl.constexpr, tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr
):
    if FEATURES[3]:
        if work[1][2] >= 0:
            if which == 0:
                prefetch_steps(work, SIZES[0], FEATURES[0])
            else:
                prefetch_tiles(work, SIZES[0], SIZES[3])
        wait_for_launch_before(FEATURES[2])
        if work[1][2] < 0:
            make_scores(which, tiles, work, SIZES[3])
        else:
            _consumer(which, tiles, sources, work, SIZES, FEATURES)
    else:
        _consumer(which, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _consumer_0(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer_or_maker(0, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer_or_maker(1, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    if FEATURES[3]:
        wait_for_launch_before(FEATURES[2])
        if work[1][2] < 0:
            fetch_for_scores(tiles, sources, work, SIZES[3])
        else:
            producer(tiles, sources, work, SIZES, FEATURES)
    else:
        producer(tiles, sources, work, SIZES, FEATURES)


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def walk_kernel(
    out_desc, x_desc, z_desc, B_desc, C_desc, scores_desc, cum_desc, cumj_desc,
    D_ptr, start, slots, decays, flags, final,
    dt_ptr, A_ptr, bias_ptr, scores_ptr, x_ptr, seqlen, dt_min, dt_max,
    stride_batch, stride_token, stride_head, x_stride_batch, x_stride_token, x_stride_head,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, D_DIMS: gl.constexpr, SOFTPLUS: gl.constexpr,
):  # fmt: skip
    """The outputs, and the final states if there is a place for them. Grid (pairs, B, segments).

    start (B, H, P, N) enters the first, or zeros. slots (B, pairs, 2, segments - 1, 64 * BLOCK_N)
    take what each contributes, decays (B, pairs, 2, segments - 1) its log2 decay; flags, as many,
    are 0 and left 0 (see `kernels.flags`); all three None of one segment.

    With dt it is the only launch, of segments of up to WITHIN_CHUNKS chunks (`hopper_walk_alone`),
    and there is one more along the grid's last axis, which comes first: it makes the scores. Flags
    are followed by (B, G, segments) of their own kind then, and cum_desc and cumj_desc are None.
    """
    let_next_launch(PDL)
    ALONE: gl.constexpr = dt_ptr is not None
    pair = gl.program_id(0)
    b = gl.program_id(1)
    segment = gl.program_id(2)
    if ALONE:
        segment = segment - 1
    first = segment * segment_chunks
    count = gl.minimum(segment_chunks, nchunks - first)
    own = gl.where(segment < nsegments - 1, count, 0)
    dtype: gl.constexpr = x_desc.dtype
    HAS_Z: gl.constexpr = z_desc is not None
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    if ALONE:
        one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
        cums = gl.allocate_shared_memory(gl.float32, [6 * WITHIN, _Q], one)
        totals = gl.allocate_shared_memory(gl.float32, [2 * WITHIN, 1], one)
    else:
        cums = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 1, _Q], cum_desc.layout)
        totals = cums
    zs = xs
    if HAS_Z:
        zs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    scores_ring = gl.allocate_shared_memory(
        scores_desc.dtype, [STAGES, _Q, _Q], scores_desc.layout
    )  # fmt: skip
    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)
    full, empty = ring_barriers(STAGES)
    fence_async_shared()  # TMA sees the barriers, which it arrives at soon
    tiles = (xs, zs, Bs, Cs, scores_ring, (cums, totals), weights, outs, full, empty)
    sources = (
        out_desc, x_desc, z_desc, B_desc, C_desc, scores_desc, cum_desc, cumj_desc, nchunks,
    )  # fmt: skip
    sizes = (nheads, pairs_per_group, heads_per_group)
    ends = (D_ptr, start, slots, decays, flags, final, gl.num_programs(0))
    made = (
        dt_ptr, A_ptr, bias_ptr, seqlen, dt_min, dt_max, (stride_batch, stride_token, stride_head),
        scores_ptr, nchunks, x_ptr, (x_stride_batch, x_stride_token, x_stride_head),
    )  # fmt: skip
    where = (b, pair, segment, nsegments, first, own, count, sizes)
    work = (ends, where, made, segment_chunks)
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    FEATURES: gl.constexpr = (D_DIMS, HAS_Z, PDL, ALONE, SOFTPLUS)
    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, FEATURES)),
            (_consumer_1, (tiles, sources, work, SIZES, FEATURES)),
            (_producer, (tiles, sources, work, SIZES, FEATURES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
