"""The launches of the SSD backward in Gluon, on Hopper, where there is no gate.

    states_kernel           what enters every chunk
    grad_c_fetched_kernel   what these states contribute to grad_C, and v
    exits_kernel, prefix    what leaves each segment, backwards     (several segments only)
    states_kernel           what leaves every chunk, in their place, and <G, S>
    grad_kernel             grad_x, grad_B, grad_C, and what grad_dt is summed from

in the place of launches of `triton_ssd_backward` and `triton_whole`, and with their results. Each
starts while the one before ends (PDL), and waits for its results before it reads or writes any.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.integers import next_power_of_2
from mambench.kernels.prepared import Recording
from mambench.kernels.ssd.hopper_config import CHANNELS, CHUNK, pairs
from mambench.kernels.ssd.hopper_exits_kernel import exits_kernel
from mambench.kernels.ssd.hopper_grad_c_kernel import grad_c_fetched_kernel
from mambench.kernels.ssd.hopper_grad_kernel import grad_kernel
from mambench.kernels.ssd.hopper_launch import blocks_of, readable, rows_of, tiles_of
from mambench.kernels.ssd.hopper_states_kernel import states_kernel
from mambench.kernels.ssd.triton_config import heads_per_program
from mambench.kernels.ssd.triton_launch import Launch, Operands, multiprocessors, run_prefix

# Stages of the rings, and registers per thread of the groups of warps that work on them.
_STATES = {"STAGES": 3, "REGISTERS": 232}
_EXITS = {"STAGES": 6, "REGISTERS": 200}
_GRAD_C = {"STAGES": 3}
_GRAD = {"STAGES": 4, "REGISTERS": 160, "GATHER_REGISTERS": 168}
_GRAD_C_RESIDENT = 2  # blocks on a multiprocessor
_GRAD_C_MOST_REGISTERS = 128
_PDL = {"PDL": True}
_LAUNCH = {"launch_pdl": True, "num_warps": 4}


def fits(launch: Launch, operands: Operands, dout: Tensor, seq: Tensor | None) -> bool:
    """Whether the kernels can serve a call: one sequence a row, and TMA can read the tensors."""
    tensors = (operands.x, operands.B, operands.C, dout)
    sizes = launch.headdim % 8 == 0 and launch.d_state % 8 == 0 and launch.chunk == CHUNK
    small = launch.headdim <= CHANNELS and launch.tiling.block_n <= 128
    return seq is None and operands.z is None and sizes and small and all(map(readable, tensors))


@dataclass(frozen=True, kw_only=True)
class Division:
    """Blocks of heads of a group."""

    block_heads: int
    blocks: int

    @classmethod
    def of(
        cls, launch: Launch, device: Any, *, resident: int = 1, most: int | None = None
    ) -> "Division":
        """Divide the heads, where so many blocks are resident on a multiprocessor, at most so."""
        programs = launch.batch * launch.nchunks * launch.ngroups
        heads = launch.heads_per_group
        block_heads = heads_per_program(heads, programs, resident * multiprocessors(device))
        if most is not None:
            block_heads = max(block_heads, -(-heads // most))
        return cls(block_heads=block_heads, blocks=-(-heads // block_heads))


def run_states(
    recording: Recording,
    launch: Launch,
    v: Tensor,
    m: Tensor,
    times: Any,
    entries: Tensor | None,
    states: Tensor,
    *,
    end: Tensor | None = None,
    passed: Tensor | None = None,
) -> None:
    """Fill states (B, H, chunks, P, N) as `triton_ssd_backward.run_states` does.

    Along time v is x and m is B; with `passed` (B, H, chunks), against it, grad_y and C.
    """
    per_group = pairs(launch.heads_per_group, launch.headdim)
    block_n = max(16, next_power_of_2(launch.d_state))
    arguments = (
        tiles_of(v, CHANNELS), tiles_of(m, block_n), blocks_of(states, CHANNELS, block_n),
        rows_of(times.cum, CHUNK, 1), rows_of(times.cumj, CHUNK, 1), entries, end, passed,
        launch.nchunks, launch.segment_chunks, launch.nsegments, launch.nheads, per_group,
        launch.heads_per_group,
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "BLOCK_N": block_n,
        "REVERSE": passed is not None, **_STATES, **_PDL,
    }  # fmt: skip
    grid = (launch.nsegments, per_group * launch.ngroups, launch.batch)
    recording.launch(states_kernel, grid, arguments, constants, **_LAUNCH)


def run_exits(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    dout: Tensor,
    times: Any,
    dfinal: Tensor | None,
) -> Tensor | None:
    """Return the gradient of what leaves each segment, (B, H, segments, P, N) fp32.

    dfinal is that of the final states, and all there is of one segment; None stands for zeros.
    """
    if launch.nsegments == 1:
        return dfinal
    outer = (launch.batch, launch.nheads, launch.nsegments)
    shape = (*outer, launch.headdim, launch.d_state)
    exits = recording.scratch(shape, torch.float32, dout.device)
    decay = recording.scratch(outer, torch.float32, dout.device)
    per_group = pairs(launch.heads_per_group, launch.headdim)
    block_n = max(16, next_power_of_2(launch.d_state))
    arguments = (
        tiles_of(dout, CHANNELS), tiles_of(operands.C, block_n), rows_of(times.cum, CHUNK, 1),
        exits, decay, launch.nchunks, launch.segment_chunks, launch.nsegments, launch.nheads,
        per_group, launch.heads_per_group,
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "BLOCK_N": block_n, **_EXITS, **_PDL
    }  # fmt: skip
    grid = (launch.nsegments - 1, per_group * launch.ngroups, launch.batch)
    recording.launch(exits_kernel, grid, arguments, constants, **_LAUNCH)
    run_prefix(recording, launch, exits, decay, dfinal, reverse=True)
    return exits


def run_grad_c(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    dout: Tensor,
    times: Any,
    states: Tensor,
) -> Tensor:
    """Launch the kernel that needs the states; returns grad_C's part, (blocks, B, L, G, N) fp32.

    Fills times.v. states (B, H, chunks, P, N) are those that enter the chunks.
    """
    C = operands.C
    division = Division.of(launch, C.device, resident=_GRAD_C_RESIDENT)
    block_n = max(16, next_power_of_2(launch.d_state))
    partial_C = recording.scratch((division.blocks, *C.shape), torch.float32, C.device)
    grid = (launch.nchunks, launch.ngroups * division.blocks, launch.batch)
    arguments = (
        tiles_of(dout, CHANNELS), blocks_of(states, CHANNELS, block_n), tiles_of(C, block_n),
        rows_of(times.cum, CHUNK, 1), times.v, partial_C,
        launch.seqlen, launch.nchunks, launch.nheads, launch.heads_per_group,
        division.block_heads, launch.ngroups,
    )  # fmt: skip
    constants = {"N": launch.d_state, "BLOCK_N": block_n, **_GRAD_C, **_PDL}
    options = {"maxnreg": _GRAD_C_MOST_REGISTERS, **_LAUNCH}
    recording.launch(grad_c_fetched_kernel, grid, arguments, constants, **options)
    return partial_C


def run_grad(
    recording: Recording,
    launch: Launch,
    operands: Operands,
    division: Division,
    dout: Tensor,
    times: Any,
    grad_states: Tensor,
    partial_C: Tensor,
    written: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Launch the kernel.

    Args:
        recording: of the call.
        launch: as `fits` takes it.
        operands: the operation's.
        division: of the heads.
        dout: gradient of the output.
        times: cum, dt and v of every token; v is added to.
        grad_states: (B, H, chunks, P, N), of the states that leave the chunks.
        partial_C: (blocks before, B, L, G, N) fp32; of several blocks each leaves its part of
            grad_C in the first slot of its share.
        written: grad_x; grad_B, in parts if of several blocks; grad_C; read and kept; x . grad_y;
            parts of grad_D (B * chunks, H, P), or None.
    """
    x, B, C, D = operands.x, operands.B, operands.C, operands.D
    grad_x, grad_B, grad_C, read_kept, diag, partial_D = written
    block_n = max(16, next_power_of_2(launch.d_state))
    arguments = (
        tiles_of(grad_x, CHANNELS), tiles_of(x, CHANNELS), tiles_of(dout, CHANNELS),
        blocks_of(grad_states, CHANNELS, block_n), tiles_of(B, block_n), tiles_of(C, block_n),
        rows_of(times.cum, CHUNK, 1), rows_of(times.dt, CHUNK, 1), rows_of(times.v, CHUNK, 1),
        D, times.v, read_kept, diag, partial_D, partial_C, grad_B, grad_C,
        launch.seqlen, launch.nchunks, launch.nheads, launch.heads_per_group,
        division.block_heads, launch.ngroups, partial_C.shape[0],
    )  # fmt: skip
    constants = {
        "P": launch.headdim, "N": launch.d_state, "BLOCK_N": block_n,
        "D_DIMS": 0 if D is None else D.dim(), **_GRAD, **_PDL,
    }  # fmt: skip
    grid = (launch.nchunks, launch.ngroups * division.blocks, launch.batch)
    recording.launch(grad_kernel, grid, arguments, constants, **_LAUNCH)
