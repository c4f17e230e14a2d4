"""Sums over all chunks of what the SSD backward leaves for each: one short launch, in order."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambench.kernels.prepared import Recording

_COLUMNS = 8  # 32 bytes of a row, the least that memory delivers
_ROWS = 256


@triton.jit(do_not_specialize=["rows"])
def column_sums_kernel(
    parts_ptr, sums_ptr, rows, stride, size,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum the first `size` columns of (rows, stride) fp32 parts; grid (blocks of columns,)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    columns = column < size
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for first in tl.range(0, rows, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & columns[None, :]
        offsets = row.to(tl.int64)[:, None] * stride + column[None, :]
        total += tl.load(parts_ptr + offsets, mask=mask, other=0.0)
    tl.store(sums_ptr + column, tl.sum(total, 0), mask=columns)


def column_sums(recording: Recording, parts: Tensor, count: int) -> Tensor:
    """Sum contiguous fp32 parts (rows, n, ...) over the rows; returns the first `count` of the n.

    A launch of this size takes half of what a general reduction of the library does.
    """
    shape: Any = (count, *parts.shape[2:])
    sums = recording.output(shape, torch.float32, parts.device)
    size = sums.numel()
    arguments = (parts, sums, parts.shape[0], parts[0].numel(), size)
    constants = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "STAGES": 2}
    grid = (-(-size // _COLUMNS),)
    recording.launch(column_sums_kernel, grid, arguments, constants, num_warps=4)
    return sums
