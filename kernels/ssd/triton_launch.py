"""Sizes, layouts and the launches that the forward and the backward pass of Triton SSD share."""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.prepared import Recording
from mambench.kernels.ssd import triton_parts as parts
from mambench.kernels.ssd.triton_config import Tiling, segment_chunks, tiling

_PREFIX_BLOCK = 256
_DT_BLOCK_H = 8


@dataclass(frozen=True, kw_only=True)
class Operands:
    """The operation's tensors, in layouts that the kernels read."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_states: Tensor | None

    @classmethod
    def laid_out(cls, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *rest: Any) -> Any:
        """Copy only what is not laid out as the kernels read it."""
        D, z, dt_bias, initial_states = rest
        return cls(
            x=unit_last(x),
            dt=dt,
            A=A.contiguous(),
            B=unit_last(B),
            C=unit_last(C),
            D=None if D is None else D.contiguous(),
            z=unit_last(z),
            dt_bias=None if dt_bias is None else dt_bias.contiguous(),
            initial_states=None if initial_states is None else initial_states.contiguous(),
        )

    @classmethod
    def of(cls, tensors: Any) -> "Operands":
        """Take tensors that are laid out, in the order of the fields."""
        return cls(**dict(zip(cls.__dataclass_fields__, tensors, strict=True)))

    def all(self) -> tuple[Tensor | None, ...]:
        """Return them in the order of the fields."""
        return (
            self.x, self.dt, self.A, self.B, self.C,
            self.D, self.z, self.dt_bias, self.initial_states,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Launch:
    """Sizes, strides and tiling of one call, as the launches need them."""

    batch: int
    seqlen: int
    nheads: int
    ngroups: int
    headdim: int
    d_state: int
    tiling: Tiling
    chunk: int
    nchunks: int
    segment_chunks: int
    nsegments: int
    dt_softplus: bool
    dt_limit: tuple[float, float]

    @property
    def heads_per_group(self) -> int:
        """H / G."""
        return self.nheads // self.ngroups

    def with_chunk(self, chunk: int) -> "Launch":
        """Divide the same segments into smaller chunks."""
        return replace(
            self,
            chunk=chunk,
            nchunks=-(-self.seqlen // chunk),
            segment_chunks=self.segment_chunks * self.chunk // chunk,
        )

    @property
    def blocks_p(self) -> int:
        """Programs that share one head in the scan and state kernels."""
        return -(-self.headdim // self.tiling.block_p)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The run-time sizes that every walk over segments takes."""
        return (
            self.seqlen,
            self.nchunks,
            self.nsegments,
            self.segment_chunks,
            self.nheads,
            self.heads_per_group,
        )


