"""The SSD forward's two walks over time on Hopper, in Gluon: segments' own states, and the outputs.

Both walk a segment chunk by chunk (Q = 64 tokens) with the state in registers. A block is one
producer warp, which fetches tiles by TMA into a ring of stages, and two consumers of four warps,
each with 64 channels of one head; the consumers share the tiles of B and C. Everything is
transposed, so that what a consumer makes stays in its registers as the left operand of the next
product and only the weights pass through shared memory:

    Y^T  (64, Q)    = S (64, N) C^T (N, Q)  scaled by exp2(cum)  + x^T (64, Q) W (Q, Q)
    W    (Q j, Q i) = (B C^T)_ji exp2(cum_i - cumj_j), 0 for i < j
    S    (64, N)   <- S exp2(total) + (x^T scaled by exp2(total - cumj)) B (Q, N)

B C^T is the same for all heads of a group: `prepare_kernel` makes it once (SCORES), or each
consumer makes its own. Past the end of the sequence TMA delivers zeros and writes nothing, and cum
and cumj (see triton_parts) make every weight 0. Channels and states beyond P and N are delivered as
zeros.
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

from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_LOG2_E = gl.constexpr(1.4426950408889634)
_RUNTIME_SIZES = [
    "nchunks", "segment_chunks", "nsegments", "nheads", "pairs_per_group", "heads_per_group",
]  # fmt: skip


@gluon.jit
def wait_for_launch_before(PDL: gl.constexpr):
    """Wait until the launch before has finished; without programmatic launch it has."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def let_next_launch(PDL: gl.constexpr):
    """Let the next launch begin; it waits for this one's results by itself."""
    if PDL:
        gl.inline_asm_elementwise(
            "griddepcontrol.launch_dependents; mov.u32 $0, 0;", "=r", [], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def ring_barriers(STAGES: gl.constexpr):
    """Barriers of a ring of stages: one filled by TMA, one emptied by both consumers."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    return full, empty


@gluon.jit
def consumers_head(
    pair, which: gl.constexpr, pairs_per_group, heads_per_group, P: gl.constexpr
):  # fmt: skip
    """Head and first channel of consumer `which` of a pair; an odd one out repeats the last."""
    blocks: gl.constexpr = (P + _P - 1) // _P
    group = pair // pairs_per_group
    v = (pair % pairs_per_group) * 2 + which
    v = gl.minimum(v, heads_per_group * blocks - 1)
    return group * heads_per_group + v // blocks, (v % blocks) * _P


@gluon.jit
def row_of(rings, slot):
    """View one fetched row of cum or cumj as a vector."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return rings.index(slot)._reinterpret(gl.float32, [_Q], flat)


@gluon.jit
def scaled_state(state, x, cum, cumj, LEFT: gl.constexpr, STATE: gl.constexpr):
    """Return the decayed state, and x^T scaled by its weight in the new one, a left operand."""
    along: gl.constexpr = gl.SliceLayout(0, LEFT)
    total = cum.slice(_Q - 1, 1)
    weight = gl.exp2(total.load(along) - cumj.load(along))
    scaled = (x.to(gl.float32) * weight[None, :]).to(x.dtype)
    decay = gl.exp2(total.load(gl.SliceLayout(1, STATE)))
    return state * decay[:, None], scaled


@gluon.jit
def state_tile(
    slot, channel, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, STATE: gl.constexpr
):
    """Offsets and mask of a consumer's part of matrix `slot` of (..., P, N)."""
    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, STATE))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, STATE))
    mask = (p < P)[:, None] & (n < N)[None, :]
    return slot * (P * N) + (p[:, None] * N + n[None, :]), mask


