"""SSD forward on Hopper, the walk that looks back: its first pass backwards, tiles fetched before the first launch ends, operands
ahead, the first chunks' tiles kept in the ring; the first and the last piece of time in one block; outputs stored past the L2 cache.

python3 ssd_walk_order.py, from the repository's root; about a minute on 12 cores. Rows as they are made; $OUT/ssd_walk_order.json. The variants are
switches of a copy of the walk as it was at commit 21d1328; with none it is that walk. Some are compiled wrongly for steep chunks
(docs/experiments.md): what they are judged by then fails.
"""
import importlib.util, json, math, os, re, subprocess, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from parts import load_package, replay_us as replay, ssd_inputs as inputs

ROOT = Path.cwd()
OUT = Path(os.environ.get("OUT", "/tmp/out")); OUT.mkdir(parents=True, exist_ok=True)
WALK = r'''"""The SSD forward on Hopper as one walk per block, behind the launch that prepares it. In Gluon.

A block serves one segment of time of two consumers' heads (see `hopper_kernel`, whose transposed
products these are). It walks its segment twice: for the segment's own end state, then, from what
enters the segment, for the outputs. Between the walks the blocks of the same heads hand their
states on (`hopper_look_back`). The last segment's own end state is nobody's and is not made.

Chunks over which the decay is mild take half the instructions of others: it is split into a factor
of i and one of j, so that no weights are made. Of a chunk that decays by 2^-64 or more the second
factor has no place in bf16.
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
    reset,
)

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_LOG2_E = gl.constexpr(1.4426950408889634)
REVERSED = gl.constexpr(True)
AHEAD = gl.constexpr(True)
EARLY = gl.constexpr(True)
FIRST_LAST = gl.constexpr(False)
STREAM = gl.constexpr(False)
KEEP = gl.constexpr(False)
_LEAST_MILD = gl.constexpr(-64.0)
_RUNTIME_SIZES = [
    "nchunks",
    "segment_chunks",
    "nsegments",
    "nheads",
    "pairs_per_group",
    "heads_per_group",
    "turns",
    "longer",
    "seqlen",
    "out_batch",
]


@gluon.jit
def _own_operand(
    which: gl.constexpr, tiles, item, after, STAGES: gl.constexpr, LEFT: gl.constexpr
):
    """x^T of an item weighted by its decay up to the segment's end, and the item's log2 decay."""
    xs, _zs, _Bs, _Cs, _scores, cums, _weights, _outs, full, _empty = tiles
    along: gl.constexpr = gl.SliceLayout(0, LEFT)
    stage = item % STAGES
    mbarrier.wait(full.index(stage), item // STAGES & 1)
    cum = row_of(cums, stage * 4 + which * 2)
    cumj = row_of(cums, stage * 4 + which * 2 + 1)
    x = xs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
    total = cum.slice(_Q - 1, 1).load(along)
    weight = gl.exp2(after + total - cumj.load(along))
    scaled = (x.to(gl.float32) * weight[None, :]).to(x.dtype)
    return (scaled, total)


@gluon.jit
def _own_state(
    which: gl.constexpr, tiles, own, BLOCK_N: gl.constexpr, STAGES: gl.constexpr
):
    """Walk a segment for its own end state and log2 decay."""
    xs, _zs, Bs, _Cs, _scores, cums, _weights, _outs, full, empty = tiles
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    scalar: gl.constexpr = gl.SliceLayout(1, STATE)
    along: gl.constexpr = gl.SliceLayout(0, LEFT)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    log_decay = gl.full([1], 0.0, gl.float32, layout=scalar)
    if REVERSED:
        after = gl.full([1], 0.0, gl.float32, layout=along)
        if AHEAD:
            scaled, total = _own_operand(which, tiles, 0, after, STAGES, LEFT)
            for c in range(0, own):
                state = warpgroup_mma(
                    scaled, Bs.index(c % STAGES), state, is_async=True
                )
                after += total
                following = gl.minimum(c + 1, own - 1)
                then, total = _own_operand(which, tiles, following, after, STAGES, LEFT)
                state = warpgroup_mma_wait(0, deps=(state,))
                mbarrier.arrive(empty.index(c % STAGES), count=1)
                scaled = then
        else:
            for c in range(0, own):
                scaled, total = _own_operand(which, tiles, c, after, STAGES, LEFT)
                state = warpgroup_mma(
                    scaled, Bs.index(c % STAGES), state, is_async=True
                )
                after += total
                state = warpgroup_mma_wait(0, deps=(state,))
                mbarrier.arrive(empty.index(c % STAGES), count=1)
        log_decay = gl.convert_layout(after, scalar)
    else:
        for c in range(0, own):
            stage = c % STAGES
            mbarrier.wait(full.index(stage), c // STAGES & 1)
            cum = row_of(cums, stage * 4 + which * 2)
            cumj = row_of(cums, stage * 4 + which * 2 + 1)
            x = xs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
            log_decay += cum.slice(_Q - 1, 1).load(scalar)
            state, scaled = scaled_state(state, x, cum, cumj, LEFT, STATE)
            state = warpgroup_mma(scaled, Bs.index(stage), state, is_async=True)
            state = warpgroup_mma_wait(0, deps=(state,))
            mbarrier.arrive(empty.index(stage), count=1)
    return (state, log_decay)


@gluon.jit
def _hand_over(
    which: gl.constexpr, state, log_decay, work, head, channel, SIZES: gl.constexpr
):
    """Publish what a segment contributes and return what enters it, or the last piece."""
    _D_ptr, start, slots, decays, flags, _final, npairs = work[0]
    b, pair, segment, nsegments, _first, own, _count, _sizes, _turn, _jump = work[1]
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SIZE: gl.constexpr = _P * BLOCK_N
    published = nsegments if FIRST_LAST else nsegments - 1
    before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * published
    flags += before
    decays += before
    slots += before * SIZE
    if segment < published:
        FLAT: gl.constexpr = flat_layout(BLOCK_N)
        left = flat_from_state(state.to(slots.dtype.element_ty), BLOCK_N, FLAT)
        gl.store(slots + (segment * SIZE + gl.arange(0, SIZE, layout=FLAT)), left)
        one = gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
        gl.store(decays + segment + one, log_decay)
        publish(flags + segment)
    if FIRST_LAST:
        state = gl.where(segment == 0, state, 0.0)
        lo = gl.where(segment == 0, 1, 0)
        hi = gl.where(segment == 0, nsegments, segment)
        state = look_back_of(state, slots, decays, flags, lo, hi, BLOCK_N, STATE)
    else:
        state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
        if start is not None:
            offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
            state = gl.load(start + offsets, mask=mask, other=0.0).to(gl.float32)
        if segment > 0:
            state = look_back(state, slots, decays, flags, segment, BLOCK_N, STATE)
    return state


@gluon.jit
def look_back_of(
    state, slots, decays, flags, lo, hi, BLOCK_N: gl.constexpr, STATE: gl.constexpr
):
    """Add to the decayed state what the pieces from lo to hi left, in order."""
    SIZE: gl.constexpr = _P * BLOCK_N
    return look_back(
        state, slots + lo * SIZE, decays + lo, flags + lo, hi - lo, BLOCK_N, STATE
    )


@gluon.jit
def _chunk(
    which: gl.constexpr,
    tiles,
    out_desc,
    row,
    state,
    skip,
    stage,
    SIZES: gl.constexpr,
    FEATURES: gl.constexpr,
    MILD: gl.constexpr,
):
    """Write a chunk's outputs and return the state that leaves it.

    Where the decay over the chunk is mild, it is split into factors of i and of j, which x takes:
    the scores themselves are the weights then, and what comes of them is scaled at the end.
    """
    xs, zs, Bs, Cs, scores_ring, cums, all_weights, outs, _full, _empty = tiles
    BLOCK_N: gl.constexpr = SIZES[2]
    D_DIMS: gl.constexpr = FEATURES[0]
    HAS_Z: gl.constexpr = FEATURES[1]
    dtype: gl.constexpr = Bs.dtype
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    out_tile = outs.index(which)
    x_tile = xs.index(stage * 2 + which)
    B, C = (Bs.index(stage), Cs.index(stage))
    scores_tile = scores_ring.index(stage)
    cum = row_of(cums, stage * 4 + which * 2)
    cumj = row_of(cums, stage * 4 + which * 2 + 1)
    zero = gl.full([_P, _Q], 0.0, gl.float32, layout=OUT)
    entering = gl.convert_layout(state.to(dtype), LEFT)
    y = warpgroup_mma(entering, C.permute((1, 0)), zero, use_acc=False, is_async=True)
    cum_i = cum.load(gl.SliceLayout(0, OUT))
    if MILD:
        x = x_tile.permute((1, 0)).load(LEFT)
        weight = gl.exp2(-cumj.load(gl.SliceLayout(0, LEFT)))
        scaled = (x.to(gl.float32) * weight[None, :]).to(dtype)
        y = warpgroup_mma(scaled, scores_tile, y, is_async=True)
        state = warpgroup_mma(scaled, B, state, is_async=True)
        since_start = gl.exp2(cum_i)
        if not STREAM:
            tma.store_wait(0)
            gl.thread_barrier()
        y = warpgroup_mma_wait(1, deps=(y,))
        y = y * since_start[None, :]
    else:
        weights_tile = all_weights.index(which)
        gap = cum_i[None, :] - cumj.load(gl.SliceLayout(1, OUT))[:, None]
        decays = gl.exp2(gl.minimum(gap, 126.0))
        weights_tile.store((scores_tile.load(OUT).to(gl.float32) * decays).to(dtype))
        fence_async_shared()
        if not STREAM:
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
    if STREAM:
        out_tile.permute((1, 0)).store(y.to(dtype))
        ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        made = out_tile.load(ROWS)
        out_ptr, seqlen, row_size, batch_stride = out_desc
        token = row[2] + gl.arange(0, _Q, layout=gl.SliceLayout(1, ROWS))
        column = gl.arange(0, _P, layout=gl.SliceLayout(0, ROWS))
        at = token[:, None] * row_size + column[None, :]
        place = out_ptr + (
            row[0].to(gl.int64) * batch_stride + row[1] * SIZES[0] + row[3]
        )
        gl.store(
            place + at,
            made,
            mask=(token < seqlen)[:, None],
            eviction_policy="evict_first",
        )
    else:
        out_tile.permute((1, 0)).store(y.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(out_desc, row, out_tile)
    state = warpgroup_mma_wait(0, deps=(state,))
    if MILD:
        total = cum.slice(_Q - 1, 1).load(gl.SliceLayout(1, STATE))
        state = state * gl.exp2(total)[:, None]
    return state


@gluon.jit
def _consumer(
    which: gl.constexpr,
    tiles,
    sources,
    work,
    SIZES: gl.constexpr,
    FEATURES: gl.constexpr,
):
    _xs, _zs, Bs, _Cs, scores_ring, cums, _weights, _outs, full, empty = tiles
    out_desc = sources[0]
    D_ptr, _start, _slots, _decays, _flags, final, _npairs = work[0]
    b, pair, segment, nsegments, first, own, count, sizes, turn, jump = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    D_DIMS: gl.constexpr = FEATURES[0]
    MILD: gl.constexpr = Bs.dtype == gl.bfloat16 and scores_ring.dtype == gl.bfloat16
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    head = b.to(gl.int64) * nheads + h
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    log_decay = gl.full([1], 0.0, gl.float32, layout=gl.SliceLayout(1, STATE))
    if FIRST_LAST:
        if segment == 0:
            if _start is not None:
                offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
                state = gl.load(_start + offsets, mask=mask, other=0.0).to(gl.float32)
    if own > 0:
        state, log_decay = _own_state(which, tiles, own, BLOCK_N, STAGES)
    if not FIRST_LAST:
        state = _hand_over(which, state, log_decay, work, head, channel, SIZES)
    p = channel + gl.arange(0, _P, layout=gl.SliceLayout(1, OUT))
    skip = p
    if D_DIMS == 1:
        skip = gl.load(D_ptr + h + 0 * p).to(gl.float32)[:, None]
    elif D_DIMS == 2:
        skip = gl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(gl.float32)[:, None]
    for item in range(own, own + count):
        if FIRST_LAST:
            if item - own == turn:
                state = _hand_over(which, state, log_decay, work, head, channel, SIZES)
        if KEEP:
            stage, fill = kept_stage(item - own, own, STAGES)
        else:
            stage = item % STAGES
            fill = item // STAGES
        mbarrier.wait(full.index(stage), fill & 1)
        at = first + item - own
        if FIRST_LAST:
            at += gl.where(item - own >= turn, jump, 0)
        row = [b, h, at * _Q, channel]
        if MILD:
            last = row_of(cums, stage * 4 + which * 2).slice(_Q - 1, 1)
            total = gl.sum(last.load(gl.SliceLayout(1, STATE)), axis=0)
            if total > _LEAST_MILD:
                state = _chunk(
                    which,
                    tiles,
                    out_desc,
                    row,
                    state,
                    skip,
                    stage,
                    SIZES,
                    FEATURES,
                    True,
                )
            else:
                state = _chunk(
                    which,
                    tiles,
                    out_desc,
                    row,
                    state,
                    skip,
                    stage,
                    SIZES,
                    FEATURES,
                    False,
                )
        else:
            state = _chunk(
                which, tiles, out_desc, row, state, skip, stage, SIZES, FEATURES, False
            )
        mbarrier.arrive(empty.index(stage), count=1)
    if not STREAM:
        tma.store_wait(0)
    if final is not None:
        if segment == (0 if FIRST_LAST else nsegments - 1):
            offsets, mask = state_tile(head, anew(channel), P, N, BLOCK_N, STATE)
            gl.store(final + offsets, state, mask=mask)


@gluon.jit
def _consumer_0(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer(0, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _consumer(1, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    xs, zs, Bs, Cs, scores_ring, cums, _weights, _outs, full, empty = tiles
    (
        _out_desc,
        x_desc,
        z_desc,
        B_desc,
        C_desc,
        scores_desc,
        cum_desc,
        cumj_desc,
        nchunks,
    ) = sources
    flags, npairs = (work[0][4], work[0][6])
    b, pair, segment, nsegments, first, own, count, sizes, turn, jump = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    STAGES: gl.constexpr = SIZES[3]
    HAS_Z: gl.constexpr = FEATURES[1]
    PDL: gl.constexpr = FEATURES[2]
    itemsize: gl.constexpr = Bs.dtype.primitive_bitwidth // 8
    row_bytes: gl.constexpr = (2 * _P + Bs.shape[2]) * itemsize + 4 * 4
    z_bytes: gl.constexpr = 2 * _P * itemsize if HAS_Z else 0
    scores_bytes: gl.constexpr = _Q * scores_ring.dtype.primitive_bitwidth // 8
    more_bytes: gl.constexpr = Bs.shape[2] * itemsize + z_bytes + scores_bytes
    group = pair // pairs_per_group
    scores_row = (b * (nheads // heads_per_group) + group) * nchunks * _Q
    early = 0
    if EARLY:
        early = gl.minimum(own, STAGES)
        for item in range(0, early):
            bar = full.index(item)
            mbarrier.expect(bar, row_bytes * _Q)
            chunk = own - 1 - item if REVERSED else item
            t = (first + chunk) * _Q
            tma.async_copy_global_to_shared(
                B_desc, [b, group, t, 0], bar, Bs.index(item)
            )
            for which in gl.static_range(2):
                h, channel = consumers_head(
                    pair, which, pairs_per_group, heads_per_group, P
                )
                x = xs.index(item * 2 + which)
                tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
    wait_for_launch_before(PDL)
    for item in range(0, own):
        stage = item % STAGES
        bar = full.index(stage)
        chunk = own - 1 - item if REVERSED else item
        t = (first + chunk) * _Q
        if item >= early:
            mbarrier.wait(empty.index(stage), item // STAGES & 1 ^ 1)
            mbarrier.expect(bar, row_bytes * _Q)
            tma.async_copy_global_to_shared(
                B_desc, [b, group, t, 0], bar, Bs.index(stage)
            )
        for which in gl.static_range(2):
            h, channel = consumers_head(
                pair, which, pairs_per_group, heads_per_group, P
            )
            if item >= early:
                x = xs.index(stage * 2 + which)
                tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
            slot = stage * 4 + which * 2
            row = [b * nheads + h, t]
            tma.async_copy_global_to_shared(cum_desc, row, bar, cums.index(slot))
            tma.async_copy_global_to_shared(cumj_desc, row, bar, cums.index(slot + 1))
    for item in range(own, own + count):
        if KEEP:
            stage, fill = kept_stage(item - own, own, STAGES)
            anew_too = item - own >= gl.minimum(own, STAGES)
        else:
            stage = item % STAGES
            fill = item // STAGES
            anew_too = True
        mbarrier.wait(empty.index(stage), fill & 1 ^ 1)
        bar = full.index(stage)
        if KEEP:
            if anew_too:
                mbarrier.expect(bar, (row_bytes + more_bytes) * _Q)
            else:
                mbarrier.expect(bar, more_bytes * _Q)
        else:
            mbarrier.expect(bar, (row_bytes + more_bytes) * _Q)
        at = first + item - own
        if FIRST_LAST:
            at += gl.where(item - own >= turn, jump, 0)
        t = at * _Q
        scores = scores_ring.index(stage)
        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        tma.async_copy_global_to_shared(scores_desc, [scores_row + t, 0], bar, scores)
        if HAS_Z:
            for which in gl.static_range(2):
                h, channel = consumers_head(
                    pair, which, pairs_per_group, heads_per_group, P
                )
                z = zs.index(stage * 2 + which)
                tma.async_copy_global_to_shared(z_desc, [b, h, t, channel], bar, z)
        if anew_too:
            tma.async_copy_global_to_shared(
                B_desc, [b, group, t, 0], bar, Bs.index(stage)
            )
            for which in gl.static_range(2):
                h, channel = consumers_head(
                    pair, which, pairs_per_group, heads_per_group, P
                )
                x = xs.index(stage * 2 + which)
                tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)
                slot = stage * 4 + which * 2
                row = [b * nheads + h, t]
                tma.async_copy_global_to_shared(cum_desc, row, bar, cums.index(slot))
                tma.async_copy_global_to_shared(
                    cumj_desc, row, bar, cums.index(slot + 1)
                )
    if FIRST_LAST:
        if segment == 0:
            for which in gl.static_range(2):
                before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * nsegments
                reset_around(flags + before, nsegments)
    elif segment == nsegments - 1:
        for which in gl.static_range(2):
            before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * (nsegments - 1)
            reset(flags + before, nsegments - 1)


@gluon.jit
def kept_stage(c, own, STAGES: gl.constexpr):
    """Where an output item is, and of how many before: its own item's, if that came last there."""
    u = own + STAGES - 1 - c % STAGES
    return (u % STAGES, u // STAGES + c // STAGES)


@gluon.jit
def reset_around(flags, count):
    """Set the `count` flags to 0 once all their readers have counted themselves."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k = gl.arange(0, 32, layout=LANES)
    watched = flags + gl.minimum(k, count - 1)
    left = 1
    while left > 0:
        values = gl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];",
            "=r,l",
            [watched],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )
        readers = count - k + gl.minimum(k, 1)
        left = gl.max(gl.where(k < count, readers - values, 0), axis=0)
    gl.store(flags + k, gl.full([32], 0, gl.int32, layout=LANES), mask=k < count)


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def walk_kernel(
    out_desc,
    x_desc,
    z_desc,
    B_desc,
    C_desc,
    scores_desc,
    cum_desc,
    cumj_desc,
    D_ptr,
    start,
    slots,
    decays,
    flags,
    final,
    nchunks,
    segment_chunks,
    nsegments,
    nheads,
    pairs_per_group,
    heads_per_group,
    turns,
    longer,
    out,
    seqlen,
    out_batch,
    PDL: gl.constexpr,
    P: gl.constexpr,
    N: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    D_DIMS: gl.constexpr,
):
    """The outputs, and the final states if there is a place for them. Grid (pairs, B, segments).

    Of two segments or more. start (B, H, P, N) enters the first, or zeros. slots (B, pairs, 2,
    segments - 1, 64 * BLOCK_N) take what each contributes, decays (B, pairs, 2, segments - 1) its
    log2 decay; flags, as many, are 0 and left 0 (see `kernels.flags`).
    """
    let_next_launch(PDL)
    pair = gl.program_id(0)
    b = gl.program_id(1)
    segment = gl.program_id(2)
    turn = 0
    jump = 0
    if FIRST_LAST:
        first = turns + (segment - 1) * segment_chunks + gl.minimum(segment - 1, longer)
        own = segment_chunks + gl.where(segment <= longer, 1, 0)
        count = own
        if segment == 0:
            first = 0
            own = 0
            turn = turns
            jump = (nsegments - 1) * segment_chunks + longer
            count = nchunks - jump
    else:
        less = gl.maximum(segment - (nsegments - turns), 0)
        first = segment * segment_chunks + gl.minimum(segment, longer) - less
        count = segment_chunks + gl.where(segment < longer, 1, 0)
        count -= gl.where(segment >= nsegments - turns, 1, 0)
        count = gl.minimum(count, nchunks - first)
        own = gl.where(segment < nsegments - 1, count, 0)
    dtype: gl.constexpr = x_desc.dtype
    HAS_Z: gl.constexpr = z_desc is not None
    xs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    Bs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], B_desc.layout)
    cums = gl.allocate_shared_memory(gl.float32, [STAGES * 4, 1, _Q], cum_desc.layout)
    zs = xs
    if HAS_Z:
        zs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], x_desc.layout)
    scores_ring = gl.allocate_shared_memory(
        scores_desc.dtype, [STAGES, _Q, _Q], scores_desc.layout
    )
    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [2, _Q, _P], x_desc.layout)
    full, empty = ring_barriers(STAGES)
    tiles = (xs, zs, Bs, Cs, scores_ring, cums, weights, outs, full, empty)
    sources = (
        (out, seqlen, nheads * P, out_batch) if STREAM else out_desc,
        x_desc,
        z_desc,
        B_desc,
        C_desc,
        scores_desc,
        cum_desc,
        cumj_desc,
        nchunks,
    )
    sizes = (nheads, pairs_per_group, heads_per_group)
    ends = (D_ptr, start, slots, decays, flags, final, gl.num_programs(0))
    work = (ends, (b, pair, segment, nsegments, first, own, count, sizes, turn, jump))
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    FEATURES: gl.constexpr = (D_DIMS, HAS_Z, PDL)
    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, FEATURES)),
            (_consumer_1, (tiles, sources, work, SIZES, FEATURES)),
            (_producer, (tiles, sources, work, SIZES, FEATURES)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
'''
FLAGS = ("REVERSED", "AHEAD", "EARLY", "KEEP", "FIRST_LAST", "STREAM")
R, A, E, K, F, T = ({f} for f in FLAGS)
VARIANTS = {  # name: (switches, cooperative launch, PDL)
    "as committed": (set(), False, True), "backwards, ahead, early": (R | A | E, False, True), "... and kept": (R | A | E | K, False, True),
    "first and last": (R | A | E | F, True, True), "first and last, no PDL": (R | A | E | F, True, False), "first and last, kept": (R | A | E | F | K, True, True),
    "kept, stored past L2": (R | A | E | K | T, False, True), "first and last, kept, stored past L2": (R | A | E | K | F | T, True, True),
}
RIGHT = {"start": ((1, 1200, 8), 8, {"start": True}), "gated, ragged": ((2, 1111, 5), 5, {"start": True, "z": True}), "steep": ((1, 1500, 6), 4, {"start": True, "A": 400.0}),
         "long memory": ((1, 3000, 4), 16, {"start": True, "A": 0.02})}
