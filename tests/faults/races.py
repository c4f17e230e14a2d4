"""Kernels with a fault for each tool of compute-sanitizer to find, and two without.

Data between partitions is int64: fp32 would be written by STSM, which racecheck does not see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

_SIZE = 128
_LINES = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_ROWS, _COLUMNS = 8, 32


@gluon.jit
def _write(shared, x_ptr, out_ptr):
    shared.store(gl.load(x_ptr + gl.arange(0, shared.shape[0], layout=_LINES)))


@gluon.jit
def _read(shared, x_ptr, out_ptr):
    i = gl.arange(0, shared.shape[0], layout=_LINES)
    gl.store(out_ptr + i, shared.load(_LINES))


@gluon.jit
def unsynchronised_kernel(x_ptr, out_ptr, SIZE: gl.constexpr, BARRIERS: gl.constexpr):
    """Write shared memory in one partition and read it in the other, which does not wait."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = gl.allocate_shared_memory(gl.int64, [SIZE], flat)
    for _ in gl.static_range(BARRIERS):
        gl.thread_barrier()
    arguments = (shared, x_ptr, out_ptr)
    gl.warp_specialize([(_write, arguments), (_read, arguments)], [4], [24])


@gluon.jit
def _copy(x_ptr, out_ptr, repeats, PART: gl.constexpr, SIZE: gl.constexpr, WARPS: gl.constexpr):
    lines: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    i = PART * SIZE + gl.arange(0, SIZE, layout=lines)
    total = gl.zeros([SIZE], gl.float32, layout=lines)
    for _ in range(repeats):
        total += gl.load(x_ptr + i, volatile=True)
    gl.store(out_ptr + i, total)


@gluon.jit
def _first(x_ptr, out_ptr, repeats, SIZE: gl.constexpr):
    _copy(x_ptr, out_ptr, 1, 0, SIZE, 4)


@gluon.jit
def _second(x_ptr, out_ptr, repeats, SIZE: gl.constexpr):
    _copy(x_ptr, out_ptr, repeats, 1, SIZE, 4)


@gluon.jit
def _third(x_ptr, out_ptr, repeats, SIZE: gl.constexpr):
    _copy(x_ptr, out_ptr, repeats * 2, 2, SIZE, 1)


@gluon.jit
def hand_over_kernel(x_ptr, out_ptr, repeats, SIZE: gl.constexpr, BARRIERS: gl.constexpr):
    """Add up in three partitions, which share nothing but what `warp_specialize` makes.

    Before, the warps of the first one pass BARRIERS barriers of their own.
    """
    for _ in gl.static_range(BARRIERS):
        gl.thread_barrier()
    gl.warp_specialize(
        [
            (_first, (x_ptr, out_ptr, repeats, SIZE)),
            (_second, (x_ptr, out_ptr, repeats, SIZE)),
            (_third, (x_ptr, out_ptr, repeats, SIZE)),
        ],
        [4, 1],
        [24, 24],
    )


@gluon.jit
def _give(shared, bar, x_ptr, out_ptr, WAITS: gl.constexpr):
    shared.store(gl.load(x_ptr + gl.arange(0, shared.shape[0], layout=_LINES)))
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _take(shared, bar, x_ptr, out_ptr, WAITS: gl.constexpr):
    i = gl.arange(0, shared.shape[0], layout=_LINES)
    if WAITS:
        mbarrier.wait(bar, 0)
    gl.store(out_ptr + i, shared.load(_LINES))


@gluon.jit
def handed_kernel(x_ptr, out_ptr, SIZE: gl.constexpr, WAITS: gl.constexpr):
    """Write shared memory in one partition and read it in the other, which waits if WAITS."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = gl.allocate_shared_memory(gl.int64, [SIZE], flat)
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=1)
    arguments = (shared, bars.index(0), x_ptr, out_ptr, WAITS)
    gl.warp_specialize([(_give, arguments), (_take, arguments)], [4], [24])


@triton.jit
def contracted_sum_kernel(
    x_ptr, y_ptr, out_ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sum products over lanes: each lane adds to its own product before that is rounded.

    The lanes' sums differ in the last bit, and all are written to one place in shared memory,
    from where they are stored.
    """
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    tile = rows[:, None] * stride + columns[None, :]
    total = tl.sum(tl.load(x_ptr + tile) * tl.load(y_ptr + tile), 1)
    tl.store(out_ptr + rows, total)


