"""Selective scan backward on Hopper: what it supports, and the launcher up to 16 states.

Time is divided into segments, so that few channels fill the GPU too. What each segment passes back
is made first (which needs no states), a small launch makes of that what each gets, and then the
segments run at once. Their blocks add up their partial sums among themselves, in a fixed order. The
states that the forward kept and what else is needed go into the gradients' memory: `hopper_memory`.
With more states `hopper_wide` does the same with another kernel.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambench.kernels.integers import ceil_div, next_power_of_2
from mambench.kernels.prepared import Calls, Recording, as_given
from mambench.kernels.s6.hopper_backward_kernel import (
    scan_backward_kernel,
    segment_adjoint_kernel,
)
from mambench.kernels.s6.hopper_memory import (
    STATES,
    Division,
    divide,
    resident,
    scratch_elements,
    states_fit,
)
from mambench.kernels.s6.hopper_scan import row_unit
from mambench.kernels.s6.hopper_small import MOVE, move_states_kernel, pass_back_kernel
from mambench.kernels.s6.hopper_wide import WideRun
from mambench.kernels.s6.hopper_wide_memory import WideConfig, fits
from mambench.kernels.s6.triton_scan import (
    _Inputs as Inputs,  # pyright: ignore[reportPrivateUsage]
)

ADJOINT_WARPS = 2
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, kw_only=True)
class BackwardConfig:
    """How the kernel is built and time divided.

    Channels of a thread (2 or 4), steps replayed in registers (4 or 8), warps of a block, steps
    between the states that the forward keeps (a multiple of 32), thread blocks that time is divided
    for on each multiprocessor, and a limit of registers.
    """

    channels: int = 2
    tile: int = 8
    warps: int = 4
    chunk: int = 64
    resident: int = 2
    registers: int | None = None

    @property
    def block(self) -> int:
        """Channels of a thread block."""
        return 8 * self.channels * self.warps


# Measured configurations, by the padded number of states; blocks of 64 channels up to 16 states,
# whose sums then have room in the gradients (`hopper_memory`), with more all states in a block.
CHOSEN: dict[int, BackwardConfig | WideConfig] = {
    16: BackwardConfig(channels=2, tile=8, warps=4, chunk=64, resident=2),
    32: WideConfig(warps_n=2, warps_d=4, chunk=64),
    64: WideConfig(warps_n=4, warps_d=2, chunk=128),
    128: WideConfig(warps_n=8, warps_d=1, chunk=256, note=16),
    256: WideConfig(lanes_n=8, warps_n=8, warps_d=1, chunk=512, mid=64, exchange=8),
}


def supported(*, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot serve a problem, or None; lengths, channels, groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in _DTYPES:
        return f"dtype {dtype}: the Hopper backward takes bfloat16, float16 and float32"
    if not 1 <= d_state <= 256:
        return f"d_state {d_state}: the Hopper backward takes 1 to 256"
    return None


def choose(
    *, d_inner: int, d_state: int, multiprocessors: int | None, ngroups: int = 1
) -> BackwardConfig | WideConfig | None:
    """Return the configuration for a problem, or None where the portable backward is to run.

    That is where the GPU, if its multiprocessors are known, cannot hold a block for every channel
    at once.
    """
    config = CHOSEN.get(max(16, 1 << (d_state - 1).bit_length()))
    if config is None or multiprocessors is None:
        return config
    sizes = {"d_inner": d_inner, "ngroups": ngroups}
    slots = multiprocessors * config.resident
    if isinstance(config, WideConfig):
        return config if fits(config, **sizes, resident=slots) else None
    return config if resident(**sizes, block=config.block, slots=slots) else None


def configuration(u: Tensor, d_state: int, ngroups: int) -> BackwardConfig | WideConfig | None:
    """Return what `choose` gives for u (B, D, L) on its device."""
    return _chosen(u.shape[1], d_state, ngroups, multiprocessors(u.device) if u.is_cuda else None)


@lru_cache(maxsize=256)
def _chosen(
    d_inner: int, d_state: int, ngroups: int, multiprocessors: int | None
) -> BackwardConfig | WideConfig | None:
    return choose(
        d_inner=d_inner, d_state=d_state, ngroups=ngroups, multiprocessors=multiprocessors
    )


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 for one that is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def specialisation(
    *, d_state: int, unit: int, has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    has_r: bool, division: Division, kept_unit: int, config: BackwardConfig,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the kernel's compile-time arguments for a problem."""
    share = _share(config.chunk, division.blocks)
    sources = 64 // share  # that `add_up_steps` loads at once
    return {
        "D_STATE": d_state,
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "HAS_R": has_r,
        "IN_PLACE": division.in_place,
        "KEPT_UNIT": kept_unit,
        "CHUNK": config.chunk,
        "UNIT": unit,
        "CHANNELS": config.channels,
        "TILE": config.tile,
        "WARPS": config.warps,
        "STEP_SHARE": share,
        "CHANNEL_SHARE": _share(config.block, division.rows),
        "EVEN": config.chunk % division.blocks == 0 and division.blocks % sources == 0,
    }


