"""Triton's interpreter with less work around each operation; values are computed as before.

Of a kernel on small tiles the interpreter spends nearly all time on itself: it looks through the
language again at every call of a function, makes the types of a shape anew for every value, and
computes whether integers overflow, which it then does not look at (its `device_assert` is off).
`install()` leaves that out, in this process; scans and reductions go step by step over whole tiles
where the interpreter calls a function for every element.

`TRITON_INTERPRET=1 python quick_interpreter.py SCRIPT WORD ...` runs a script with it.
"""

import dataclasses
import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import triton.language as tl
from triton._utils import validate_block_shape
from triton.runtime import interpreter


def install() -> None:
    """Replace the interpreter's slow parts; to be called before a kernel is run."""
    _patch_once()
    _remember_types()
    interpreter.ScanOps.generic_scan = scan_by_steps
    interpreter.ReduceOps.generic_reduce = reduce_by_steps
    builder = interpreter.interpreter_builder
    if not builder.options.debug:  # else the assertion would be looked at
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


class _Kept:
    """What was replaced by a patch, and stays."""

    def restore(self) -> None:
        """Put nothing back."""


def _patch_once() -> None:
    """Keep the language replaced once it is, instead of at every launch and call."""
    patch = interpreter._patch_lang
    patched: set[str] = set()
    known: set[Callable] = set()

    def once(function: Callable) -> _Kept:
        if function not in known:
            known.add(function)
            modules = filter(inspect.ismodule, list(function.__globals__.values()))
            names = {module.__name__ for module in modules if module in (tl, tl.core)}
            if not names or not names <= patched:
                patch(function)
                patched.update(names)
        return _Kept()

    interpreter._patch_lang = once


def _remember_types() -> None:
    """Make what follows from a shape, and numpy's types, once."""
    shapes: dict[tuple[int, ...], tuple[Any, int]] = {}
    sizes: dict[tuple[int, ...], tuple[Any, Any]] = {}
    numpy_types: dict[str, np.dtype] = {}
    numpy_type = interpreter._get_np_dtype

    def init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = shape.values if isinstance(shape, tl.core.tuple) else shape
        key = tuple([size.value if isinstance(size, tl.constexpr) else size for size in key])
        if key not in shapes:
            if not key:
                raise TypeError("0d block_type is forbidden")
            shapes[key] = (tl.core.tuple(key), validate_block_shape(list(key)))
        self.element_ty = element_ty
        self.shape, self.numel = shapes[key]

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        key = tuple(type.shape.values) if type.is_block() else ()
        if key not in sizes:
            made = tl.core.tuple([tl.constexpr(size) for size in key])
            sizes[key] = (made, tl.constexpr(int(np.prod(key, dtype=np.int64))))
        self.shape, self.numel = sizes[key]

    def remembered(dtype: Any) -> np.dtype:
        if isinstance(dtype, tl.block_type):
            dtype = dtype.element_ty
        if dtype.name not in numpy_types:
            numpy_types[dtype.name] = numpy_type(dtype)
        return numpy_types[dtype.name]

    tl.block_type.__init__ = init_block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.tensor.__init__ = init_tensor
    interpreter._get_np_dtype = remembered


def scan_by_steps(self: interpreter.ScanOps, tensors: list) -> list:
    """As the interpreter's own, which calls the function once for every element."""
    data = [np.moveaxis(tensor.handle.data, self.axis, 0) for tensor in tensors]
    results = [np.empty_like(array) for array in data]
    before: list = []
    for step in range(data[0].shape[0]):
        here = [
            self.to_tensor(np.ascontiguousarray(a[step]), t.dtype)
            for a, t in zip(data, tensors, strict=True)
        ]
        if step:
            here = list(self.combine_fn.fn(*before, *here))
        before[:] = here
        for result, value in zip(results, here, strict=True):
            result[step] = value.handle.data
    moved = [np.ascontiguousarray(np.moveaxis(result, 0, self.axis)) for result in results]
    return [
        self.to_tensor(array, tensor.dtype) for array, tensor in zip(moved, tensors, strict=True)
    ]


def reduce_by_steps(self: interpreter.ReduceOps, tensors: list) -> interpreter.TensorHandle:
    """As the interpreter's own, for one operand."""
    (tensor,) = tensors
    data = np.moveaxis(tensor.handle.data, self.axis, 0)
    total = self.to_tensor(np.ascontiguousarray(data[0]), tensor.dtype)
    for step in range(1, data.shape[0]):
        here = self.to_tensor(np.ascontiguousarray(data[step]), tensor.dtype)
        total = self.combine_fn.fn(total, here)
    array = total.handle.data
    array = np.expand_dims(array, self.axis) if self.keep_dims else array
    return self.to_tensor(array, tensor.dtype)


def main() -> None:
    """Run a script as if it had been called itself."""
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    install()
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
