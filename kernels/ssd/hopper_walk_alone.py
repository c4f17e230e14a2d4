"""What the SSD's walk on Hopper needs of a launch before it, made within its own. In Gluon.

Where a segment is short, a consumer makes the sums of its segment's log-decay before the first
walk, and keeps them in shared memory. The scores, which all heads of a group share, are made by
blocks that walk nothing: they come before all others in the grid, so that still no block waits for
one of a higher index. They say what they have made only at their end, which by the choice of shapes
(`hopper_config.walks_alone`) is mostly before the second walk asks for it; what they keep from
starting at once is blocks of the last segment, which wait at first.

Before it waits for the launch before, a block has the L2 cache fetch what it reads first: that is
right also where it is still to be written, since the cache is where writes go.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import PropagateNan

from mambench.kernels.ssd.hopper_config import CHUNK, MOST_SEGMENTS, WITHIN_CHUNKS
from mambench.kernels.ssd.hopper_kernel import consumers_head
from mambench.kernels.ssd.hopper_rows import (
    LEAST_A2,
    LEAST_LOG2_DECAY,
    LOG2_E,
    add,
    softplus,
)

_Q = gl.constexpr(CHUNK)
_C = gl.constexpr(WITHIN_CHUNKS)
_ALL = gl.constexpr(PropagateNan.ALL)
_SEGMENTS = gl.constexpr(MOST_SEGMENTS)
_PREFETCHED = gl.constexpr(7)  # tiles of x, of each consumer
_SHARERS = gl.constexpr(8)  # pairs of heads, whose steps are one sector of 32 bytes in bf16


@gluon.jit
def _prefetch(where):
    """Have the L2 cache fetch lines: a hint, also where they are still to be written."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], dtype=gl.int32, is_pure=False,
        pack=1,
    )  # fmt: skip


@gluon.jit
def prefetch_steps(work, P: gl.constexpr, D_DIMS: gl.constexpr):
    """Prefetch what sums are made of, a segment's dt and a head's A and bias, and the head's D.

    Of a pair's first head: the other's is close by. So are other pairs': each of eight asks for an
    eighth of the steps, since a request goes its way a line at a time, ahead of loads.
    """
    b, pair, _segment, _nsegments, first, _own, count, sizes = work[1]
    D_ptr = work[0][0]
    dt_ptr, A_ptr, bias_ptr, seqlen, _min, _max, strides = work[2][:7]
    _nheads, pairs_per_group, heads_per_group = sizes
    stride_batch, stride_token, stride_head = strides
    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    h, _channel = consumers_head(pair, 0, pairs_per_group, heads_per_group, P)
    one = h + gl.arange(0, 1, layout=LINES)
    _prefetch(A_ptr + one)
    if bias_ptr is not None:
        _prefetch(bias_ptr + one)
    if D_DIMS == 1:
        _prefetch(D_ptr + one)
    start = b.to(gl.int64) * stride_batch + h.to(gl.int64) * stride_head
    last = gl.minimum((first + count) * _Q, seqlen) - 1
    STEPS: gl.constexpr = _C * _Q // _SHARERS
    sharers = gl.minimum(pairs_per_group, _SHARERS)
    for part in range(pair % pairs_per_group % sharers, _SHARERS, sharers):
        t = gl.minimum(first * _Q + part * STEPS + gl.arange(0, STEPS, layout=LINES), last)
        _prefetch(dt_ptr + start + t.to(gl.int64) * stride_token)


@gluon.jit
def prefetch_tiles(work, P: gl.constexpr, STAGES: gl.constexpr):
    """Prefetch the tiles of x that are asked for first, but those that the ring has place for.

    Those are fetched as soon as the wait is over.
    """
    b, pair, _segment, _nsegments, first, own, count, sizes = work[1]
    seqlen, x_ptr, x_strides = work[2][3], work[2][9], work[2][10]
    _nheads, pairs_per_group, heads_per_group = sizes
    stride_batch, stride_token, stride_head = x_strides
    LINES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    row = gl.arange(0, _Q, layout=LINES)
    for item in range(STAGES, gl.minimum(STAGES + _PREFETCHED, count)):
        c = gl.where(own > 0, own - 1 - item, item)
        t = gl.minimum((first + c) * _Q + row, seqlen - 1).to(gl.int64)
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            start = b.to(gl.int64) * stride_batch + h.to(gl.int64) * stride_head + channel
            _prefetch(x_ptr + start + t * stride_token)


