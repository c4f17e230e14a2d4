"""A recorded call, repeated: it allocates, launches and frees as the first one did.

A call is divided into phases, each of which begins where memory that was freed may be had again. A
phase allocates at once what it needs: every result on its own, and one block of scratch memory for
all that is freed together. So a repeated call holds no more at any time than the first one did.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from inspect import getclosurevars
from itertools import count
from operator import itemgetter
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from mambench.kernels.flags import flags

Tensors = Sequence[Tensor | None]
Results = tuple[Tensor | None, ...]
Sizes = tuple[int, ...]

_KEPT = 1 << 12  # addresses of a descriptor's tensor
_ALIGNED = 256  # bytes: pieces of scratch memory begin at multiples
_LAUNCHER = "3.6."  # the versions of Triton whose launcher's arguments are known here
_STREAM = object()  # stands for the current stream among a launch's arguments
_DENSE = torch.contiguous_format


@dataclass(frozen=True)
class Place:
    """Where a pointer comes from: the input, output or piece of scratch memory of that number.

    Or the call's flags.
    """

    kind: str
    index: int
    offset: int = 0  # bytes

    @property
    def whole(self) -> "Place":
        """Where that of which this is a part begins."""
        return replace(self, offset=0) if self.offset else self


@dataclass(frozen=True)
class Described:
    """A TMA descriptor of what is at a place."""

    place: Place
    shape: Sizes
    strides: Sizes
    how: tuple[Any, ...]  # swizzle, element size and type, block


@dataclass
class Step:
    """One launch: a compiled kernel, its grid, and its arguments with places for pointers."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: list[Any]


@dataclass(frozen=True)
class Allocated:
    """An output, or a piece of scratch memory, and what it is to be like."""

    place: Place
    shape: Sizes
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Freed:
    """Scratch memory that later allocations may have, or an input that the caller gave away."""

    place: Place


@dataclass(frozen=True)
class Result:
    """An input or an output, or a view of it: its sizes, strides and first element."""

    place: Place
    view: tuple[Sizes, Sizes, int] | None


Event = Step | Allocated | Freed


@dataclass(frozen=True, kw_only=True, slots=True)
class _Phase:
    """What is allocated at once, launched and then freed."""

    outputs: tuple[Tensor, ...]  # without memory of their own
    blocks: tuple[tuple[Tensor, Sizes], ...]  # of scratch memory, and where its pieces begin
    parts: tuple[tuple[int, int], ...]  # where the address of the whole is, and bytes from there
    # where the address of a tensor map is, the maps known by address, and what makes others
    maps: tuple[tuple[int, dict[int, Any], Callable[[int], Any]], ...]
    steps: tuple[tuple[Callable[..., Any], Callable[[Any], tuple[Any, ...]]], ...]
    freed: Sizes  # blocks
    given: Sizes  # inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A call that only allocates, launches and frees."""

    device: int | None
    flags: tuple[int, torch.device] | None  # how many
    constants: tuple[Any, ...]
    phases: tuple[_Phase, ...]
    results: tuple[tuple[int, tuple[Sizes, Sizes, int] | None] | None, ...]

    def __call__(self, tensors: Tensors, addresses: list[int | None]) -> Results:
        """Repeat it on the tensors' device; addresses are theirs, None for None.

        A list of tensors loses those that are freed on the way.
        """
        if self.device is not None and torch.cuda.current_device() != self.device:
            with torch.cuda.device(self.device):
                return self._repeat(tensors, addresses)
        return self._repeat(tensors, addresses)

    def _repeat(self, tensors: Tensors, addresses: list[int | None]) -> Results:
        stream = driver.active.get_current_stream(self.device)
        filled: list[Any] = [*self.constants, stream, *addresses]
        if self.flags is not None:
            zeros = flags(*self.flags)
            filled.append(zeros.data_ptr())
        outputs: list[Tensor] = []
        blocks: list[Tensor | None] = []
        for phase in self.phases:
            made = [torch.empty_like(t, memory_format=_DENSE) for t in phase.outputs]
            outputs += made
            filled += [t.data_ptr() for t in made]
            for template, offsets in phase.blocks:
                blocks.append(torch.empty_like(template, memory_format=_DENSE))
                base = blocks[-1].data_ptr()  # type: ignore[union-attr]
                filled += [base + offset for offset in offsets]
            filled += [filled[index] + offset for index, offset in phase.parts]
            filled += [
                known.get(filled[index]) or make(filled[index]) for index, known, make in phase.maps
            ]
            for call, pick in phase.steps:
                call(*pick(filled))
            for index in phase.freed:
                blocks[index] = None
            for index in phase.given:
                tensors[index] = None  # type: ignore[index]
        found: list[Tensor | None] = []
        given = len(tensors)
        for result in self.results:
            if result is None:
                found.append(None)
                continue
            index, view = result
            whole = tensors[index] if index < given else outputs[index - given]
            found.append(whole if view is None or whole is None else whole.as_strided(*view))
        return tuple(found)