@gluon.jit
def entering_state(
    before, head, segment, nsegments, tile, mask,
    SIZE: gl.constexpr, FIRST: gl.constexpr, COMBINE: gl.constexpr, STATE: gl.constexpr,
):  # fmt: skip
    """Load what enters a segment, or add it up from what the segments before it contribute."""
    entry, decay, start = before
    if COMBINE:
        if start is None:
            state = gl.full(tile.shape, 0.0, gl.float32, layout=STATE)
        else:
            state = gl.load(start + head * SIZE + tile, mask=mask, other=0.0).to(gl.float32)
        slots = entry + head * (nsegments - 1) * SIZE + tile
        decays = decay + head * nsegments + gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
        # The next segment's loads are in flight while this one's are used.
        own = gl.load(slots, mask=mask & (segment > 0), other=0.0)
        log_decay = gl.load(decays)
        for k in range(0, segment):
            following = gl.minimum(k + 1, segment - 1)
            next_own = gl.load(slots + following * SIZE, mask=mask, other=0.0)
            next_decay = gl.load(decays + following)
            state = state * gl.exp2(log_decay)[:, None] + own.to(gl.float32)
            own = next_own
            log_decay = next_decay
    elif FIRST:
        slot = head * nsegments + segment
        state = gl.load(entry + slot * SIZE + tile, mask=mask, other=0.0).to(gl.float32)
    else:
        slot = head * (nsegments - 1) + segment - 1
        later = mask & (segment > 0)
        state = gl.load(entry + slot * SIZE + tile, mask=later, other=0.0).to(gl.float32)
        if start is not None:
            earliest = mask & (segment == 0)
            state += gl.load(start + head * SIZE + tile, mask=earliest, other=0.0).to(gl.float32)
    return state