USED = [None]


def setup():
    global torch, S, W, prepared, cases
    import torch
    sys.path.insert(0, str(ROOT / "tests/kernels/ssd"))
    load_package()
    from mambench.kernels import prepared
    from mambench.kernels.ssd import hopper_ssd as S, hopper_walk as W
    import ssd_cases as cases
    S.run_walk = run_walk
    torch.set_grad_enabled(False)


def use(name):
    """Have the walk be a variant."""
    on, _, _ = VARIANTS[name]
    source = WALK
    for flag in FLAGS: source = re.sub(rf"^{flag} = gl.constexpr\(\w+\)", f"{flag} = gl.constexpr({flag in on})", source, flags=re.M)
    stem = "v_walk_order_" + "".join(str(int(f in on)) for f in FLAGS); path = OUT / f"{stem}.py"
    if not path.exists() or path.read_text() != source: path.write_text(source)
    spec = importlib.util.spec_from_file_location(f"mambench.kernels.ssd.{stem}", path)
    if spec.name not in sys.modules: sys.modules[spec.name] = made = importlib.util.module_from_spec(spec); spec.loader.exec_module(made)
    USED[:] = [name, sys.modules[spec.name].walk_kernel]


def first_last(nchunks, S):
    """Chunks of the first piece, of the others, and how many of these have one more; a chunk's own state takes 0.55 of its outputs."""
    if (nchunks, S) == (128, 8): return 9, 15, 0
    def costs():
        for others in range(S - 1, nchunks - 1):
            each, longer = divmod(others, S - 1); most = each + (longer > 0); rest = nchunks - others
            for first in {min(max(1, round(0.55 * most)), rest - 1), min(max(1, rest - most), rest - 1)}:
                yield max(0.55 * most, first) + max(most, rest - first), first, each, longer
    return min(costs())[1:]


