"""Calls of an operation prepared once and repeated: a launch costs a few microseconds of Python.

Binding forty arguments takes Triton longer than a kernel of a short sequence runs, and so do the
checks, the plan and the allocations around it. All of that follows from the shapes, strides,
dtypes, devices and alignment of the tensors and from the options. So the first call of a kind runs
as written and is recorded: which compiled kernels, on which grids, and where every pointer comes
from. The next of its kind allocates the results and one block of scratch memory, fills the pointers
in and calls Triton's C launchers, which take addresses as they take tensors.

What is repeated are the launches alone: nothing else may happen to a tensor while recording. A call
is not repeated if a pointer is of no known origin (a copy) or of two (one tensor for two
arguments), if a kernel wants memory of its own from Triton, or in Triton's interpreter.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from inspect import getclosurevars
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from mambench.kernels.flags import flags

Tensors = tuple[Tensor | None, ...]
Results = tuple[Tensor | None, ...]
Sizes = tuple[int, ...]

_KEPT = 1 << 12  # kinds of calls of an operation, and addresses of a descriptor's tensor
_ALIGNED = 256  # bytes: pieces of scratch memory begin at multiples
_ALIGNMENT_SEEN = 15  # Triton compiles for pointers that are multiples of 16 bytes, or are not
_LAUNCHER = "3.6."  # the versions of Triton whose launcher's arguments are known here


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device current if it is not: Triton launches on the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


class Calls:
    """An operation's calls: the first of a kind as written, the next ones as it was recorded.

    Args:
        run: (recording, tensors, options) to results, each an output of the recording, an input or
            None. It launches and allocates through the recording only.
        ready: (tensors, options) to the tensors as `run` takes them: checked, and copied where
            they are not laid out for it; the same objects where they are.
    """

    def __init__(
        self,
        run: "Callable[[Recording, Tensors, tuple[Any, ...]], Results]",
        ready: Callable[[Tensors, tuple[Any, ...]], Tensors],
    ) -> None:
        self._run, self._ready = run, ready
        self._known: dict[tuple[Any, ...], Prepared] = {}

    def __call__(self, tensors: Tensors, options: tuple[Any, ...]) -> Results:
        """Return the results of a call; options are all that it depends on besides the tensors.

        Raises what `ready` and `run` raise.
        """
        return self.with_ready(tensors, options)[1]

    def with_ready(self, tensors: Tensors, options: tuple[Any, ...]) -> tuple[Tensors, Results]:
        """Return the tensors as `ready` gives them, for a backward, and the results."""
        key, addresses = _kind(tensors, options)
        prepared = self._known.get(key)
        if prepared is None or some_hook():
            return self._first(key, tensors, options)
        return tensors, prepared(tensors, addresses)

    def clear(self) -> None:
        """Forget what was recorded."""
        self._known.clear()

    def _first(
        self, key: tuple[Any, ...], tensors: Tensors, options: tuple[Any, ...]
    ) -> tuple[Tensors, Results]:
        ready = self._ready(tensors, options)
        if any(a is not b for a, b in zip(ready, tensors, strict=True)):
            key, addresses = _kind(ready, options)
            prepared = self._known.get(key)
            if prepared is not None and not some_hook():
                return ready, prepared(ready, addresses)
        recording = Recording(ready)
        assert ready[0] is not None
        with on_device(ready[0]):
            results = self._run(recording, ready, options)
            prepared = recording.prepared(results)
        if prepared is not None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = prepared
        return ready, results


def _kind(tensors: Tensors, options: tuple[Any, ...]) -> tuple[tuple[Any, ...], list[int | None]]:
    """Return all that a call's launches depend on, and the tensors' addresses."""
    kind: list[Any] = [options]
    addresses: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            kind.append(None)
            addresses.append(None)
        else:
            address = tensor.data_ptr()
            addresses.append(address)
            kind += (
                tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(),
                address & _ALIGNMENT_SEEN,
            )  # fmt: skip
    return tuple(kind), addresses


@dataclass(frozen=True)
class _Place:
    """Where a pointer comes from: the input, output or piece of scratch memory of that number.

    Or the call's flags.
    """

    kind: str
    index: int
    offset: int = 0  # bytes


@dataclass(frozen=True)
class _Described:
    """A TMA descriptor of what is at a place."""

    place: _Place
    shape: Sizes
    strides: Sizes
    how: tuple[Any, ...]  # swizzle, element size and type, block


@dataclass
class Step:
    """One launch: a compiled kernel, its grid, and its arguments with places for pointers."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