# Thread t of 256: the first half passes a barrier of its own and writes a word; then all pass
# another one, if ORDERED, and read.
_BARRIERS = """{
    .shared .align 4 .b32 words[128];
    .reg .pred writes;
    .reg .b32 place, base;
    setp.lt.s32 writes, $1, 128;
    and.b32 place, $1, 127;
    shl.b32 place, place, 2;
    mov.u32 base, words;
    add.u32 place, place, base;
    @writes bar.sync 2, 128;
    @writes st.shared.b32 [place], $1;
    ALL
    ld.shared.b32 $0, [place];
}"""
_IN_ORDER = tl.constexpr(_BARRIERS.replace("ALL", "bar.sync 3;"))
_RACING = tl.constexpr(_BARRIERS.replace("ALL", ""))


@triton.jit
def barriers_kernel(out_ptr, ORDERED: tl.constexpr):
    """Write in some warps, which pass one barrier more than the others, and read in all.

    In order, whichever comes first, if a barrier of all warps lies between.
    """
    thread = tl.arange(0, 256)
    assembly: tl.constexpr = _IN_ORDER if ORDERED else _RACING
    value = tl.inline_asm_elementwise(
        assembly, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.store(out_ptr + thread, value)


@triton.jit
def copy_kernel(x_ptr, out_ptr, first, SIZE: tl.constexpr):
    """Copy SIZE elements from the one numbered `first` on."""
    i = tl.arange(0, SIZE)
    tl.store(out_ptr + i, tl.load(x_ptr + first + i))


@gluon.jit
def never_made_kernel():
    """Arrive at an mbarrier that nobody initialised."""
    bars = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.arrive(bars.index(0), count=1)


def unsynchronised(barriers: int = 0) -> Tensor:
    """Run the partitions that do not wait for each other."""
    x = torch.arange(_SIZE, device="cuda")
    out = torch.empty_like(x)
    unsynchronised_kernel[(4,)](x, out, _SIZE, barriers, num_warps=4)
    return out


def handed(waits: bool = True) -> Tensor:
    """Run the partitions of which one waits for the other, or does not."""
    x = torch.arange(_SIZE, device="cuda")
    out = torch.empty_like(x)
    handed_kernel[(4,)](x, out, _SIZE, waits, num_warps=4)
    return out


def hand_over(barriers: int = 0) -> Tensor:
    """Run the partitions that share nothing; they end at different times."""
    x = torch.randn(3 * _SIZE).cuda()
    out = torch.empty_like(x)
    hand_over_kernel[(64,)](x, out, 8, _SIZE, barriers, num_warps=4)
    return out


def barriers(ordered: bool) -> Tensor:
    """Run the barrier of some warps; with one of all behind it, or without."""
    out = torch.empty(256, dtype=torch.int32, device="cuda")
    barriers_kernel[(64,)](out, ordered, num_warps=8)
    return out


def past_the_end() -> Tensor:
    """Read one element more than there is."""
    x, out = torch.zeros(_SIZE, device="cuda"), torch.empty(_SIZE, device="cuda")
    copy_kernel[(1,)](x, out, 1, _SIZE)
    return out


def never_written() -> Tensor:
    """Read what nobody has written."""
    x, out = torch.empty(_SIZE, device="cuda"), torch.empty(_SIZE, device="cuda")
    copy_kernel[(1,)](x, out, 0, _SIZE)
    return out


def never_made() -> None:
    """Arrive at an mbarrier that nobody initialised."""
    never_made_kernel[(1,)](num_warps=4)


def contracted_sum() -> Tensor:
    """Run the sum that every lane rounds in its own way, on rows that are not aligned."""
    stride = _COLUMNS + 1
    x, y = torch.randn(_ROWS * stride, device="cuda"), torch.randn(_ROWS * stride, device="cuda")
    out = torch.empty(_ROWS, device="cuda")
    contracted_sum_kernel[(1,)](x, y, out, stride, _ROWS, _COLUMNS, num_warps=1)
    return out
