"""Selective scan backward on Hopper: the launcher of its kernel, and what it supports.

Time is divided into segments, so that few channels fill the GPU too. What later segments pass back
to each is made first (which needs no states), then the segments run at once, and a third launch
adds up their partial sums in a fixed order. A long scan goes through this window by window, and the
states that the forward kept go into du's memory: `hopper_memory` says why.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambench.kernels.s6.hopper_backward_kernel import (
    scan_backward_kernel,
    segment_adjoint_kernel,
)
from mambench.kernels.s6.hopper_memory import (
    STATES,
    Division,
    Window,
    divide,
    scratch_elements,
    states_fit,
)
from mambench.kernels.s6.hopper_scan import row_unit
from mambench.kernels.s6.triton_scan import (
    _Inputs as Inputs,  # pyright: ignore[reportPrivateUsage]
)

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


# Measured configurations, by the padded number of states and whether channels alone fill the GPU;
# where there is none, the portable backward runs. Blocks of 64 channels are within 3 % of those of
# 32, and have half the partial sums.
CHOSEN: dict[tuple[int, bool], BackwardConfig] = {
    (16, False): BackwardConfig(channels=2, tile=8, warps=4, chunk=64, resident=2),
    (16, True): BackwardConfig(channels=2, tile=8, warps=4, chunk=64, resident=2),
    (128, False): BackwardConfig(channels=2, tile=8, warps=4, chunk=32, resident=2),
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
    *, batch: int, d_inner: int, d_state: int, multiprocessors: int
) -> BackwardConfig | None:
    """Return the configuration for a problem, or None where the portable backward is to run."""
    many = batch * d_inner >= 64 * multiprocessors
    return CHOSEN.get((max(16, 1 << (d_state - 1).bit_length()), many))


def configuration(u: Tensor, d_state: int) -> BackwardConfig | None:
    """Return what `choose` gives for u (B, D, L) on its device; None while nothing is chosen."""
    if not CHOSEN:
        return None
    return choose(
        batch=u.shape[0], d_inner=u.shape[1], d_state=d_state,
        multiprocessors=multiprocessors(u.device),
    )  # fmt: skip


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has; 1 for one that is no GPU."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def specialisation(
    *, d_state: int, unit: int, has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    has_last: bool, pass_on: bool, config: BackwardConfig,
) -> dict[str, int | bool]:  # fmt: skip
    """Return the kernel's compile-time arguments for a problem."""
    return {
        "D_STATE": d_state,
        "STATE_BLOCKS": triton.cdiv(d_state, STATES),
        "HAS_D": has_D,
        "HAS_Z": has_z,
        "HAS_BIAS": has_bias,
        "SOFTPLUS": softplus,
        "HAS_LAST": has_last,
        "PASS_ON": pass_on,
        "CHUNK": config.chunk,
        "UNIT": unit,
        "CHANNELS": config.channels,
        "TILE": config.tile,
        "WARPS": config.warps,
    }


def adjoint_specialisation(constants: dict[str, int | bool]) -> dict[str, int | bool]:
    """Return those of the compile-time arguments that `segment_adjoint_kernel` takes."""
    other = ("HAS_D", "HAS_LAST", "PASS_ON", "TILE")
    return {name: value for name, value in constants.items() if name not in other}