class _Encoder:
    """Encodes the tensor maps of one descriptor, each address once.

    A map depends on nothing but address, sizes and strides, so that it outlives the tensor.
    """

    __slots__ = ("_described", "known")

    def __init__(self, described: Described) -> None:
        self._described = described
        self.known: dict[int, Any] = {}

    def make(self, address: int) -> Any:
        """Encode the map of what lies at an address, which is known from now on."""
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        if len(self.known) >= _KEPT:
            self.known.clear()
        swizzle, size, kind, block = self._described.how
        made = self.known[address] = driver.active.utils.fill_tma_descriptor(
            address, swizzle, size, TMA_DTYPE_DEVICE_TO_HOST[kind], list(block),
            list(self._described.shape), list(self._described.strides), 0,
        )  # fmt: skip
        return made


@dataclass
class _Planned:
    """A phase as its events say it."""

    allocated: list[Allocated] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    freed: list[Place] = field(default_factory=list)


def prepare(
    events: list[Event], results: list[Result | None], *, inputs: int, flags: int,
    device: torch.device,
) -> Prepared | None:  # fmt: skip
    """Return a recorded call as one to repeat; None where a kernel cannot be launched so.

    Args:
        events: in their order.
        results: None for None.
        inputs: how many tensors the call takes.
        flags: how many its launches use.
        device: the tensors'.
    """
    planned = _planned(events)
    launchers = {
        id(step): found
        for phase in planned
        for step in phase.steps
        if (found := launcher(step)) is not None
    }
    if len(launchers) < sum(len(phase.steps) for phase in planned):
        return None
    every = [
        argument
        for phase in planned
        for step in phase.steps
        for argument in (*launchers[id(step)][1], *step.arguments)
    ]
    values = _Values(tuple(filter(_is_constant, every)), inputs, has_flags=flags > 0)
    arranged = _Arranged(planned, values, launchers)
    return Prepared(
        device=device.index,
        flags=(flags, device) if flags else None,
        constants=values.constants,
        phases=tuple(arranged.phase(number) for number in range(len(planned))),
        results=tuple(
            None
            if result is None
            else (result.place.index + inputs * (result.place.kind == "output"), result.view)
            for result in results
        ),
    )


def _planned(events: Iterable[Event]) -> list[_Planned]:
    """Divide a call into phases: one begins where something is allocated after a free."""
    phases = [_Planned()]
    for event in events:
        if isinstance(event, Step):
            phases[-1].steps.append(event)
        elif isinstance(event, Freed):
            phases[-1].freed.append(event.place)
        else:
            if phases[-1].freed:
                phases.append(_Planned())
            phases[-1].allocated.append(event)
    return phases


