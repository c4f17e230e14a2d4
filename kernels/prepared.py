"""Calls of an operation prepared once and repeated: a launch costs a few microseconds of Python.

Binding forty arguments takes Triton longer than a kernel of a short sequence runs, and so do the
checks, the plan and the allocations around it. All of that follows from the shapes, strides,
dtypes, devices and alignment of the tensors and from the options. So the first call of a kind runs
as written and is recorded: which compiled kernels, on which grids, what is allocated and freed
between them, and where every pointer comes from. The next of its kind allocates the same, fills the
pointers in and calls Triton's C launchers, which take addresses as they take tensors (`repeated`).

What is repeated are launches, allocations and frees alone: nothing else may happen to a tensor
while recording. A call is not repeated if a pointer is of no known origin (a copy) or of two (one
tensor for two arguments), if a kernel wants memory of its own from Triton, or in Triton's
interpreter.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.flags import flags
from mambench.kernels.repeated import (
    Allocated,
    Described,
    Event,
    Freed,
    Place,
    Prepared,
    Result,
    Results,
    Sizes,
    Step,
    prepare,
    some_hook,
    tensor_maps,
)

Tensors = Sequence[Tensor | None]

_KEPT = 1 << 12  # kinds of calls of an operation
_ALIGNMENT_SEEN = 15  # Triton compiles for pointers that are multiples of 16 bytes, or are not


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device current if it is not: Triton launches on the current one."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def as_given(gradients: Results, tensors: Tensors) -> Results:
    """Return gradients in the dtypes of their tensors, None for the tensors that are None."""
    return tuple(
        None
        if gradient is None or tensor is None
        else (gradient if gradient.dtype == tensor.dtype else gradient.to(tensor.dtype))
        for gradient, tensor in zip(gradients, tensors, strict=True)
    )


class Calls:
    """An operation's calls: the first of a kind as written, the next ones as it was recorded.

    Args:
        run: (recording, tensors, options) to results, each an output of the recording, a view of
            one, an input or None. It launches, allocates and frees through the recording only.
        ready: (tensors, options) to the tensors as `run` takes them: checked, and copied where
            they are not laid out for it; the same objects where they are.
    """

    def __init__(
        self,
        run: "Callable[[Recording, Any, tuple[Any, ...]], Results]",
        ready: Callable[[Any, tuple[Any, ...]], Tensors],
    ) -> None:
        self._run, self._ready = run, ready
        self._known: dict[tuple[Any, ...], Prepared] = {}

    def __call__(self, tensors: Tensors, options: tuple[Any, ...]) -> Results:
        """Return the results of a call; options are all that it depends on besides the tensors.

        The tensors may come in a list of the caller's, which `run` then takes those from that it
        frees. Raises what `ready` and `run` raise.
        """
        return self.with_ready(tensors, options)[1]

    def with_ready(self, tensors: Tensors, options: tuple[Any, ...]) -> tuple[Any, Results]:
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
    ) -> tuple[Any, Results]:
        ready = self._ready(tensors, options)
        changed = any(a is not b for a, b in zip(ready, tensors, strict=True))
        if isinstance(tensors, list):
            tensors[:] = ready
            ready = tensors  # so that what is freed is held by nothing else
        if changed:
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


class Recording:
    """Allocates, launches and frees, and remembers it. Of no inputs (None), it remembers nothing.

    What it allocated and what it was given it knows by address, with all parts; memory that is let
    go of otherwise than by `free` is held until the call ends.
    """

    def __init__(self, tensors: Tensors | None) -> None:
        self._events: list[Event] | None = None if tensors is None else []
        self._inputs: Tensors = () if tensors is None else tensors
        self._places: dict[int, Place] = {}  # of inputs, parts of them and flags
        self._held: dict[Place, Tensor] = {}  # allocated here and not freed
        self._spare: list[Tensor] = []
        self._flags, self._zeros = 0, list[Tensor]()
        self._count = {"output": 0, "scratch": 0}
        for index, tensor in enumerate(self._inputs):
            if tensor is None:
                continue
            if tensor.data_ptr() in self._places:
                self.refuse()
            self._places[tensor.data_ptr()] = Place("input", index)

    def refuse(self) -> None:
        """Do not repeat this call: something is done to a tensor that is no launch."""
        self._events = None
        self._held.clear()

    def output(self, shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate what the call returns."""
        return self._allocate("output", shape, dtype, device)

    def scratch(self, shape: Sizes, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Allocate what only the call's launches use."""
        for index, tensor in enumerate(self._spare):
            if tensor.shape == shape and tensor.dtype == dtype:
                return self._spare.pop(index)
        return self._allocate("scratch", shape, dtype, device)

    def flags(self, count: int, device: torch.device) -> Tensor:
        """Return the call's flags, int32 zeros that each of its launches must leave zero."""
        self._flags = max(self._flags, count)
        found = flags(self._flags, device)
        if self._events is not None:
            self._places[found.data_ptr()] = Place("flags", 0)
            self._zeros.append(found)
        return found

    def spare(self, *held: Tensor) -> None:
        """Let later launches use the scratch memory of those before, except what is held."""
        scratch = (t for place, t in self._held.items() if place.kind == "scratch")
        self._spare = [t for t in scratch if all(t is not h for h in held)]

    def free(self, tensor: Tensor) -> None:
        """Let later allocations have scratch memory, or an input that was given in a list.

        The caller must let go of it too, and of all views of it.
        """
        for index, given in enumerate(self._inputs):
            if given is tensor:
                self._inputs[index] = None  # type: ignore[index]
        if self._events is None:
            return
        place = self._place(tensor)
        if place is None or place.offset or place.kind not in ("input", "scratch"):
            self.refuse()
            return
        self._events.append(Freed(place))
        self._held.pop(place, None)
        self._places = {a: p for a, p in self._places.items() if p.whole != place}

    def _allocate(
        self, kind: str, shape: Sizes, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if self._events is not None:
            place = Place(kind, self._count[kind])
            self._count[kind] += 1
            self._held[place] = tensor
            self._events.append(Allocated(place, tuple(tensor.shape), dtype, device))
        return tensor

    def part(self, tensor: Tensor, begin: int, count: int) -> Tensor:
        """Return `count` entries of dimension 1 from `begin`, of a tensor of the recording's.

        Of what the recording allocated it knows all parts, those of its inputs only so.
        """
        part = tensor.narrow(1, begin, count)
        place = self._places.get(tensor.data_ptr())
        if place is not None and begin > 0:
            offset = place.offset + part.data_ptr() - tensor.data_ptr()
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
        compiled = kernel[grid](*arguments, **constants, **options)
        if self._events is None:
            return
        if compiled is None:  # in Triton's interpreter
            self.refuse()
            return
        others = (constants[name] for name in kernel.arg_names[len(arguments) :])
        flat = self._flat((*arguments, *others), tensor_maps(compiled))
        if flat is None:
            self.refuse()
        else:
            self._events.append(Step(compiled, (*grid, 1, 1)[:3], flat))

    def _flat(self, arguments: tuple[Any, ...], maps: list[Any]) -> list[Any] | None:
        """Return a launch's arguments as the C launcher takes them; None: one has no origin."""
        flat: list[Any] = []
        left = iter(maps)
        for argument in arguments:
            if isinstance(argument, Tensor):
                flat.append(self._place(argument) if argument.numel() else 0)
                if flat[-1] is None:
                    return None
            elif hasattr(argument, "block_shape"):  # a descriptor
                place, how = self._place(argument.base), next(left, None)
                if place is None or how is None or how["fp4_padded"]:
                    return None
                shape, strides = tuple(argument.shape), tuple(argument.strides)
                kind = (how["swizzle"], how["elem_size"], how["elem_type"])
                described = Described(place, shape, strides, (*kind, tuple(how["block_size"])))
                flat += (described, *shape, *strides)
            else:
                flat.append(argument)
        return flat

    def _place(self, tensor: Tensor) -> Place | None:
        """Return where a tensor begins: at an input, or in what was allocated and is held."""
        address = tensor.data_ptr()
        found = self._places.get(address)
        if found is not None:
            return found
        for place, held in self._held.items():
            offset = address - held.data_ptr()
            if 0 <= offset < held.numel() * held.element_size():
                return replace(place, offset=offset)
        return None

    def prepared(self, results: Results) -> Prepared | None:
        """Return the call to repeat, or None where it cannot be."""
        if self._events is None:
            return None
        found = [None if t is None else self._result(t) for t in results]
        if any(t is not None and r is None for t, r in zip(results, found, strict=True)):
            return None
        device = next(t for t in self._inputs if t is not None).device
        return prepare(
            self._events, found, inputs=len(self._inputs), flags=self._flags, device=device
        )

    def _result(self, tensor: Tensor) -> Result | None:
        """Return which input or output a result is, or a view of; None: neither."""
        place = self._place(tensor)
        if place is None or place.kind not in ("input", "output"):
            return None
        whole = self._inputs[place.index] if place.kind == "input" else self._held[place.whole]
        assert whole is not None
        shape, strides = tuple(tensor.shape), tensor.stride()
        if (shape, strides) == (tuple(whole.shape), whole.stride()) and not place.offset:
            return Result(place, None)
        if place.kind == "input" or tensor.dtype != whole.dtype:
            return None
        return Result(place.whole, (shape, strides, int(tensor.storage_offset())))
