"""SSD forward on Hopper: what it supports, how it is divided, and its launches.

Where no backward follows and the blocks of all segments, which look back at earlier ones, have a
place at once, short segments take one launch: a walk that makes its own sums and scores
(`hopper_walk_alone`), or of the shortest sequences, and of few heads to a group, `hopper_fused`.
Two, prepare_kernel and a walk (`hopper_walk`), serve longer segments, and time that is one segment,
with a backward or without. Others are up to four:

    prepare_kernel  cum, cumj, and B C^T once per group (scores)
    state_kernel    each segment's own contribution to the state    (more than one segment only)
    prefix_kernel   what enters each segment                        (more than one segment only)
    scan_kernel     the outputs

It leaves what the portable forward leaves (`triton_ssd.run_forward`): the output, the final states
and the fp32 states that enter the segments, so that the portable backward continues from it. Where
nothing is kept for a backward, these states are in bf16 if x is, two segments need no
prefix_kernel, and a long sequence is a row of shorter ones, each starting from the state that the
one before left.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mambench.kernels.prepared import Recording, on_device
from mambench.kernels.ssd.hopper_config import (
    CHANNELS,
    CHUNK,
    LONGEST_WALK,
    MOST_COMBINED,
    MOST_SEGMENTS,
    WITHIN_CHUNKS,
    chunks_per_segment,
    look_back_chunks,
    may_look_back,
    one_launch,
    pairs,
    refusal,
    walks_alone,
)
from mambench.kernels.ssd.hopper_fused import run_fused
from mambench.kernels.ssd.hopper_kernel import scan_kernel, state_kernel
from mambench.kernels.ssd.hopper_launch import fetchable, rows_of, tiles_of
from mambench.kernels.ssd.hopper_parts import prefix_kernel, prepare_kernel
from mambench.kernels.ssd.hopper_walk import run_walk
from mambench.kernels.ssd.triton_launch import (
    Launch,
    Operands,
    multiprocessors,
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
    combined: up to how many segments the scan adds up what enters them; with more a launch does.
    narrow: keep the states of more segments in bf16 where x is and no backward follows.
    walk: most chunks of a segment where no backward follows; more are done in parts of the
        sequence; None: any number. Blocks that read the same B and C drift apart on long walks.
    fused: one launch that looks back at earlier segments.
    look_back: after the first launch one walk. There is one segment; or no backward follows, and
        the blocks of all segments, which look back at earlier ones, have a place at once.
    stages: most stages of the scan's ring; fewer where shared memory is short.
    registers: per thread of a consumer of the scan.
    fused_registers: per thread of a consumer and of the helper of the one launch.
    walk_registers: per thread of a consumer of the walk that looks back.
    alone: have the walk that looks back make its own sums and scores, so that it is the only
        launch, where several segments are short.
    """

    scores: bool = True
    scores_fp32: bool = False
    pdl: bool = True
    segments: int | None = None
    combined: int = MOST_COMBINED
    narrow: bool = True
    walk: int | None = LONGEST_WALK
    fused: bool = False
    look_back: bool = False
    stages: int = 4
    state_stages: int = 5
    registers: int = 232
    state_registers: int = 200
    fused_registers: tuple[int, int] = (208, 72)
    walk_registers: int = 240
    alone: bool = False


DEFAULT = Config()
_WITHOUT_PDL = Config(pdl=False)
_WALKS_WITHOUT_PDL = Config(pdl=False, look_back=True)
_FUSED = Config(fused=True)
_LOOKS_BACK = Config(look_back=True)
_ALONE = Config(look_back=True, alone=True)
_PDL_TOKEN_HEADS = 1 << 17


def choose(plan: Launch, *, keep: bool = True) -> Config:
    """Return the configuration for a problem: one launch, a walk that looks back, or PDL.

    A backward takes up the four launches' division of time, which it was tuned with.
    On an H100 PDL costs 5 to 10 % up to 2048 tokens of 32 heads where nothing is looked back at,
    and gains up to 5 % from 8192 on.
    """
    if not keep and plan.nsegments <= MOST_SEGMENTS and one_launch(**_sizes(plan)):
        return _FUSED
    if not keep and plan.nsegments > 1:
        return _ALONE if walks_alone(**_sizes(plan)) else _LOOKS_BACK
    whole = plan.nsegments == 1
    if plan.batch * plan.seqlen * plan.nheads < _PDL_TOKEN_HEADS:
        return _WALKS_WITHOUT_PDL if whole else _WITHOUT_PDL
    return _LOOKS_BACK if whole else DEFAULT


