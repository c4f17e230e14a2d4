"""TMA descriptors and launches of the Hopper SSD, cheap enough to be made anew on every call."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from mambench.kernels.ssd.hopper_config import CHUNK

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_ready: dict[tuple[Any, ...], Any] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple[Any, ...],
    constants: dict[str, Any],
    inputs: tuple[Tensor | None, ...],
    *,
    device: int | None,
    num_warps: int,
    pdl: bool,
) -> None:
    """Launch a kernel, the second time without going through Triton's specialisation.

    Args:
        kernel: whose integers are not specialised on.
        grid: blocks.
        args: its run-time arguments, in order.
        constants: its compile-time arguments, in order.
        inputs: those of its tensors that are the caller's: what they are specialised on is in the
            key; all others are this module's own, of fixed dtypes and aligned.
        device: index of the device, the current one.
        num_warps: of the launch.
        pdl: whether the launch may begin before the one before has ended.
    """
    given = tuple(None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in inputs)
    kinds = tuple(_kind(argument) for argument in args)
    key = (kernel, device, given, kinds, *constants.values(), num_warps, pdl)
    ready = _ready.get(key)
    if ready is not None:
        ready[grid](*args, *constants.values())
        return
    ready = kernel[grid](*args, **constants, num_warps=num_warps, launch_pdl=pdl)
    _ready[key] = ready


def _kind(argument: Any) -> int:
    """What of a run-time argument its type in the kernel depends on: absence, or 64 bits."""
    if argument is None:
        return 0
    return 2 if type(argument) is int and argument > 0x7FFFFFFF else 1


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


def fetchable(tensor: Tensor) -> Tensor:
    """Return the tensor as TMA can read it: copied where its address or strides are not right."""
    per_16_bytes = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    right = last == 1 and tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape, outer, strict=False):
        right = right and (size == 1 or (stride > 0 and stride % per_16_bytes == 0))
    return tensor if right else tensor.clone(memory_format=torch.contiguous_format)
