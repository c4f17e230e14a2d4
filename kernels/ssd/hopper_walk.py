"""The launch of the SSD forward's walk on Hopper, which looks back where segments are several."""

import math
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.prepared import Recording
from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK
from mambench.kernels.ssd.hopper_launch import rows_of, tiles_of
from mambench.kernels.ssd.hopper_walk_kernel import walk_kernel
from mambench.kernels.ssd.triton_launch import Launch, Operands


def run_walk(
    recording: Recording,
    plan: Launch,
    tensors: Operands,
    prepared: tuple[Tensor, Tensor, Tensor] | None,
    results: tuple[Tensor, Tensor | None],
    *,
    scores_dtype: torch.dtype,
    sizes: tuple[int, ...],
    constants: dict[str, Any],
    narrow: bool,
) -> None:
    """Fill the results: out, and the final states if wanted.

    Args:
        recording: what launches and allocates.
        plan: of up to MOST_SEGMENTS segments.
        tensors: as TMA can read them.
        prepared: cum and cumj (B, H, chunks * Q), and scores; None: the walk makes them itself.
        results: out, final states.
        scores_dtype: of the scores.
        sizes: of time and heads, as the kernel takes them.
        constants: PDL, P, N, BLOCK_N, STAGES and REGISTERS.
        narrow: keep what segments contribute in bf16.
    """
    out, final = results
    block_n, pdl, device = constants["BLOCK_N"], constants["PDL"], out.device
    npairs = sizes[4] * plan.ngroups
    ends = (plan.batch, npairs, 2, plan.nsegments - 1)
    dtype = torch.bfloat16 if narrow else torch.float32
    slots = decays = flags = None
    if plan.nsegments > 1:
        slots = recording.scratch((*ends, CHANNELS * block_n), dtype, device)
        decays = recording.scratch(ends, torch.float32, device)
    scores_counts = 0 if prepared else plan.batch * plan.ngroups * plan.nsegments
    if math.prod(ends) + scores_counts > 0:
        flags = recording.flags(math.prod(ends) + scores_counts, device)
    D, z = tensors.D, tensors.z
    if prepared is None:
        tiles = (plan.batch, plan.ngroups, plan.nchunks, CHUNK, CHUNK)
        scores = recording.scratch(tiles, scores_dtype, device)
        rows = (None, None)
        made = (tensors.dt, tensors.A, tensors.dt_bias, scores, tensors.x)
        strides, extra = (*tensors.dt.stride(), *tensors.x.stride()[:3]), 1
    else:
        cum, cumj, scores = prepared
        rows = (rows_of(cum, CHUNK, 1), rows_of(cumj, CHUNK, 1))
        made = (None,) * 5
        strides, extra = (0,) * 6, 0
    arguments = (
        tiles_of(out, CHANNELS), tiles_of(tensors.x, CHANNELS),
        None if z is None else tiles_of(z, CHANNELS),
        tiles_of(tensors.B, block_n), tiles_of(tensors.C, block_n),
        rows_of(scores, CHUNK, CHUNK), *rows,
        D, tensors.initial_states, slots, decays, flags, final,
        *made, plan.seqlen, *plan.dt_limit, *strides, *sizes,
    )  # fmt: skip
    constants = constants | {
        "D_DIMS": 0 if D is None else D.dim(), "SOFTPLUS": plan.dt_softplus,
    }  # fmt: skip
    grid = (npairs, plan.batch, plan.nsegments + extra)
    recording.launch(walk_kernel, grid, arguments, constants, num_warps=4, launch_pdl=pdl)
