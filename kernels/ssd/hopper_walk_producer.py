"""What the SSD's walk that looks back fetches, and where it lies, on Hopper. In Gluon.

The first walk goes through a segment backwards, the second forwards, so that the second begins with
what was read last: the first chunks' tiles of x and B and rows of sums are still in the ring, and
more of x in the L2 cache.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK
from mambench.kernels.ssd.hopper_kernel import consumers_head, wait_for_launch_before
from mambench.kernels.ssd.hopper_look_back import reset
from mambench.kernels.ssd.hopper_walk_alone import await_scores

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)


@gluon.jit
def place(c, own, STAGES: gl.constexpr):
    """Return the stage of chunk c in the second walk, and how often it was filled before.

    The first chunks are where the first walk, which ended with them, has left them.
    """
    backwards = own + STAGES - 1 - c % STAGES
    return backwards % STAGES, backwards // STAGES + c // STAGES


@gluon.jit
def _fetch_x_and_B(tiles, sources, work, stage, c, P: gl.constexpr):
    """Fetch chunk c's tiles of x and B, which the launch before does not make."""
    xs, _zs, Bs, _Cs, _scores, _cums, _weights, _outs, full, _empty = tiles
    _out_desc, x_desc, _z, B_desc, _C, _scores_desc, _cum, _cumj, _nchunks = sources
    b, pair, _segment, _nsegments, first, _own, _count, sizes = work[1]
    _nheads, pairs_per_group, heads_per_group = sizes
    bar = full.index(stage)
    t = (first + c) * _Q
    group = pair // pairs_per_group
    tma.async_copy_global_to_shared(B_desc, [b, group, t, 0], bar, Bs.index(stage))
    for which in gl.static_range(2):
        h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
        x = xs.index(stage * 2 + which)
        tma.async_copy_global_to_shared(x_desc, [b, h, t, channel], bar, x)


@gluon.jit
def _fetch_sums(tiles, sources, work, stage, c, P: gl.constexpr):
    """Fetch chunk c's rows of cum and cumj."""
    _xs, _zs, _Bs, _Cs, _scores, sums, _weights, _outs, full, _empty = tiles
    cums, _totals = sums
    _out_desc, _x, _z, _B, _C, _scores_desc, cum_desc, cumj_desc, _nchunks = sources
    b, pair, _segment, _nsegments, first, _own, _count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    bar = full.index(stage)
    for which in gl.static_range(2):
        h, _channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
        slot = stage * 4 + which * 2
        row = [b * nheads + h, (first + c) * _Q]
        tma.async_copy_global_to_shared(cum_desc, row, bar, cums.index(slot))
        tma.async_copy_global_to_shared(cumj_desc, row, bar, cums.index(slot + 1))


@gluon.jit
def producer(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    """Fetch a segment's tiles in the order that consumers take them, and reset flags at the end."""
    _xs, zs, Bs, Cs, scores_ring, _cums, _weights, _outs, full, empty = tiles
    _out_desc, _x, z_desc, _B, C_desc, scores_desc, _cum, _cumj, nchunks = sources
    slots, flags, npairs = work[0][2], work[0][4], work[0][6]
    b, pair, segment, nsegments, first, own, count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    STAGES: gl.constexpr = SIZES[3]
    HAS_Z: gl.constexpr = FEATURES[1]
    PDL: gl.constexpr = FEATURES[2]
    ALONE: gl.constexpr = FEATURES[3]
    sums_bytes: gl.constexpr = 0 if ALONE else 4 * 4
    itemsize: gl.constexpr = Bs.dtype.primitive_bitwidth // 8
    row_bytes: gl.constexpr = (2 * _P + Bs.shape[2]) * itemsize + sums_bytes
    z_bytes: gl.constexpr = 2 * _P * itemsize if HAS_Z else 0
    scores_bytes: gl.constexpr = _Q * scores_ring.dtype.primitive_bitwidth // 8
    more_bytes: gl.constexpr = Bs.shape[2] * itemsize + z_bytes + scores_bytes
    # As many as the ring holds come before what the launch before makes, and stay at the end.
    early = gl.minimum(own, STAGES)
    for item in range(0, early):
        mbarrier.expect(full.index(item), row_bytes * _Q)
        _fetch_x_and_B(tiles, sources, work, item, own - 1 - item, P)
    if not ALONE:
        wait_for_launch_before(PDL)
    for item in range(0, own):
        stage = item % STAGES
        if item >= early:
            mbarrier.wait(empty.index(stage), ((item // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), row_bytes * _Q)
            _fetch_x_and_B(tiles, sources, work, stage, own - 1 - item, P)
        if not ALONE:
            _fetch_sums(tiles, sources, work, stage, own - 1 - item, P)
    if ALONE:
        await_scores(work)
    group = pair // pairs_per_group
    scores_row = (b * (nheads // heads_per_group) + group) * nchunks * _Q
    for c in range(0, count):
        stage, fill = place(c, own, STAGES)
        mbarrier.wait(empty.index(stage), (fill & 1) ^ 1)
        bar = full.index(stage)
        if c < early:  # x, B and sums are there from the first walk
            mbarrier.expect(bar, more_bytes * _Q)
        else:
            mbarrier.expect(bar, (row_bytes + more_bytes) * _Q)
            _fetch_x_and_B(tiles, sources, work, stage, c, P)
            if not ALONE:
                _fetch_sums(tiles, sources, work, stage, c, P)
        t = (first + c) * _Q
        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        scores = scores_ring.index(stage)
        tma.async_copy_global_to_shared(scores_desc, [scores_row + t, 0], bar, scores)
        if HAS_Z:
            for which in gl.static_range(2):
                h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
                z = zs.index(stage * 2 + which)
                tma.async_copy_global_to_shared(z_desc, [b, h, t, channel], bar, z)
    if slots is not None:  # noqa: SIM102 of compile time, the other is not
        if segment == nsegments - 1:
            for which in gl.static_range(2):
                before = ((b.to(gl.int64) * npairs + pair) * 2 + which) * (nsegments - 1)
                reset(flags + before, nsegments - 1)
