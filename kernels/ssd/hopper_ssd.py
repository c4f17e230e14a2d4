"""SSD forward on Hopper: what it supports, how it is divided, and its launches.

    prepare_kernel  cum, cumj, and B C^T once per group (scores)
    state_kernel    each segment's own contribution to the state    (more than one segment only)
    prefix_kernel   what enters each segment                        (more than one segment only)
    scan_kernel     the outputs

It leaves what the portable forward leaves (`triton_ssd.run_forward`): the output, the final states
and the fp32 states that enter the segments, so that the portable backward continues from it.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.ssd.hopper_config import (
    CHANNELS,
    CHUNK,
    chunks_per_segment,
    pairs,
    refusal,
)
from mambench.kernels.ssd.hopper_kernel import scan_kernel, state_kernel
from mambench.kernels.ssd.hopper_launch import fetchable, launch, rows_of, tiles_of
from mambench.kernels.ssd.hopper_parts import prefix_kernel, prepare_kernel
from mambench.kernels.ssd.triton_launch import (
    Launch,
    Operands,
    multiprocessors,
    on_device,
    plan_launch,
    strides3,
)

_SHARED_BYTES = 232448  # that one block may have on compute capability 9.0
_BLOCK_H = 8
_PREFIX_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class Config:
    """How the launches are made.

    scores: whether B C^T is made once per group in the first launch, or by each consumer.
    scores_fp32: keep the scores in fp32 (always for fp16 inputs, whose range they may exceed).
    pdl: programmatic dependent launch.
    segments: into how many segments time is divided; None: as fills the device in one wave.
    stages: most stages of the scan's ring; fewer where shared memory is short.
    registers: per thread of a consumer of the scan.
    """

    scores: bool = True
    scores_fp32: bool = False
    pdl: bool = True
    segments: int | None = None
    stages: int = 4
    state_stages: int = 5
    registers: int = 232
    state_registers: int = 200


DEFAULT = Config()
_WITHOUT_PDL = Config(pdl=False)
_PDL_TOKEN_HEADS = 1 << 17


def choose(plan: Launch) -> Config:
    """Return the configuration for a problem: PDL where the launches are long.

    On an H100 it costs 5 to 10 % up to 2048 tokens of 32 heads, where launches wait for each other
    longer than they run, and gains up to 5 % from 8192 on.
    """
    token_heads = plan.batch * plan.seqlen * plan.nheads
    return DEFAULT if token_heads >= _PDL_TOKEN_HEADS else _WITHOUT_PDL


def supported(*, headdim: int, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot serve a problem, or None; lengths, heads and groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}: the Hopper SSD takes bfloat16 and float16"
    return refusal(headdim=headdim, d_state=d_state)


def plan_hopper(
    x: Tensor, B: Tensor, *, dt_softplus: bool, dt_limit: tuple[float, float],
    config: Config = DEFAULT,
) -> Launch:  # fmt: skip
    """Choose the division of time; the rest is the portable launch's, for its backward.

    Raises:
        ValueError: what `supported` refuses.
    """
    limit = (float(dt_limit[0]), float(dt_limit[1]))
    return _planned(x.shape, B.shape[2], B.shape[3], x.dtype, x.device, dt_softplus, limit, config)


@lru_cache(maxsize=256)
def _planned(
    shape: torch.Size, ngroups: int, d_state: int, dtype: torch.dtype, device: torch.device,
    dt_softplus: bool, dt_limit: tuple[float, float], config: Config,
) -> Launch:  # fmt: skip
    """Plan from sizes alone; the tensors made here take no memory to speak of."""
    batch, seqlen, nheads, headdim = shape
    reason = supported(headdim=headdim, d_state=d_state, dtype=dtype)
    if reason is not None:
        raise ValueError(reason)
    nchunks = -(-seqlen // CHUNK)
    if config.segments is None:
        per_segment = chunks_per_segment(
            batch=batch, seqlen=seqlen, nheads=nheads, headdim=headdim, ngroups=ngroups,
            multiprocessors=multiprocessors(device),
        )  # fmt: skip
    else:
        per_segment = -(-nchunks // max(1, min(config.segments, nchunks)))
    one = torch.empty((), dtype=dtype, device=device)
    x, B = one.expand(shape), one.expand(batch, seqlen, ngroups, d_state)
    portable = plan_launch(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, segments=1)
    return replace(
        portable,
        chunk=CHUNK,
        nchunks=nchunks,
        segment_chunks=per_segment,
        nsegments=-(-nchunks // per_segment),
    )


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Compile-time sizes of the two walks."""

    block_n: int
    stages: int
    state_stages: int
    scores_dtype: torch.dtype | None