def _sizes(plan: Launch) -> dict[str, int]:
    return {
        "batch": plan.batch, "seqlen": plan.seqlen, "nheads": plan.nheads,
        "headdim": plan.headdim, "ngroups": plan.ngroups, "d_state": plan.d_state,
    }  # fmt: skip


def supported(*, headdim: int, d_state: int, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot serve a problem, or None; lengths, heads and groups are free.

    That the device has compute capability 9.0 is the caller's to check.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype {dtype}: the Hopper SSD takes bfloat16 and float16"
    return refusal(headdim=headdim, d_state=d_state)


def plan_hopper(
    x: Tensor, B: Tensor, *, dt_softplus: bool, dt_limit: tuple[float, float],
    config: Config | None = None, keep: bool = True,
) -> Launch:  # fmt: skip
    """Choose the division of time; the rest is the portable launch's, for its backward.

    With `keep` a backward follows. Without a config the division is that of what `choose` takes.

    Raises:
        ValueError: what `supported` refuses.
    """
    limit = (float(dt_limit[0]), float(dt_limit[1]))
    return _planned(
        x.shape, B.shape[2], B.shape[3], x.dtype, x.device, dt_softplus, limit, config, keep
    )


@lru_cache(maxsize=256)
def _planned(
    shape: torch.Size, ngroups: int, d_state: int, dtype: torch.dtype, device: torch.device,
    dt_softplus: bool, dt_limit: tuple[float, float], config: Config | None, keep: bool,
) -> Launch:  # fmt: skip
    """Plan from sizes alone; the tensors made here take no memory to speak of."""
    batch, seqlen, nheads, headdim = shape
    reason = supported(headdim=headdim, d_state=d_state, dtype=dtype)
    if reason is not None:
        raise ValueError(reason)
    nchunks = -(-seqlen // CHUNK)
    sizes = {
        "batch": batch, "seqlen": seqlen, "nheads": nheads, "headdim": headdim, "ngroups": ngroups,
    }  # fmt: skip
    short = one_launch(**sizes, d_state=d_state)
    if config is not None and config.segments is not None:
        per_segment = -(-nchunks // max(1, min(config.segments, nchunks)))
    elif config.fused if config is not None else not keep and short:
        per_segment = look_back_chunks(**sizes, multiprocessors=multiprocessors(device))
    else:
        per_segment = chunks_per_segment(**sizes, multiprocessors=multiprocessors(device))
    one = torch.empty((), dtype=dtype, device=device)
    x, B = one.expand(shape), one.expand(batch, seqlen, ngroups, d_state)
    portable = plan_launch(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, segments=1)
    return replace(
        portable,
        tiling=replace(portable.tiling, fetched=portable.tiling.whole_heads),
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
    alone_stages: int
    state_stages: int
    scores_dtype: torch.dtype | None


@lru_cache(maxsize=64)
def ring(d_state: int, dtype: torch.dtype, gated: bool, config: Config) -> Ring:
    """Return as many stages as shared memory holds, at most the config's."""
    # With 16 states the compiler waits for each of the one launch's products at once.
    block_n = max(32 if config.fused else 16, 1 << (d_state - 1).bit_length())
    itemsize = dtype.itemsize
    scores_dtype = None
    if config.scores:
        wide = config.scores_fp32 or dtype == torch.float16
        scores_dtype = torch.float32 if wide else dtype
    rows = (8 if config.fused else 4) * CHUNK * 4
    x_tiles = 2 * CHUNK * CHANNELS * itemsize
    n_tile = CHUNK * block_n * itemsize
    scores = CHUNK * CHUNK * scores_dtype.itemsize if scores_dtype else 0
    stage = x_tiles * (2 if gated else 1) + 2 * n_tile + rows + scores
    fixed = 2 * x_tiles + 256  # weights, outputs; barriers
    stages = min(config.stages, (_SHARED_BYTES - fixed) // (stage + 24))
    sums = 6 * WITHIN_CHUNKS * CHUNK * 4 + 2 * WITHIN_CHUNKS * 4
    alone_stages = min(config.stages, (_SHARED_BYTES - fixed - sums) // (stage - rows + 24))
    return Ring(
        block_n=block_n,
        stages=stages,
        alone_stages=alone_stages,
        state_stages=min(config.state_stages, _SHARED_BYTES // (x_tiles + n_tile + rows + 16)),
        scores_dtype=scores_dtype,
    )


def run_prepare(
    recording: Recording, plan: Launch, tensors: Operands, shape: Ring, config: Config
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return cum and cumj (B, H, chunks * Q) fp32, and scores (B, G, chunks, Q, Q) if wanted."""
    x, dt, A, bias = tensors.x, tensors.dt, tensors.A, tensors.dt_bias
    sums = (plan.batch, plan.nheads, plan.nchunks * CHUNK)
    cum, cumj = (recording.scratch(sums, torch.float32, x.device) for _ in range(2))
    scores = None
    if shape.scores_dtype is not None:
        size = (plan.batch, plan.ngroups, plan.nchunks, CHUNK, CHUNK)
        scores = recording.scratch(size, shape.scores_dtype, x.device)
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
    options = {"num_warps": 4, "launch_pdl": False}
    recording.launch(prepare_kernel, grid, arguments, constants, **options)
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


@dataclass(frozen=True, kw_only=True)
class Entering:
    """What the scan starts its segments from.

    states: (B, H, segments, P, N), what enters each segment; unless `first`, (B, H, segments - 1,
        P, N), what enters all but the first, or if `combine` what all but the last contribute.
    decay: of a segment, (B, H, segments) log2, if `combine`.
    start: (B, H, P, N), what enters the first segment unless `first`; None: zeros.
    """

    states: Tensor | None
    first: bool = True
    combine: bool = False
    decay: Tensor | None = None
    start: Tensor | None = None


def entering(
    recording: Recording,
    plan: Launch,
    tiles: Tiles,
    tensors: Operands,
    shape: Ring,
    config: Config,
    *,
    keep: bool,
) -> Entering:
    """Compute what enters segments from all before them; to `keep` it, in fp32 and combined."""
    start, segments = tensors.initial_states, plan.nsegments
    if segments == 1:
        return Entering(states=start)
    combine = not keep and segments <= config.combined
    wide = keep or combine or not config.narrow or tensors.x.dtype != torch.bfloat16
    device, heads = tensors.x.device, (plan.batch, plan.nheads)
    states = (*heads, segments if keep else segments - 1, plan.headdim, plan.d_state)
    allocate = recording.output if keep else recording.scratch
    slots = allocate(states, torch.float32 if wide else torch.bfloat16, device)
    decay = recording.scratch((*heads, segments), torch.float32, device)
    constants = tiles.constants | {
        "STAGES": shape.state_stages, "REGISTERS": config.state_registers, "FIRST": int(keep),
    }  # fmt: skip
    grid = (segments - 1, tiles.npairs, plan.batch)
    arguments = (tiles.x, tiles.B, tiles.cum, tiles.cumj, slots, decay, *tiles.sizes)
    on = {"launch_pdl": config.pdl}
    recording.launch(state_kernel, grid, arguments, constants, num_warps=4, **on)
    if combine:
        return Entering(states=slots, first=False, combine=True, decay=decay, start=start)
    size = plan.headdim * plan.d_state
    constants = {
        "SIZE": size, "BLOCK": _PREFIX_BLOCK, "HAS_START": start is not None, "FIRST": int(keep),
        "PDL": config.pdl,
    }  # fmt: skip
    grid = (-(-size // _PREFIX_BLOCK), plan.batch * plan.nheads, 1)
    arguments = (slots, decay, start, segments)
    recording.launch(prefix_kernel, grid, arguments, constants, num_warps=2, **on)
    return Entering(states=slots, first=keep, start=None if keep else start)


def run_forward(
    recording: Recording,
    plan: Launch,
    tensors: Operands,
    *,
    return_final_states: bool,
    keep: bool,
    config: Config | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return out, the final states if wanted and, with `keep`, what enters each segment.

    The same as the portable `triton_ssd.run_forward`; `plan` comes from `plan_hopper`, and TMA can
    read x, z, B and C (`hopper_launch.fetchable`). Without a config `choose` takes one.
    """
    config = config or choose(plan, keep=keep)
    x = tensors.x
    out = recording.output(x.shape, x.dtype, x.device)
    final = None
    states = (plan.batch, plan.nheads, plan.headdim, plan.d_state)
    if return_final_states:
        final = recording.output(states, torch.float32, x.device)
    nparts = 1
    if not keep and config.walk is not None:
        nparts = -(-plan.segment_chunks // config.walk)
    if nparts == 1:
        entries = _run_part(recording, plan, tensors, config, (out, final), keep=keep)
        return out, final, entries
    config = replace(config, narrow=False)  # or every part would add a rounding to the state
    segment_chunks = -(-plan.segment_chunks // nparts)
    length = segment_chunks * plan.nsegments * CHUNK
    carried = [recording.scratch(states, torch.float32, x.device) for _ in range(2)]
    begins = range(0, plan.seqlen, length)
    for index, begin in enumerate(begins):
        recording.spare(*carried)  # a part's first launch waits for all before it
        count = min(length, plan.seqlen - begin)
        end = final if begin == begins[-1] else carried[index % 2]
        start = tensors.initial_states if index == 0 else carried[1 - index % 2]
        part = _part_of(recording, tensors, begin, count, start)
        planned = replace(
            plan, seqlen=count, nchunks=-(-count // CHUNK), segment_chunks=segment_chunks,
            nsegments=-(-count // (segment_chunks * CHUNK)),
        )  # fmt: skip
        written = recording.part(out, begin, count)
        _run_part(recording, planned, part, config, (written, end), keep=False)
    return out, final, None


def _part_of(
    recording: Recording, tensors: Operands, begin: int, count: int, start: Tensor | None
) -> Operands:
    """Return the operands of `count` tokens from `begin`, which start from a state."""
    x, dt, B, C = (
        recording.part(t, begin, count) for t in (tensors.x, tensors.dt, tensors.B, tensors.C)
    )
    z = None if tensors.z is None else recording.part(tensors.z, begin, count)
    return replace(tensors, x=x, dt=dt, B=B, C=C, z=z, initial_states=start)


def _run_part(
    recording: Recording, plan: Launch, tensors: Operands, config: Config,
    results: tuple[Tensor, Tensor | None], *, keep: bool,
) -> Tensor | None:  # fmt: skip
    """Fill the results, out and the final states if wanted; return what `keep` keeps."""
    x, z, B = tensors.x, tensors.z, tensors.B
    shape = ring(plan.d_state, x.dtype, z is not None, config)
    if config.fused and plan.nsegments <= MOST_SEGMENTS and shape.scores_dtype is not None:
        narrow = not keep and config.narrow and x.dtype == torch.bfloat16
        return run_fused(
            recording, plan, tensors, results, block_n=shape.block_n, stages=shape.stages,
            scores_dtype=shape.scores_dtype, registers=config.fused_registers,
            narrow=narrow, keep=keep,
        )  # fmt: skip
    per_group = pairs(plan.heads_per_group, plan.headdim)
    sizes = (
        plan.nchunks, plan.segment_chunks, plan.nsegments, plan.nheads, per_group,
        plan.heads_per_group,
    )  # fmt: skip
    constants = {
        "PDL": config.pdl, "P": plan.headdim, "N": plan.d_state, "BLOCK_N": shape.block_n,
    }  # fmt: skip
    walks = config.look_back and shape.scores_dtype is not None
    walks = walks and (plan.nsegments == 1 or (not keep and _all_there(plan, x)))
    alone = walks and config.alone and plan.nsegments > 1 and plan.segment_chunks <= WITHIN_CHUNKS
    prepared = None if alone else run_prepare(recording, plan, tensors, shape, config)
    if walks:
        assert shape.scores_dtype is not None
        constants |= {
            "STAGES": shape.alone_stages if alone else shape.stages,
            "REGISTERS": config.walk_registers,
        }
        run_walk(
            recording, plan, tensors, prepared, results, scores_dtype=shape.scores_dtype,
            sizes=sizes, constants=constants,
            narrow=config.narrow and x.dtype == torch.bfloat16,
        )  # fmt: skip
        return tensors.initial_states if keep else None
    assert prepared is not None
    cum, cumj, scores = prepared
    tiles = Tiles(
        x=tiles_of(x, CHANNELS),
        B=tiles_of(B, shape.block_n),
        cum=rows_of(cum, CHUNK, 1),
        cumj=rows_of(cumj, CHUNK, 1),
        npairs=per_group * plan.ngroups,
        sizes=sizes,
        constants=constants,
    )
    entries = entering(recording, plan, tiles, tensors, shape, config, keep=keep)
    _scan(recording, plan, tiles, tensors, shape, config, entries, scores, results)
    return entries.states if keep else None


def _all_there(plan: Launch, x: Tensor) -> bool:
    """Return whether blocks may look back, on the device of x."""
    return may_look_back(
        segments=plan.nsegments,
        blocks=pairs(plan.heads_per_group, plan.headdim) * plan.ngroups * plan.batch,
        headdim=plan.headdim, d_state=plan.d_state, multiprocessors=multiprocessors(x.device),
    )  # fmt: skip


def _scan(
    recording: Recording, plan: Launch, tiles: Tiles, tensors: Operands, shape: Ring,
    config: Config, entries: Entering, scores: Tensor | None,
    results: tuple[Tensor, Tensor | None],
) -> None:  # fmt: skip
    """Launch the walk that writes the outputs and the final states."""
    z, D = tensors.z, tensors.D
    out, final = results
    constants = tiles.constants | {
        "STAGES": shape.stages, "REGISTERS": config.registers,
        "D_DIMS": 0 if D is None else D.dim(), "HAS_Z": z is not None,
        "HAS_ENTRY": entries.states is not None, "FIRST": int(entries.first),
        "COMBINE": entries.combine, "STORE_FINAL": final is not None, "SCORES": scores is not None,
    }  # fmt: skip
    arguments = (
        tiles_of(out, CHANNELS), tiles.x, None if z is None else tiles_of(z, CHANNELS),
        tiles.B, tiles_of(tensors.C, shape.block_n),
        None if scores is None else rows_of(scores, CHUNK, CHUNK),
        tiles.cum, tiles.cumj, D, entries.states, entries.decay, entries.start, final,
        *tiles.sizes,
    )  # fmt: skip
    grid = (plan.nsegments, tiles.npairs, plan.batch)
    options = {"num_warps": 4, "launch_pdl": config.pdl}
    recording.launch(scan_kernel, grid, arguments, constants, **options)


def fetched(operands: Operands) -> Operands:
    """Return the tensors as TMA can read them."""
    x, z, B, C = operands.x, operands.z, operands.B, operands.C
    z = None if z is None else fetchable(z)
    return replace(operands, x=fetchable(x), z=z, B=fetchable(B), C=fetchable(C))


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
    keep: bool = True,
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
        keep: whether to return what enters the segments, for a backward.
        config: how the launches are made; None: as `choose` says.

    Returns:
        out (B, L, H, P) in x's dtype; final states (B, H, P, N) fp32 or None; what enters the
        segments, (B, H, segments, P, N) fp32, or the initial states where there is one segment;
        None unless `keep`.

    Raises:
        ValueError: what `supported` refuses.
    """
    plan = plan_hopper(x, B, dt_softplus=dt_softplus, dt_limit=dt_limit, config=config, keep=keep)
    operands = fetched(Operands.laid_out(x, dt, A, B, C, D, z, dt_bias, initial_states))
    final = return_final_states
    with on_device(x):
        return run_forward(
            Recording(None), plan, operands, return_final_states=final, keep=keep, config=config
        )
