"""What `triton_whole.whole_kernel` computes, on Hopper in Gluon: each tile is fetched once.

A block takes one chunk (Q = 64 tokens) and a block of heads of one group. One producer warp fetches
each head's tiles by TMA into a ring of stages. Two groups of four warps take every other head each
and make its weights; from these and the same tiles a third group makes grad_x of every head, and
adds up grad_B. [j, i] tiles have the token that is read (j) in rows, and the one that is written
(i) in columns; u = dt x, w_ij = exp2(cum_i - cum_j) for i >= j:

    M    (Q j, Q i)  = (x grad_y^T) w            summed with dt_j over the heads: sums
    dx   (Q j, P)    = (B G^T) exp2(total - cum_j) dt_j + D grad_y + (B C^T w dt_j) grad_y
    dB   (Q j, N)    = sum over heads: (u_j exp2(total - cum_j)) G  + sums C
    dC   (Q i, N)    = sums^T B + what the states contribute

Past the end of the sequence TMA delivers zeros and writes nothing. Channels and states beyond P and
N are delivered as zeros.
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
    let_next_launch,
    ring_barriers,
    wait_for_launch_before,
)

ROWS = 3  # of a token's numbers: cum, dt, v
_ROWS = gl.constexpr(ROWS)
_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_RUNTIME_SIZES = [
    "seqlen", "nchunks", "nheads", "heads_per_group", "block_heads", "ngroups", "blocks_before",
]  # fmt: skip


@gluon.jit
def _row(rows, stage, which: gl.constexpr):
    """View one fetched row of cum, dt or v as a vector."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return rows.index(stage * _ROWS + which)._reinterpret(gl.float32, [_Q], flat)