@gluon.jit
def sums_within(
    which: gl.constexpr, tiles, work, h, SOFTPLUS: gl.constexpr, LEAST_MILD: gl.constexpr
):  # fmt: skip
    """Make the rows of a segment's chunks, and each chunk's log2 decay.

    Two rows are cum and cumj (see triton_parts); of a mild chunk, one that decays by more than
    LEAST_MILD, what is made of them instead: exp2(cum - middle), and exp2(middle - cumj), which x
    takes. The third is each token's weight in the segment's own end state. LEAST_MILD is None where
    no chunk counts as mild.
    """
    cums, totals = tiles[5]
    b, _pair, _segment, _nsegments, first, _own, count, _sizes = work[1]
    dt_ptr, A_ptr, bias_ptr, seqlen, dt_min, dt_max, strides = work[2][:7]
    stride_batch, stride_token, stride_head = strides
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    chunk = gl.arange(0, _C, layout=gl.SliceLayout(1, ROWS))
    q = gl.arange(0, _Q, layout=gl.SliceLayout(0, ROWS))
    t = ((first + chunk) * _Q)[:, None] + q[None, :]
    inside = (t < seqlen) & (chunk < count)[:, None]
    start = b.to(gl.int64) * stride_batch + h.to(gl.int64) * stride_head
    A2 = gl.maximum(gl.load(A_ptr + h).to(gl.float32) * LOG2_E, LEAST_A2, propagate_nan=_ALL)
    bias = A2
    if bias_ptr is not None:
        bias = gl.load(bias_ptr + h).to(gl.float32)
    # Lanes load what lies side by side, in fewer lines a request than in the order of the sums.
    # Without masks, or the compiler waits for one load before it starts the next.
    LOADED: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [4, 1], [1, 0])
    loaded_chunk = first + gl.arange(0, _C, layout=gl.SliceLayout(1, LOADED))
    token = (loaded_chunk * _Q)[:, None] + gl.arange(0, _Q, gl.SliceLayout(0, LOADED))[None, :]
    last = gl.minimum((first + count) * _Q, seqlen) - 1
    token = gl.minimum(token, last).to(gl.int64)
    dt = gl.load(dt_ptr + start + token * stride_token).to(gl.float32)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    rows = cums._reinterpret(gl.float32, [6, _C, _Q], flat)
    rows.index(which * 3).store(dt)
    gl.thread_barrier()
    dt = rows.index(which * 3).load(ROWS)
    if bias_ptr is not None:
        dt += bias
    if SOFTPLUS:
        dt = softplus(dt)
    dt = gl.maximum(dt, dt_min, propagate_nan=_ALL)
    dt = gl.minimum(dt, dt_max, propagate_nan=_ALL)
    dt = gl.where(inside, dt, 0.0)
    log_decay = gl.maximum(dt * A2, LEAST_LOG2_DECAY, propagate_nan=_ALL)
    cum = gl.associative_scan(log_decay, 1, add)
    total = gl.sum(gl.where((q == _Q - 1)[None, :], cum, 0.0), axis=1)
    one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    totals._reinterpret(gl.float32, [2, _C], one).index(which).store(total)
    log_dt = gl.log2(gl.where(dt > 0, dt, 1.0))
    cumj = gl.where(dt > 0, cum - log_dt, float("inf"))
    gl.thread_barrier()
    after = total * 0.0
    for k in gl.static_range(_C - 1, 0, -1):
        later = gl.sum(totals.index(which * _C + k).load(gl.SliceLayout(1, ROWS)), axis=0)
        after += gl.where(chunk < k, later, 0.0)
    rows.index(which * 3 + 2).store(gl.exp2((after + total)[:, None] - cumj))
    if LEAST_MILD is not None:
        middle = (total * 0.5)[:, None]
        mild = (total > LEAST_MILD)[:, None]
        cumj = gl.where(mild, dt * gl.exp2(middle - cum), cumj)
        cum = gl.where(mild, gl.exp2(cum - middle), cum)
    rows.index(which * 3).store(cum)
    rows.index(which * 3 + 1).store(cumj)
    gl.thread_barrier()


@gluon.jit
def _made_here(work):
    """Return the first chunk that a block makes scores of, every how many, and their number."""
    nchunks = work[2][8]
    _b, pair, _segment, _nsegments, _first, _own, _count, sizes = work[1]
    _nheads, pairs_per_group, _heads_per_group = sizes
    first = pair % pairs_per_group
    return first, pairs_per_group, (nchunks - first + pairs_per_group - 1) // pairs_per_group