@lru_cache(maxsize=64)
def ring(d_state: int, dtype: torch.dtype, gated: bool, config: Config) -> Ring:
    """Return as many stages as shared memory holds, at most the config's."""
    block_n = max(16, 1 << (d_state - 1).bit_length())
    itemsize = dtype.itemsize
    scores_dtype = None
    if config.scores:
        wide = config.scores_fp32 or dtype == torch.float16
        scores_dtype = torch.float32 if wide else dtype
    rows = 4 * CHUNK * 4
    x_tiles = 2 * CHUNK * CHANNELS * itemsize
    n_tile = CHUNK * block_n * itemsize
    scores = CHUNK * CHUNK * scores_dtype.itemsize if scores_dtype else 0
    stage = x_tiles * (2 if gated else 1) + 2 * n_tile + rows + scores
    fixed = 2 * x_tiles + 256  # weights, outputs; barriers
    return Ring(
        block_n=block_n,
        stages=min(config.stages, (_SHARED_BYTES - fixed) // (stage + 16)),
        state_stages=min(config.state_stages, _SHARED_BYTES // (x_tiles + n_tile + rows + 16)),
        scores_dtype=scores_dtype,
    )


def run_prepare(
    plan: Launch, tensors: Operands, shape: Ring, config: Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return cum and cumj (B, H, chunks * Q) fp32, and scores (B, G, chunks, Q, Q) if wanted."""
    x, dt, A, bias = tensors.x, tensors.dt, tensors.A, tensors.dt_bias
    cum, cumj = torch.empty(
        (2, plan.batch, plan.nheads, plan.nchunks * CHUNK), dtype=torch.float32, device=x.device
    ).unbind()
    scores = None
    if shape.scores_dtype is not None:
        size = (plan.batch, plan.ngroups, plan.nchunks, CHUNK, CHUNK)
        scores = torch.empty(size, dtype=shape.scores_dtype, device=x.device)
    parts = -(-plan.nheads // _BLOCK_H) + (plan.ngroups if scores is not None else 0)
    constants = {
        "Q": CHUNK, "BLOCK_H": _BLOCK_H, "N": plan.d_state, "BLOCK_N": shape.block_n,
        "HAS_BIAS": bias is not None, "SOFTPLUS": plan.dt_softplus,
        "SCORES": scores is not None, "PDL": config.pdl,
    }  # fmt: skip
    arguments = (
        dt, A, bias, cum, cumj, tensors.B, tensors.C, scores,
        plan.seqlen, plan.nchunks, plan.nheads, *plan.dt_limit, plan.ngroups,
        *dt.stride(), *strides3(tensors.B), *strides3(tensors.C),
    )  # fmt: skip
    grid = (plan.nchunks, parts, plan.batch)
    # What came before on the stream may still use the memory: this launch waits for all of it.
    given = (dt, A, bias, tensors.B)
    launch(
        prepare_kernel,
        grid,
        arguments,
        constants,
        given,
        device=x.device.index,
        num_warps=4,
        pdl=False,
    )
    return cum, cumj, scores


@dataclass(frozen=True, kw_only=True)
class Tiles:
    """What both walks read, as TMA sees it, and their common arguments."""

    x: Any
    B: Any
    cum: Any
    cumj: Any
    npairs: int
    sizes: tuple[int, ...]
    constants: dict[str, Any]


def segment_entries(
    plan: Launch,
    tiles: Tiles,
    start: Tensor | None,
    shape: Ring,
    config: Config,
    device: torch.device,
) -> Tensor | None:
    """Return what enters each segment, (B, H, segments, P, N) fp32; `start` if there is but one."""
    if plan.nsegments == 1:
        return start
    slots = (plan.batch, plan.nheads, plan.nsegments)
    size = plan.headdim * plan.d_state
    states = (*slots, plan.headdim, plan.d_state)
    entries = torch.empty(states, dtype=torch.float32, device=device)
    decay = torch.empty(slots, dtype=torch.float32, device=device)
    constants = tiles.constants | {
        "STAGES": shape.state_stages, "REGISTERS": config.state_registers,
    }  # fmt: skip
    grid = (plan.nsegments - 1, tiles.npairs, plan.batch)
    arguments = (tiles.x, tiles.B, tiles.cum, tiles.cumj, entries, decay, *tiles.sizes)
    given = (tiles.x.base,)
    on = {"device": device.index, "pdl": config.pdl}
    launch(state_kernel, grid, arguments, constants, given, num_warps=4, **on)
    constants = {
        "SIZE": size, "BLOCK": _PREFIX_BLOCK, "HAS_START": start is not None, "PDL": config.pdl,
    }  # fmt: skip
    grid = (-(-size // _PREFIX_BLOCK), plan.batch * plan.nheads, 1)
    arguments = (entries, decay, start, plan.nsegments)
    launch(prefix_kernel, grid, arguments, constants, (start,), num_warps=2, **on)
    return entries


def run_forward(
    plan: Launch,
    tensors: Operands,
    *,
    return_final_states: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return out, the final states if wanted, and what enters each segment.

    The same as the portable `triton_ssd.run_forward`; `plan` comes from `plan_hopper`. Without a
    config `choose` takes one.
    """
    config = config or choose(plan)
    x, z, D = fetchable(tensors.x), tensors.z, tensors.D
    z = None if z is None else fetchable(z)
    B, C = fetchable(tensors.B), fetchable(tensors.C)
    if B is not tensors.B or C is not tensors.C:
        tensors = replace(tensors, B=B, C=C)
    shape = ring(plan.d_state, x.dtype, z is not None, config)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    final = None
    if return_final_states:
        states = (plan.batch, plan.nheads, plan.headdim, plan.d_state)
        final = torch.empty(states, dtype=torch.float32, device=x.device)
    per_group = pairs(plan.heads_per_group, plan.headdim)
    with on_device(x):
        cum, cumj, scores = run_prepare(plan, tensors, shape, config)
        tiles = Tiles(
            x=tiles_of(x, CHANNELS), B=tiles_of(B, shape.block_n),
            cum=rows_of(cum, CHUNK, 1), cumj=rows_of(cumj, CHUNK, 1),
            npairs=per_group * plan.ngroups,
            sizes=(
                plan.nchunks, plan.segment_chunks, plan.nsegments, plan.nheads, per_group,
                plan.heads_per_group,
            ),
            constants={
                "PDL": config.pdl, "P": plan.headdim, "N": plan.d_state, "BLOCK_N": shape.block_n,
            },
        )  # fmt: skip
        start = tensors.initial_states
        entries = segment_entries(plan, tiles, start, shape, config, x.device)
        constants = tiles.constants | {
            "STAGES": shape.stages, "REGISTERS": config.registers,
            "D_DIMS": 0 if D is None else D.dim(), "HAS_Z": z is not None,
            "HAS_ENTRY": entries is not None, "STORE_FINAL": final is not None,
            "SCORES": scores is not None,
        }  # fmt: skip
        arguments = (
            tiles_of(out, CHANNELS), tiles.x, None if z is None else tiles_of(z, CHANNELS),
            tiles.B, tiles_of(C, shape.block_n),
            None if scores is None else rows_of(scores, CHUNK, CHUNK),
            tiles.cum, tiles.cumj, D, entries, final, *tiles.sizes,
        )  # fmt: skip
        grid = (plan.nsegments, tiles.npairs, plan.batch)
        given = (x, D, entries, scores)
        on = {"device": x.device.index, "pdl": config.pdl}
        launch(scan_kernel, grid, arguments, constants, given, num_warps=4, **on)
    return out, final, entries


def ssd_forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Run the SSD forward on a Hopper GPU.

    Args:
        x: (B, L, H, P), bf16 or fp16; P a multiple of 8 up to 128.
        dt: (B, L, H), any floating dtype.
        A: (H,), not positive.
        B: (B, L, G, N), dtype of x; N a multiple of 8 up to 128, G divides H.
        C: (B, L, G, N), dtype of x.
        D: (H,) or (H, P).
        z: (B, L, H, P), dtype of x.
        dt_bias: (H,).
        initial_states: (B, H, P, N).
        dt_softplus: whether dt goes through softplus, after the bias.
        dt_limit: range that dt is clamped to, last.
        return_final_states: whether to return the final states too.
        config: how the launches are made; None: as `choose` says.

    Returns:
        out (B, L, H, P) in x's dtype; final states (B, H, P, N) fp32 or None; what enters the
        segments, (B, H, segments, P, N) fp32, or the initial states where there is one segment.

    Raises:
        ValueError: what `supported` refuses.
    """
    plan = plan_hopper(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, config=config or DEFAULT)
    operands = Operands.laid_out(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return run_forward(plan, operands, return_final_states=return_final_states, config=config)
