"""The launch of the SSD forward on Hopper as one walk."""

import math

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl

from mambench.kernels.prepared import Recording
from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK, pairs
from mambench.kernels.ssd.hopper_fused_kernel import fused_kernel
from mambench.kernels.ssd.hopper_launch import tile_layout, tiles_of
from mambench.kernels.ssd.triton_launch import Launch, Operands

_GLUON = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}


def run_fused(
    recording: Recording,
    plan: Launch,
    tensors: Operands,
    results: tuple[Tensor, Tensor | None],
    *,
    block_n: int,
    stages: int,
    scores_dtype: torch.dtype,
    registers: tuple[int, int],
    narrow: bool,
    keep: bool,
) -> Tensor | None:
    """Fill the results, out and the final states if wanted; return what enters each segment.

    Args:
        recording: what launches and allocates.
        plan: of at most MOST_SEGMENTS segments.
        tensors: as TMA can read them.
        results: out, final states.
        block_n: d_state rounded up to a power of two.
        stages: of the ring.
        scores_dtype: that B C^T is rounded to.
        registers: per thread of a consumer, and of the helper.
        narrow: keep what segments contribute in bf16.
        keep: whether to return what enters them (fp32), or the initial states of one segment.
    """
    x, B, dt, D, device = tensors.x, tensors.B, tensors.dt, tensors.D, tensors.x.device
    per_group = pairs(plan.heads_per_group, plan.headdim)
    npairs = per_group * plan.ngroups
    out, final = results
    slots = decays = flags = kept = None
    if plan.nsegments > 1:
        ends = (plan.batch, npairs, 2, plan.nsegments - 1)
        dtype = torch.bfloat16 if narrow else torch.float32
        slots = recording.scratch((*ends, CHANNELS * block_n), dtype, device)
        decays = recording.scratch(ends, torch.float32, device)
        flags = recording.flags(math.prod(ends), device)
        if keep:
            states = (plan.batch, plan.nheads, plan.nsegments, plan.headdim, plan.d_state)
            kept = recording.output(states, torch.float32, device)
    constants = {
        "P": plan.headdim, "N": plan.d_state, "BLOCK_N": block_n, "STAGES": stages,
        "REGISTERS": registers[0], "HELPER_REGISTERS": registers[1],
        "SCORES": _GLUON[scores_dtype],
        "SCORES_LAYOUT": tile_layout(CHUNK, CHUNK, scores_dtype),
        "SOFTPLUS": plan.dt_softplus, "D_DIMS": 0 if D is None else D.dim(),
    }  # fmt: skip
    arguments = (
        tiles_of(out, CHANNELS), tiles_of(x, CHANNELS),
        None if tensors.z is None else tiles_of(tensors.z, CHANNELS),
        tiles_of(B, block_n), tiles_of(tensors.C, block_n),
        dt, tensors.A, tensors.dt_bias, D, tensors.initial_states, slots, decays, flags, kept,
        final, plan.seqlen, *plan.dt_limit, *dt.stride(), plan.nchunks, plan.segment_chunks,
        plan.nsegments, plan.nheads, per_group, plan.heads_per_group,
    )  # fmt: skip
    grid = (npairs, plan.batch, plan.nsegments)
    recording.launch(fused_kernel, grid, arguments, constants, num_warps=4)
    if not keep:
        return None
    return tensors.initial_states if kept is None else kept
