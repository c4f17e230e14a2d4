"""TMA descriptors of the Hopper SSD."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambench.kernels.ssd.hopper_config import CHUNK

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def described(
    tensor: Tensor, shape: list[int], strides: list[int], block: list[int], layout: Any
) -> TensorDescriptor:
    """Make a descriptor without its constructor's checks, which `fetchable` has made."""
    made = TensorDescriptor.__new__(TensorDescriptor)
    made.base, made.shape, made.strides = tensor, shape, strides
    made.block_shape, made.layout, made.padding = block, layout, "zero"
    return made


@lru_cache(maxsize=64)
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a tile that TMA delivers."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])


def tiles_of(tensor: Tensor, columns: int) -> TensorDescriptor:
    """Describe a (B, L, H, P) tensor to TMA as (B, H, L, P), in tiles of Q tokens of one head."""
    batch, seqlen, heads, size = tensor.shape
    stride_batch, stride_token, stride_head, _ = tensor.stride()
    # The stride of a dimension of size 1 is never used and may be anything; TMA wants multiples.
    strides = [
        stride_batch if batch > 1 else 64,
        stride_head if heads > 1 else 64,
        stride_token if seqlen > 1 else 64,
        1,
    ]
    layout = tile_layout(CHUNK, columns, tensor.dtype)
    shape = [batch, heads, seqlen, size]
    return described(tensor, shape, strides, [1, 1, CHUNK, columns], layout)


def rows_of(tensor: Tensor, columns: int, rows: int) -> TensorDescriptor:
    """Describe a contiguous tensor to TMA as a matrix with its last dimension as columns."""
    width = tensor.shape[-1]
    layout = tile_layout(rows, columns, tensor.dtype)
    shape = [tensor.numel() // width, width]
    return described(tensor, shape, [width, 1], [rows, columns], layout)


def blocks_of(tensor: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Describe a contiguous tensor to TMA as a row of matrices, its last two dimensions."""
    height, width = tensor.shape[-2:]
    layout = tile_layout(rows, columns, tensor.dtype)
    shape = [tensor.numel() // (height * width), height, width]
    return described(tensor, shape, [height * width, width, 1], [1, rows, columns], layout)


def readable(tensor: Tensor) -> bool:
    """Whether TMA can read a tensor: its address and strides are multiples of 16 bytes."""
    per_16_bytes = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    right = last == 1 and tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape, outer, strict=False):
        right = right and (size == 1 or (stride > 0 and stride % per_16_bytes == 0))
    return right


def fetchable(tensor: Tensor) -> Tensor:
    """Return the tensor as TMA can read it: copied where its address or strides are not right."""
    return tensor if readable(tensor) else tensor.clone(memory_format=torch.contiguous_format)
