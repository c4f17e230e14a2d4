"""The states that enter all chunks, and their gradients, on Hopper in Gluon: both walks over time.

A block serves one segment of time of two consumers' heads. A producer warp fetches tiles by TMA
into a ring of stages; two consumers of four warps hold 64 channels of one head each. Along time
(u = dt x, Q = 64 tokens)

    S    (64, N)   <- S exp2(total) + (x^T scaled by exp2(total - cumj)) B (Q, N)

is stored before each chunk. Against time, in the place of the states of the walk before,

    G    (64, N)   <- G exp2(total) + (grad_y^T scaled by exp2(cum_i)) C (Q, N)

is, and of the states is left <G, S>. A state that was fetched is replaced in its own stage of the
ring, which TMA then stores.
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
    state_tile,
    wait_for_launch_before,
)

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_RUNTIME_SIZES = [
    "nchunks", "segment_chunks", "nsegments", "nheads", "pairs_per_group", "heads_per_group",
]  # fmt: skip


@gluon.jit
def _row(rows, slot):
    """View one fetched row of cum or cumj as a vector."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return rows.index(slot)._reinterpret(gl.float32, [_Q], flat)


@gluon.jit
def _consumer(
    which: gl.constexpr, tiles, sources, work, SIZES: gl.constexpr, REVERSE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    vs, ms, states, rows, full, empty = tiles
    entry, end, passed = work[0]
    b, pair, segment, nsegments, first, count, nchunks, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    dtype: gl.constexpr = ms.dtype
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    along: gl.constexpr = gl.SliceLayout(0, LEFT)
    scalar: gl.constexpr = gl.SliceLayout(1, STATE)
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    head = b.to(gl.int64) * nheads + h
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    if entry is not None:
        wait_for_launch_before(PDL)
        offsets, mask = state_tile(head * nsegments + segment, channel, P, N, BLOCK_N, STATE)
        state = gl.load(entry + offsets, mask=mask, other=0.0).to(gl.float32)
    for c in range(0, count):
        stage = c % STAGES
        chunk = first + c
        if REVERSE:
            chunk = first + count - 1 - c
        mbarrier.wait(full.index(stage), (c // STAGES) & 1)
        kept = states.index(stage * 2 + which)
        if REVERSE:
            product = gl.sum(kept.load(STATE).to(gl.float32) * state, axis=1)
            part = passed + (head * nchunks + chunk)
            one = gl.arange(0, 1, layout=scalar)
            value = gl.sum(product, axis=0) + 0.0 * one.to(gl.float32)
            gl.store(part + one, value)
        kept.store(state.to(dtype))
        fence_async_shared()
        slot = (b * nheads + h) * nchunks + chunk
        tma.async_copy_shared_to_global(sources[2], [slot, channel, 0], kept)
        cum = _row(rows, stage * 2 + which)
        v = vs.index(stage * 2 + which).permute((1, 0)).load(LEFT)
        if REVERSE:
            weight = gl.exp2(cum.load(along))
            total = cum.slice(_Q - 1, 1).load(scalar)
        else:
            cumj = _row(rows, (STAGES + stage) * 2 + which)
            weight = gl.exp2(cum.slice(_Q - 1, 1).load(along) - cumj.load(along))
            total = cum.slice(_Q - 1, 1).load(scalar)
        scaled = (v.to(gl.float32) * weight[None, :]).to(dtype)
        state = state * gl.exp2(total)[:, None]
        state = warpgroup_mma(scaled, ms.index(stage), state, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
        tma.store_wait(0)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    if end is not None:  # noqa: SIM102 of compile time, the other is not
        if segment == 0:
            offsets, mask = state_tile(head, channel, P, N, BLOCK_N, STATE)
            gl.store(end + offsets, state, mask=mask)


@gluon.jit
def _consumer_0(
    tiles, sources, work, SIZES: gl.constexpr, REVERSE: gl.constexpr, PDL: gl.constexpr
):
    _consumer(0, tiles, sources, work, SIZES, REVERSE, PDL)


@gluon.jit
def _consumer_1(
    tiles, sources, work, SIZES: gl.constexpr, REVERSE: gl.constexpr, PDL: gl.constexpr
):
    _consumer(1, tiles, sources, work, SIZES, REVERSE, PDL)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, REVERSE: gl.constexpr, PDL: gl.constexpr):
    vs, ms, states, rows, full, empty = tiles
    v_desc, m_desc, state_desc, cum_desc, cumj_desc = sources
    b, pair, _segment, _nsegments, first, count, nchunks, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    itemsize: gl.constexpr = ms.dtype.primitive_bitwidth // 8
    state_bytes: gl.constexpr = 2 * _P * BLOCK_N * itemsize if REVERSE else 0
    row_bytes: gl.constexpr = 2 * 4 if REVERSE else 4 * 4
    fetched: gl.constexpr = ((2 * _P + BLOCK_N) * itemsize + row_bytes) * _Q + state_bytes
    wait_for_launch_before(PDL)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), ((c // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        chunk = first + c
        if REVERSE:
            chunk = first + count - 1 - c
        t = chunk * _Q
        group = pair // pairs_per_group
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            part = stage * 2 + which
            head = b * nheads + h
            if REVERSE:
                slot = head * nchunks + chunk
                state = states.index(part)
                tma.async_copy_global_to_shared(state_desc, [slot, channel, 0], bar, state)
            else:
                cumj = rows.index(STAGES * 2 + part)
                tma.async_copy_global_to_shared(cumj_desc, [head, t], bar, cumj)
            tma.async_copy_global_to_shared(v_desc, [b, h, t, channel], bar, vs.index(part))
            tma.async_copy_global_to_shared(cum_desc, [head, t], bar, rows.index(part))
        tma.async_copy_global_to_shared(m_desc, [b, group, t, 0], bar, ms.index(stage))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def states_kernel(
    v_desc, m_desc, state_desc, cum_desc, cumj_desc, entry, end, passed,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    """Fill the states of all chunks. Grid (segments, pairs of consumers, B).

    state_desc is of (B * H * chunks, P, N), which in reverse holds the states and gets their
    gradients. entry (B, H, segments, P, N) is what the walk starts each segment from, or zeros. In
    reverse passed (B, H, chunks) gets <G, S>, and end (B, H, P, N), if there, what leaves the
    first segment; v is then grad_y, m is C and cumj is not read.
    """
    let_next_launch(PDL)
    segment = gl.program_id(0)
    first = segment * segment_chunks
    count = gl.minimum(segment_chunks, nchunks - first)
    dtype: gl.constexpr = v_desc.dtype
    vs = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], v_desc.layout)
    ms = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], m_desc.layout)
    states = gl.allocate_shared_memory(dtype, [STAGES * 2, _P, BLOCK_N], m_desc.layout)
    ROWS: gl.constexpr = STAGES * 2 if REVERSE else STAGES * 4
    rows = gl.allocate_shared_memory(gl.float32, [ROWS, 1, _Q], cum_desc.layout)
    full, empty = ring_barriers(STAGES)
    tiles = (vs, ms, states, rows, full, empty)
    sources = (v_desc, m_desc, state_desc, cum_desc, cumj_desc)
    sizes = (nheads, pairs_per_group, heads_per_group)
    where = (gl.program_id(2), gl.program_id(1), segment, nsegments, first, count, nchunks, sizes)
    work = ((entry, end, passed), where)
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, REVERSE, PDL)),
            (_consumer_1, (tiles, sources, work, SIZES, REVERSE, PDL)),
            (_producer, (tiles, sources, work, SIZES, REVERSE, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