def scan_backward(
    inputs: Inputs,
    kept: Tensor | list[Tensor],
    dout: Tensor,
    dlast: Tensor | None,
    *,
    config: BackwardConfig,
    segments: int | None = None,
    windows: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; dB and dC without atomics.

    kept (B, ceil(L / config.chunk), D, N) fp32 are the states that the forward kept: in a list,
    which is emptied, if they are to be freed once they are in du's memory. dout (B, D, L); dlast
    (B, D, N) or None. The same bits from run to run. `segments` and `windows` override how time is
    divided.
    """
    batch, seqlen, d_inner, _, ngroups = _sizes(inputs)
    u, delta, B, C, dout = (
        t.contiguous() for t in (inputs.u, inputs.delta, inputs.B, inputs.C, dout)
    )
    z = None if inputs.z is None else inputs.z.contiguous()
    dlast = None if dlast is None else dlast.float().contiguous()
    division = divide(
        batch=batch, seqlen=seqlen, d_inner=d_inner, ngroups=ngroups, chunk=config.chunk,
        block=config.block, slots=multiprocessors(u.device) * config.resident,
        segments=segments, windows=windows,
    )  # fmt: skip
    with torch.cuda.device_of(u):
        du = torch.empty_like(u)
        states = _States.of(kept, du, config.chunk)
        del kept
        tokens = _Tokens(u, delta, B, C, z, dout, du, torch.empty_like(u), None)
        if z is not None:
            tokens = tokens._replace(dz=torch.empty_like(u))
        dA, dD, dbias, dBC = _run(inputs, tokens, states, dlast, division, config)
    gradients = (du, tokens.ddelta, dA, dBC[0], dBC[1], dD, tokens.dz, dbias)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs.original, strict=True)
    )


class _States(NamedTuple):
    """The kept states in memory: where they begin, and strides of batch, chunk and channel."""

    memory: Tensor
    strides: tuple[int, int, int]

    @classmethod
    def of(cls, kept: Tensor | list[Tensor], du: Tensor, chunk: int) -> "_States":
        """Take them as they are, or move them into du's memory if they may be freed and fit."""
        found = kept if isinstance(kept, Tensor) else kept.pop()
        states = cls(found.view(-1), found.stride()[:3])
        d_inner, d_state = found.shape[2:]
        seqlen, itemsize = du.shape[2], du.element_size()
        fit = states_fit(seqlen=seqlen, chunk=chunk, d_state=d_state, itemsize=itemsize)
        if isinstance(kept, Tensor) or not fit:
            return states
        pitch = seqlen * itemsize // 4
        words = du.view(torch.float32).view(-1)
        strides = (d_inner * pitch, chunk * itemsize // 4, pitch)
        words.as_strided(found.shape, (*strides, 1)).copy_(found)
        return cls(words, strides)

    def since(self, chunk: int) -> Tensor:
        """Return the memory from a chunk of the first channel on."""
        return self.memory[chunk * self.strides[1] :]


class _Tokens(NamedTuple):
    """The tensors over time; of a window, where a window's are meant."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    dout: Tensor
    du: Tensor
    ddelta: Tensor
    dz: Tensor | None

    def given(self) -> tuple[Tensor, ...]:
        """Return those that are there."""
        return tuple(t for t in self if t is not None)

    def window(self, window: Window) -> "_Tokens":
        """Return their memory from the window's first step of the first row on."""
        return _Tokens(*(None if t is None else t.view(-1)[window.first :] for t in self))


def _run(
    inputs: Inputs,
    tokens: _Tokens,
    states: _States,
    dlast: Tensor | None,
    division: Division,
    config: BackwardConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Go through the windows; returns dA (D, N), dD (D,), dbias (D,) and dBC (2, B, G, N, L)."""
    u = tokens.u
    batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
    sums = torch.empty(d_inner * (d_state + 2), dtype=torch.float32, device=u.device)
    dBC = torch.empty((2, batch, ngroups, d_state, seqlen), dtype=u.dtype, device=u.device)
    sizes = scratch_elements(
        division, batch=batch, d_inner=d_inner, d_state=d_state, ngroups=ngroups
    )
    whole = torch.empty(sum(sizes.values()), dtype=torch.float32, device=u.device)
    scratch = dict(zip(sizes, whole.split(list(sizes.values())), strict=True), whole=whole)
    coming, going = scratch["first"].chunk(2) if sizes["first"] else (None, None)
    passed = dlast
    unit = row_unit(seqlen, tokens.given())
    for number, window in enumerate(division.windows):
        part = tokens.window(window)
        first = window.first == 0
        _launch(
            inputs, part, states, passed,
            None if first else going, scratch, division, window, config, unit,
        )  # fmt: skip
        _add_up(inputs, scratch, sums, dBC, division, window, again=number > 0)
        passed, coming, going = going, going, coming
    dA, dD, dbias = sums.split([d_inner * d_state, d_inner, d_inner])
    return dA.view(d_inner, d_state), dD, dbias, dBC


def _launch(
    inputs: Inputs,
    tokens: _Tokens,
    states: _States,
    passed: Tensor | None,
    first: Tensor | None,
    scratch: dict[str, Tensor],
    division: Division,
    window: Window,
    config: BackwardConfig,
    unit: int,
) -> None:
    """Launch the two kernels that go through a window; `first` gets what it passes back."""
    batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
    u, delta, B, C, z, dout, du, ddelta, dz = tokens
    constants = specialisation(
        d_state=d_state, unit=unit, has_D=inputs.D is not None, has_z=z is not None,
        has_bias=inputs.bias is not None, softplus=inputs.softplus, has_last=passed is not None,
        pass_on=first is not None, config=config,
    )  # fmt: skip
    sizes = (window.steps // unit, seqlen // unit, d_inner, ngroups, division.blocks)
    each, count = window.segment_chunks, window.segments
    chunks = triton.cdiv(window.steps, config.chunk)
    programs = batch * ngroups * division.blocks
    end, total = scratch["end"], scratch["total"]
    if count > 1:
        segment_adjoint_kernel[(programs * (count - 1) * triton.cdiv(d_state, STATES),)](
            *(delta, inputs.A, C, z, inputs.bias, dout, end, total),
            *(*sizes, each, count),
            **adjoint_specialisation(constants),
            num_warps=config.warps,
        )
    scan_backward_kernel[(programs * count,)](
        *(u, delta, inputs.A, B, C, inputs.D, z, inputs.bias, dout),
        states.since(window.first // config.chunk),
        *(end, total, passed, scratch["r"], first, du, ddelta, dz),
        *(scratch["dA"], scratch["dD"], scratch["dbias"], scratch["dBC"]),
        *(batch, *sizes, chunks, each, count, *states.strides),
        **constants,
        num_warps=config.warps,
        maxnreg=config.registers,
    )


def _sizes(inputs: Inputs) -> tuple[int, int, int, int, int]:
    """Return batch, seqlen, d_inner, d_state and ngroups."""
    sizes = inputs.sizes
    names = ("batch", "seqlen", "d_inner", "d_state", "ngroups")
    batch, seqlen, d_inner, d_state, ngroups = (sizes[name] for name in names)
    return batch, seqlen, d_inner, d_state, ngroups


_SUM_STEPS, _SUM_COLUMNS, _SUM_BLOCK = 16, 8, 256


def _add_up(
    inputs: Inputs,
    scratch: dict[str, Tensor],
    sums: Tensor,
    dBC: Tensor,
    division: Division,
    window: Window,
    *,
    again: bool,
) -> None:
    """Add up a window's partial sums; `again`: those of dA, dD and dbias to what is there."""
    batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
    steps = triton.cdiv(window.steps, _SUM_STEPS)
    sum_programs = triton.cdiv(sums.numel(), _SUM_BLOCK)
    state_blocks = triton.cdiv(d_state, STATES)
    add_partial_sums[(sum_programs + batch * ngroups * state_blocks * steps,)](
        *(scratch["whole"], sums, dBC.view(-1)[window.first :]),
        *(scratch[name].storage_offset() for name in ("dD", "dbias", "dBC")),
        *(batch * window.segments, d_inner * d_state, d_inner),
        *(batch * ngroups, window.steps, seqlen, division.blocks, sum_programs, steps),
        *(d_state, state_blocks, again, _SUM_BLOCK, _SUM_STEPS, _SUM_COLUMNS),
        num_warps=4,
    )


@triton.jit
def add_partial_sums(
    scratch_ptr, sums_ptr, dBC_ptr, dD_at, dbias_at, dBC_at,
    rows, matrix, d_inner, batch_groups, seqlen, pitch, columns, sum_programs, step_blocks,
    D_STATE: tl.constexpr, STATE_BLOCKS: tl.constexpr, AGAIN: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the kernel's partial sums in a fixed order: of dA, dD and dbias, or of dB and dC.

    scratch: (rows, matrix) of dA; (rows, d_inner) of dD and dbias and (columns, batch_groups,
    STATE_BLOCKS, seqlen, 2, 16) of dB and dC at the offsets given. sums: (matrix + 2 d_inner), of
    which AGAIN says that they have begun; dBC (2, batch_groups, D_STATE, pitch), from the window's
    first step on.
    """
    pid = tl.program_id(0)
    size = matrix + 2 * d_inner
    if pid < sum_programs:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        width = tl.where(i < matrix, matrix, d_inner)
        begin = tl.where(i < matrix + d_inner, dD_at - matrix, dbias_at - matrix - d_inner)
        at = scratch_ptr + tl.where(i < matrix, 0, begin) + i
        total = tl.zeros([BLOCK], tl.float32)
        if AGAIN:
            total = tl.load(sums_ptr + i, mask=i < size, other=0.0)
        for _ in range(0, rows):
            total += tl.load(at, mask=i < size, other=0.0)
            at += width
        tl.store(sums_ptr + i, total, mask=i < size)
    else:
        index = pid - sum_programs
        t = index % step_blocks * STEPS + tl.arange(0, STEPS)
        block = (index // step_blocks).to(tl.int64)  # (batch, group, block of states)
        place = tl.arange(0, 32)
        column = tl.arange(0, COLUMNS)
        stride = tl.cast(batch_groups, tl.int64) * STATE_BLOCKS * seqlen * 32
        from_ptr = scratch_ptr + dBC_at + block * seqlen * 32
        from_ptr = from_ptr + column.to(tl.int64)[:, None, None] * stride
        from_ptr = from_ptr + (t[:, None] * 32 + place[None, :])[None, :, :]
        summed = tl.zeros([STEPS, 32], tl.float32)
        for first in range(0, columns, COLUMNS):
            mask = (first + column < columns)[:, None, None] & (t < seqlen)[None, :, None]
            summed += tl.sum(tl.load(from_ptr, mask=mask, other=0.0), 0)
            from_ptr += COLUMNS * stride
        state = block % STATE_BLOCKS * 16 + place % 16
        row = (place // 16) * tl.cast(batch_groups, tl.int64) + block // STATE_BLOCKS
        out = dBC_ptr + ((row * D_STATE + state) * pitch)[None, :] + t[:, None]
        mask = (t < seqlen)[:, None] & (state < D_STATE)[None, :]
        tl.store(out, summed.to(dBC_ptr.dtype.element_ty), mask=mask)
