"""How the blocks of one launch hand states on: flags, and a look back at earlier segments.

A block stores what its segment leaves, sets the segment's flag (release), waits for the flags of
all earlier segments (acquire) and adds up what they left, from the first to the last, so that every
run gives the same bits. Flags count their readers too; after the last one, the producer of the last
segment sets them to 0.

No block waits for one of a higher index: segments are the slowest axis of the grid. The hardware
starts blocks in the order of their index, so that the lowest one that has not ended waits for
nobody, whether all are resident or not. In Gluon.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from mambench.kernels.ssd.hopper_config import CHANNELS, MOST_SEGMENTS

_P = gl.constexpr(CHANNELS)
_FLAGS = gl.constexpr(MOST_SEGMENTS)


@gluon.jit
def count_readers(flags, count):
    """Count one more reader of the first `count` flags, which others wait for no longer."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k = gl.arange(0, _FLAGS, layout=LANES)
    one = gl.full([_FLAGS], 1, gl.int32, layout=LANES)
    gl.atomic_add(flags + k, one, mask=k < count, sem="relaxed", scope="gpu")


@gluon.jit
def reset(flags, count):
    """Set the first `count` flags to 0 once all blocks after each one's have read it."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    k = gl.arange(0, _FLAGS, layout=LANES)
    watched = flags + gl.minimum(k, count - 1)
    left = 1
    while left > 0:
        values = gl.inline_asm_elementwise(
            "ld.relaxed.gpu.global.b32 $0, [$1];", "=r,l", [watched], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        left = gl.max(gl.where(k < count, count + 1 - k - values, 0), axis=0)
    gl.store(flags + k, gl.full([_FLAGS], 0, gl.int32, layout=LANES), mask=k < count)


@gluon.jit
def publish(flag):
    """Let other blocks see what the partition's threads have stored, once they see the flag."""
    gl.thread_barrier()
    gl.atomic_add(flag, 1, sem="release", scope="gpu")


@gluon.jit
def await_published(flags, count):
    """Wait until the first `count` flags are set, and see what was stored before they were."""
    LANES: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    watched = flags + gl.minimum(gl.arange(0, _FLAGS, layout=LANES), count - 1)
    seen = 0
    while seen == 0:
        values = gl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [watched], dtype=gl.int32,
            is_pure=False, pack=1,
        )  # fmt: skip
        seen = gl.min(values, axis=0)
    gl.thread_barrier()


@gluon.constexpr_function
def flat_layout(block_n):
    """Return the layout of a stored state: each thread's elements, 16 bytes at a time."""
    high = [[1024 << i] for i in range((block_n // 16).bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [4], *high],
        lane_bases=[[8], [16], [32], [64], [128]],
        warp_bases=[[256], [512]],
        block_bases=[],
        shape=[CHANNELS * block_n],
    )


@gluon.jit
def flat_from_state(state, BLOCK_N: gl.constexpr, FLAT: gl.constexpr):
    """Return a state in the order that it is stored in; each thread keeps its elements."""
    moved = gl.reshape(state, [4, 2, 8, BLOCK_N // 16, 2, 4, 2])
    moved = gl.permute(moved, (3, 0, 2, 5, 4, 1, 6))
    moved = gl.reshape(moved, [_P * BLOCK_N])
    return gl.convert_layout(moved, FLAT, assert_trivial=True)


@gluon.jit
def state_from_flat(flat, BLOCK_N: gl.constexpr, STATE: gl.constexpr):
    """Return a state from the order that it is stored in."""
    moved = gl.reshape(flat, [BLOCK_N // 16, 4, 8, 4, 2, 2, 2])
    moved = gl.permute(moved, (1, 5, 2, 0, 4, 3, 6))
    moved = gl.reshape(moved, [_P, BLOCK_N])
    return gl.convert_layout(moved, STATE, assert_trivial=True)


@gluon.jit
def look_back(state, slots, decays, flags, segment, BLOCK_N: gl.constexpr, STATE: gl.constexpr):
    """Add to the decayed state what the segments before this one left, from the first on."""
    FLAT: gl.constexpr = flat_layout(BLOCK_N)
    SIZE: gl.constexpr = _P * BLOCK_N
    await_published(flags, segment)
    count_readers(flags, segment)
    slots += gl.arange(0, SIZE, layout=FLAT)
    decays += gl.arange(0, 1, layout=gl.SliceLayout(1, STATE))
    WIDE: gl.constexpr = slots.dtype.element_ty.primitive_bitwidth == 32
    # While one segment's are used, the loads of the next are in flight: of two, if in bf16.
    last = segment - 1
    own = gl.load(slots)
    log_decay = gl.load(decays)
    if not WIDE:
        next_own = gl.load(slots + gl.minimum(1, last) * SIZE)
        next_decay = gl.load(decays + gl.minimum(1, last))
    for k in range(0, segment):
        if WIDE:
            next_own = gl.load(slots + gl.minimum(k + 1, last) * SIZE)
            next_decay = gl.load(decays + gl.minimum(k + 1, last))
        else:
            then_own = gl.load(slots + gl.minimum(k + 2, last) * SIZE)
            then_decay = gl.load(decays + gl.minimum(k + 2, last))
        own = state_from_flat(own, BLOCK_N, STATE)
        state = state * gl.exp2(log_decay)[:, None] + own.to(gl.float32)
        own = next_own
        log_decay = next_decay
        if not WIDE:
            next_own = then_own
            next_decay = then_decay
    return state


@gluon.jit
def anew(value):
    """Return the value so that what follows from it is computed again, not kept in registers."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [value], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def unknown(value):
    """Return a value that is the same in the whole warp, so that the compiler does not know it."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [value], dtype=gl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip
