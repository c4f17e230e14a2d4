"""Selective scan backward on Hopper: the launcher of its kernel, and what it supports.

Time is divided into segments, so that few channels fill the GPU too. What later segments pass back
to each is made first (which needs no states), then the segments run at once, and a third launch
adds up their partial sums in a fixed order.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambench.kernels.s6.hopper_backward_kernel import (
    scan_backward_kernel,
    segment_adjoint_kernel,
)
from mambench.kernels.s6.hopper_scan import row_unit
from mambench.kernels.s6.triton_scan import (
    _Inputs as Inputs,  # pyright: ignore[reportPrivateUsage]
)

STATES = 16  # states that a block holds at a time
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
# where there is none, the portable backward runs.
CHOSEN: dict[tuple[int, bool], BackwardConfig] = {
    (16, False): BackwardConfig(channels=2, tile=8, warps=2, chunk=64, resident=4),
    (16, True): BackwardConfig(channels=2, tile=8, warps=2, chunk=64, resident=4),
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


def divide(
    *, batch: int, seqlen: int, ngroups: int, d_inner: int, config: BackwardConfig, processors: int
) -> int:
    """Return the number of segments with which the thread blocks fill the GPU once."""
    blocks = batch * ngroups * triton.cdiv(d_inner // ngroups, config.block)
    chunks = triton.cdiv(seqlen, config.chunk)
    return min(chunks, max(1, processors * config.resident // blocks))


def specialisation(
    *, d_state: int, unit: int, has_D: bool, has_z: bool, has_bias: bool, softplus: bool,
    has_last: bool, config: BackwardConfig,
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
        "CHUNK": config.chunk,
        "UNIT": unit,
        "CHANNELS": config.channels,
        "TILE": config.tile,
        "WARPS": config.warps,
    }


def adjoint_specialisation(constants: dict[str, int | bool]) -> dict[str, int | bool]:
    """Return those of the compile-time arguments that `segment_adjoint_kernel` takes."""
    other = ("HAS_D", "HAS_LAST", "TILE")
    return {name: value for name, value in constants.items() if name not in other}


@dataclass(frozen=True, kw_only=True)
class _Buffers:
    """What the kernels write besides du, ddelta and dz: fp32 partial sums and segments' ends."""

    dA: Tensor  # (rows, D, N), rows being batch x segments; also the following
    dD: Tensor  # (rows, D)
    dbias: Tensor  # (rows, D)
    dBC: Tensor  # (blocks, B, G, blocks of states, L, 2, 16)
    end: Tensor  # (rows, D, N)
    total: Tensor  # (rows, D)
    r: Tensor  # (rows, D, N), or empty up to 16 states
    all: Tensor  # dA, dD, dbias, dBC, ... in one allocation


def _allocate(u: Tensor, *, rows: int, d_inner: int, d_state: int, partial: int) -> _Buffers:
    states, channels = rows * d_inner * d_state, rows * d_inner
    sizes = [states, channels, channels, partial, states, channels, states * (d_state > STATES)]
    whole = torch.empty(sum(sizes), dtype=torch.float32, device=u.device)
    return _Buffers(
        **dict(zip(_Buffers.__annotations__, [*whole.split(sizes), whole], strict=True))
    )