def _share(size: int, among: int) -> int:
    """Return how many each takes, as a power of two."""
    return next_power_of_2(ceil_div(size, among))


def adjoint_specialisation(constants: dict[str, int | bool], *, move: int) -> dict[str, int | bool]:
    """Return those of the compile-time arguments that `segment_adjoint_kernel` takes, and MOVE."""
    other = (
        "HAS_D",
        "HAS_R",
        "IN_PLACE",
        "KEPT_UNIT",
        "TILE",
        "STEP_SHARE",
        "CHANNEL_SHARE",
        "EVEN",
    )
    kept = {name: value for name, value in constants.items() if name not in other}
    return kept | {"STATE_BLOCKS": 1, "MOVE": move, "WARPS": ADJOINT_WARPS}


def scan_backward(
    tensors: tuple[Tensor | None, ...],
    softplus: bool,
    kept: Tensor | list[Tensor],
    dout: Tensor,
    dlast: Tensor | None,
    *,
    config: BackwardConfig | WideConfig,
    segments: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; dB and dC without atomics.

    tensors are these eight. kept (B, ceil(L / config.chunk), D, N) fp32 are the states that the
    forward kept: in a list, which is emptied, if they are to be freed once they are in du's memory.
    dout (B, D, L); dlast (B, D, N) or None. The same bits from run to run. `segments` overrides how
    time is divided. Raises RuntimeError from the driver if the GPU cannot hold a block for all
    channels at once.
    """
    given = isinstance(kept, list)
    call = [*tensors, dout, dlast, kept.pop() if given else kept]
    return as_given(_calls(call, (softplus, config, segments, given)), tensors)


def _ready(tensors: list[Any], options: tuple[Any, ...]) -> tuple[Any, ...]:
    """Copy what is not laid out as the kernels read it; parameters and states in fp32."""
    u, delta, A, B, C, D, z, bias, dout, dlast, kept = tensors
    return (
        *(_dense(u), _dense(delta), _wide(A), _dense(B), _dense(C), _wide(D), _dense(z)),
        *(_wide(bias), _dense(dout), _wide(dlast), kept),
    )


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _wide(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.float().contiguous()


def _run(recording: Recording, tensors: list[Any], options: tuple[Any, ...]) -> Any:
    """Run the backward that is configured, of which the first call of a kind is recorded."""
    softplus, config, segments, given = options
    inputs = Inputs(*tensors[:8], softplus)
    tokens = _Tokens(inputs.u, inputs.delta, inputs.B, inputs.C, inputs.z, tensors[8])
    dlast = tensors[9]
    slots = multiprocessors(inputs.u.device) * config.resident
    if isinstance(config, WideConfig):
        run = WideRun(recording, inputs, tokens, config, slots=slots, segments=segments)
    else:
        batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
        division = divide(
            batch=batch, seqlen=seqlen, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
            itemsize=inputs.u.element_size(), chunk=config.chunk, block=config.block, slots=slots,
            segments=segments,
        )  # fmt: skip
        run = _Run(recording, inputs, tokens, division, config)
    return run(tensors, dlast, give=given)


class _Tokens(NamedTuple):
    """The inputs over time, contiguous."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    dout: Tensor


class _Strided(NamedTuple):
    """fp32 values of every (batch, chunk or segment, channel, state): memory and strides."""

    memory: Tensor
    strides: tuple[int, int, int]


class _Run:
    """One backward: its buffers and launches, in the order in which memory becomes free."""

    def __init__(
        self, recording: Recording, inputs: Inputs, tokens: _Tokens, division: Division,
        config: BackwardConfig,
    ) -> None:  # fmt: skip
        self.recording = recording
        self.inputs, self.tokens, self.division, self.config = inputs, tokens, division, config
        self.sizes = _sizes(inputs)
        batch, _, d_inner, d_state, ngroups = self.sizes
        self.du = self._like_u()
        elements = scratch_elements(
            division, batch=batch, d_inner=d_inner, d_state=d_state, ngroups=ngroups,
            chunk=config.chunk,
        )  # fmt: skip
        size = (sum(elements.values()),)
        memory = recording.scratch(size, torch.float32, tokens.u.device)
        self.scratch = dict(zip(elements, memory.split(list(elements.values())), strict=True))

    def _like_u(self) -> Tensor:
        u = self.tokens.u
        return self.recording.output(tuple(u.shape), u.dtype, u.device)

    def __call__(
        self, tensors: list[Any], dlast: Tensor | None, *, give: bool
    ) -> tuple[Tensor | None, ...]:
        """Return the gradients, in fp32 where they are of parameters.

        The kept states are the last of the tensors; give: they may be freed once they are in du.
        """
        batch, seqlen, d_inner, d_state, ngroups = self.sizes
        tokens, scratch = self.tokens, self.scratch
        passed = self._passed()
        states = self._prepare(tensors, dlast, passed, give=give)
        ddelta = self._like_u()
        dz = None if tokens.z is None else self._like_u()
        recording, device = self.recording, ddelta.device
        dA, dD, dbias = recording.output(
            (d_inner * (d_state + 2),), torch.float32, device
        ).split([d_inner * d_state, d_inner, d_inner])  # fmt: skip
        dBC = recording.output((2, batch, ngroups, d_state, seqlen), ddelta.dtype, device)
        division, inputs = self.division, self.inputs
        several = division.segments > 1
        if several:  # a segment gets what its last part gets
            of_batch, of_part, of_channel = passed.strides
            strides = (of_batch, division.parts * of_part, of_channel)
            passed = _Strided(passed.memory[(division.parts - 1) * of_part :], strides)
        elif dlast is not None:
            passed = _Strided(dlast, (d_inner * d_state, 0, d_state))
        unit = self._unit(ddelta)
        in_place = division.in_place
        strides = (*states.strides, *passed.strides)
        kept_unit = min(_unit_of(states.memory, strides), _unit_of(passed.memory, strides))
        arguments = (
            tokens.u, tokens.delta, inputs.A, tokens.B, tokens.C, inputs.D, tokens.z,
            inputs.bias, tokens.dout, states.memory, passed.memory, self.du, ddelta, dz,
            _words(ddelta) if in_place else scratch["parts"],
            _words(self.du) if in_place else scratch["records"],
            scratch["counters"].view(torch.int32),
            dA, dD, dbias, dBC, batch, seqlen // unit, d_inner, ngroups, division.blocks,
            ceil_div(seqlen, self.config.chunk), division.segment_chunks, division.segments,
            division.rows,
            *(n // kept_unit for n in strides),
        )  # fmt: skip
        recording.launch(
            scan_backward_kernel,
            (division.rows * ngroups * division.blocks,),
            arguments,
            self._constants(unit, has_r=several or dlast is not None, kept_unit=kept_unit),
            num_warps=self.config.warps,
            maxnreg=self.config.registers,
            launch_cooperative_grid=True,
        )
        return self.du, ddelta, dA.view(d_inner, d_state), dBC[0], dBC[1], dD, dz, dbias

    def _unit(self, *more: Tensor) -> int:
        """Return what every row's start is a multiple of."""
        given = (t for t in (*self.tokens, self.du, *more) if t is not None)
        return row_unit(self.sizes[1], tuple(given))

    def _constants(self, unit: int, *, has_r: bool, kept_unit: int = 1) -> dict[str, int | bool]:
        inputs = self.inputs
        return specialisation(
            d_state=self.sizes[3], unit=unit, has_D=inputs.D is not None,
            has_z=inputs.z is not None, has_bias=inputs.bias is not None,
            softplus=inputs.softplus, has_r=has_r, division=self.division,
            kept_unit=kept_unit, config=self.config,
        )  # fmt: skip

    def _passed(self) -> _Strided:
        """Return where what is passed back to each part of a segment goes."""
        _, seqlen, d_inner, d_state, _ = self.sizes
        division = self.division
        if not division.in_place:
            strides = (division.segments * d_inner * d_state, d_inner * d_state, d_state)
            return _Strided(self.scratch["r"], strides)
        pitch, chunk = (
            n * self.du.element_size() // 4 for n in (seqlen, self.config.chunk)
        )  # behind the 16 states that a chunk may begin with
        strides = (d_inner * pitch, division.segment_chunks // division.parts * chunk, pitch)
        return _Strided(_words(self.du)[STATES:], strides)

    def _prepare(
        self, tensors: list[Any], dlast: Tensor | None, passed: _Strided, *, give: bool
    ) -> _Strided:
        """Make what is passed back, clear the counters, move the states; return where these are."""
        batch, seqlen, d_inner, d_state, _ = self.sizes
        kept = tensors[-1]
        states = _Strided(kept, kept.stride()[:3])
        itemsize, chunk = self.du.element_size(), self.config.chunk
        move = give and states_fit(seqlen=seqlen, chunk=chunk, d_state=d_state, itemsize=itemsize)
        if move:
            pitch = seqlen * itemsize // 4
            strides = (d_inner * pitch, chunk * itemsize // 4, pitch)
            states = _Strided(_words(self.du), strides)
        segments = self.division.segments
        if segments > 1:
            self._make_adjoints(kept, states if move else None, passed)
        elif move:
            self._move(kept, states)
        counters = self.scratch["counters"].view(torch.int32)
        size = batch * d_inner * d_state if segments > 1 else 0
        parts, block = self.division.total_parts, 256
        arguments = (
            self.inputs.A, self.scratch["total"], dlast, passed.memory, counters,
            size, parts, d_inner, *passed.strides, counters.numel(),
        )  # fmt: skip
        constants = {
            "D_STATE": d_state, "HAS_LAST": dlast is not None, "BLOCK": block,
            "AHEAD": min(16, next_power_of_2(parts)),
        }  # fmt: skip
        grid = (max(1, ceil_div(size, block)),)
        self.recording.launch(pass_back_kernel, grid, arguments, constants, num_warps=4)
        if move:
            self.recording.free(kept)
        return states

    def _move(self, kept: Tensor, states: _Strided) -> None:
        """Launch the copy of the states to where they do not keep memory from being freed."""
        _, seqlen, d_inner, d_state, _ = self.sizes
        spans = kept.shape[1]
        arguments = (kept, states.memory, None, seqlen, d_inner, spans, spans, 1)
        constants = {
            "D_STATE": d_state, "SPAN": self.config.chunk, "FIRST": 0, "BEFORE": 0, "HEADS": False,
            "WORD": self.du.element_size(), "BLOCK": MOVE,
        }  # fmt: skip
        grid = (kept.shape[0] * spans * ceil_div(d_inner * d_state, MOVE),)
        self.recording.launch(move_states_kernel, grid, arguments, constants, num_warps=4)

    def _make_adjoints(self, kept: Tensor, moved: _Strided | None, passed: _Strided) -> None:
        """Launch the kernel that makes what each segment passes back, and may move the states."""
        batch, seqlen, d_inner, _, ngroups = self.sizes
        tokens, division, config = self.tokens, self.division, self.config
        unit = self._unit()
        parts, idle = division.total_parts, division.parts  # those of the first segment
        blocks = ceil_div(d_inner // ngroups, 8 * config.channels * ADJOINT_WARPS)
        programs = batch * (parts if moved is not None else parts - idle) * ngroups * blocks
        to, strides = (None, (0, 0, 0)) if moved is None else moved
        move = 0 if to is None else _unit_of(to, strides)
        constants = adjoint_specialisation(self._constants(unit, has_r=True), move=move)
        arguments = (
            tokens.delta, self.inputs.A, tokens.C, tokens.z, self.inputs.bias, tokens.dout,
            passed.memory, self.scratch["total"], None if moved is None else kept, to,
            seqlen // unit, d_inner, ngroups, blocks, division.segment_chunks // idle, parts,
            idle, *passed.strides, ceil_div(seqlen, config.chunk),
            *(n // max(1, move) for n in strides),
        )  # fmt: skip
        options = {"num_warps": ADJOINT_WARPS}
        self.recording.launch(segment_adjoint_kernel, (programs,), arguments, constants, **options)


def _unit_of(memory: Tensor, strides: tuple[int, ...]) -> int:
    """Return 4 where every stride is of so many fp32 elements, from an aligned beginning; or 1."""
    return 1 if memory.data_ptr() % 16 or any(n % 4 for n in strides) else 4


def _words(tensor: Tensor) -> Tensor:
    """Return a tensor's memory as fp32; what is past the last whole word is left out."""
    flat = tensor.view(-1)
    words = flat.numel() * flat.element_size() // 4
    return flat[: words * 4 // flat.element_size()].view(torch.float32)


def _sizes(inputs: Inputs) -> tuple[int, int, int, int, int]:
    """Return batch, seqlen, d_inner, d_state and ngroups."""
    sizes = inputs.sizes
    names = ("batch", "seqlen", "d_inner", "d_state", "ngroups")
    batch, seqlen, d_inner, d_state, ngroups = (sizes[name] for name in names)
    return batch, seqlen, d_inner, d_state, ngroups


_calls = Calls(_run, _ready)