@gluon.jit
def _weigh(which: gl.constexpr, tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    """Every other head: its weights within the chunk, and the products' sum."""
    xs, grads, _states, rows, B, C, _outs, all_weights, sums, full, empty, flags = tiles
    ready, done, made, taken = flags
    _D_ptr, v_ptr, read_kept_ptr, _diag_ptr, _partial_D_ptr = work[0]
    b, chunk, _group, _block, first_head, count, sizes = work[1]
    _seqlen, nchunks, nheads, _ngroups, _before, _batch = sizes
    STAGES: gl.constexpr = SIZES[3]
    dtype: gl.constexpr = B.dtype
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _Q, 16])
    J: gl.constexpr = gl.SliceLayout(1, TILE)
    I: gl.constexpr = gl.SliceLayout(0, TILE)
    j = gl.arange(0, _Q, layout=J)
    i = gl.arange(0, _Q, layout=I)
    total_sums = gl.full([_Q, _Q], 0.0, gl.float32, layout=TILE)
    zero = gl.full([_Q, _Q], 0.0, gl.float32, layout=TILE)
    mbarrier.wait(ready.index(0), 0)
    scores = warpgroup_mma(B, C.permute((1, 0)), zero, use_acc=False, is_async=True)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    scores_tile = sums.index(which)  # until the sums themselves are made
    scores_tile.store(gl.where(j[:, None] <= i[None, :], scores, 0.0))
    for k in range(which, count, 2):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        product = warpgroup_mma(
            xs.index(stage), grads.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True
        )
        cum = _row(rows, stage, 0)
        dt_j = _row(rows, stage, 1).load(J)
        # For i < j the scores are zero; the gap must only not overflow.
        decay = gl.exp2(gl.minimum(cum.load(I)[None, :] - cum.load(J)[:, None], 0.0))
        scores = scores_tile.load(TILE) * decay
        product = warpgroup_mma_wait(0, deps=(product,))
        weights = (scores * dt_j[:, None]).to(dtype)
        mbarrier.wait(taken.index(which), ((k // 2) & 1) ^ 1)
        all_weights.index(which).store(weights)
        fence_async_shared()
        mbarrier.arrive(made.index(which), count=1)
        total_sums += product * (decay * dt_j[:, None])
        product = product * scores
        head = b.to(gl.int64) * nheads + first_head + k
        token = (head * nchunks + chunk) * _Q
        gl.store(read_kept_ptr + 2 * token + 2 * j, gl.sum(product, axis=1))
        written = gl.sum(product * dt_j[:, None], axis=0)
        gl.store(v_ptr + token + i, _row(rows, stage, 2).load(I) + written)
        gl.thread_barrier()
        mbarrier.arrive(empty.index(stage), count=1)
    causal = j[:, None] <= i[None, :]
    scores_tile.store(gl.where(causal, total_sums, 0.0))
    mbarrier.arrive(done.index(0), count=1)


@gluon.jit
def _weigh_0(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _weigh(0, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _weigh_1(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    _weigh(1, tiles, sources, work, SIZES, FEATURES)


@gluon.jit
def _gather(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    """Every head: grad_x, and what passes through the state; grad_B and grad_C over all heads."""
    xs, grads, states, rows, B, C, outs, all_weights, sums, full, empty, flags = tiles
    ready, done, made, taken = flags
    D_ptr, _v_ptr, read_kept_ptr, diag_ptr, partial_D_ptr = work[0]
    partial_C_ptr, grad_B_ptr, grad_C_ptr = work[2]
    b, chunk, group, block, first_head, count, sizes = work[1]
    seqlen, nchunks, nheads, ngroups, before, batch = sizes
    P: gl.constexpr = SIZES[0]
    N: gl.constexpr = SIZES[1]
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    D_DIMS: gl.constexpr = FEATURES[0]
    dtype: gl.constexpr = B.dtype
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _P, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    J: gl.constexpr = gl.SliceLayout(1, TILE)
    along: gl.constexpr = gl.SliceLayout(1, LEFT)
    j = gl.arange(0, _Q, layout=J)
    p = gl.arange(0, _P, layout=gl.SliceLayout(0, TILE))
    zero = gl.full([_Q, _P], 0.0, gl.float32, layout=TILE)
    grad_B = gl.full([_Q, BLOCK_N], 0.0, gl.float32, layout=WIDE)
    mbarrier.wait(ready.index(0), 0)
    for k in range(0, count):
        stage = k % STAGES
        h = first_head + k
        if D_DIMS == 1:
            skip = gl.load(D_ptr + h + 0 * p).to(gl.float32)
        elif D_DIMS == 2:
            skip = gl.load(D_ptr + h * P + p, mask=p < P, other=0.0).to(gl.float32)
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        x_tile, grad_tile, state_tile = xs.index(stage), grads.index(stage), states.index(stage)
        if D_DIMS == 2:  # before the products need the registers
            terms = grad_tile.load(TILE).to(gl.float32) * x_tile.load(TILE).to(gl.float32)
            row = ((b.to(gl.int64) * nchunks + chunk) * nheads + h) * P
            gl.store(partial_D_ptr + row + p, gl.sum(terms, axis=0), mask=p < P)
        grad_x = warpgroup_mma(B, state_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        cum, dt = _row(rows, stage, 0), _row(rows, stage, 1)
        weight = gl.exp2(cum.slice(_Q - 1, 1).load(along) - cum.load(along)) * dt.load(along)
        scaled = (x_tile.load(LEFT).to(gl.float32) * weight[:, None]).to(dtype)
        grad_B = warpgroup_mma(scaled, state_tile, grad_B, is_async=True)
        to_end = gl.exp2(cum.slice(_Q - 1, 1).load(J) - cum.load(J))
        dt_j = dt.load(J)
        x = x_tile.load(TILE).to(gl.float32)
        if D_DIMS > 0:
            grad_y = grad_tile.load(TILE).to(gl.float32)
        grad_x = warpgroup_mma_wait(1, deps=(grad_x,))
        grad_x = grad_x * to_end[:, None]
        kept = gl.sum(grad_x * x, axis=1)
        grad_x = grad_x * dt_j[:, None]
        if D_DIMS == 1:
            diag = gl.sum(grad_y * x, axis=1)
            grad_x += grad_y * skip[None, :]
        elif D_DIMS == 2:
            grad_x += grad_y * skip[None, :]
        mbarrier.wait(made.index(k % 2), (k // 2) & 1)
        grad_x = warpgroup_mma(all_weights.index(k % 2), grad_tile, grad_x, is_async=True)
        tma.store_wait(0)
        grad_x, grad_B = warpgroup_mma_wait(0, deps=(grad_x, grad_B))
        gl.thread_barrier()  # all four warps' products are done, and the tile below was read
        mbarrier.arrive(empty.index(stage), count=1)
        mbarrier.arrive(taken.index(k % 2), count=1)
        outs.store(grad_x.to(dtype))
        fence_async_shared()
        tma.async_copy_shared_to_global(sources[0], [b, h, chunk * _Q, 0], outs)
        head = b.to(gl.int64) * nheads + h
        token = (head * nchunks + chunk) * _Q
        gl.store(read_kept_ptr + 2 * token + 2 * j + 1, kept)
        if D_DIMS == 1:
            gl.store(diag_ptr + token + j, diag)
    tma.store_wait(0)
    mbarrier.wait(done.index(0), 0)
    q = gl.arange(0, _Q, layout=gl.SliceLayout(1, WIDE))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, WIDE))
    mask = (chunk * _Q + q < seqlen)[:, None] & (n < N)[None, :]
    within = q[:, None] * (ngroups * N) + n[None, :]
    t0 = chunk.to(gl.int64) * _Q
    row = ((block * batch + b).to(gl.int64) * seqlen + t0) * ngroups + group
    both = (sums.index(0).load(LEFT) + sums.index(1).load(LEFT)).to(dtype)
    grad_B = warpgroup_mma(both, C, grad_B, is_async=True)
    grad_B = warpgroup_mma_wait(0, deps=(grad_B,))
    gl.store(grad_B_ptr + row * N + within, grad_B.to(grad_B_ptr.dtype.element_ty), mask=mask)
    # The launch before has divided the heads into other blocks: each of these takes its share.
    blocks = gl.num_programs(1) // ngroups
    share = block * before // blocks
    grad_C = gl.full([_Q, BLOCK_N], 0.0, gl.float32, layout=WIDE)
    for k in range(share, (block + 1) * before // blocks):
        part = ((k * batch + b).to(gl.int64) * seqlen + t0) * ngroups + group
        grad_C += gl.load(partial_C_ptr + part * N + within, mask=mask, other=0.0)
    first = sums.index(0).permute((1, 0)).load(LEFT)
    both = (first + sums.index(1).permute((1, 0)).load(LEFT)).to(dtype)
    grad_C = warpgroup_mma(both, B, grad_C, is_async=True)
    grad_C = warpgroup_mma_wait(0, deps=(grad_C,))
    row = ((share * batch + b).to(gl.int64) * seqlen + t0) * ngroups + group
    gl.store(grad_C_ptr + row * N + within, grad_C.to(grad_C_ptr.dtype.element_ty), mask=mask)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, FEATURES: gl.constexpr):
    xs, grads, states, rows, B, C, _outs, _weights, _sums, full, empty, flags = tiles
    ready = flags[0]
    _out_desc, x_desc, grad_desc, state_desc, B_desc, C_desc, cum_desc, dt_desc, v_desc = sources
    b, chunk, group, _block, first_head, count, sizes = work[1]
    _seqlen, nchunks, nheads, _ngroups, _before, _batch = sizes
    BLOCK_N: gl.constexpr = SIZES[2]
    STAGES: gl.constexpr = SIZES[3]
    PDL: gl.constexpr = FEATURES[1]
    itemsize: gl.constexpr = B.dtype.primitive_bitwidth // 8
    fetched: gl.constexpr = (2 * _Q * _P + _P * BLOCK_N) * itemsize + _ROWS * _Q * 4
    t = chunk * _Q
    mbarrier.expect(ready.index(0), 2 * _Q * BLOCK_N * itemsize)
    tma.async_copy_global_to_shared(B_desc, [b, group, t, 0], ready.index(0), B)
    tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], ready.index(0), C)
    wait_for_launch_before(PDL)
    for k in range(0, count):
        stage = k % STAGES
        mbarrier.wait(empty.index(stage), ((k // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        h = first_head + k
        head = b * nheads + h
        tma.async_copy_global_to_shared(x_desc, [b, h, t, 0], bar, xs.index(stage))
        tma.async_copy_global_to_shared(grad_desc, [b, h, t, 0], bar, grads.index(stage))
        slot = head * nchunks + chunk
        tma.async_copy_global_to_shared(state_desc, [slot, 0, 0], bar, states.index(stage))
        row = stage * _ROWS
        tma.async_copy_global_to_shared(cum_desc, [head, t], bar, rows.index(row))
        tma.async_copy_global_to_shared(dt_desc, [head, t], bar, rows.index(row + 1))
        tma.async_copy_global_to_shared(v_desc, [head, t], bar, rows.index(row + 2))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def grad_kernel(
    grad_x_desc, x_desc, grad_desc, state_desc, B_desc, C_desc, cum_desc, dt_desc, v_desc,
    D_ptr, v_ptr, read_kept_ptr, diag_ptr, partial_D_ptr, partial_C_ptr, grad_B_ptr, grad_C_ptr,
    seqlen, nchunks, nheads, heads_per_group, block_heads, ngroups, blocks_before,
    PDL: gl.constexpr, P: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, REGISTERS: gl.constexpr, GATHER_REGISTERS: gl.constexpr,
    D_DIMS: gl.constexpr,
):  # fmt: skip
    """All gradients but that of dt, if there is no gate. Grid (chunks, G * blocks of heads, B).

    state_desc is of the gradients of the states that leave the chunks, (B * H * chunks, P, N). For
    every token and head it leaves what `triton_whole.finish_kernel` sums. partial_C (blocks_before,
    B, L, G, N) is what the states contribute to grad_C, by blocks of heads of whatever size.
    """
    let_next_launch(PDL)
    chunk = gl.program_id(0)
    b = gl.program_id(2)
    blocks = gl.num_programs(1) // ngroups
    group = gl.program_id(1) // blocks
    block = gl.program_id(1) % blocks
    count = gl.minimum(block_heads, heads_per_group - block * block_heads)
    first_head = group * heads_per_group + block * block_heads
    dtype: gl.constexpr = x_desc.dtype
    xs = gl.allocate_shared_memory(dtype, [STAGES, _Q, _P], x_desc.layout)
    grads = gl.allocate_shared_memory(dtype, [STAGES, _Q, _P], x_desc.layout)
    states = gl.allocate_shared_memory(dtype, [STAGES, _P, BLOCK_N], B_desc.layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES * _ROWS, 1, _Q], cum_desc.layout)
    B = gl.allocate_shared_memory(dtype, [1, _Q, BLOCK_N], B_desc.layout)
    C = gl.allocate_shared_memory(dtype, [1, _Q, BLOCK_N], B_desc.layout)
    outs = gl.allocate_shared_memory(dtype, [1, _Q, _P], x_desc.layout)
    weights = gl.allocate_shared_memory(dtype, [2, _Q, _Q], x_desc.layout)
    SPREAD: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])  # over the banks
    sums = gl.allocate_shared_memory(gl.float32, [2, _Q, _Q], SPREAD)
    full, empty = ring_barriers(STAGES)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    mbarrier.init(done.index(0), count=2)
    made = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for which in gl.static_range(2):
        mbarrier.init(made.index(which), count=1)
        mbarrier.init(taken.index(which), count=1)
    tiles = (
        xs, grads, states, rows, B.index(0), C.index(0), outs.index(0), weights, sums, full, empty,
        (ready, done, made, taken),
    )  # fmt: skip
    sources = (
        grad_x_desc, x_desc, grad_desc, state_desc, B_desc, C_desc, cum_desc, dt_desc, v_desc,
    )  # fmt: skip
    sizes = (seqlen, nchunks, nheads, ngroups, blocks_before, gl.num_programs(2))
    heads = (D_ptr, v_ptr, read_kept_ptr, diag_ptr, partial_D_ptr)
    where = (b, chunk, group, block, first_head, count, sizes)
    work = (heads, where, (partial_C_ptr, grad_B_ptr, grad_C_ptr))
    SIZES: gl.constexpr = (P, N, BLOCK_N, STAGES)
    FEATURES: gl.constexpr = (D_DIMS, PDL)
    gl.warp_specialize(
        [
            (_weigh_0, (tiles, sources, work, SIZES, FEATURES)),
            (_weigh_1, (tiles, sources, work, SIZES, FEATURES)),
            (_gather, (tiles, sources, work, SIZES, FEATURES)),
            (_producer, (tiles, sources, work, SIZES, FEATURES)),
        ],
        [4, 4, 1],
        [REGISTERS, GATHER_REGISTERS, 24],
    )