def scan_backward(
    inputs: Inputs,
    kept: Tensor,
    dout: Tensor,
    dlast: Tensor | None,
    *,
    config: BackwardConfig,
    segments: int | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of u, delta, A, B, C, D, z and delta_bias; dB and dC without atomics.

    kept (B, ceil(L / config.chunk), D, N) fp32 are the states that the forward kept; dout
    (B, D, L); dlast (B, D, N) or None. The same bits from run to run. `segments` overrides how time
    is divided.
    """
    batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
    u, delta, B, C, dout = (
        t.contiguous() for t in (inputs.u, inputs.delta, inputs.B, inputs.C, dout)
    )
    z = None if inputs.z is None else inputs.z.contiguous()
    dlast = None if dlast is None else dlast.float().contiguous()
    chunks = triton.cdiv(seqlen, config.chunk)
    if segments is None:
        segments = divide(
            batch=batch, seqlen=seqlen, ngroups=ngroups, d_inner=d_inner, config=config,
            processors=multiprocessors(u.device),
        )  # fmt: skip
    each = triton.cdiv(chunks, segments)
    count = triton.cdiv(chunks, each)
    blocks = triton.cdiv(d_inner // ngroups, config.block)
    state_blocks = triton.cdiv(d_state, STATES)
    du, ddelta = torch.empty((2, batch, d_inner, seqlen), dtype=u.dtype, device=u.device)
    dz = None if z is None else torch.empty_like(u)
    buffers = _allocate(
        u, rows=batch * count, d_inner=d_inner, d_state=d_state,
        partial=blocks * batch * ngroups * state_blocks * seqlen * 32,
    )  # fmt: skip
    unit = row_unit(seqlen, tuple(t for t in (u, delta, B, C, dout, z, du) if t is not None))
    constants = specialisation(
        d_state=d_state, unit=unit, has_D=inputs.D is not None, has_z=z is not None,
        has_bias=inputs.bias is not None, softplus=inputs.softplus, has_last=dlast is not None,
        config=config,
    )  # fmt: skip
    sizes = (seqlen // unit, d_inner, ngroups, blocks)
    programs = batch * ngroups * blocks
    with torch.cuda.device_of(u):
        if count > 1:
            segment_adjoint_kernel[(programs * (count - 1) * state_blocks,)](
                *(delta, inputs.A, C, z, inputs.bias, dout, buffers.end, buffers.total),
                *(*sizes, each, count),
                **adjoint_specialisation(constants),
                num_warps=config.warps,
            )
        scan_backward_kernel[(programs * count,)](
            *(u, delta, inputs.A, B, C, inputs.D, z, inputs.bias, dout, kept),
            *(buffers.end, buffers.total, dlast, buffers.r, du, ddelta, dz),
            *(buffers.dA, buffers.dD, buffers.dbias, buffers.dBC),
            *(batch, *sizes, chunks, each, count),
            **constants,
            num_warps=config.warps,
            maxnreg=config.registers,
        )
        dA, dD, dbias, dBC = _finish(inputs, buffers.all, rows=batch * count, blocks=blocks)
    gradients = (du, ddelta, dA, dBC[0], dBC[1], dD, dz, dbias)
    return tuple(
        None if gradient is None or tensor is None else gradient.to(tensor.dtype)
        for gradient, tensor in zip(gradients, inputs.original, strict=True)
    )


def _sizes(inputs: Inputs) -> tuple[int, int, int, int, int]:
    """Return batch, seqlen, d_inner, d_state and ngroups."""
    sizes = inputs.sizes
    names = ("batch", "seqlen", "d_inner", "d_state", "ngroups")
    batch, seqlen, d_inner, d_state, ngroups = (sizes[name] for name in names)
    return batch, seqlen, d_inner, d_state, ngroups


_SUM_STEPS, _SUM_COLUMNS, _SUM_BLOCK = 16, 8, 256


def _finish(
    inputs: Inputs, parts: Tensor, *, rows: int, blocks: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add up the partial sums; returns dA (D, N), dD (D,), dbias (D,) and dBC (2, B, G, N, L)."""
    u = inputs.u
    batch, seqlen, d_inner, d_state, ngroups = _sizes(inputs)
    sums = torch.empty(d_inner * (d_state + 2), dtype=torch.float32, device=u.device)
    dBC = torch.empty((2, batch, ngroups, d_state, seqlen), dtype=u.dtype, device=u.device)
    steps = triton.cdiv(seqlen, _SUM_STEPS)
    sum_programs = triton.cdiv(sums.numel(), _SUM_BLOCK)
    state_blocks = triton.cdiv(d_state, STATES)
    add_partial_sums[(sum_programs + batch * ngroups * state_blocks * steps,)](
        *(parts, sums, dBC, rows, d_inner * d_state, d_inner, batch * ngroups, seqlen, blocks),
        *(sum_programs, steps),
        *(d_state, state_blocks, _SUM_BLOCK, _SUM_STEPS, _SUM_COLUMNS),
        num_warps=4,
    )
    dA, dD, dbias = sums.split([d_inner * d_state, d_inner, d_inner])
    return dA.view(d_inner, d_state), dD, dbias, dBC


@triton.jit
def add_partial_sums(
    parts_ptr, sums_ptr, dBC_ptr,
    rows, matrix, d_inner, batch_groups, seqlen, columns, sum_programs, step_blocks,
    D_STATE: tl.constexpr, STATE_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add up the kernel's partial sums in a fixed order: of dA, dD and dbias, or of dB and dC.

    parts: (rows, matrix), (rows, d_inner), (rows, d_inner) and (columns, batch_groups,
    STATE_BLOCKS, seqlen, 2, 16), one after another; sums: (matrix + 2 d_inner); dBC (2,
    batch_groups, D_STATE, seqlen).
    """
    pid = tl.program_id(0)
    size = matrix + 2 * d_inner
    if pid < sum_programs:
        i = pid * BLOCK + tl.arange(0, BLOCK)
        width = tl.where(i < matrix, matrix, d_inner)
        begin = tl.where(i < matrix, 0, matrix)
        begin = tl.where(i < matrix + d_inner, begin, matrix + d_inner)
        at = parts_ptr + begin.to(tl.int64) * rows + (i - begin)
        total = tl.zeros([BLOCK], tl.float32)
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
        from_ptr = parts_ptr + tl.cast(size, tl.int64) * rows + block * seqlen * 32
        from_ptr = from_ptr + column.to(tl.int64)[:, None, None] * stride
        from_ptr = from_ptr + (t[:, None] * 32 + place[None, :])[None, :, :]
        summed = tl.zeros([STEPS, 32], tl.float32)
        for first in range(0, columns, COLUMNS):
            mask = (first + column < columns)[:, None, None] & (t < seqlen)[None, :, None]
            summed += tl.sum(tl.load(from_ptr, mask=mask, other=0.0), 0)
            from_ptr += COLUMNS * stride
        state = block % STATE_BLOCKS * 16 + place % 16
        row = (place // 16) * tl.cast(batch_groups, tl.int64) + block // STATE_BLOCKS
        out = dBC_ptr + ((row * D_STATE + state) * seqlen)[None, :] + t[:, None]
        mask = (t < seqlen)[:, None] & (state < D_STATE)[None, :]
        tl.store(out, summed.to(dBC_ptr.dtype.element_ty), mask=mask)