def run_walk(recording, plan, tensors, prepared, results, *, sizes, constants, narrow):
    on, cooperative, pdl = VARIANTS[USED[0]]
    both = "FIRST_LAST" in on
    cum, cumj, scores = prepared
    out, final = results
    block_n, device, D, z = constants["BLOCK_N"], out.device, tensors.D, tensors.z
    npairs, segments = sizes[4] * plan.ngroups, plan.nsegments
    turns, per, longer = first_last(plan.nchunks, segments) if both else (0, sizes[1], 0)
    ends = (plan.batch, npairs, 2, segments if both else segments - 1)
    slots = recording.scratch((*ends, 64 * block_n), torch.bfloat16 if narrow else torch.float32, device)
    decays = recording.scratch(ends, torch.float32, device)
    flags = recording.flags(math.prod(ends), device)
    arguments = (
        W.tiles_of(out, 64), W.tiles_of(tensors.x, 64), None if z is None else W.tiles_of(z, 64), W.tiles_of(tensors.B, block_n), W.tiles_of(tensors.C, block_n),
        W.rows_of(scores, 64, 64), W.rows_of(cum, 64, 1), W.rows_of(cumj, 64, 1), D, tensors.initial_states, slots, decays, flags, final,
        sizes[0], per, *sizes[2:], turns, longer, out, plan.seqlen, out.stride(0))
    constants = constants | {"D_DIMS": 0 if D is None else D.dim(), "PDL": pdl}
    options = {"launch_cooperative_grid": True} if cooperative else {}
    recording.launch(USED[1], (npairs, plan.batch, segments), arguments, constants, num_warps=4, launch_pdl=pdl, **options)


