"""TMA descriptors and launches of the Hopper SSD, cheap enough to be made anew on every call."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from inspect import getclosurevars
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from mambench.kernels.ssd.hopper_config import CHUNK

_INT32_MAX = 0x7FFFFFFF
_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A compiled kernel and the way to its C launcher around Triton's Python.

    That way passes addresses instead of tensors, which spares a query of the driver for each, and
    tensor maps that are kept by address and sizes instead of encoded anew on every launch.
    """

    compiled: Any
    call: Callable[..., Any] | None  # the C launcher; None: only through Triton
    before: tuple[Any, ...] = ()  # its arguments between stream and kernel arguments
    maps: tuple[tuple[Any, ...], ...] = ()  # how each descriptor's tensor map is encoded

    @classmethod
    def of(cls, compiled: Any) -> "Ready":
        """Look the launcher up; Triton 3.6 keeps it in a closure if there are descriptors."""
        run, metadata = compiled.run, compiled.metadata
        maps: list[Any] = getattr(metadata, "tensordesc_meta", None) or []
        call = getattr(run, "launch", None)
        if maps and call is not None:
            call = getclosurevars(call).nonlocals.get("launcher")
        scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
        if call is None or scratch or None in maps or any(m["fp4_padded"] for m in maps):
            return cls(compiled=compiled, call=None)
        return cls(
            compiled=compiled,
            call=call,
            before=(
                compiled.function, run.launch_cooperative_grid, run.launch_pdl, None, None,
                compiled.packed_metadata, None, None, None,
            ),
            maps=tuple(
                (m["swizzle"], m["elem_size"], m["elem_type"], tuple(m["block_size"])) for m in maps
            ),
        )  # fmt: skip

    def __call__(
        self,
        grid: tuple[int, int, int],
        device: int | None,
        args: tuple[Any, ...],
        constants: tuple[Any, ...],
    ) -> None:
        """Launch on the device's current stream with the run-time and compile-time arguments."""
        hooks = knobs.runtime
        if self.call is None or hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls:
            self.compiled[grid](*args, *constants)  # a profiler's hooks see the launch
            return
        flat: list[Any] = []
        maps = iter(self.maps)
        for argument in args:
            kind = type(argument)
            if kind is int or kind is float or argument is None:
                flat.append(argument)
            elif kind is TensorDescriptor:
                address, shape, strides = argument.base.data_ptr(), argument.shape, argument.strides
                flat += encoded(address, tuple(shape), tuple(strides), next(maps))
            else:
                flat.append(argument.data_ptr())
        stream = driver.active.get_current_stream(device)
        self.call(*grid, stream, *self.before, *flat, *constants)


@lru_cache(maxsize=4096)
def encoded(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...], how: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Return a descriptor as the C launcher takes it: tensor map, shape and strides.

    The map depends on nothing but these arguments, so that it outlives the tensor: it is the
    address that it names, whatever lies there by then.
    """
    swizzle, elem_size, elem_type, block = how
    made = driver.active.utils.fill_tma_descriptor(
        address, swizzle, elem_size, TMA_DTYPE_DEVICE_TO_HOST[elem_type], list(block),
        list(shape), list(strides), 0,
    )  # fmt: skip
    return (made, *shape, *strides)


_ready: dict[tuple[Any, ...], Ready] = {}


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
    given = [None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in inputs]
    kinds = [
        # What an argument's type in the kernel depends on: absence, or 64 bits.
        argument is None or (type(argument) is int and argument > _INT32_MAX and 64)
        for argument in args
    ]
    fixed = tuple(constants.values())
    key = (kernel, device, *given, *kinds, fixed, num_warps, pdl)
    ready = _ready.get(key)
    if ready is not None:
        ready(grid, device, args, fixed)
        return
    compiled = kernel[grid](*args, **constants, num_warps=num_warps, launch_pdl=pdl)
    if compiled is not None:  # in Triton's interpreter it is
        _ready[key] = Ready.of(compiled)


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
