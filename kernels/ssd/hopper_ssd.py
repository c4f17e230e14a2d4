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
from mambench.kernels.ssd.hopper_kernel import CHANNELS, CHUNK, scan_kernel, state_kernel
from mambench.kernels.ssd.hopper_parts import prefix_kernel, prepare_kernel
from mambench.kernels.ssd.triton_config import segment_chunks
from mambench.kernels.ssd.triton_launch import (
    Launch,
    Operands,
    multiprocessors,
    on_device,
    plan_launch,
    strides3,
)
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}
_SHARED_BYTES = 232448  # that one block may have on compute capability 9.0
_BLOCK_H = 8
MAX_D_STATE = 128  # at 256 the scan spills registers
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


def supported(*, headdim: int, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot serve a problem, or None; lengths, heads and groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}: the Hopper SSD takes bfloat16 and float16"
    if headdim % 8 or not 8 <= headdim <= 128:
        return f"headdim {headdim}: the Hopper SSD takes multiples of 8 up to 128"
    if d_state % 8 or not 8 <= d_state <= MAX_D_STATE:
        return f"d_state {d_state}: the Hopper SSD takes multiples of 8 up to {MAX_D_STATE}"
    return None


def plan_hopper(
    x: Tensor, B: Tensor, *, dt_softplus: bool, dt_limit: tuple[float, float],
    config: Config = DEFAULT,
) -> Launch:  # fmt: skip
    """Choose the division of time; the rest is the portable launch's, for its backward.

    Raises:
        ValueError: what `supported` refuses.
    """
    headdim, d_state = x.shape[3], B.shape[3]
    reason = supported(headdim=headdim, d_state=d_state, dtype=x.dtype)
    if reason is not None:
        raise ValueError(reason)
    nchunks = -(-x.shape[1] // CHUNK)
    if config.segments is None:
        blocks = x.shape[0] * B.shape[2] * pairs(x.shape[2] // B.shape[2], headdim)
        per_segment = segment_chunks(nchunks, blocks, multiprocessors(x.device))
    else:
        per_segment = -(-nchunks // max(1, min(config.segments, nchunks)))
    launch = plan_launch(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, segments=1)
    return replace(
        launch,
        chunk=CHUNK,
        nchunks=nchunks,
        segment_chunks=per_segment,
        nsegments=-(-nchunks // per_segment),
    )


def pairs(heads_per_group: int, headdim: int) -> int:
    """Return how many blocks of two consumers serve the heads of one group."""
    return -(-heads_per_group * -(-headdim // CHANNELS) // 2)


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


@lru_cache(maxsize=64)
def tile_layout(rows: int, columns: int, dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """Return the shared-memory layout of a tile that TMA delivers."""
    return gl.NVMMASharedLayout.get_default_for([rows, columns], _DTYPES[dtype])


def tiles_of(tensor: Tensor, columns: int) -> TensorDescriptor:
    """Describe a (B, L, H, P) tensor to TMA as (B, H, L, P), in tiles of Q tokens of one head."""
    batch, seqlen, heads, size = tensor.shape
    stride_batch, stride_token, stride_head, _ = tensor.stride()
    # The stride of a dimension of size 1 is never used and may be anything; TMA wants multiples.
    strides = [
        stride_batch if batch > 1 else 64,
        stride_head if heads > 1 else 64,
        stride_token if seqlen > 1 else 64,
        1,
    ]
    layout = tile_layout(CHUNK, columns, tensor.dtype)
    shape = [batch, heads, seqlen, size]
    return TensorDescriptor(tensor, shape, strides, [1, 1, CHUNK, columns], layout)


def rows_of(tensor: Tensor, columns: int, rows: int) -> TensorDescriptor:
    """Describe a contiguous tensor to TMA as a matrix with its last dimension as columns."""
    width = tensor.shape[-1]
    layout = tile_layout(rows, columns, tensor.dtype)
    shape = [tensor.numel() // width, width]
    return TensorDescriptor(tensor, shape, [width, 1], [rows, columns], layout)


def fetchable(tensor: Tensor) -> Tensor:
    """Return the tensor as TMA can read it: copied where its address or strides are not right."""
    per_16_bytes = 16 // tensor.element_size()
    *outer, last = tensor.stride()
    right = last == 1 and tensor.data_ptr() % 16 == 0
    for size, stride in zip(tensor.shape, outer, strict=False):
        right = right and (size == 1 or (stride > 0 and stride % per_16_bytes == 0))
    return tensor if right else tensor.clone(memory_format=torch.contiguous_format)


def run_prepare(
    launch: Launch, tensors: Operands, shape: Ring, config: Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return cum and cumj (B, H, chunks * Q) fp32, and scores (B, G, chunks, Q, Q) if wanted."""
    x, dt, B = tensors.x, tensors.dt, tensors.B
    cum, cumj = torch.empty(
        (2, launch.batch, launch.nheads, launch.nchunks * CHUNK),
        dtype=torch.float32, device=x.device,
    )  # fmt: skip
    scores = None
    if shape.scores_dtype is not None:
        size = (launch.batch, launch.ngroups, launch.nchunks, CHUNK, CHUNK)
        scores = torch.empty(size, dtype=shape.scores_dtype, device=x.device)
    parts = -(-launch.nheads // _BLOCK_H) + (launch.ngroups if scores is not None else 0)
    prepare_kernel[(launch.nchunks, parts, launch.batch)](
        dt, tensors.A, tensors.dt_bias, cum, cumj, B, tensors.C, scores,
        launch.seqlen, launch.nchunks, launch.nheads, *launch.dt_limit, launch.ngroups,
        *dt.stride(), *strides3(B), *strides3(tensors.C),
        Q=CHUNK, BLOCK_H=_BLOCK_H, N=launch.d_state, BLOCK_N=shape.block_n,
        HAS_BIAS=tensors.dt_bias is not None, SOFTPLUS=launch.dt_softplus,
        SCORES=scores is not None, PDL=config.pdl, num_warps=4,
    )  # fmt: skip
    return cum, cumj, scores


def run_forward(
    launch: Launch,
    tensors: Operands,
    *,
    return_final_states: bool,
    config: Config = DEFAULT,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return out, the final states if wanted, and what enters each segment.

    The same as the portable `triton_ssd.run_forward`; `launch` comes from `plan_hopper`.
    """
    x, z, B, C = (
        None if t is None else fetchable(t) for t in (tensors.x, tensors.z, tensors.B, tensors.C)
    )
    assert x is not None
    assert B is not None
    tensors = replace(tensors, x=x, z=z, B=B, C=C)
    shape = ring(launch.d_state, x.dtype, z is not None, config)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    states = (launch.batch, launch.nheads, launch.headdim, launch.d_state)
    final = None
    if return_final_states:
        final = torch.empty(states, dtype=torch.float32, device=x.device)
    heads_per_group = launch.heads_per_group
    per_group = pairs(heads_per_group, launch.headdim)
    npairs = per_group * launch.ngroups
    sizes = (launch.nchunks, launch.segment_chunks, launch.nsegments, launch.nheads, per_group)
    options: dict[str, Any] = {
        "PDL": config.pdl, "P": launch.headdim, "N": launch.d_state, "BLOCK_N": shape.block_n,
        "num_warps": 4, "launch_pdl": config.pdl,
    }  # fmt: skip
    with on_device(x):
        cum, cumj, scores = run_prepare(launch, tensors, shape, config)
        x_desc = tiles_of(x, CHANNELS)
        B_desc = tiles_of(B, shape.block_n)
        cum_desc, cumj_desc = rows_of(cum, CHUNK, 1), rows_of(cumj, CHUNK, 1)
        entries = tensors.initial_states
        if launch.nsegments > 1:
            slots = (launch.batch, launch.nheads, launch.nsegments)
            entries = torch.empty((*slots, *states[2:]), dtype=torch.float32, device=x.device)
            decay = torch.empty(slots, dtype=torch.float32, device=x.device)
            state_kernel[(launch.nsegments - 1, npairs, launch.batch)](
                x_desc, B_desc, cum_desc, cumj_desc, entries, decay, *sizes, heads_per_group,
                STAGES=shape.state_stages, REGISTERS=config.state_registers, **options,
            )  # fmt: skip
            size = launch.headdim * launch.d_state
            grid = (-(-size // _PREFIX_BLOCK), launch.batch * launch.nheads)
            prefix_kernel[grid](
                entries, decay, tensors.initial_states, launch.nsegments,
                SIZE=size, BLOCK=_PREFIX_BLOCK, HAS_START=tensors.initial_states is not None,
                PDL=config.pdl, num_warps=2, launch_pdl=config.pdl,
            )  # fmt: skip
        D = tensors.D
        scan_kernel[(launch.nsegments, npairs, launch.batch)](
            tiles_of(out, CHANNELS), x_desc, None if z is None else tiles_of(z, CHANNELS),
            B_desc, tiles_of(C, shape.block_n),
            None if scores is None else rows_of(scores, CHUNK, CHUNK),
            cum_desc, cumj_desc, D, entries, final, *sizes, heads_per_group,
            STAGES=shape.stages, REGISTERS=config.registers,
            D_DIMS=0 if D is None else D.dim(), HAS_Z=z is not None,
            HAS_ENTRY=entries is not None, STORE_FINAL=final is not None,
            SCORES=scores is not None, **options,
        )  # fmt: skip
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
    config: Config = DEFAULT,
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
        config: how the launches are made.

    Returns:
        out (B, L, H, P) in x's dtype; final states (B, H, P, N) fp32 or None; what enters the
        segments, (B, H, segments, P, N) fp32, or the initial states where there is one segment.

    Raises:
        ValueError: what `supported` refuses.
    """
    launch = plan_hopper(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, config=config)
    operands = Operands.laid_out(x, dt, A, B, C, D, z, dt_bias, initial_states)
    return run_forward(launch, operands, return_final_states=return_final_states, config=config)