@gluon.jit
def _state_consumer(
    which: gl.constexpr, tiles, work,
    P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    xs, Bs, cums, full, empty = tiles
    end, decay, b, pair, segment, _first, count, nsegments, sizes = work
    nheads, pairs_per_group, heads_per_group = sizes
    BLOCK_N: gl.constexpr = Bs.shape[2]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    scalar: gl.constexpr = gl.SliceLayout(1, STATE)
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    log_decay = gl.full([1], 0.0, gl.float32, layout=scalar)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(full.index(stage), (c // STAGES) & 1)
        cum = row_of(cums, stage * 4 + which * 2)
        cumj = row_of(cums, stage * 4 + which * 2 + 1)
        x = xs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
        log_decay += cum.slice(_Q - 1, 1).load(scalar)
        state, scaled = scaled_state(state, x, cum, cumj, LEFT, STATE)
        state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(stage), count=1)
    head = b.to(gl.int64) * nheads + h
    slot = head * (nsegments - 1 + FIRST) + segment + FIRST
    offsets, mask = state_tile(slot, channel, P, N, BLOCK_N, STATE)
    gl.store(end + offsets, state, mask=mask)
    one = gl.arange(0, 1, layout=scalar)
    gl.store(decay + head * nsegments + segment + one, log_decay, mask=one + channel == 0)


@gluon.jit
def _state_consumer_0(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    _state_consumer(0, tiles, work, P, N, STAGES, FIRST)


@gluon.jit
def _state_consumer_1(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    _state_consumer(1, tiles, work, P, N, STAGES, FIRST)


@gluon.jit
def _state_producer(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    xs, Bs, cums, full, empty = tiles
    x_desc, B_desc, cum_desc, cumj_desc = sources
    _end, _decay, b, pair, _segment, first, count, _nsegments, sizes = work
    nheads, pairs_per_group, heads_per_group = sizes
    itemsize: gl.constexpr = Bs.dtype.primitive_bitwidth // 8
    fetched: gl.constexpr = (2 * _P + Bs.shape[2]) * _Q * itemsize + 4 * _Q * 4
    wait_for_launch_before(PDL)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), ((c // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        t = (first + c) * _Q
        tma.async_copy_global_to_shared(
            B_desc, [b, pair // pairs_per_group, t, 0], bar, Bs.index(stage)
        )
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            x = xs.index(stage * 2 + which)
            tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
            slot = stage * 4 + which * 2
            row = [b * nheads + h, t]
            tma.async_copy_global_to_shared(cum_desc, row, bar, cums.index(slot))
            tma.async_copy_global_to_shared(cumj_desc, row, bar, cums.index(slot + 1))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def state_kernel(
    x_desc, B_desc, cum_desc, cumj_desc, end, decay,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """Each segment's own end state, into the slot of the next segment, and its log2 decay.

    Grid (segments - 1, pairs of consumers, B). end (B, H, segments, P, N), or without the slot of
    the first segment (FIRST = 0); decay (B, H, segments).
    """
    let_next_launch(PDL)
    segment = gl.program_id(0)
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    cums = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 1, _Q], cum_desc.layout)
    full, empty = ring_barriers(STAGES)
    tiles = (xs, Bs, cums, full, empty)
    sources = (x_desc, B_desc, cum_desc, cumj_desc)
    sizes = (nheads, pairs_per_group, heads_per_group)
    work = (
        end, decay, gl.program_id(2), gl.program_id(1), segment, segment * segment_chunks,
        segment_chunks, nsegments, sizes,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_state_consumer_0, (tiles, sources, work, PDL, P, N, STAGES, FIRST)),
            (_state_consumer_1, (tiles, sources, work, PDL, P, N, STAGES, FIRST)),
            (_state_producer, (tiles, sources, work, PDL, P, N, STAGES, FIRST)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )


@gluon.jit
def _scan_consumer(
    which: gl.constexpr, tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    D_DIMS: gl.constexpr, HAS_Z: gl.constexpr, HAS_ENTRY: gl.constexpr, FIRST: gl.constexpr,
    COMBINE: gl.constexpr, STORE_FINAL: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    xs, zs, Bs, Cs, scores_ring, cums, all_weights, outs, full, empty = tiles
    out_desc = sources[0]
    D_ptr, before, final, b, pair, segment, first, count, nsegments, sizes = work
    nheads, pairs_per_group, heads_per_group = sizes
    dtype: gl.constexpr = Bs.dtype
    BLOCK_N: gl.constexpr = Bs.shape[2]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    weights_tile = all_weights.index(which)
    out_tile = outs.index(which)
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    head = b.to(gl.int64) * nheads + h
    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))
    if D_DIMS == 1:
        skip = gl.load(D_ptr + h + 0 * p).to(gl.float32)[:, None]
    elif D_DIMS == 2:
        skip = gl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(gl.float32)[:, None]
    if HAS_ENTRY:
        wait_for_launch_before(PDL)
        tile, mask = state_tile(0, channel, P, N, BLOCK_N, STATE)
        state = entering_state(
            before, head, segment, nsegments, tile, mask, P * N, FIRST, COMBINE, STATE
        )  # fmt: skip
    else:
        state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    for c in range(0, count):
        stage = c % STAGES
        # What enters the chunk, before the chunk's own part: S C^T.
        entering = gl.convert_layout(state.to(dtype), LEFT)
        mbarrier.wait(full.index(stage), (c // STAGES) & 1)
        x_tile = xs.index(stage * 2 + which)
        B, C = Bs.index(stage), Cs.index(stage)
        zero = gl.full([_P, _Q], 0.0, gl.float32, layout=OUT)
        if SCORES:
            y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
            scores = scores_ring.index(stage).load(OUT).to(gl.float32)
        else:
            scores = warpgroup_mma(B, C.permute((1, 0)), zero, use_acc=False, is_async=True)
            y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
        cum = row_of(cums, stage * 4 + which * 2)
        cumj = row_of(cums, stage * 4 + which * 2 + 1)
        cum_i = cum.load(gl.SliceLayout(0, OUT))
        gap = cum_i[None, :] - cumj.load(gl.SliceLayout(1, OUT))[:, None]
        if SCORES:
            # For i < j the scores are zero; the gap must only not overflow.
            decays = gl.exp2(gl.minimum(gap, 126.0))
        else:
            i = gl.arange(0, _Q, layout=gl.SliceLayout(0, OUT))
            j = gl.arange(0, _Q, layout=gl.SliceLayout(1, OUT))
            decays = gl.exp2(gl.where(i[None, :] >= j[:, None], gap, float("-inf")))
            scores = warpgroup_mma_wait(1, deps=(scores,))
        weights_tile.store((scores * decays).to(dtype))
        fence_async_shared()
        tma.store_wait(0)
        x = x_tile.permute((1, 0)).load(LEFT)
        state, scaled = scaled_state(state, x, cum, cumj, LEFT, STATE)
        y = warpgroup_mma_wait(0, deps=(y,))
        y = y * gl.exp2(cum_i)[None, :]
        if D_DIMS > 0:
            y += gl.convert_layout(x.to(gl.float32), OUT) * skip
        y = warpgroup_mma(x_tile.permute((1, 0)), weights_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        y = warpgroup_mma_wait(1, deps=(y,))
        if HAS_Z:
            z = zs.index(stage * 2 + which).permute((1, 0)).load(OUT).to(gl.float32)
            y *= z / (1.0 + gl.exp2(-z * _LOG2_E))
        out_tile.permute((1, 0)).store(y.to(dtype))
        fence_async_shared()
        row = [b, h, (first + c) * _Q, channel]
        tma.async_copy_shared_to_global(out_desc, row, out_tile)
        state = warpgroup_mma_wait(0, deps=(state,))
        mbarrier.arrive(empty.index(stage), count=1)
    tma.store_wait(0)
    if STORE_FINAL:  # noqa: SIM102 of compile time, the other is not
        if segment == nsegments - 1:
            offsets, mask = state_tile(head, channel, P, N, BLOCK_N, STATE)
            gl.store(final + offsets, state, mask=mask)


@gluon.jit
def _scan_consumer_0(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    D_DIMS: gl.constexpr, HAS_Z: gl.constexpr, HAS_ENTRY: gl.constexpr, FIRST: gl.constexpr,
    COMBINE: gl.constexpr, STORE_FINAL: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    _scan_consumer(
        0, tiles, sources, work, PDL, P, N, STAGES, D_DIMS, HAS_Z, HAS_ENTRY, FIRST, COMBINE,
        STORE_FINAL, SCORES,
    )  # fmt: skip


@gluon.jit
def _scan_consumer_1(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    D_DIMS: gl.constexpr, HAS_Z: gl.constexpr, HAS_ENTRY: gl.constexpr, FIRST: gl.constexpr,
    COMBINE: gl.constexpr, STORE_FINAL: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    _scan_consumer(
        1, tiles, sources, work, PDL, P, N, STAGES, D_DIMS, HAS_Z, HAS_ENTRY, FIRST, COMBINE,
        STORE_FINAL, SCORES,
    )  # fmt: skip


@gluon.jit
def _scan_producer(
    tiles, sources, work,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, STAGES: gl.constexpr,
    D_DIMS: gl.constexpr, HAS_Z: gl.constexpr, HAS_ENTRY: gl.constexpr, FIRST: gl.constexpr,
    COMBINE: gl.constexpr, STORE_FINAL: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    xs, zs, Bs, Cs, scores_ring, cums, _all_weights, _outs, full, empty = tiles
    _out_desc, x_desc, z_desc, B_desc, C_desc, scores_desc, cum_desc, cumj_desc, nchunks = sources
    _D_ptr, _before, _final, b, pair, _segment, first, count, _nsegments, sizes = work
    nheads, pairs_per_group, heads_per_group = sizes
    group = pair // pairs_per_group
    itemsize: gl.constexpr = Bs.dtype.primitive_bitwidth // 8
    x_tiles: gl.constexpr = 4 if HAS_Z else 2
    scores_bits: gl.constexpr = scores_ring.dtype.primitive_bitwidth if SCORES else 0
    row_bytes: gl.constexpr = (x_tiles * _P + 2 * Bs.shape[2]) * itemsize + 4 * 4
    fetched: gl.constexpr = (row_bytes + _Q * scores_bits // 8) * _Q
    if SCORES:
        groups = nheads // heads_per_group
        scores_row = (b * groups + group) * nchunks * _Q
    wait_for_launch_before(PDL)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), ((c // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        t = (first + c) * _Q
        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        if SCORES:
            tma.async_copy_global_to_shared(
                scores_desc, [scores_row + t, 0], bar, scores_ring.index(stage)
            )
        tma.async_copy_global_to_shared(B_desc, [b, group, t, 0], bar, Bs.index(stage))
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            x = xs.index(stage * 2 + which)
            tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
            if HAS_Z:
                z = zs.index(stage * 2 + which)
                tma.async_copy_global_to_shared(z_desc, [b, h, t, channel], bar, z)
            slot = stage * 4 + which * 2
            row = [b * nheads + h, t]
            tma.async_copy_global_to_shared(cum_desc, row, bar, cums.index(slot))
            tma.async_copy_global_to_shared(cumj_desc, row, bar, cums.index(slot + 1))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def scan_kernel(
    out_desc, x_desc, z_desc, B_desc, C_desc, scores_desc, cum_desc, cumj_desc,
    D_ptr, entry, entry_decay, start, final,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
    D_DIMS: gl.constexpr, HAS_Z: gl.constexpr, HAS_ENTRY: gl.constexpr, FIRST: gl.constexpr,
    COMBINE: gl.constexpr, STORE_FINAL: gl.constexpr, SCORES: gl.constexpr,
):  # fmt: skip
    """The outputs of each segment, from what enters it. Grid (segments, pairs of consumers, B).

    entry is what enters each segment, unless FIRST all but the first, which begins from start or
    zeros; or if COMBINE what every segment but the last contributes, and entry_decay the segments'.
    Without z or SCORES, their descriptors are another tensor's and not read.
    """
    let_next_launch(PDL)
    segment = gl.program_id(0)
    first = segment * segment_chunks
    count = gl.minimum(segment_chunks, nchunks - first)
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    cums = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 1, _Q], cum_desc.layout)
    zs = xs
    if HAS_Z:
        zs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    scores_ring = xs
    if SCORES:
        scores_ring = gl.allocate_shared_memory(
            scores_desc.dtype, [STAGES, _Q, _Q], scores_desc.layout
        )
    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)
    full, empty = ring_barriers(STAGES)
    tiles = (xs, zs, Bs, Cs, scores_ring, cums, weights, outs, full, empty)
    sources = (
        out_desc, x_desc, z_desc, B_desc, C_desc, scores_desc, cum_desc, cumj_desc, nchunks,
    )  # fmt: skip
    sizes = (nheads, pairs_per_group, heads_per_group)
    before = (entry, entry_decay, start)
    work = (
        D_ptr, before, final, gl.program_id(2), gl.program_id(1), segment, first, count,
        nsegments, sizes,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (
                _scan_consumer_0,
                (
                    tiles,
                    sources,
                    work,
                    PDL,
                    P,
                    N,
                    STAGES,
                    D_DIMS,
                    HAS_Z,
                    HAS_ENTRY,
                    FIRST,
                    COMBINE,
                    STORE_FINAL,
                    SCORES,
                ),
            ),
            (
                _scan_consumer_1,
                (
                    tiles,
                    sources,
                    work,
                    PDL,
                    P,
                    N,
                    STAGES,
                    D_DIMS,
                    HAS_Z,
                    HAS_ENTRY,
                    FIRST,
                    COMBINE,
                    STORE_FINAL,
                    SCORES,
                ),
            ),
            (
                _scan_producer,
                (
                    tiles,
                    sources,
                    work,
                    PDL,
                    P,
                    N,
                    STAGES,
                    D_DIMS,
                    HAS_Z,
                    HAS_ENTRY,
                    FIRST,
                    COMBINE,
                    STORE_FINAL,
                    SCORES,
                ),
            ),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
