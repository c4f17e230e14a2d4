"""What `triton_ssd_backward.grad_c_kernel` computes without a gate, on Hopper in Gluon.

A block takes one chunk (Q = 64 tokens) and a block of heads of one group, as `hopper_grad_kernel`
does, two blocks on a multiprocessor: one hides the begin and the end of the other. A producer
warp fetches each head's tiles into a ring, a group of four warps takes them:

    y    (Q i, P)  = C S^T exp2(cum_i)         v_i = grad_y_i . y_i
    dC   (Q i, N)  = sum over heads: (grad_y_i exp2(cum_i)) S
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
from mambench.kernels.ssd.hopper_kernel import let_next_launch, wait_for_launch_before

_Q = gl.constexpr(CHUNK)
_P = gl.constexpr(CHANNELS)
_RUNTIME_SIZES = ["seqlen", "nchunks", "nheads", "heads_per_group", "block_heads", "ngroups"]


@gluon.jit
def _heads(tiles, sources, work, SIZES: gl.constexpr, PDL: gl.constexpr):
    """Every head: v, and the sum of what their states contribute to grad_C."""
    grads, states, rows, C, full, empty, ready = tiles
    v_ptr, grad_C_ptr = work[0]
    b, chunk, group, block, first_head, count, sizes = work[1]
    seqlen, nchunks, nheads, ngroups, batch = sizes
    N: gl.constexpr = SIZES[0]
    BLOCK_N: gl.constexpr = SIZES[1]
    STAGES: gl.constexpr = SIZES[2]
    dtype: gl.constexpr = C.dtype
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _P, 16])
    WIDE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, WIDE, 2)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    i = gl.arange(0, _Q, layout=gl.SliceLayout(1, TILE))
    zero = gl.full([_Q, _P], 0.0, gl.float32, layout=TILE)
    grad_C = gl.full([_Q, BLOCK_N], 0.0, gl.float32, layout=WIDE)
    mbarrier.wait(ready.index(0), 0)
    for k in range(0, count):
        stage = k % STAGES
        mbarrier.wait(full.index(stage), (k // STAGES) & 1)
        state = states.index(stage)
        y = warpgroup_mma(C, state.permute((1, 0)), zero, use_acc=False, is_async=True)
        cum = rows.index(stage)._reinterpret(gl.float32, [_Q], flat)
        grad_y = grads.index(stage).load(LEFT)
        into = gl.exp2(cum.load(gl.SliceLayout(1, LEFT)))
        weighted = (grad_y.to(gl.float32) * into[:, None]).to(dtype)
        grad_C = warpgroup_mma(weighted, state, grad_C, is_async=True)
        grad_yf = grads.index(stage).load(TILE).to(gl.float32)
        into_i = gl.exp2(cum.load(gl.SliceLayout(1, TILE)))
        y = warpgroup_mma_wait(1, deps=(y,))
        v = gl.sum(y * grad_yf, axis=1) * into_i
        head = b.to(gl.int64) * nheads + first_head + k
        gl.store(v_ptr + (head * nchunks + chunk) * _Q + i, v)
        grad_C = warpgroup_mma_wait(0, deps=(grad_C,))
        mbarrier.arrive(empty.index(stage), count=1)
    q = gl.arange(0, _Q, layout=gl.SliceLayout(1, WIDE))
    n = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, WIDE))
    mask = (chunk * _Q + q < seqlen)[:, None] & (n < N)[None, :]
    t0 = chunk.to(gl.int64) * _Q
    row = ((block * batch + b).to(gl.int64) * seqlen + t0) * ngroups + group
    out = grad_C_ptr + row * N + (q[:, None] * (ngroups * N) + n[None, :])
    gl.store(out, grad_C, mask=mask)


@gluon.jit
def _producer(tiles, sources, work, SIZES: gl.constexpr, PDL: gl.constexpr):
    grads, states, rows, C, full, empty, ready = tiles
    grad_desc, state_desc, C_desc, cum_desc = sources
    b, chunk, group, _block, first_head, count, sizes = work[1]
    _seqlen, nchunks, nheads, _ngroups, _batch = sizes
    BLOCK_N: gl.constexpr = SIZES[1]
    STAGES: gl.constexpr = SIZES[2]
    itemsize: gl.constexpr = C.dtype.primitive_bitwidth // 8
    fetched: gl.constexpr = (_Q * _P + _P * BLOCK_N) * itemsize + _Q * 4
    t = chunk * _Q
    mbarrier.expect(ready.index(0), _Q * BLOCK_N * itemsize)
    tma.async_copy_global_to_shared(C_desc, [b, group, t, 0], ready.index(0), C)
    wait_for_launch_before(PDL)
    for k in range(0, count):
        stage = k % STAGES
        mbarrier.wait(empty.index(stage), ((k // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, fetched)
        h = first_head + k
        head = b * nheads + h
        slot = head * nchunks + chunk
        tma.async_copy_global_to_shared(state_desc, [slot, 0, 0], bar, states.index(stage))
        tma.async_copy_global_to_shared(grad_desc, [b, h, t, 0], bar, grads.index(stage))
        tma.async_copy_global_to_shared(cum_desc, [head, t], bar, rows.index(stage))


@gluon.jit(do_not_specialize=_RUNTIME_SIZES)
def grad_c_fetched_kernel(
    grad_desc, state_desc, C_desc, cum_desc, v_ptr, grad_C_ptr,
    seqlen, nchunks, nheads, heads_per_group, block_heads, ngroups,
    PDL: gl.constexpr, N: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """v per head, and grad_C's part as (blocks, B, L, G, N) fp32. Grid (chunks, G * blocks, B).

    state_desc is of the states that enter the chunks, (B * H * chunks, P, N).
    """
    let_next_launch(PDL)
    chunk = gl.program_id(0)
    blocks = gl.num_programs(1) // ngroups
    group = gl.program_id(1) // blocks
    block = gl.program_id(1) % blocks
    count = gl.minimum(block_heads, heads_per_group - block * block_heads)
    first_head = group * heads_per_group + block * block_heads
    dtype: gl.constexpr = grad_desc.dtype
    grads = gl.allocate_shared_memory(dtype, [STAGES, _Q, _P], grad_desc.layout)
    states = gl.allocate_shared_memory(dtype, [STAGES, _P, BLOCK_N], C_desc.layout)
    rows = gl.allocate_shared_memory(gl.float32, [STAGES, 1, _Q], cum_desc.layout)
    C = gl.allocate_shared_memory(dtype, [1, _Q, BLOCK_N], C_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(STAGES):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(empty.index(k), count=1)
    ready = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(ready.index(0), count=1)
    tiles = (grads, states, rows, C.index(0), full, empty, ready)
    sizes = (seqlen, nchunks, nheads, ngroups, gl.num_programs(2))
    where = (gl.program_id(2), chunk, group, block, first_head, count, sizes)
    work = ((v_ptr, grad_C_ptr), where)
    sources = (grad_desc, state_desc, C_desc, cum_desc)
    SIZES: gl.constexpr = (N, BLOCK_N, STAGES)
    gl.warp_specialize(
        [
            (_heads, (tiles, sources, work, SIZES, PDL)),
            (_producer, (tiles, sources, work, SIZES, PDL)),
        ],
        [1],
        [24],
    )