@gluon.jit
def _counter(work):
    """Return where the chunks of a group whose scores are there are counted, by segment."""
    flags = work[0][4]
    b, pair, _segment, nsegments, _first, _own, _count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    counts = flags + gl.num_programs(1) * gl.num_programs(0) * 2 * (nsegments - 1)
    return counts + (b * (nheads // heads_per_group) + pair // pairs_per_group) * nsegments


@gluon.jit
def make_scores(which: gl.constexpr, tiles, work, STAGES: gl.constexpr):
    """Make every other chunk's scores, B_j . C_i for i >= j, else 0; consumers take turns.

    They are counted when all are stored, so that nothing waits for a chunk's to be stored.
    """
    _xs, _zs, Bs, Cs, _scores, _cums, _weights, _outs, full, empty = tiles
    scores_ptr, nchunks = work[2][7], work[2][8]
    b, pair, _segment, _nsegments, _first, _own, _count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    chunk, step, count = _made_here(work)
    start = chunk + which * step
    group = b.to(gl.int64) * (nheads // heads_per_group) + pair // pairs_per_group
    j = gl.arange(0, _Q, layout=gl.SliceLayout(1, TILE))
    i = gl.arange(0, _Q, layout=gl.SliceLayout(0, TILE))
    for item in range(0, count):
        stage = item % STAGES
        mbarrier.wait(full.index(stage), (item // STAGES) & 1)
        if item % 2 == which:
            zero = gl.full([_Q, _Q], 0.0, gl.float32, layout=TILE)
            C = Cs.index(stage).permute((1, 0))
            scores = warpgroup_mma(Bs.index(stage), C, zero, use_acc=False, is_async=True)
            scores = warpgroup_mma_wait(0, deps=(scores,))
            mbarrier.arrive(empty.index(stage), count=1)
            scores = gl.where(j[:, None] <= i[None, :], scores, 0.0)
            tile = scores_ptr + (group * nchunks + chunk) * (_Q * _Q)
            gl.store(tile + (j * _Q)[:, None] + i[None, :], scores.to(tile.dtype.element_ty))
        else:
            mbarrier.arrive(empty.index(stage), count=1)
        chunk += step
    _count_made(work, start, 2 * step)


@gluon.jit
def _count_made(work, start, step):
    """Count what a consumer has stored, of every step-th chunk, to each chunk's segment."""
    nchunks, segment_chunks = work[2][8], work[3]
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    segment = gl.arange(0, _SEGMENTS, layout=LANES)
    begin = gl.minimum(segment * segment_chunks, nchunks)
    end = gl.minimum(begin + segment_chunks, nchunks)
    before = gl.maximum(begin - start + step - 1, 0) // step
    made = gl.maximum(end - start + step - 1, 0) // step - before
    gl.thread_barrier()
    gl.atomic_add(_counter(work) + segment, made, mask=made > 0, sem="release", scope="gpu")


@gluon.jit
def fetch_for_scores(tiles, sources, work, STAGES: gl.constexpr):
    """Fetch the tiles of B and C that a block makes scores of."""
    _xs, _zs, Bs, Cs, _scores, _cums, _weights, _outs, full, empty = tiles
    _out_desc, _x, _z, B_desc, C_desc, _scores_desc, _cum, _cumj, _nchunks = sources
    b, pair, _segment, _nsegments, _first, _own, _count, sizes = work[1]
    _nheads, pairs_per_group, _heads_per_group = sizes
    tile_bytes: gl.constexpr = _Q * Bs.shape[2] * Bs.dtype.primitive_bitwidth // 8
    chunk, step, count = _made_here(work)
    group = pair // pairs_per_group
    for item in range(0, count):
        stage = item % STAGES
        mbarrier.wait(empty.index(stage), ((item // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, 2 * tile_bytes)
        t = chunk * _Q
        tma.async_copy_global_to_shared(B_desc, [b, group, t, 0], bar, Bs.index(stage))
        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        chunk += step


@gluon.jit
def await_scores(work):
    """Wait for the scores of a segment's chunks; the last block that does leaves the count 0."""
    _b, _pair, segment, _nsegments, _first, _own, count, sizes = work[1]
    _nheads, pairs_per_group, _heads_per_group = sizes
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    counter = _counter(work) + segment
    watched = counter + gl.arange(0, 32, layout=LANES) * 0
    seen = 0
    while seen < count:
        values = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [watched], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        seen = gl.min(values, axis=0)
    # What others have stored is read by bulk copies, which go another way.
    gl.inline_asm_elementwise(
        "fence.proxy.async.global; mov.u32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    before = gl.atomic_add(counter, 1, sem="relaxed", scope="gpu")
    if before == count + pairs_per_group - 1:
        gl.store(counter, 0)