def forward(case, final=False, **config):
    config = S.Config(look_back=True, **config)
    plan = S.plan_hopper(case["x"], case["B"], dt_softplus=True, dt_limit=(0.0, math.inf), config=config, keep=False)
    ops = S.Operands.laid_out(*(case.get(k) for k in ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")))
    return lambda: S.run_forward(prepared.Recording(None), plan, ops, return_final_states=final, keep=False, config=config)


def judged(name):
    """Errors of out and final states against the loop in float64, and whether 20 repeats gave the same bits."""
    use(name); got = {}
    for label, (shape, segments, more) in RIGHT.items():
        case = inputs(*shape, **more)
        want = cases.loop(**{k: v.double().cpu() for k, v in case.items() if torch.is_tensor(v)}, dt_softplus=True)
        call = forward(case, final=True, segments=segments); o, e, _ = call(); torch.cuda.synchronize()
        got[label] = [float((a.double().cpu() - b).norm() / b.norm()) for a, b in zip((o, e), want)]
        again = [call() for _ in range(20)]; torch.cuda.synchronize(); got[label].append(all(torch.equal(a[0], o) and torch.equal(a[1], e) for a in again))
    return got


def main(argv):
    if argv[:1] == ["right"]: setup(); print(json.dumps(judged(argv[1]))); return
    if argv[:1] == ["time"]:
        setup(); use(argv[1]); print(json.dumps({L: round(replay(forward(inputs(1, L, 32))), 2) for L in (8192, 32768, 4096)})); return
    found = {"right": {}, "us": {}}
    def run(*arguments):
        done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else "FAILED " + done.stderr.strip()[-300:]
    with ThreadPoolExecutor(4) as pool: found["right"] = dict(zip(VARIANTS, pool.map(lambda name: run("right", name), VARIANTS)))
    for name in VARIANTS: found["us"][name] = run("time", name); print(f"{name:40}", json.dumps(found["us"][name]), found["right"][name], flush=True)
    (OUT / "ssd_walk_order.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__": main(sys.argv[1:])