class _Values:
    """Where everything that launches take is in the one list that a repeated call fills.

    Constants, in the order in which launches take them, the stream, the inputs' addresses, that of
    the flags; then, by phase, addresses of outputs and of scratch memory, of parts, tensor maps.
    """

    def __init__(self, constants: tuple[Any, ...], inputs: int, *, has_flags: bool) -> None:
        self.constants = constants
        self._next_constant = count()
        self._position: dict[Any, int] = {}
        self._next = count(len(constants))
        self.add(_STREAM)
        for index in range(inputs):
            self.add(Place("input", index))
        if has_flags:
            self.add(Place("flags", 0))

    def add(self, value: Any) -> None:
        """Give a value the next position."""
        self._position[value] = next(self._next)

    def __contains__(self, value: Any) -> bool:
        return value in self._position

    def __getitem__(self, value: Any) -> int:
        return self._position[value]

    def take(self, argument: Any) -> int:
        """Return where an argument is; constants are taken one after the other."""
        return next(self._next_constant) if _is_constant(argument) else self._position[argument]


def _is_constant(argument: Any) -> bool:
    return argument is not _STREAM and not isinstance(argument, Place | Described)


class _Arranged:
    """Makes the phases of a repeated call, in their order."""

    def __init__(self, planned: list[_Planned], values: _Values, launchers: dict[int, Any]) -> None:
        self._planned, self._values, self._launchers = planned, values, launchers
        self._death = {
            place: number for number, phase in enumerate(planned) for place in phase.freed
        }
        self._deaths: list[int] = []  # of blocks: after which phase

    def phase(self, number: int) -> _Phase:
        """Return a phase; to be called for one after the other."""
        phase, values = self._planned[number], self._values
        outputs = [a for a in phase.allocated if a.place.kind == "output"]
        for allocated in outputs:
            values.add(allocated.place)
        blocks = self._blocks([a for a in phase.allocated if a.place.kind == "scratch"])
        arguments = [a for step in phase.steps for a in step.arguments]
        places = [a.place if isinstance(a, Described) else a for a in arguments]
        parts: list[tuple[int, int]] = []
        for place in places:
            if isinstance(place, Place) and place not in values:
                parts.append((values[place.whole], place.offset))
                values.add(place)
        maps: list[tuple[int, dict[int, Any], Callable[[int], Any]]] = []
        for described in arguments:
            if isinstance(described, Described) and described not in values:
                encoder = _Encoder(described)
                maps.append((values[described.place], encoder.known, encoder.make))
                values.add(described)
        return _Phase(
            outputs=tuple(_template(a.shape, a.dtype, a.device) for a in outputs),
            blocks=blocks,
            parts=tuple(parts),
            maps=tuple(maps),
            steps=tuple(self._step(step) for step in phase.steps),
            freed=tuple(i for i, death in enumerate(self._deaths) if death == number),
            given=tuple(place.index for place in phase.freed if place.kind == "input"),
        )

    def _step(self, step: Step) -> tuple[Callable[..., Any], Callable[[Any], tuple[Any, ...]]]:
        call, before = self._launchers[id(step)]
        return call, itemgetter(*map(self._values.take, (*before, *step.arguments)))

    def _blocks(self, scratch: list[Allocated]) -> tuple[tuple[Tensor, Sizes], ...]:
        """Put together what is freed together."""
        deaths = [self._death.get(allocated.place, len(self._planned)) for allocated in scratch]
        blocks: list[tuple[Tensor, Sizes]] = []
        for death in dict.fromkeys(deaths):
            offsets: list[int] = []
            size = 0
            for allocated, own in zip(scratch, deaths, strict=True):
                if own == death:
                    self._values.add(allocated.place)
                    offsets.append(size)
                    size += -(-_bytes(allocated) // _ALIGNED) * _ALIGNED
            blocks.append((_template((size,), torch.uint8, scratch[0].device), tuple(offsets)))
            self._deaths.append(death)
        return tuple(blocks)


def _bytes(allocated: Allocated) -> int:
    size = allocated.dtype.itemsize
    for each in allocated.shape:
        size *= each
    return size


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
