"""Kernels with a race in shared memory, for the checks that must find it, and one without."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

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
def unsynchronised_kernel(x_ptr, out_ptr, SIZE: gl.constexpr):
    """Write shared memory in one partition and read it in the other, which does not wait."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    shared = gl.allocate_shared_memory(gl.float32, [SIZE], flat)
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
def hand_over_kernel(x_ptr, out_ptr, repeats, SIZE: gl.constexpr):
    """Add up in three partitions, which share nothing but what `warp_specialize` makes."""
    gl.warp_specialize(
        [
            (_first, (x_ptr, out_ptr, repeats, SIZE)),
            (_second, (x_ptr, out_ptr, repeats, SIZE)),
            (_third, (x_ptr, out_ptr, repeats, SIZE)),
        ],
        [4, 1],
        [24, 24],
    )


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


def unsynchronised() -> Tensor:
    """Run the partitions that do not wait for each other."""
    x = torch.randn(_SIZE, device="cuda")
    out = torch.empty_like(x)
    unsynchronised_kernel[(4,)](x, out, _SIZE, num_warps=4)
    return out


def hand_over() -> Tensor:
    """Run the partitions that share nothing; they end at different times."""
    x = torch.randn(3 * _SIZE, device="cuda")
    out = torch.empty_like(x)
    hand_over_kernel[(64,)](x, out, 8, _SIZE, num_warps=4)
    return out


def contracted_sum() -> Tensor:
    """Run the sum that every lane rounds in its own way, on rows that are not aligned."""
    stride = _COLUMNS + 1
    x, y = torch.randn(_ROWS * stride, device="cuda"), torch.randn(_ROWS * stride, device="cuda")
    out = torch.empty(_ROWS, device="cuda")
    contracted_sum_kernel[(1,)](x, y, out, stride, _ROWS, _COLUMNS, num_warps=1)
    return out
