"""Launches of a kernel without binding its arguments anew, where `prepared` cannot record a call.

Binding forty arguments takes Triton longer than many a kernel runs. What it finds by them, the
compiled kernel, follows from the kinds of the arguments: whether there is a tensor, its dtype and
alignment, whether an integer is 1 or a multiple of 16, and the constants. The first launch of a
kind goes through Triton; the next ones find the compiled kernel by the kinds and call Triton's C
launcher, which takes addresses as it takes tensors.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from mambench.kernels.prepared import Step, launcher, some_hook, tensor_maps

_KEPT = 1 << 12  # kinds of launches of a kernel, and tensor maps


class _Known(NamedTuple):
    """What launches a kind: the C launcher, what follows grid and stream, and the constants."""

    call: Callable[..., Any]
    function: tuple[Any, ...]
    maps: list[Any]
    constants: tuple[Any, ...]


class Relaunched:
    """A kernel as `relaunched` returns it: `kernel[grid](*arguments, **constants_and_options)`."""

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._known: dict[tuple[Any, ...], _Known | None] = {}
        self._constant = [bool(parameter.is_constexpr) for parameter in kernel.params]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """Return what launches on a grid of one to three dimensions, on the current device."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        kinds, values = _kinds(arguments, self._constant)
        device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1
        key = (device, kinds, tuple(constants.items()))
        known = self._known.get(key)
        if known is None or some_hook():
            compiled = self._kernel[grid](*arguments, **constants)
            if key not in self._known and getattr(compiled, "run", None) is not None:
                if len(self._known) >= _KEPT:
                    self._known.clear()
                self._known[key] = self._learn(compiled, len(arguments), constants)
            return
        flat = values if not known.maps else _with_maps(values, known.maps)
        stream = driver.active.get_current_stream(device)
        sizes = (*grid, 1, 1)[:3]
        known.call(*sizes, stream, *known.function, *flat, *known.constants)

    def _learn(self, compiled: Any, given: int, constants: dict[str, Any]) -> _Known | None:
        """Return how to launch it again; None: only through Triton."""
        maps = tensor_maps(compiled)
        names = self._kernel.arg_names[given:]
        found = launcher(Step(compiled, (1, 1, 1), []))
        known_way = found is not None and len(found[1]) > 0
        if not known_way or any(how["fp4_padded"] for how in maps) or not {*names} <= {*constants}:
            return None
        call, before = found
        return _Known(call, before[4:], maps, tuple(constants[name] for name in names))


def relaunched(kernel: Any) -> Any:
    """Return a JIT function of Triton or Gluon whose launches are found by their arguments' kinds.

    Every launch goes through Triton in its interpreter (the kernel itself is returned), with a
    profiler's hooks, or with a launcher of another version.
    """
    return _relaunched(kernel) if isinstance(kernel, triton.JITFunction) else kernel


@lru_cache(maxsize=256)
def _relaunched(kernel: Any) -> Relaunched:
    return Relaunched(kernel)


def _kinds(arguments: tuple[Any, ...], constant: list[bool]) -> tuple[tuple[Any, ...], list[Any]]:
    """Return what Triton compiles for, and the values that the launcher takes.

    constant: whether the kernel takes each of its arguments as a constant of compile time.
    """
    kinds: list[Any] = []
    values: list[Any] = []
    for argument, compiled_in in zip(arguments, constant, strict=False):
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            kinds.append((argument.dtype, address % 16 == 0))
            values.append(address)
            continue
        values.append(argument)
        if argument is None:
            kinds.append(None)
        elif hasattr(argument, "block_shape"):  # a descriptor
            kinds.append((argument.base.dtype, tuple(argument.block_shape), argument.layout))
        elif compiled_in or type(argument) not in (int, float):
            kinds.append((type(argument), argument))
        elif type(argument) is int:
            small = -(1 << 31) <= argument < 1 << 31
            kinds.append((argument == 1, argument % 16 == 0, small))
        else:
            kinds.append(float)
    return tuple(kinds), values


def _with_maps(values: list[Any], maps: list[Any]) -> list[Any]:
    """Return the values with every descriptor as tensor map, sizes and strides."""
    flat: list[Any] = []
    left = iter(maps)
    for value in values:
        if hasattr(value, "block_shape"):
            how = next(left)
            shape, strides = tuple(value.shape), tuple(value.strides)
            kind = (how["swizzle"], how["elem_size"], how["elem_type"], tuple(how["block_size"]))
            flat += (_encoded(value.base.data_ptr(), shape, strides, *kind), *shape, *strides)
        else:
            flat.append(value)
    return flat


@lru_cache(maxsize=_KEPT)
def _encoded(
    address: int, shape: tuple[int, ...], strides: tuple[int, ...],
    swizzle: int, size: int, kind: int, block: tuple[int, ...],
) -> Any:  # fmt: skip
    """Return a tensor map, which depends on nothing else and outlives the tensor."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    return driver.active.utils.fill_tma_descriptor(
        address, swizzle, size, TMA_DTYPE_DEVICE_TO_HOST[kind], list(block), list(shape),
        list(strides), 0,
    )  # fmt: skip