def plan_launch(
    x: Tensor,
    B: Tensor,
    *,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    segments: int | None,
) -> Launch:
    """Choose the tiling and the division of time; `segments` overrides how many there should be."""
    # A compiler may not know the sizes yet: the division of time is made for these alone.
    batch, seqlen, nheads, headdim = map(int, x.shape)
    ngroups, d_state = map(int, B.shape[2:])
    tiles = tiling(x.element_size(), headdim, d_state, wgmma=has_wgmma(x.device))
    nchunks = -(-seqlen // tiles.chunk)
    if segments is None:
        programs = batch * nheads * -(-headdim // tiles.block_p)
        slots = multiprocessors(x.device) * tiles.scan_programs_per_sm
        per_segment = segment_chunks(nchunks, programs, slots)
    else:
        per_segment = -(-nchunks // max(1, min(segments, nchunks)))
    return Launch(
        batch=batch,
        seqlen=seqlen,
        nheads=nheads,
        ngroups=ngroups,
        headdim=headdim,
        d_state=d_state,
        tiling=tiles,
        chunk=tiles.chunk,
        nchunks=nchunks,
        segment_chunks=per_segment,
        nsegments=-(-nchunks // per_segment),
        dt_softplus=dt_softplus,
        dt_limit=dt_limit,
    )


@lru_cache(maxsize=32)
def multiprocessors(device: torch.device) -> int:
    """Return the device's number of multiprocessors; 1 for the CPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=32)
def has_wgmma(device: torch.device) -> bool:
    """Whether the device has Hopper's tensor cores; False for the CPU (Triton's interpreter)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def strides3(tensor: Tensor | None) -> tuple[int, int, int]:
    """Return the strides of the first three dimensions; zeros for None."""
    return (0, 0, 0) if tensor is None else tensor.stride()[:3]  # type: ignore[return-value]


def unit_last(tensor: Tensor | None) -> Tensor | None:
    """Return the tensor with its last dimension contiguous; copies only where it is not."""
    if tensor is None or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()


def run_dt(
    recording: Recording,
    launch: Launch,
    dt: Tensor,
    A: Tensor,
    dt_bias: Tensor | None,
    *,
    store_dt: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return cum, cumj and, if wanted, dt, all (B, H, chunks * Q) fp32."""
    shape = (launch.batch, launch.nheads, launch.nchunks * launch.chunk)
    cum, cumj, dt_out = (
        recording.scratch(shape, torch.float32, dt.device) if wanted else None
        for wanted in (True, True, store_dt)
    )
    assert cum is not None
    assert cumj is not None
    grid = (launch.nchunks, -(-launch.nheads // _DT_BLOCK_H), launch.batch)
    arguments = (
        dt, A, dt_bias, cum, cumj, dt_out,
        launch.seqlen, launch.nchunks, launch.nheads, *launch.dt_limit, *dt.stride(),
    )  # fmt: skip
    constants = {
        "Q": launch.chunk, "BLOCK_H": _DT_BLOCK_H, "HAS_BIAS": dt_bias is not None,
        "SOFTPLUS": launch.dt_softplus, "STORE_DT": store_dt,
    }  # fmt: skip
    recording.launch(parts.dt_kernel, grid, arguments, constants, num_warps=4)
    return cum, cumj, dt_out


def run_prefix(
    recording: Recording,
    launch: Launch,
    slots: Tensor,
    decay: Tensor,
    start: Tensor | None,
    *,
    reverse: bool,
) -> None:
    """Turn segments' own contributions into what enters them, in place."""
    size = launch.headdim * launch.d_state
    grid = (-(-size // _PREFIX_BLOCK), launch.batch * launch.nheads)
    constants = {
        "SIZE": size, "BLOCK": _PREFIX_BLOCK, "STAGES": 4, "REVERSE": reverse,
        "HAS_START": start is not None,
    }  # fmt: skip
    arguments = (slots, decay, start, launch.nsegments)
    recording.launch(parts.prefix_kernel, grid, arguments, constants, num_warps=4)


def segment_entries(
    recording: Recording,
    launch: Launch,
    v: Tensor,
    z: Tensor | None,
    m: Tensor,
    cum: Tensor,
    cumj: Tensor,
    start: Tensor | None,
    *,
    seq: Tensor | None,
    reverse: bool,
    keep: bool = False,
) -> Tensor | None:
    """Return what enters each segment, (B, H, segments, P, N) fp32; `start` if there is but one.

    Forward in time: v = x, m = B, start = initial states. In reverse: v = dout, m = C, start =
    gradient of the final states. None stands for zeros. With `keep` it is a result of the call.
    """
    if launch.nsegments == 1:
        return start
    tiles = launch.tiling
    outer = (launch.batch, launch.nheads, launch.nsegments)
    allocate = recording.output if keep else recording.scratch
    slots = allocate((*outer, launch.headdim, launch.d_state), torch.float32, v.device)
    decay = recording.scratch(outer, torch.float32, v.device)
    grid = ((launch.nsegments - 1) * launch.blocks_p, launch.nheads, launch.batch)
    arguments = (
        v, z, m, cum, cumj, seq, None, None, slots, decay, None, *launch.sizes,
        *strides3(v), *strides3(z), *strides3(m),
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "Q": launch.chunk,
        "BLOCK_P": tiles.block_p, "BLOCK_N": tiles.block_n, "STAGES": tiles.state_stages,
        "REVERSE": reverse, "CHUNK_STATES": False, "HAS_ENTRY": False, "STORE_END": True,
        "HAS_Z": z is not None, "HAS_SEQ": seq is not None, "PRECISION": tiles.precision,
    }  # fmt: skip
    warps = tiles.state_warps
    recording.launch(parts.state_kernel, grid, arguments, constants, num_warps=warps)
    run_prefix(recording, launch, slots, decay, start, reverse=reverse)
    return slots
