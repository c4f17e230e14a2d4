"""Each segment's own part of the state's gradient, on Hopper in Gluon: a walk against time.

As `hopper_kernel.state_kernel` walks along it: a producer warp fetches tiles by TMA into a ring of
stages, and two consumers of four warps hold 64 channels of one head each. Over the segment's chunks
(Q = 64 tokens), from the last to the first, from zeros:

    G    (64, N)   <- G exp2(total) + (grad_y^T scaled by exp2(cum_i)) C (Q, N)
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
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
def _consumer(which: gl.constexpr, tiles, work, SIZES: gl.constexpr):
    grads, Cs, rows, full, empty = tiles
    end, decay = work[0]
    b, pair, segment, nsegments, _first, count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    STATE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, STATE, 2)
    scalar: gl.constexpr = gl.SliceLayout(1, STATE)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
    state = gl.full([_P, BLOCK_N], 0.0, gl.float32, layout=STATE)
    log_decay = gl.full([1], 0.0, gl.float32, layout=scalar)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(full.index(stage), (c // STAGES) & 1)
        cum = rows.index(stage * 2 + which)._reinterpret(gl.float32, [_Q], flat)
        grad_y = grads.index(stage * 2 + which).permute((1, 0)).load(LEFT)
        weight = gl.exp2(cum.load(gl.SliceLayout(0, LEFT)))
        scaled = (grad_y.to(gl.float32) * weight[None, :]).to(grad_y.dtype)
        total = cum.slice(_Q - 1, 1).load(scalar)
        log_decay += total
        state = state * gl.exp2(total)[:, None]
        state = warpgroup_mma(scaled, Cs.index(stage), state, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    head = b.to(gl.int64) * nheads + h
    offsets, mask = state_tile(head * nsegments + segment - 1, channel, P, N, BLOCK_N, STATE)
    gl.store(end + offsets, state, mask=mask)
    one = gl.arange(0, 1, layout=scalar)
    gl.store(decay + head * nsegments + segment + one, log_decay, mask=one + channel == 0)


@gluon.jit
def _consumer_0(tiles, sources, work, SIZES: gl.constexpr, PDL: gl.constexpr):
    _consumer(0, tiles, work, SIZES)


@gluon.jit
def _consumer_1(tiles, sources, work, SIZES: gl.constexpr, PDL: gl.constexpr):
    _consumer(1, tiles, work, SIZES)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, PDL: gl.constexpr):
    grads, Cs, rows, full, empty = tiles
    grad_desc, C_desc, cum_desc = sources
    b, pair, _segment, _nsegments, first, count, sizes = work[1]
    nheads, pairs_per_group, heads_per_group = sizes
    P: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    itemsize: gl.constexpr = Cs.dtype.primitive_bitwidth // 8
    fetched: gl.constexpr = (2 * _P + BLOCK_N) * _Q * itemsize + 2 * _Q * 4
    wait_for_launch_before(PDL)
    for c in range(0, count):
        stage = c % STAGES
        mbarrier.wait(empty.index(stage), ((c // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        t = (first + count - 1 - c) * _Q
        group = pair // pairs_per_group
        tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], bar, Cs.index(stage))
        for which in gl.static_range(2):
            h, channel = consumers_head(pair, which, pairs_per_group, heads_per_group, P)
            slot = stage * 2 + which
            tma.async_copy_global_to_shared(grad_desc, [b, h, t, channel], bar, grads.index(slot))
            tma.async_copy_global_to_shared(cum_desc, [b * nheads + h, t], bar, rows.index(slot))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def exits_kernel(
    grad_desc, C_desc, cum_desc, end, decay,
    nchunks, segment_chunks, nsegments, nheads, pairs_per_group, heads_per_group,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    """What every segment but the first leaves, into the slot of the segment before it.

    Grid (segments - 1, pairs of consumers, B). end (B, H, segments, P, N) and decay (B, H,
    segments), log2 and of the segment itself, both fp32.
    """
    let_next_launch(PDL)
    segment = gl.program_id(0) + 1
    first = segment * segment_chunks
    count = gl.minimum(segment_chunks, nchunks - first)
    dtype: gl.constexpr = grad_desc.dtype
    grads = gl.allocate_shared_memory(dtype, [STAGES * 2, _Q, _P], grad_desc.layout)
    Cs = gl.allocate_shared_memory(dtype, [STAGES, _Q, BLOCK_N], C_desc.layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1, _Q], cum_desc.layout)
    full, empty = ring_barriers(STAGES)
    tiles = (grads, Cs, rows, full, empty)
    sources = (grad_desc, C_desc, cum_desc)
    sizes = (nheads, pairs_per_group, heads_per_group)
    where = (gl.program_id(2), gl.program_id(1), segment, nsegments, first, count, sizes)
    work = ((end, decay), where)
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    gl.warp_specialize(
        [
            (_consumer_0, (tiles, sources, work, SIZES, PDL)),
            (_consumer_1, (tiles, sources, work, SIZES, PDL)),
            (_producer, (tiles, sources, work, SIZES, PDL)),
        ],
        [4, 1],
        [REGISTERS, 24],
    )