class Recording:
    """Allocates and launches, and remembers it. Of no inputs (None), it remembers nothing."""

    def __init__(self, tensors: Tensors | None) -> None:
        self._steps: list[Step] | None = None if tensors is None else []
        self._inputs: Tensors = tensors or ()
        self._places: dict[int, _Place] = {}
        self._outputs: list[Tensor] = []
        self._spare: list[Tensor] = []
        self._flags, self._zeros = 0, list[Tensor]()
        self._scratch: list[Tensor] = []  # held: no address may stand for two of them
        for index, tensor in enumerate(self._inputs):
            if tensor is None:
                continue
            if tensor.data_ptr() in self._places:
                self.refuse()
            self._places[tensor.data_ptr()] = _Place("input", index)

    def refuse(self) -> None:
        """Do not repeat this call: something is done to a tensor that is no launch."""
        self._steps = None

    def output(self, shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate what the call returns."""
        return self._allocate("output", self._outputs, shape, dtype, device)

    def scratch(self, shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate what only the call's launches use."""
        for index, tensor in enumerate(self._spare):
            if tensor.shape == shape and tensor.dtype == dtype:
                return self._spare.pop(index)
        return self._allocate("scratch", self._scratch, shape, dtype, device)

    def flags(self, count: int, device: torch.device) -> Tensor:
        """Return the call's flags, int32 zeros that each of its launches must leave zero."""
        self._flags = max(self._flags, count)
        found = flags(self._flags, device)
        if self._steps is not None:
            self._places[found.data_ptr()] = _Place("flags", 0)
            self._zeros.append(found)
        return found

    def spare(self, *held: Tensor) -> None:
        """Let later launches use the scratch memory of those before, except what is held."""
        self._spare = [t for t in self._scratch if all(t is not h for h in held)]

    def _allocate(
        self, kind: str, held: list[Tensor], shape: Sizes, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if self._steps is not None:
            self._places[tensor.data_ptr()] = _Place(kind, len(held))
            held.append(tensor)
        return tensor

    def part(self, tensor: Tensor, begin: int, count: int) -> Tensor:
        """Return `count` entries of dimension 1 from `begin`, of a tensor of the recording's."""
        part = tensor.narrow(1, begin, count)
        place = self._places.get(tensor.data_ptr())
        if place is not None and begin > 0:
            offset = part.data_ptr() - tensor.data_ptr()
            self._places[part.data_ptr()] = replace(place, offset=offset)
        return part

    def launch(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        **options: Any,
    ) -> None:
        """Launch a kernel.

        Args:
            kernel: a JIT function of Triton or Gluon.
            grid: blocks.
            arguments: its first arguments, in order.
            constants: its other arguments, by name.
            options: of the compilation.
        """
        if self._steps is None:
            from mambench.kernels.relaunched import relaunched  # which needs this module

            relaunched(kernel)[grid](*arguments, **constants, **options)
            return
        compiled = kernel[grid](*arguments, **constants, **options)
        if compiled is None:  # in Triton's interpreter
            self.refuse()
            return
        others = (constants[name] for name in kernel.arg_names[len(arguments) :])
        flat = self._flat((*arguments, *others), tensor_maps(compiled))
        if flat is None:
            self.refuse()
        else:
            self._steps.append(Step(compiled, (*grid, 1, 1)[:3], flat))

    def _flat(self, arguments: tuple[Any, ...], maps: list[Any]) -> list[Any] | None:
        """Return a launch's arguments as the C launcher takes them; None: one has no origin."""
        flat: list[Any] = []
        left = iter(maps)
        for argument in arguments:
            if isinstance(argument, Tensor):
                flat.append(self._places.get(argument.data_ptr()))
                if flat[-1] is None:
                    return None
            elif hasattr(argument, "block_shape"):  # a descriptor
                place, how = self._places.get(argument.base.data_ptr()), next(left, None)
                if place is None or how is None or how["fp4_padded"]:
                    return None
                shape, strides = tuple(argument.shape), tuple(argument.strides)
                kind = (how["swizzle"], how["elem_size"], how["elem_type"])
                described = _Described(place, shape, strides, (*kind, tuple(how["block_size"])))
                flat += (described, *shape, *strides)
            else:
                flat.append(argument)
        return flat

    def prepared(self, results: Results) -> "Prepared | None":
        """Return the call to repeat, or None where it cannot be."""
        steps = self._steps
        if steps is None:
            return None
        launchers = [found for step in steps if (found := launcher(step)) is not None]
        if len(launchers) < len(steps):
            return None
        first = next(t for t in self._inputs if t is not None)
        arguments = [argument for step in steps for argument in step.arguments]
        layout = _Layout(
            len(self._inputs), self._outputs, self._scratch, arguments, has_flags=self._flags > 0
        )
        picks = [
            itemgetter(*map(layout.position, (*before, *step.arguments)))
            for (_, before), step in zip(launchers, steps, strict=True)
        ]
        found = [None if t is None else self._places.get(t.data_ptr()) for t in results]
        if any(t is not None and p is None for t, p in zip(results, found, strict=True)):
            return None
        return Prepared(
            device=first.device.index,
            outputs=tuple(_template(t.shape, t.dtype, t.device) for t in self._outputs),
            scratch=_template((layout.bytes,), torch.uint8, first.device) if layout.bytes else None,
            offsets=tuple(layout.offsets),
            flags=(self._flags, first.device) if self._flags else None,
            parts=tuple(layout.parts),
            maps=tuple((layout.index(d.place), _Encoder(d)) for d in layout.described),
            constants=tuple(layout.constants),
            steps=tuple((call, pick) for (call, _), pick in zip(launchers, picks, strict=True)),
            results=tuple(None if p is None else layout.result(p) for p in found),
        )


class _Layout:
    """Where a repeated call puts everything that launches take, in one list.

    Addresses of the inputs, of the outputs, of scratch memory, of flags and of parts of these, the
    stream, tensor maps; constants are counted from the end.
    """

    def __init__(
        self, inputs: int, outputs: list[Tensor], scratch: list[Tensor], arguments: list[Any],
        *, has_flags: bool,
    ) -> None:  # fmt: skip
        self.offsets: list[int] = []
        self.bytes = 0
        for tensor in scratch:
            self.offsets.append(self.bytes)
            self.bytes += -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED
        after = inputs + len(outputs) + len(scratch)
        self._first = {"input": 0, "output": inputs, "scratch": inputs + len(outputs)}
        self._first["flags"] = after
        self._after = after + has_flags
        places = (a.place if isinstance(a, _Described) else a for a in arguments)
        apart = (p for p in places if isinstance(p, _Place) and p.offset > 0)
        self._apart = list(dict.fromkeys(apart))
        self.parts = [(self.index(replace(p, offset=0)), p.offset) for p in self._apart]
        self._stream = self._after + len(self.parts)
        self.described: list[_Described] = []
        self.constants: list[Any] = []

    def index(self, place: _Place) -> int:
        """Return where a place's address is."""
        if place.offset > 0:
            return self._after + self._apart.index(place)
        return self._first[place.kind] + place.index

    def result(self, place: _Place) -> int:
        """Return which of the inputs and outputs is a result."""
        if place.kind not in ("input", "output") or place.offset > 0:
            raise ValueError(f"expected an output or an input as a result, got {place}")
        return self.index(place)

    def position(self, argument: Any) -> int:
        """Return where an argument is; constants and tensor maps are added."""
        if isinstance(argument, _Place):
            return self.index(argument)
        if argument is _STREAM:
            return self._stream
        if isinstance(argument, _Described):
            if argument not in self.described:
                self.described.append(argument)
            return self._stream + 1 + self.described.index(argument)
        self.constants.insert(0, argument)
        return -len(self.constants)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A call that only allocates and launches."""

    device: int | None
    outputs: tuple[Tensor, ...]  # without memory of their own
    scratch: Tensor | None
    offsets: Sizes
    flags: tuple[int, torch.device] | None  # how many
    parts: tuple[tuple[int, int], ...]  # where the address of the whole is, and bytes from there
    maps: "tuple[tuple[int, _Encoder], ...]"
    constants: tuple[Any, ...]
    steps: tuple[tuple[Callable[..., Any], Callable[[Any], tuple[Any, ...]]], ...]
    results: tuple[int | None, ...]

    def __call__(self, tensors: Tensors, addresses: list[int | None]) -> Results:
        """Allocate and launch on the tensors' device; addresses are theirs, None for None."""
        if self.device is not None and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self._repeat(tensors, addresses)
        return self._repeat(tensors, addresses)

    def _repeat(self, tensors: Tensors, addresses: list[int | None]) -> Results:
        filled: list[Any] = list(addresses)
        outputs = [torch.empty_like(t, memory_format=_DENSE) for t in self.outputs]
        filled += [t.data_ptr() for t in outputs]
        if self.scratch is not None:
            scratch = torch.empty_like(self.scratch, memory_format=_DENSE)
            base = scratch.data_ptr()
            filled += [base + offset for offset in self.offsets]
        if self.flags is not None:
            zeros = flags(*self.flags)
            filled.append(zeros.data_ptr())
        filled += [filled[index] + offset for index, offset in self.parts]
        filled.append(driver.active.get_current_stream(self.device))
        filled += [encoder(filled[index]) for index, encoder in self.maps]
        filled += self.constants
        for call, pick in self.steps:
            call(*pick(filled))
        given = len(tensors)
        return tuple(
            None if i is None else tensors[i] if i < given else outputs[i - given]
            for i in self.results
        )


class _Encoder:
    """Encodes the tensor maps of one descriptor, each address once.

    A map depends on nothing but address, sizes and strides, so that it outlives the tensor.
    """

    __slots__ = ("_described", "_made")

    def __init__(self, described: _Described) -> None:
        self._described = described
        self._made: dict[int, Any] = {}

    def __call__(self, address: int) -> Any:
        made = self._made.get(address)
        if made is None:
            from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

            if len(self._made) >= _KEPT:
                self._made.clear()
            swizzle, size, kind, block = self._described.how
            made = self._made[address] = driver.active.utils.fill_tma_descriptor(
                address, swizzle, size, TMA_DTYPE_DEVICE_TO_HOST[kind], list(block),
                list(self._described.shape), list(self._described.strides), 0,
            )  # fmt: skip
        return made


_STREAM = object()  # stands for the current stream among a launch's arguments
_DENSE = torch.contiguous_format


def some_hook() -> bool:
    """Whether a profiler wants to see launches, which only Triton's own way shows it."""
    runtime = knobs.runtime
    return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)


def tensor_maps(compiled: Any) -> list[Any]:
    """Return how each descriptor among a kernel's arguments is encoded; None: on the device."""
    return getattr(compiled.metadata, "tensordesc_meta", None) or []


def launcher(step: Step) -> tuple[Callable[..., Any], tuple[Any, ...]] | None:
    """Return what launches a step, and what it takes before the kernel's arguments.

    Triton's C launcher where its arguments are known, which saves most; elsewhere Triton's way to
    launch a compiled kernel, which takes no descriptors in pieces.
    """
    compiled, run, maps = step.compiled, step.compiled.run, tensor_maps(step.compiled)
    own = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    call = getattr(run, "launch", None)
    if maps and call is not None:  # Triton keeps it in a closure then
        call = getclosurevars(call).nonlocals.get("launcher")
    nvidia = type(run).__module__ == "triton.backends.nvidia.driver"
    if call is None or own or not nvidia or not triton.__version__.startswith(_LAUNCHER):
        return None if maps else (compiled[step.grid], ())
    return call, (
        *step.grid, _STREAM, compiled.function, run.launch_cooperative_grid, run.launch_pdl,
        None, None, compiled.packed_metadata, None, None, None,
    )  # fmt: skip


@lru_cache(maxsize=64)
def _scalar(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty((), dtype=dtype, device=device)


def _template(shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor to allocate others like, in half the time that shape and dtype take."""
    return _scalar(dtype, device).expand(shape)
